"""Another tokenizer for a checkpoint: what is kept is kept bit for bit, what is new is a mean, and is said."""

import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest

from conftest import ROOT, call, fields, full, packed, random_params

from tiny_aya_jax import axes, run
from tiny_aya_jax.data import toy, tokenizer as tokenizers, vocab
from tiny_aya_jax.model import transformer
from tiny_aya_jax.train import begin, checkpoint, remap, saved, start


@pytest.fixture(scope="module")
def old(data):
  return tokenizers.load(data / "tokenizer.model")


@pytest.fixture(scope="module")
def shuffled(data, old, tmp_path_factory):
  """The same pieces and merges under other ids, specials included."""
  return tokenizers.load(write_shuffled(old, tmp_path_factory.mktemp("shuffled") / "tokenizer.json"))


def write_shuffled(tokenizer, path):
  whole = json.loads(tokenizer.json())
  to = [int(id) for id in np.random.default_rng(0).permutation(tokenizer.size)]
  whole["model"]["vocab"] = {piece: to[id] for piece, id in whole["model"]["vocab"].items()}
  for token in whole["added_tokens"]:
    token["id"] = to[token["id"]]
  whole["post_processor"] = None
  path.write_text(json.dumps(whole))
  return path


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
  """A vocabulary of Turkish and Amharic, larger than that of `data`, which has no Amharic."""
  lines = [vocab.shape(line) for code in ("tur_Latn", "amh_Ethi")
           for text in list(toy.documents(code, "train"))[:80] for line in vocab.lines(text)]
  path = tmp_path_factory.mktemp("grown") / "tokenizer.model"
  path.write_bytes(vocab.train(lines, 700, 0.9995))
  return tokenizers.load(path)


def table(V, D=8, seed=1):
  return np.random.default_rng(seed).normal(size=(V, D)).astype(np.float32)


def toy_tokenizer(pieces, specials=()):
  """Pieces by the longest match, after 256 bytes and specials; as SentencePiece, it reads U+2581 as a space."""
  single = [bytes([byte]) for byte in range(256)]
  pieces = [b""] * len(specials) + single + pieces
  ids = {piece: id for id, piece in enumerate(pieces) if piece}

  def encode(text):
    left, found = text.replace("\u2581", " ").encode(), []
    while left:
      piece = max((piece for piece in ids if left.startswith(piece)), key=len)
      found, left = [*found, ids[piece]], left[len(piece):]
    return found

  return tokenizers.Tokenizer(
      __file__, pieces, {name: id for id, name in enumerate(specials)}, {}, lambda texts: [*map(encode, texts)], None)


def test_the_same_pieces_in_another_order_are_the_same_rows_and_the_same_logits(cfg, old, shuffled):
  cfg = ml_collections.ConfigDict(cfg.to_dict() | dict(V=608))  # 8 rows that no piece has
  params = random_params(cfg, seed=2)
  rows = remap.rows(old, shuffled, cfg.V, cfg.V)
  assert rows.counts == dict(kept=600, averaged=0, byte_only=0, new_specials=0, unused=8)
  moved = params | dict(embedding_VD=remap.embedding(rows, params["embedding_VD"]))
  assert sorted(rows.kept_V) == list(range(608)) and (rows.kept_V[:600] != np.arange(600)).any()
  text = "Almanya ve हिन्दी, 12 Deutsche Wörter"
  segment_BT, position_BT = packed([[12]], 12)

  @jax.jit
  def logits(params, token_BT):
    hidden = transformer.TinyAya(cfg).apply({"params": params}, token_BT, segment_BT, position_BT)
    return transformer.logits(params, hidden, cfg)

  before, after = (np.asarray(logits(tree, np.array([tokenizer.encode(text)[:12]])))
                   for tree, tokenizer in ((params, old), (moved, shuffled)))
  np.testing.assert_allclose(after, before[..., rows.kept_V], rtol=0, atol=1e-5)


def test_kept_rows_are_kept_bit_for_bit_and_new_ones_are_means_of_what_was_read(old, grown):
  rows, old_VD = remap.rows(old, grown, 600, 712), table(600)
  new_VD = remap.embedding(rows, old_VD)
  assert new_VD.shape == (712, 8) and new_VD.dtype == np.float32
  here = {piece: id for id, piece in enumerate(old.pieces)}  # of a byte's two the letter, which comes second
  seen = dict(kept=0, averaged=0)
  for id in range(268, grown.size):  # behind the specials and the bytes
    piece = grown.pieces[id]
    if piece in here:
      np.testing.assert_array_equal(new_VD[id], old_VD[here[piece]])
    else:
      np.testing.assert_allclose(new_VD[id], old_VD[old.encode(piece.decode())].mean(0), atol=1e-6)
    seen["kept" if piece in here else "averaged"] += 1
  np.testing.assert_array_equal(new_VD[:12], old_VD[:12])  # specials
  np.testing.assert_array_equal(new_VD[12 + 128 : 268], old_VD[12 + 128 : 268])  # bytes of longer characters
  for (before,), (now,) in zip(*(tokenizer.encode_many(map(chr, range(128))) for tokenizer in (old, grown))):
    np.testing.assert_array_equal(new_VD[now], old_VD[before])  # a byte in one may be a letter in the other
  assert seen["kept"] > 50 and seen["averaged"] == rows.counts["averaged"] > 50
  np.testing.assert_allclose(new_VD[700:], np.tile(old_VD.mean(0), (12, 1)), atol=1e-6)
  assert seen["averaged"] > rows.counts["byte_only"] > 20
  assert sum(rows.counts[name] for name in ("kept", "averaged", "new_specials", "unused")) == 712
  halves = remap.embedding(rows, old_VD.astype(np.float16))
  np.testing.assert_array_equal(halves[:12], old_VD[:12].astype(np.float16))


