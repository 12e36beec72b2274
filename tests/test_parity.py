"""The proof of an export: it holds for what is right, and fails for each thing that can be wrong."""

import fcntl
import json
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from conftest import call, random_params
from tiny_aya_jax import axes, run
from tiny_aya_jax.data import tokenizer as tokenizers
from tiny_aya_jax.export import card, cohere2, gguf, huggingface, proof, reader, runtimes, tensors
from tiny_aya_jax.train import saved

ASKED = ml_collections.ConfigDict(dict(tokens=40, greedy=4, transformers="", mlx="", llama_cpp="", bytes=1e9))


@pytest.fixture(scope="module")
def tokenizer(data):
  return tokenizers.load(data / "tokenizer.model")


@pytest.fixture(scope="module")
def whole(cfg, tokenizer, tmp_path_factory):
  """(folder, leaves, cfg) of a written bfloat16 model with the vocabulary's rows and two to spare."""
  cfg = ml_collections.ConfigDict(cfg.to_dict() | dict(V=tokenizer.size + 2, L=1))
  params = random_params(cfg, 3)
  folder = tmp_path_factory.mktemp("parity") / "whole"
  huggingface.write(folder, params, cfg, tokenizer, dtype="bfloat16", shard_bytes=50_000)
  return folder, params, cfg


@pytest.fixture(autouse=True)
def alone(monkeypatch):
  """No other runtime: they take seconds to start, and are asked in test_pipeline."""
  monkeypatch.setattr(runtimes, "find", lambda name, python=None: None)


def prove(folder, params, cfg, tokenizer, dtype="bfloat16"):
  shapes = cohere2.leaf_shapes(cfg)
  return proof.prove(folder, ((path, cohere2.leaf(params, path)) for path in shapes), cfg, dtype, tokenizer, ASKED)


def test_a_folder_is_proved_by_a_reader_of_its_own(whole, tokenizer):
  folder, params, cfg = whole
  found = prove(folder, params, cfg, tokenizer)
  assert found["tensors"] == 34 and found["tokenizer"]["languages"] == 70 and found["tokenizer"]["texts"] > 200
  assert found["rows"][0] > 2 * cfg.window and found["greedy_tokens"] == 12
  assert found["readers"]["numpy"]["largest_logit_difference"] < 1e-4 and found["readers"]["mlx"] == "not installed"
  assert found["readers"]["numpy"]["largest_logit"] > 1


@pytest.fixture
def copy(whole, tmp_path):
  return shutil.copytree(whole[0], tmp_path / "copy")


