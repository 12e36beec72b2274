"""Pairs from text to loss: packed whole, scored once, and the loss is its definition."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from conftest import call, packed
from tiny_aya_jax import axes, run
from tiny_aya_jax.data import loader, text, tokenizer as tokenizers
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.model import preference
from tiny_aya_jax.model.transformer import TinyAya, logits
from tiny_aya_jax.train import checkpoint, saved

LENGTHS = ((4, 5, 3, 4), (6, 7), (3, 3, 4, 4), (9, 8), (5, 4, 4, 3), (2, 3), (7, 6), (3, 4, 5, 6))
J, T = 2, 20
MESSAGES = [dict(role="user", content="why")]


@pytest.fixture(scope="module")
def pairs(cfg):
  """Rows of one or two pairs, each of two documents; the first two tokens are the prompt."""
  random = np.random.default_rng(0)
  segment_BT, position_BT = packed(LENGTHS, T)
  token_BT, target_BT = random.integers(0, cfg.V, (2, len(LENGTHS), T), dtype=np.int32)
  inside_BT = segment_BT > 0
  return dict(
      token_BT=token_BT, target_BT=target_BT, segment_BT=segment_BT, position_BT=position_BT,
      weight_BT=(inside_BT & (position_BT > 0)).astype(np.float32),
      pair_BT=np.where(inside_BT, (segment_BT + 1) // 2, 0).astype(np.int32),
      side_BT=np.where(inside_BT, 2 - segment_BT % 2, 0).astype(np.int32),
      reference_BJC=random.normal(-10, 3, (len(LENGTHS), J, 2)).astype(np.float32),
  )


def by_hand(params, batch, cfg, kind, beta, length_normalised):
  """The definition, pair after pair, over all logits."""
  model = TinyAya(cfg)
  hidden_BTD = model.apply({"params": params}, *(batch[n] for n in ("token_BT", "segment_BT", "position_BT")))
  share_BTV = jax.nn.log_softmax(logits(params, hidden_BTD, cfg))
  log_p_BT = jnp.take_along_axis(share_BTV, batch["target_BT"][..., None], -1)[..., 0]
  total = 0.0
  for row, lengths in enumerate(LENGTHS[: len(log_p_BT)]):
    for pair in range(len(lengths) // 2):
      ratios = []
      for side in range(2):
        own_T = (batch["segment_BT"][row] == 2 * pair + side + 1) * batch["weight_BT"][row]
        ratio = (own_T * log_p_BT[row]).sum() - batch["reference_BJC"][row, pair, side]
        ratios.append(ratio / own_T.sum() if length_normalised else ratio)
      margin = ratios[0] - ratios[1]
      total += -jax.nn.log_sigmoid(beta * margin) if kind == "dpo" else (margin - 0.5 / beta) ** 2
  return total


def ours(params, batch, cfg, **settings):
  hidden_BTD = preference.hidden(params, batch, TinyAya(cfg))
  return preference.preference(hidden_BTD, params["embedding_VD"], batch,
                               logit_scale=cfg.logit_scale, chunk=8, **settings)


@pytest.mark.parametrize("kind, length_normalised", [("dpo", False), ("ipo", True)])
def test_the_loss_and_every_gradient_are_the_definitions(cfg, params, pairs, kind, length_normalised):
  settings = dict(kind=kind, beta=0.3, length_normalised=length_normalised)
  pairs = {name: rows[:3] for name, rows in pairs.items()}
  expected = jax.jit(jax.value_and_grad(
      lambda params: by_hand(params, pairs, cfg, **settings)))(params)
  found = jax.jit(jax.value_and_grad(lambda params: ours(params, pairs, cfg, **settings)[0]))(params)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  for x, y in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1])):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max())


def test_a_mesh_changes_nothing_and_at_the_reference_the_loss_is_log_2(cfg, params, pairs):
  model, settings = TinyAya(cfg), dict(kind="dpo", beta=0.1, length_normalised=False)
  reference_BJC = preference.references(params, pairs, model=model, J=J, chunk=8)
  batch = pairs | dict(reference_BJC=np.array(reference_BJC))
  _, count, told = ours(params, batch, cfg, **settings)
  assert float(count) == sum(len(lengths) // 2 for lengths in LENGTHS)
  real = np.array(told["pairs"], bool)
  np.testing.assert_allclose(np.array(told["loss"])[real], np.log(2), rtol=1e-5)
  assert not np.array(told["loss"])[~real].any()
  mesh = axes.mesh(data=1, fsdp=2, tensor=2, context=2)

  def loss(params, batch):
    return ours(params, batch, cfg, **settings)[0]

  expected, expected_gradient = jax.jit(jax.value_and_grad(loss))(params, pairs)
  with jax.set_mesh(mesh):
    spread = jax.device_put(params, axes.shardings(mesh, params))
    placed = axes.place(mesh, pairs)
    total, gradient = jax.jit(jax.value_and_grad(loss))(spread, placed)
    elsewhere = jax.jit(functools.partial(
        preference.references, model=model, J=J, chunk=8))(spread, placed)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient)):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max())
  np.testing.assert_allclose(elsewhere, reference_BJC, rtol=1e-5)


@pytest.fixture(scope="module")
def stage(data, tmp_path_factory):
  """Packed pairs of two languages, one pair of them with equal sides and one far too long."""
  folder = tmp_path_factory.mktemp("pairs")
  rows = [dict(lang=code, prompt=f"{word}?", chosen=f"{word} {word}.", rejected=word, other=1)
          for code, words in (("deu_Latn", "eins zwei drei vier"), ("wol_Latn", "benn ñaar ñett"))
          for word in words.split()]
  rows += [dict(lang="deu_Latn", messages=MESSAGES, chosen="ja", rejected="ja"),
           dict(lang="deu_Latn", messages=MESSAGES, chosen="ja", rejected="nein " * 99)]
  (folder / "text").mkdir()
  (folder / "text" / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert pack(folder, data) == 0
  return folder


def pack(folder, data, *more):
  return call("pack", "pack.py", folder, f"--config.text={folder / 'text'}", "--config.T=64",
              "--config.stage=pairs", f"--config.tokenizer={data / 'tokenizer.model'}",
              "--config.packing=best_fit", "--config.pairs=2", *more)


def score(folder, data, place, *more):
  return call("score", "score.py:tiny", folder, f"--config.checkpoint={place}",
              f"--config.rows={folder / 'pairs'}", f"--config.tokenizer={data / 'tokenizer.model'}",
              "--config.batch=8", *more)


def test_both_sides_of_a_pair_lie_in_one_row_and_only_answers_have_weight(stage, data):
  tokenizer = tokenizers.load(data / "tokenizer.model")
  german, wolof = loader.read_manifests(stage / "pairs")
  assert german["dropped"] == {"longer than T+1": 1, "equal sides": 1}
  assert (german["documents"], wolof["documents"], german["pairs"]) == (4, 3, 2)
  assert german["fields"] == loader.PAIRS
  said = []
  for row in next(loader.every_row_once([german], 4))["pair_BT"]:
    assert set(row) <= {0, 1, 2}
  for batch in loader.every_row_once([german], 1):
    pair_T, side_T, weight_T, target_T = (
        batch[name][0] for name in ("pair_BT", "side_BT", "weight_BT", "target_BT"))
    assert not weight_T[pair_T == 0].any()
    for pair in range(1, pair_T.max() + 1):
      said.append(tuple(tokenizer.decode(target_T[(pair_T == pair) & (side_T == side) & (weight_T > 0)])
                        for side in (1, 2)))
      segments = {tuple(batch["segment_BT"][0][(pair_T == pair) & (side_T == side) & (weight_T > 0)])
                  for side in (1, 2)}
      assert len(segments) == 2 and not set.intersection(*map(set, segments))
  assert sorted(said) == [(f"{word} {word}.", word) for word in ("drei", "eins", "vier", "zwei")]


def test_score_writes_the_references_once_and_train_refuses_what_is_not_scored(
    stage, data, place, capsys, tmp_path):
  assert score(stage, data, place) == 0
  scored = loader.read_manifests(stage / "scored")
  assert all(manifest["fields"] == loader.SCORED for manifest in scored)
  for before, after in zip(loader.read_manifests(stage / "pairs"), scored):
    old, new = (next(loader.every_row_once([manifest], 8)) for manifest in (before, after))
    assert all(np.array_equal(old[name], new[name]) for name in old)
    held_BJ = (new["weight_BT"][:, None] * (new["pair_BT"][:, None] == np.array([[1], [2]]))).any(-1)
    assert (new["reference_BJC"][held_BJ] < -1).all() and not new["reference_BJC"][~held_BJ].any()
  capsys.readouterr()
  assert score(stage, data, place) == 0 and "up to date" in capsys.readouterr().out
  assert score(stage, data, place, "--config.dtype=bfloat16") == 65
  assert "made from other inputs" in capsys.readouterr().err

  def train(*more):
    return call("train", "preference.py:tiny", tmp_path, f"--config.init_from={place}",
                f"--config.tokenizer={data / 'tokenizer.model'}", "--config.data.T=64", *more)

  assert train(f"--config.data.rows={stage / 'pairs'}", "--config.loss.pairs=2") == 65
  assert "score" in capsys.readouterr().err
  assert train(f"--config.data.rows={stage / 'scored'}") == 65
  assert "at most 2 pairs a row, config.loss.pairs is 16" in capsys.readouterr().err
  assert train(f"--config.data.rows={data / 'rows/train'}", "--config.loss.pairs=2") == 65
  assert "token, segment, weight, expected" in capsys.readouterr().err
  wanted = [f"--config.data.rows={stage / 'scored'}", "--config.loss.pairs=2", "--config.show=1"]
  assert train(*wanted) == 65  # it would be trained by another size
  assert "is another model" in capsys.readouterr().err
  sizes = [f"--config.model.{name}={value}" for name, value in saved.meta(place)["model"].items()]
  assert train(*wanted, *sizes) == 0 and "_Latn/few, 2 segments" in capsys.readouterr().out
  assert train(*wanted, *sizes, "--config.dtype=bfloat16") == 65
  assert "scored with another dtype float32 (here bfloat16)" in capsys.readouterr().err
  manifest = stage / "scored" / "wol_Latn" / "few" / "manifest.json"
  found = run.read_json(manifest, "manifest")
  run.write_json(manifest, found | dict(reference=found["reference"] | dict(params="0123456789abcdef")))
  assert train(*wanted, *sizes) == 65
  assert "another params 0123456789ab (here" in capsys.readouterr().err
  assert train(*wanted, *sizes, "--config.loss.z_loss=0.1") == 65
  assert "dpo has none" in capsys.readouterr().err
  hidden = stage / "scored" / "deu_Latn" / ".few.tmp"
  hidden.mkdir()  # as a killed score leaves it
  assert train(f"--config.data.rows={stage / 'scored'}", "--config.loss.pairs=2") == 65
  assert "not whole" in capsys.readouterr().err
  hidden.rmdir()


def test_a_hugging_face_folder_scores_as_its_checkpoint_and_only_it_may_be_tuned(
    stage, data, place, capsys, tmp_path):
  params, meta = checkpoint.restore_params(place)
  cfg, tokenizer = ml_collections.ConfigDict(meta["model"]), tokenizers.load(data / "tokenizer.model")
  huggingface.write(tmp_path / "one", params, cfg, tokenizer)
  huggingface.write(tmp_path / "other", jax.tree.map(lambda x: x * 1.001, params), cfg, tokenizer)
  assert score(stage, data, place, "--config.stage=of_checkpoint") == 0
  assert score(stage, data, tmp_path / "one", "--config.stage=of_folder") == 0
  for mine, theirs in zip(*(loader.read_manifests(stage / name) for name in ("of_folder", "of_checkpoint"))):
    rows = [next(loader.every_row_once([one], 8))["reference_BJC"] for one in (mine, theirs)]
    np.testing.assert_array_equal(*rows)
    assert mine["reference"]["params"] != theirs["reference"]["params"]

  def train(name):
    sizes = [f"--config.model.{letter}={value}" for letter, value in meta["model"].items()]
    return call("train", "preference.py:tiny", tmp_path / "run", f"--config.init_from={tmp_path / name}",
                f"--config.tokenizer={data / 'tokenizer.model'}", "--config.data.T=64", "--config.loss.pairs=2",
                f"--config.data.rows={stage / 'of_folder'}", "--config.show=1", *sizes)

  assert train("one") == 0
  capsys.readouterr()
  assert train("other") == 65 and "was scored with another params" in capsys.readouterr().err
  small = tmp_path / "small"
  small.mkdir()
  for name in ("config.json", "tokenizer.json", "model.safetensors"):
    (small / name).write_bytes((tmp_path / "one" / name).read_bytes())
  run.write_json(small / "config.json", run.read_json(small / "config.json", "") | dict(vocab_size=599))
  assert score(stage, data, small, "--config.stage=small") == 65
  assert "has 600 ids, the embedding only" in capsys.readouterr().err


@pytest.mark.parametrize("record, words", [
    (dict(prompt=MESSAGES, chosen=[dict(role="assistant", content="a")], rejected="b"), None),
    (dict(messages=MESSAGES, chosen="a", rejected=" "), "'rejected' says nothing"),
    (dict(messages=MESSAGES, chosen="a", rejected=[dict(role="user", content="b")]), "one answer"),
    (dict(messages=[*MESSAGES, dict(role="assistant", content="b")], chosen="a", rejected="b"),
     "ends with assistant, expected user"),
    (dict(messages=[*MESSAGES, dict(role="assistant", content=" ")]), "message 2 says nothing"),
    (dict(messages=[*MESSAGES, *MESSAGES]), "user and assistant in turn"),
])
def test_a_pair_is_read_or_refused_with_its_place(tmp_path, record, words):
  (tmp_path / "deu_Latn.jsonl").write_text(json.dumps(record) + "\n")
  if words is None:
    assert list(text.read(tmp_path, "deu_Latn", "text")) == [
        dict(messages=MESSAGES, chosen="a", rejected="b")]
  else:
    with pytest.raises(run.Refused, match=f"deu_Latn.jsonl, line 1.*{words}"):
      list(text.read(tmp_path, "deu_Latn", "text"))


def test_pairs_and_conversations_do_not_mix(stage, data, capsys):
  assert pack(stage, data, "--config.pairs=0", "--config.stage=other") == 65
  assert "packed with --config.pairs" in capsys.readouterr().err
  assert pack(stage, data, "--config.packing=split", "--config.stage=other") == 65
  assert "best_fit" in capsys.readouterr().err