def test_many_means_are_made_a_part_at_a_time(old, grown, monkeypatch):
  rows, old_VD = remap.rows(old, grown, 600, 712), table(600)
  whole = remap.embedding(rows, old_VD)
  for size in (1, 7):
    monkeypatch.setattr(remap, "AT_ONCE", size)
    np.testing.assert_allclose(remap.embedding(rows, old_VD), whole, rtol=0, atol=1e-6)


def test_what_is_no_text_or_would_be_read_as_other_bytes_is_the_mean_of_its_bytes():
  old = toy_tokenizer(["ሰላም".encode(), b" a"], ["<PAD>", "<BOS_TOKEN>"])
  new = toy_tokenizer([b"\xe1\x88", "\u2581".encode(), "ሰላምa".encode(), b" a"], ["<BOS_TOKEN>", "<|NEW|>"])
  rows, old_VD = remap.rows(old, new, 262, 264), table(262)
  new_VD = remap.embedding(rows, old_VD)
  cut, mark, word, kept = new_VD[258:262]
  at = lambda piece: old.pieces.index(piece)
  np.testing.assert_allclose(cut, old_VD[[at(b"\xe1"), at(b"\x88")]].mean(0), atol=1e-6)
  np.testing.assert_allclose(mark, old_VD[[at(b"\xe2"), at(b"\x96"), at(b"\x81")]].mean(0), atol=1e-6)
  np.testing.assert_allclose(word, old_VD[[at("ሰላም".encode()), at(b"a")]].mean(0), atol=1e-6)
  np.testing.assert_array_equal(kept, old_VD[at(b" a")])
  np.testing.assert_array_equal(new_VD[0], old_VD[1])  # <BOS_TOKEN>
  np.testing.assert_allclose(new_VD[1], old_VD[:260].mean(0), atol=1e-6)  # <|NEW|>: of the rows in use
  np.testing.assert_array_equal(new_VD[262:], old_VD[260:])  # never said before, never to be said
  assert rows.counts == dict(kept=258, averaged=3, byte_only=2, new_specials=1, unused=2)


def test_a_byte_that_is_also_a_letter_keeps_the_row_it_was_read_with(old):
  bytes_alone = toy_tokenizer([], ["<PAD>"])  # byte-level: A is there once
  letter, byte = old.encode("A")[0], old.pieces.index(b"A")
  assert letter != byte and old.pieces[letter] == b"A"
  down = remap.rows(old, bytes_alone, 600, 257)
  assert down.kept_V[1 + ord("A")] == letter
  up = remap.rows(bytes_alone, old, 257, 600)
  assert up.kept_V[letter] == up.kept_V[byte] == 1 + ord("A")


# --- in a run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(data, old, tmp_path_factory):
  """A checkpoint of random parameters with the sizes of conftest.fields."""
  folder = tmp_path_factory.mktemp("base")
  model = ml_collections.ConfigDict(config(fields(data)).model.to_dict())
  meta = dict(model=model.to_dict(), tokenizer_sha256=old.sha256, T=32)
  checkpoint.save(folder, 0, dict(params=random_params(model, seed=7), meta=meta), keep=1)
  return folder


@pytest.fixture(scope="module")
def rows(grown, tmp_path_factory):
  """Turkish and Amharic, packed with the vocabulary of `grown`."""
  folder = tmp_path_factory.mktemp("rows")
  assert call("pack", "pack.py:tiny", folder, "--config.languages=('tur_Latn', 'amh_Ethi')", "--config.T=32",
              f"--config.tokenizer={grown.path}") == 0
  return folder


def config(words):
  found = run.load_config(f"{ROOT / 'experiments' / 'pretrain.py'}:tiny")
  run.override(found, {name.removeprefix("--config."): value
                       for name, _, value in (word.partition("=") for word in words)})
  return found


def onto(data, base, grown, rows, *more):
  """The fields of a run that goes on from `base` with the vocabulary of `grown`."""
  return fields(data, f"--config.init_from={base}", f"--config.init_tokenizer={data / 'tokenizer.model'}",
                f"--config.tokenizer={grown.path}", f"--config.data.rows={rows / 'train'}", "--config.model.V=700",
                "--config.steps=2", "--config.schedule.warmup_steps=0", *more)


def last(words):
  return [f"{name}={value}" for name, value in dict(word.split("=", 1) for word in words).items()]