def change(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("fields", [dict(sliding_window=4), dict(logit_scale=0.5), dict(layer_norm_eps=1e-3)])
def test_another_constant_in_config_is_refused(whole, copy, tokenizer, fields):
  change(copy / "config.json", **fields)
  with pytest.raises(run.Refused, match="config.json reads back as"):
    prove(copy, *whole[1:], tokenizer)


def test_a_flipped_bit_is_refused_by_the_name_of_its_tensor(whole, copy, tokenizer):
  one = tensors.open_folder(copy)["model.layers.2.mlp.up_proj.weight"]
  with open(one.path, "r+b") as file:
    file.seek(one.offset + 7)
    byte = file.read(1)[0]
    file.seek(one.offset + 7)
    file.write(bytes([byte ^ 1]))
  with pytest.raises(run.Refused, match="layers.2.mlp.up_proj.weight differs from the checkpoint"):
    prove(copy, *whole[1:], tokenizer)


def test_a_folder_of_another_dtype_is_refused(whole, tokenizer):
  with pytest.raises(run.Refused, match="differs from the checkpoint"):
    prove(*whole, tokenizer, dtype="float32")


SWAPPED = dict(
    layers=dict(gate_DF="mlp.up_proj", up_DF="mlp.gate_proj"),
    blocks=("full", "sliding_0", "sliding_1", "sliding_2"),
)


@pytest.mark.parametrize("wrong", SWAPPED)
def test_an_error_that_agrees_with_itself_is_caught_by_the_reader(whole, tokenizer, tmp_path, monkeypatch, wrong):
  _, params, cfg = whole
  if wrong == "layers":
    monkeypatch.setattr(cohere2, "LAYER", cohere2.LAYER | SWAPPED["layers"])
  else:
    monkeypatch.setattr(cohere2, "BLOCKS", SWAPPED["blocks"])
  huggingface.write(tmp_path / "out", params, cfg, tokenizer, dtype="bfloat16")
  back, _ = huggingface.read(tmp_path / "out")  # a round trip sees nothing
  np.testing.assert_array_equal(back["periods"]["full"]["up_DF"], np.asarray(
      params["periods"]["full"]["up_DF"]).astype(jnp.bfloat16).astype(np.float32))
  with pytest.raises(run.Refused, match="the NumPy reader computes other logits"):
    prove(tmp_path / "out", params, cfg, tokenizer)


def test_another_tokenizer_in_the_folder_is_refused(whole, copy, tokenizer):
  text = json.loads((copy / "tokenizer.json").read_text())
  vocab = text["model"]["vocab"]
  one, other = list(vocab)[-2:]
  vocab[one], vocab[other] = vocab[other], vocab[one]
  (copy / "tokenizer.json").write_text(json.dumps(text))
  with pytest.raises(run.Refused, match="tokenizer.json is another tokenizer than the checkpoint's"):
    prove(copy, *whole[1:], tokenizer)
  shutil.copy(whole[0] / "tokenizer.json", copy)
  text = json.loads((copy / "tokenizer.json").read_text())
  text["model"]["merges"] = text["model"]["merges"][::-1]
  (copy / "tokenizer.json").write_text(json.dumps(text))
  with pytest.raises(run.Refused, match="gives other ids than training had"):
    prove(copy, *whole[1:], tokenizer)


def test_a_runtime_that_answers_otherwise_is_refused(whole, tokenizer, monkeypatch):
  _, params, cfg = whole
  monkeypatch.setattr(runtimes, "find", lambda name, python=None: "python" if name == "transformers" else None)

  def answer(name, python, folder, request, spoil):
    logits = reader.forward(folder, request["tokens"])
    found = {f"logits_{at}": one + spoil.get("logits", 0) for at, one in enumerate(logits)}
    ids = tokenizer.encode_many(request["texts"])
    return found | {f"ids_{at}": np.array(one + spoil.get("ids", [])) for at, one in enumerate(ids)} | dict(versions={})

  for spoil, sentence in ((dict(), None), (dict(logits=np.float32(0.1)), "transformers computes other logits"),
                          (dict(ids=[5]), "transformers gives other ids"), (dict(logits=np.nan), "other logits")):
    monkeypatch.setattr(runtimes, "ask", lambda *given, spoil=spoil: answer(*given, spoil))
    if sentence is None:
      assert prove(*whole, tokenizer)["readers"]["transformers"]["texts"] > 200
    else:
      with pytest.raises(run.Refused, match=sentence):
        prove(*whole, tokenizer)


def test_a_model_that_is_too_large_for_a_runtime_is_said(whole, tokenizer, monkeypatch, capsys):
  monkeypatch.setattr(runtimes, "find", lambda name, python=None: "python")
  monkeypatch.setattr(runtimes, "ask", None)
  monkeypatch.setitem(ASKED, "bytes", 10.0)
  found = prove(*whole, tokenizer)
  assert found["readers"]["transformers"].startswith("not asked: ") and "config.proof.bytes" in capsys.readouterr().out


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=4, tensor=2)])
def test_a_folder_is_read_into_shards(whole, mesh):
  folder, _, _ = whole
  expected, _ = huggingface.read(folder)
  placed = axes.shardings(axes.mesh(**mesh, context=1), expected)
  for dtype in (jnp.float32, jnp.bfloat16):
    found, cfg = huggingface.load(folder, lambda tree: jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding), tree, placed))
    assert cfg.to_dict() == whole[2].to_dict()
    assert jax.tree.map(lambda x: x.sharding, found) == placed
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), y), found, expected)


