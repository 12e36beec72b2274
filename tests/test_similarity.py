"""Similarity of two checkpoints: against NumPy, and what may not change it."""

import json

import jax
import ml_collections
import numpy as np
import pytest

from conftest import B, DOCUMENTS, T, call, packed, random_params

from tiny_aya_jax import axes, run
from tiny_aya_jax.data import loader
from tiny_aya_jax.evaluate import outputs
from tiny_aya_jax.export import cohere2
from tiny_aya_jax.model import transformer
from tiny_aya_jax.model.transformer import BLOCKS, Block, TinyAya
from tiny_aya_jax.post import similarity
from tiny_aya_jax.train import checkpoint, saved

CODES = ["deu_Latn", "hin_Deva", "yor_Latn"]


@pytest.fixture(scope="module")
def pair(params, cfg):
  """Two models that are neither near nor far."""
  noise = random_params(cfg, seed=1)
  return params, jax.tree.map(lambda x, y: x + 0.3 * y, params, noise)


@pytest.fixture(scope="module")
def rows(batch):
  """The packed rows with their languages; the last is no one's."""
  return batch | dict(source_B=np.array([0, 1, 2, 0, 1, 2, 0, -1], np.int32))


def one_device():
  return axes.mesh(data=1, fsdp=1, devices=jax.devices()[:1])


def functional(cfg, pair, batches, mesh=None):
  return similarity.functional(TinyAya(cfg), pair, batches, mesh or one_device(), CODES, chunk=7)


@pytest.fixture(scope="module")
def found(cfg, pair, rows):
  return functional(cfg, pair, [rows])


@pytest.fixture(scope="module")
def logits(cfg, rows):
  """params -> logits_BTV of the rows."""
  return forward(cfg, rows)


def forward(cfg, rows):
  """A function of params that returns the logits_BTV of rows, by the model as it is trained."""
  @jax.jit
  def apply(params):
    hidden_BTD = TinyAya(cfg).apply(
        {"params": params}, rows["token_BT"], rows["segment_BT"], rows["position_BT"])
    return transformer.logits(params, hidden_BTD, cfg)

  return apply


def brute_force(logits, pair):
  """(KL(a || b), KL(b || a), agreement), [B, T] each: whole logits, fp64."""
  logs = []
  for params in pair:
    logits_BTV = np.asarray(logits(params), np.float64)
    logs.append(logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True)))
  a, b = logs
  return ((np.exp(a) * (a - b)).sum(-1), (np.exp(b) * (b - a)).sum(-1), a.argmax(-1) == b.argmax(-1))


def of_language(rows, source):
  return (rows["weight_BT"] > 0) & (rows["source_B"] == source)[:, None]