def test_a_checkpoint_is_remapped_onto_its_shards(data, base, old, grown, rows):
  asked = config(last(onto(data, base, grown, rows, "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
                           "--config.mesh.data=1", "--config.init_tokenizer=" + str(data))))
  mesh = axes.mesh(**asked.mesh.to_dict(), devices=jax.devices()[:4])
  found = begin.decide(asked, base.parent / "nowhere", {}, grown)
  counts = remap.rows(old, grown, 600, 700).counts
  assert found.remapped == counts | dict(tokenizer_sha256=old.sha256)
  assert f"{counts['kept']:,} kept, {counts['averaged']:,} begin as means" in found.said
  with jax.set_mesh(mesh):
    state = start.start(asked, found, mesh)
  before, _ = checkpoint.restore_params(base)
  expected = before | dict(embedding_VD=remap.embedding(found.rows, np.asarray(before["embedding_VD"])))
  jax.tree.map(np.testing.assert_array_equal, state["params"], expected)
  assert state["params"]["embedding_VD"].sharding.shard_shape((700, 16)) == (350, 8)


@full
def test_a_run_from_another_vocabulary_goes_on_without_the_old_files(data, base, grown, rows, tmp_path):
  words = onto(data, base, grown, rows)
  assert call("train", "pretrain.py:tiny", tmp_path / "whole", *words) == 0
  trunk, model = tmp_path / "trunk", tmp_path / "tokenizer.model"
  shutil.copytree(base, trunk)
  shutil.copy(data / "tokenizer.model", model)
  words += [f"--config.init_from={trunk}", f"--config.init_tokenizer={model}"]
  assert call("train", "pretrain.py:tiny", tmp_path / "run", *words, "--config.steps=1") == 0
  shutil.rmtree(trunk)
  model.unlink()
  assert call("train", "pretrain.py:tiny", tmp_path / "run", *words) == 0
  one, other = (saved.meta(tmp_path / name) for name in ("run", "whole"))
  assert one["fingerprints"] == other["fingerprints"]
  assert one["remapped"] == other["remapped"] and one["remapped"]["kept"] > 300
  assert run.read_json(tmp_path / "run" / "run.json", "record")["remapped"] == one["remapped"]


@pytest.mark.parametrize("more, said", [
    (("init_tokenizer=",), "has another tokenizer than"),
    (("init_from=",), "config.init_from is not set"),
    (("init_what=state",), "set config.init_what to 'params'"),
    (("adapter.rank=2",), "adapters leave the embedding as it is"),
    (("init_tokenizer=GROWN",), "there is nothing to remap"),
    (("init_tokenizer=SHUFFLED",), "was not trained with config.init_tokenizer"),
    (("init_tokenizer=nowhere.model",), "nowhere.model does not exist"),
    (("model.F=28",), "is another model: F 24 (here 28)"),
])
def test_what_cannot_be_remapped_is_refused_at_the_door(
    data, base, grown, shuffled, rows, tmp_path, capsys, more, said):
  more = [f"--config.{word}".replace("GROWN", grown.path).replace("SHUFFLED", shuffled.path) for word in more]
  assert call("train", "pretrain.py:tiny", tmp_path / "run", *onto(data, base, grown, rows, *more)) == 65
  assert said in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_the_same_ids_in_another_file_are_nothing_to_remap(data, base, tmp_path, capsys):
  shutil.copy(data / "tokenizer.model", tmp_path / "copy.model")
  words = fields(data, f"--config.init_from={base}", f"--config.init_tokenizer={tmp_path / 'copy.model'}")
  assert call("train", "pretrain.py:tiny", tmp_path / "run", *words) == 65
  assert "has the ids of config.tokenizer" in capsys.readouterr().err


def test_an_old_vocabulary_that_the_table_has_no_rows_for_is_refused(data, base, grown, rows, tmp_path, monkeypatch):
  meta = saved.meta(base)
  monkeypatch.setattr(saved, "meta", lambda place: meta | dict(model=meta["model"] | dict(V=599)))
  with pytest.raises(run.Refused, match="has 600 ids, .* only 599 rows"):
    begin.decide(config(last(onto(data, base, grown, rows))), tmp_path, {}, grown)


def test_a_folder_is_remapped_and_one_that_was_cut_short_leaves_nothing_behind(
    data, base, old, grown, rows, tmp_path, capsys):
  from tiny_aya_jax.export import huggingface

  params, meta = checkpoint.restore_params(base)
  folder = tmp_path / "folder"
  huggingface.write(folder, params, ml_collections.ConfigDict(meta["model"]), old)
  words = onto(data, folder, grown, rows)
  asked = config(last(words))
  found, mesh = begin.decide(asked, tmp_path / "run", {}, grown), axes.mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    state = start.start(asked, found, mesh)
  np.testing.assert_array_equal(
      state["params"]["embedding_VD"], remap.embedding(found.rows, np.asarray(params["embedding_VD"])))
  weights = folder / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-100])
  assert call("train", "pretrain.py:tiny", tmp_path / "run", *words) == 65
  assert "is not a whole safetensors file" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