def test_biases_of_zero_a_model_without_its_head_and_stored_frequencies_are_read(whole, tmp_path, capsys):
  folder, _, cfg = whole
  held = {name: one.read().astype(np.float32) for name, one in tensors.open_folder(folder).items()}
  more = {name.replace("weight", "bias"): np.zeros(len(value), np.float32)
          for name, value in held.items() if "self_attn" in name or name == "model.norm.weight"}
  frequencies = cfg.rope_theta ** (-np.arange(0, cfg.H, 2) / cfg.H)
  more["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies.astype(np.float32)
  every = {name.removeprefix("model."): value for name, value in (held | more).items()}
  out = shutil.copytree(folder, tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors*"))
  tensors.write(out, {name: value.shape for name, value in every.items()}, every.items())
  change(out / "config.json", attention_bias=True)
  found, expected = huggingface.read(out)[0], huggingface.read(folder)[0]
  assert "17 biases are all zero and are left out" in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  every["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones_like(frequencies, np.float32)
  tensors.write(out, {name: value.shape for name, value in every.items()}, every.items())
  with pytest.raises(run.Refused, match="inv_freq is not what rope_theta 50000.0 makes it"):
    huggingface.read(out)


def test_a_folder_is_exported_as_it_is(whole, tmp_path, capsys):
  folder, _, _ = whole
  source = shutil.copytree(folder, tmp_path / "source")
  change(source / "tokenizer_config.json", tokenizer_class="CohereTokenizerFast", auto_map={"AutoTokenizer": "x.X"})
  change(source / "config.json", max_position_embeddings=32_768)
  (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
  export = ("export", "export.py", tmp_path, f"--config.checkpoint={source}", "--config.name=out",
            "--config.gguf.kinds=('BF16',)")
  assert call(*export) == 65  # llama.cpp has no heads that do not make up the width
  assert "heads that make up the width" in capsys.readouterr().err and not (tmp_path / "out").exists()
  assert call(*export[:-1]) == 0
  out = tmp_path / "out"
  stored = [{name: (one.dtype, one.read().tobytes()) for name, one in tensors.open_folder(place).items()}
            for place in (source, out)]
  assert stored[0] == stored[1]
  for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
    assert (out / name).read_bytes() == (source / name).read_bytes()
  facts = json.loads((out / "tokenizer_config.json").read_text())
  assert facts["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in facts
  assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 32_768
  assert call(*export[:-1]) == 0 and "up to date" in capsys.readouterr().out
  assert call(*export[:-1], "--config.proof.greedy=2") == 65
  assert "other inputs" in capsys.readouterr().err


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def square(whole, tokenizer, tmp_path_factory):
  """(folder, cfg) of a model that llama.cpp could hold: heads make up the width, widths are multiples of 32."""
  cfg = ml_collections.ConfigDict(whole[2].to_dict() | dict(D=32, N=4, K=2, H=8, F=64))
  folder = tmp_path_factory.mktemp("square") / "whole"
  huggingface.write(folder, random_params(cfg, 4), cfg, tokenizer, dtype="bfloat16", T=77)
  return folder, cfg


def prove_gguf(square, tokenizer, path, kind, python=None):
  return proof.prove_gguf(square[0], {kind: path}, square[1], tokenizer, ASKED, python, "")[kind]


@pytest.mark.parametrize("kind, least, most", [
    ("BF16", 0.0, 0.0), ("F32", 0.0, 0.0), ("Q8_0", 1e-3, 1e-2), ("Q4_0", 0.05, 0.12)])
def test_what_a_kind_rounds_is_measured_and_more_is_refused(square, tokenizer, tmp_path, kind, least, most):
  path = tmp_path / "a.gguf"
  gguf.write(path, square[0], kind)
  found = prove_gguf(square, tokenizer, path, kind)
  assert least <= found["rounding"] <= most and found["llama_cpp"] == "not installed"
  raw = path.read_bytes()
  path.write_bytes(raw[:-2000] + bytes(2000))  # the last matrix is zero, and the norm
  with pytest.raises(run.Refused, match=f"away from the folder's, {kind} allows"):
    prove_gguf(square, tokenizer, path, kind)


def test_llama_cpp_is_compared_with_our_forward_pass_of_the_very_weights(square, tokenizer, tmp_path, monkeypatch):
  path = tmp_path / "a.gguf"
  gguf.write(path, square[0], "Q4_0")
  params, cfg = gguf.read(path)
  huggingface.write(tmp_path / "decoded", params, cfg, tokenizer)  # another way to the same logits

  def answer(name, python, model, request, scale):
    found = {f"logits_{at}": one * scale for at, one in enumerate(reader.forward(tmp_path / "decoded", request["tokens"]))}
    ids = {f"ids_{at}": np.array(one) for at, one in enumerate(tokenizer.encode_many(request["texts"]))}
    return found | ids | dict(versions={})

  for scale, wrong in ((1.0, False), (1.05, False), (1.5, True), (np.nan, True)):
    monkeypatch.setattr(runtimes, "ask", lambda *given, scale=scale: answer(*given, scale))
    if wrong:
      with pytest.raises(run.Refused, match="llama.cpp computes other logits from a.gguf"):
        prove_gguf(square, tokenizer, path, "Q4_0", "python")
    else:
      found = prove_gguf(square, tokenizer, path, "Q4_0", "python")["llama_cpp"]
      assert found["texts_of_other_ids"] == 0 and found["divergence_from_folder_nats"] > 1e-5
  assert json.loads((square[0] / "config.json").read_text())["max_position_embeddings"] == 77


# --- nothing is lost ----------------------------------------------------------------------------


def test_an_earlier_export_is_never_lost(square, tmp_path, capsys):
  export = ("export", "export.py", tmp_path, f"--config.checkpoint={square[0]}", "--config.name=old",
            "--config.proof.greedy=0")
  assert call(*export, "--config.gguf.kinds=('Q8_0',)", "--config.gguf.batch=0") == 65
  assert "config.gguf.batch is 0" in capsys.readouterr().err
  assert call(*export, "--config.gguf.kinds=('Q8_0',)") == 0
  out = tmp_path / "old"
  assert [path.name for path in tmp_path.iterdir()] == ["old"] and (out / "old-Q8_0.gguf").exists()
  assert set(json.loads((out / "parity.json").read_text())["gguf"]) == {"Q8_0"}  # and no file that is not there
  (out / "README.md").write_text("my licence")
  (out / "3000").mkdir()
  assert call(*export, "--config.overwrite=True") == 0
  (kept,) = [path for path in tmp_path.iterdir() if path != out]
  assert (kept / "README.md").read_text() == "my licence" and (kept / "3000").exists() and "superseded" in kept.name
  assert "is kept as" in capsys.readouterr().out
  out.rename(tmp_path / ".old.old")  # a kill between two renames
  (tmp_path / ".old.new").mkdir()
  assert call(*export) == 0 and "up to date" in capsys.readouterr().out and out.exists()
  shutil.copytree(out, tmp_path / ".old.old")  # a kill behind them
  assert call(*export, "--config.overwrite=True") == 0
  assert sorted(path.name for path in tmp_path.iterdir()) == ["old", kept.name]
  assert call(*export, f"--config.checkpoint={out}", "--config.overwrite=True") == 65
  assert "is what is exported" in capsys.readouterr().err
  with open(tmp_path / ".old.lock", "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    assert call(*export, "--config.overwrite=True") == 65
  assert "another export writes" in capsys.readouterr().err and (out / "parity.json").exists()


def test_a_refused_export_leaves_nothing_but_what_was(square, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(proof, "TOLERANCE", 0.0)
  assert call("export", "export.py", tmp_path, f"--config.checkpoint={square[0]}", "--config.name=out") == 65
  assert "computes other logits" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_card_counts_what_this_model_saw(data, tmp_path, monkeypatch):
  """A trunk that went on after its fork, and a merge of two steps of one run: no token twice."""
  plan = dict(T=32, sources=[dict(name="deu_Latn/cldr", language="deu_Latn", path=str(data / "rows/train/deu_Latn/cldr"))])
  monkeypatch.setattr(card.mixture, "counts", lambda plan, row: {"deu_Latn/cldr": row})
  known = {}

  def stage(name, step, start, origin=None, init_from=None):
    path = tmp_path / name / "checkpoints" / str(step)
    path.mkdir(parents=True)
    known[path] = dict(step=step, start=start, T=32, origin=origin and dict(step=origin))
    (tmp_path / name / "run.json").write_text(json.dumps(dict(config=f"a: 1\ninit_from: {init_from or 'null'}\nz: 2\n")))
    return path

  stage("trunk", 3000, 0)
  fork = stage("fork", 2600, 2400, 2400, tmp_path / "trunk")
  other = stage("other", 2500, 2400, 2400, tmp_path / "trunk")
  merged = tmp_path / "merged" / "checkpoints" / "0"
  known[merged] = dict(merge=dict(operator="linear", checkpoints=[dict(path=str(fork)), dict(path=str(other))], base=None))
  monkeypatch.setattr(saved, "find", lambda place: next(
      (path for path in known if path == place or path.parents[1] == place), None) or run.existing("x", None))
  monkeypatch.setattr(saved, "meta", lambda path: known[path])
  monkeypatch.setattr(saved, "data", lambda path: dict(batch=2, plan=plan))
  stages = card.lineage(merged)
  drawn = {one["name"]: sum(one["drawn"].values()) for one in stages}
  assert drawn == dict(merged=0, fork=200 * 64, other=100 * 64, trunk=2400 * 64)
  assert {key for one in stages for key in one["drawn"]} == {("Unicode-3.0", "deu_Latn")}
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "config.json").write_text("{}")
  (tmp_path / "folder" / "parity.json").write_text(json.dumps(dict(made=card.to_json(stages))))
  assert card.lineage(tmp_path / "folder") == stages
  (tmp_path / "folder" / "parity.json").unlink()
  (tmp_path / "folder" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
  assert card.lineage(tmp_path / "folder")[0]["licence"] == "cc-by-nc-4.0"