def assert_near(one, other, rtol=1e-4, atol=1e-6):
  """Two trees of dicts and lists of floats."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  np.testing.assert_allclose(jax.tree.leaves(one), jax.tree.leaves(other), rtol=rtol, atol=atol)


def test_divergences_are_those_of_whole_logits_in_numpy(logits, pair, rows, found):
  expected = brute_force(logits, pair)
  for source, code in enumerate(CODES):
    here, entry = of_language(rows, source), found["languages"][code]
    assert entry["tokens"] == here.sum()
    for way, values in zip(("kl_ab", "kl_ba"), expected):
      assert entry[way]["mean"] == pytest.approx(values[here].mean(), rel=1e-4)
      for name, share in dict(p10=0.1, p50=0.5, p90=0.9, p99=0.99).items():
        assert entry[way][name] == pytest.approx(np.quantile(values[here], share), rel=1e-3)
    assert entry["agreement"] == pytest.approx(expected[2][here].mean())
  assert 0.01 < found["mean"]["kl_ab"]["mean"] < 10 and 0 < found["mean"]["agreement"] < 1


def test_the_mean_counts_each_language_once(found):
  for way in ("kl_ab", "kl_ba"):
    values = [entry[way]["mean"] for entry in found["languages"].values()]
    assert found["mean"][way]["mean"] == pytest.approx(np.mean(values))
  layers = [entry["cosine"] for entry in found["languages"].values()]
  np.testing.assert_allclose(found["mean"]["cosine"], np.mean(layers, 0))


def test_cosines_are_of_what_each_block_returns(cfg, pair, rows, found):
  states = [transformer.look_up(params["embedding_VD"], rows["token_BT"], np.float32) for params in pair]
  blocks = {window: jax.jit(Block(cfg, np.float32, "reference", window, "dtype").apply)
            for window in (cfg.window, None)}
  for layer in range(4 * cfg.L):
    name = BLOCKS[layer % 4]
    states = [blocks[None if name == "full" else cfg.window](
        {"params": jax.tree.map(lambda x: x[layer // 4], params["periods"][name])}, x, rows["segment_BT"],
        rows["position_BT"]) for x, params in zip(states, pair)]
    a, b = (np.asarray(x, np.float64) for x in states)
    cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    for source, code in enumerate(CODES):
      assert found["languages"][code]["cosine"][layer] == pytest.approx(
          cosine[of_language(rows, source)].mean(), abs=1e-5)


def test_a_model_is_like_itself(cfg, params, rows):
  found = functional(cfg, (params, params), [rows])
  for entry in found["languages"].values():
    assert set(entry["kl_ab"].values()) == set(entry["kl_ba"].values()) == {0.0}
    assert entry["agreement"] == 1
    np.testing.assert_allclose(entry["cosine"], 1, atol=1e-6)
  base = random_params(cfg, seed=2)
  for figures in similarity.structural(cfg, (params, params), base)["tensors"].values():
    assert figures == dict(cosine=pytest.approx(1), distance=0, norm_ratio=1,
                           task_cosine=pytest.approx(1), task_norm_ratio=1, sign_agreement=1)


def test_models_that_are_nearly_one_have_a_divergence_with_digits(cfg, logits, params, rows):
  near = jax.tree.map(lambda x, y: x + 3e-4 * y, params, random_params(cfg, seed=1))
  found = functional(cfg, (params, near), [rows])
  expected = brute_force(logits, (params, near))
  for source, code in enumerate(CODES):
    here, entry = of_language(rows, source), found["languages"][code]
    assert 0 <= entry["kl_ab"]["p10"] and expected[0][here].mean() < 3e-6
    assert entry["kl_ab"]["mean"] == pytest.approx(expected[0][here].mean(), rel=0.05)


def test_swapped_models_swap_the_directions(cfg, pair, rows, found):
  swapped = functional(cfg, pair[::-1], [rows])
  for code, entry in found["languages"].items():
    other = swapped["languages"][code]
    assert_near(entry | dict(kl_ab=entry["kl_ba"], kl_ba=entry["kl_ab"]), other)
    assert entry["kl_ab"]["mean"] != pytest.approx(entry["kl_ba"]["mean"], rel=0.01)
  one = similarity.structural(cfg, pair)["whole"]
  other = similarity.structural(cfg, pair[::-1])["whole"]
  assert one["norm_ratio"] * other["norm_ratio"] == pytest.approx(1)
  assert one["distance"] == pytest.approx(other["distance"] * one["norm_ratio"])
  assert one["norm_ratio"] != pytest.approx(1, rel=0.01)


def test_packing_and_padding_change_nothing(cfg, pair, rows, found):
  alone = []  # each document in a row of its own, and what is behind it padding
  for row, lengths in enumerate(DOCUMENTS):
    for start, length in zip(np.cumsum([0, *lengths]), lengths):
      segment_BT, position_BT = packed(((length,),), T)
      here = slice(start, start + length)
      one = {name: np.zeros((1, T), rows[name].dtype) for name in ("token_BT", "target_BT", "weight_BT")}
      for name, array in one.items():
        array[0, :length] = rows[name][row, here]
      alone.append(one | dict(segment_BT=segment_BT, position_BT=position_BT,
                              source_B=rows["source_B"][row : row + 1]))
  alone += [alone[0] | dict(source_B=np.full(1, -1, np.int32))] * (-len(alone) % B)
  batches = [similarity._stacked(alone[at : at + B]) for at in range(0, len(alone), B)]
  assert len(batches) > 1
  assert_near(functional(cfg, pair, batches), found)


def test_eight_devices_find_what_one_does(cfg, pair, rows, found):
  mesh = axes.mesh(fsdp=2, tensor=2, context=2)
  spread = [jax.device_put(params, axes.shardings(mesh, params)) for params in pair]
  assert_near(functional(cfg, spread, [rows], mesh), found)
  base = random_params(cfg, seed=2)
  assert_near(similarity.structural(cfg, spread, jax.device_put(base, axes.shardings(mesh, base))),
              similarity.structural(cfg, pair, base))


def test_sources_of_a_language_are_added_and_one_without_a_token_has_no_divergence():
  totals = dict(tokens=np.array([3.0, 1.0, 0.0]), kl_ab=np.array([6.0, 2.0, 0.0]),
                kl_ba=np.array([1.0, 1.0, 0.0]))
  assert similarity._averages(totals, ["deu_Latn", "deu_Latn", "code"]) == dict(
      deu_Latn=dict(tokens=4, kl_ab=2.0, kl_ba=0.5), code=dict(tokens=0, kl_ab=None, kl_ba=None))


def figures(a, b, base):
  """The structural figures of three vectors."""
  u, v, norm = a - base, b - base, np.linalg.norm
  return dict(
      cosine=a @ b / norm(a) / norm(b), distance=norm(a - b) / norm(a), norm_ratio=norm(b) / norm(a),
      task_cosine=u @ v / norm(u) / norm(v), task_norm_ratio=norm(v) / norm(u),
      sign_agreement=np.mean((u * v > 0)[(u != 0) & (v != 0)]))


def test_structural_figures_are_those_of_the_tensors_as_vectors(cfg, pair):
  base = random_params(cfg, seed=2)
  base["embedding_VD"][:3] = pair[0]["embedding_VD"][:3]  # untrained ids: no sign, no vote
  found = similarity.structural(cfg, pair, base)
  names = cohere2.tensor_names(cfg)
  vectors = {name: [] for name in names}
  for name, (path, period) in names.items():
    for tree in (*pair, base):
      leaf = tree
      for key in path:
        leaf = leaf[key]
      vectors[name].append(np.asarray(leaf if period is None else leaf[period], np.float64).ravel())
  assert found["tensors"].keys() == names.keys()
  for name in names:
    assert_near(found["tensors"][name], figures(*vectors[name]), 1e-5)
  queries = [vectors[name] for name in names if name.endswith("q_proj.weight")]
  assert len(queries) == 4 * cfg.L
  assert_near(found["kinds"]["self_attn.q_proj"], figures(*map(np.concatenate, zip(*queries))), 1e-5)
  assert_near(found["whole"], figures(*map(np.concatenate, zip(*vectors.values()))), 1e-5)
  assert set(found["kinds"]) == {"embed_tokens", "norm", *cohere2.LAYER.values()}


def test_a_task_vector_of_nothing_has_no_direction(cfg, pair):
  found = similarity.structural(cfg, pair, pair[0])["whole"]
  assert found["task_cosine"] is found["task_norm_ratio"] is found["sign_agreement"] is None
  assert found["cosine"] < 1


@pytest.fixture(scope="module")
def manifests(data):
  return loader.read_manifests(data / "rows/validation")


def test_the_probe_is_the_first_tokens_of_each_language_in_turn(manifests):
  batches, codes = similarity.probe(manifests, 8, 100)
  assert codes == sorted({manifest["language"] for manifest in manifests}) and len(codes) == 4
  assert batches[0]["source_B"][:8].tolist() == [0, 1, 2, 3] * 2
  for source in range(4):
    assert sum((batch["weight_BT"][batch["source_B"] == source] > 0).sum() for batch in batches) == 100
  first = next(loader.every_row_once(manifests[:1], 1))
  np.testing.assert_array_equal(batches[0]["token_BT"][0], first["token_BT"][0])
  assert all(not batch["weight_BT"][batch["source_B"] < 0].any() for batch in batches)
  assert {len(batch["source_B"]) for batch in batches} == {8}


def test_a_probe_of_more_than_there_is_has_every_row(manifests):
  batches, _ = similarity.probe(manifests, 8, 10**9)
  trained = sum(manifest["trained"] for manifest in manifests)
  assert sum((batch["weight_BT"] > 0).sum() for batch in batches) == trained


def test_processes_share_the_batches_of_a_probe(manifests):
  whole, _ = similarity.probe(manifests, 8, 100)
  parts = [similarity.probe(manifests, 8, 100, (index, 2))[0] for index in range(2)]
  for batch, *halves in zip(whole, *parts, strict=True):
    for name in batch:
      np.testing.assert_array_equal(batch[name], np.concatenate([half[name] for half in halves]))


def test_a_language_without_a_token_to_predict_is_refused(manifests):
  with pytest.raises(run.Refused, match="deu_Latn have no token to predict"):
    similarity.probe(manifests, 8, 0)


def test_all_features_are_json_and_a_table(cfg, pair, rows, found):
  both = dict(functional=found, structural=similarity.structural(cfg, pair, random_params(cfg, seed=2)))
  assert json.loads(json.dumps(both, allow_nan=False)) == both
  text = similarity.table(both)
  assert all(word in text for word in (*CODES, "Europe (1)", "Africa (1)", "self_attn.q_proj", "whole"))
  mean = found["languages"]["yor_Latn"]["kl_ba"]["mean"]
  (line,) = [line for line in text.splitlines() if "yor_Latn" in line]
  assert f"{mean:.4f}" in line


# --- as evaluate reports it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):
  """A workdir whose checkpoint is some way from `place`."""
  cfg = ml_collections.ConfigDict(saved.meta(place)["model"])
  params = jax.tree.map(lambda x, y: x + 0.3 * y, checkpoint.restore_params(place)[0],
                        random_params(cfg, seed=4))
  return saved_as(tmp_path_factory.mktemp("model") / "tuned", params, cfg, place)


def saved_as(folder, params, cfg, place):
  """A workdir with `params`, made with the tokenizer of the checkpoint at `place`."""
  meta = dict(model=cfg.to_dict(), tokenizer_sha256=saved.meta(place)["tokenizer_sha256"], T=32)
  checkpoint.save(folder, 7, dict(params=params, meta=meta), keep=1)
  return folder


def arguments(data, *places, **fields):
  return [f"--config.checkpoints={tuple(map(str, places))}",
          f"--config.tokenizer={data / 'tokenizer.model'}", f"--config.rows={data / 'rows/validation'}",
          "--config.batch=64", *(f"--config.{name}={value}" for name, value in fields.items())]


def test_evaluate_reports_the_divergence_to_a_reference_once(data, place, tuned, tmp_path, monkeypatch):
  some = arguments(data, tuned, divergence_from=place, **{"mesh.data": 8, "mesh.fsdp": 1})
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *some) == 0
  measures = json.loads((tmp_path / "evaluation.json").read_text())["measures"]
  to, back = [one for one in measures if one["task"] == "divergence"]
  assert to["measure"] == "KL(checkpoint || random@0)" and to["better"] == "lower"
  assert back["measure"] == "KL(random@0 || checkpoint)"
  assert to["counts"].keys() == to["columns"]["tuned"].keys()
  for one in (to, back):
    assert len(one["columns"]["tuned"]) == 4
    assert all(0 < value < 10 for value in one["columns"]["tuned"].values())
  cfg, manifests = saved.meta(place)["model"], loader.read_manifests(data / "rows/validation")[:1]
  (rows,) = loader.every_row_once(manifests, manifests[0]["rows"])
  pair = [checkpoint.restore_params(place)[0] for place in (tuned, place)]
  expected = brute_force(forward(ml_collections.ConfigDict(cfg), rows), pair)
  assert expected[0].mean() != pytest.approx(expected[1].mean(), rel=0.001)
  for one, values in zip((to, back), expected):
    assert one["counts"]["deu_Latn"] == manifests[0]["trained"]
    assert one["columns"]["tuned"]["deu_Latn"] == pytest.approx(
        values[rows["weight_BT"] > 0].mean(), rel=1e-4)
  assert "KL(checkpoint || random@0)" in (tmp_path / "report.html").read_text()
  (tmp_path / "evaluation.json").unlink()
  monkeypatch.setattr(outputs.engines, "load", lambda *_: pytest.fail("computed again"))
  monkeypatch.setattr(outputs.engines, "refuse_unless_possible", lambda *_: None)  # seconds of tracing
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *some) == 0
  assert json.loads((tmp_path / "evaluation.json").read_text())["measures"] == measures
  other = [*some, f"--config.divergence_from={tuned}"]
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *other) == 65  # made from other inputs
  with pytest.raises(pytest.fail.Exception, match="computed again"):
    call("evaluate", "evaluate.py:tiny", tmp_path, *other, "--config.overwrite=True")


def test_a_divergence_that_cannot_be_is_refused(data, place, tuned, tmp_path, capsys):
  cfg = ml_collections.ConfigDict(saved.meta(place)["model"] | dict(V=608))
  saved_as(tmp_path / "wide", random_params(cfg, seed=0), cfg, place)
  for fields, said in (
      (dict(divergence_from=tmp_path / "nowhere"), "does not exist"),
      (dict(divergence_from=place, rows="", **{"tasks.cloze": "embedded"}), "give config.rows"),
      (dict(divergence_from=tmp_path / "wide"), "tuned predicts 600 ids and config.divergence_from 608")):
    some = arguments(data, tuned, **fields)
    assert call("evaluate", "evaluate.py:tiny", tmp_path / "w", *some) == 65
    assert said in capsys.readouterr().err
