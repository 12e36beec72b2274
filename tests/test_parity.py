"""The proof of an export: it holds for what is right, and fails for each thing that can be wrong."""

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
from tiny_aya_jax.export import cohere2, huggingface, proof, reader, runtimes, tensors

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
  more = {f"model.layers.{layer}.self_attn.{name}_proj.bias": np.zeros(held[f"model.layers.{layer}.self_attn.{name}_proj.weight"].shape[0], np.float32)
          for layer in range(4) for name in "qkvo"} | {"model.norm.bias": np.zeros(cfg.D, np.float32)}
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
