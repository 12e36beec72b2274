"""Adapters: step 0 is the base, only they move, and every later stage reads the merged matrices."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from conftest import ROOT, call, fields, random_params
from test_transformer import assert_same

from tiny_aya_jax import axes, plan, run
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.model import adapter as adapters, losses
from tiny_aya_jax.model.adapter import FACTORS, Adapter
from tiny_aya_jax.model.transformer import TinyAya
from tiny_aya_jax.train import begin, checkpoint, saved, start
from tiny_aya_jax.train.fields import ADAPTED

ALL = Adapter(3, 5.0, ADAPTED)  # a rank that is the size of no other letter
SOME = Adapter(3, 5.0, ("q", "o", "down"))


def beside(cfg, params, adapter, seed=0):
  """params with random factors beside them, the second not 0."""
  random = np.random.default_rng(seed)
  tree = jax.eval_shape(TinyAya(cfg, adapter=adapter).init, jax.random.key(0), *[np.zeros((1, 1), np.int32)] * 3)
  drawn = jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32),
                       adapters.split(tree["params"])[0])
  return adapters.join(drawn, params)


def hidden(cfg, params, batch, adapter=None, **settings):
  rows = batch["token_BT"], batch["segment_BT"], batch["position_BT"]
  model = TinyAya(cfg, adapter=adapter, **settings)
  return np.asarray(jax.jit(lambda params: model.apply({"params": params}, *rows))(params))


def graded(cfg, adapter, **settings):
  """(params, batch) -> (mean loss, gradients of what is trained)."""
  model = TinyAya(cfg, adapter=adapter, **settings)

  def loss(trained, frozen, batch):
    params = adapters.join(trained, frozen)
    hidden_BTD = model.apply(
        {"params": params}, batch["token_BT"], batch["segment_BT"], batch["position_BT"])
    sum, count, _ = losses.next_token(
        hidden_BTD, params["embedding_VD"], batch["target_BT"], batch["weight_BT"],
        logit_scale=cfg.logit_scale, chunk=512)
    return sum / count

  return lambda params, batch: jax.value_and_grad(loss)(*adapters.split(params), batch)


@pytest.fixture(scope="module")
def adapted(cfg, params):
  return beside(cfg, params, ALL)


@pytest.fixture(scope="module")
def plain(cfg, adapted, batch):
  """Loss and gradients of the adapters on one device."""
  return jax.jit(graded(cfg, ALL))(adapted, batch)


def names(tree):
  return {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fresh_adapters_leave_every_bit_of_the_forward_pass(cfg, params, batch, fresh, dtype):
  held = adapters.held(adapters.join(fresh, params), dtype)
  assert {leaf.dtype for leaf in jax.tree.leaves(adapters.split(held)[1])} == {jnp.dtype(dtype), jnp.dtype("float32")}
  ours = hidden(cfg, held, batch, ALL, dtype=dtype)
  np.testing.assert_array_equal(ours, hidden(cfg, params, batch, dtype=dtype))


@pytest.fixture(scope="module")
def fresh(cfg):
  rows = [np.zeros((1, 1), np.int32)] * 3
  init = TinyAya(cfg, adapter=ALL).init
  return jax.jit(lambda key: adapters.split(init(key, *rows)["params"])[0])(jax.random.key(3))


def test_a_first_factor_is_as_wide_as_its_inputs_allow_and_the_second_is_nothing(fresh):
  for block in fresh["periods"].values():
    for first, second in FACTORS.values():
      limit = np.prod(block[first].shape[1:-1]) ** -0.5
      assert 0.8 * limit < np.abs(block[first]).max() <= limit and not np.any(block[second])
  assert not np.array_equal(fresh["periods"]["full"]["q_DR"][0], fresh["periods"]["full"]["q_DR"][1])


def test_the_merged_model_is_the_adapted_one(cfg, params, batch):
  tree = beside(cfg, params, SOME)
  merged = adapters.merged(tree, SOME)  # NumPy: on the host
  assert names(merged) == names(params) and isinstance(merged["periods"]["full"]["q_DNH"], np.ndarray)
  ours, theirs = hidden(cfg, tree, batch, SOME), hidden(cfg, merged, batch)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
  assert np.abs(theirs - hidden(cfg, params, batch)).max() > 0.1
  placed = adapters.merged(jax.tree.map(jnp.array, tree), SOME)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), placed, merged)
  for kept in (tree, jax.tree.map(jnp.array, tree)):
    rounded = adapters.merged(adapters.held(kept, jnp.bfloat16), SOME)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=3e-3), rounded, merged)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype("float32")}


def test_gradients_of_the_factors_are_those_of_the_merged_matrix_projected(cfg, params, batch, adapted, plain):
  merged = adapters.merged(adapted, ALL)
  full = jax.jit(graded(cfg, None))(merged, batch)
  np.testing.assert_allclose(plain[0], full[0], rtol=1e-5)
  expected = {}
  for block, matrices in full[1]["periods"].items():
    for name, (first, second) in FACTORS.items():
      one, other = (np.asarray(adapted["periods"][block][leaf]) for leaf in (first, second))
      d = np.asarray(matrices[name]).reshape(cfg.L, np.prod(one.shape[1:-1]), -1) * ALL.alpha / ALL.R
      flat, across = one.reshape(cfg.L, -1, ALL.R), other.reshape(cfg.L, ALL.R, -1)
      expected.setdefault(block, {}).update({
          first: (d @ across.swapaxes(1, 2)).reshape(one.shape),
          second: (flat.swapaxes(1, 2) @ d).reshape(other.shape)})
  assert_same(plain, (full[0], dict(periods=expected)))


@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=2, fsdp=2, context=2)], ids=str)
def test_the_mesh_changes_nothing(cfg, adapted, batch, plain, sizes):
  mesh = axes.mesh(**sizes)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
  spread = axes.shardings(mesh, adapted)
  with jax.set_mesh(mesh):
    advance = jax.jit(graded(cfg, ALL), in_shardings=(spread, rows))
    found = advance(jax.device_put(adapted, spread), jax.device_put(batch, rows))
  assert_same(found, plain)


def test_fp8_multiplies_the_frozen_matrices_and_not_the_adapters(cfg, params, adapted, batch):
  rows = batch["token_BT"], batch["segment_BT"], batch["position_BT"]

  def eights(params, adapter):
    model = TinyAya(cfg, adapter=adapter, matmul="fp8")
    return str(jax.make_jaxpr(model.apply)({"params": params}, *rows)).count("f8_e4m3fn")

  assert eights(adapted, ALL) == eights(params, None) > 0


ADAPTER = ("--config.adapter.rank=3", "--config.adapter.alpha=6.0", "--config.steps=4", "--config.save_every=2",
           "--config.accumulate=2", "--config.attention=reference")


def train(data, workdir, *more):
  return call("train", "sft.py:tiny_adapter", workdir, *fields(data, *ADAPTER, *more))


def tiny(data, experiment, *more):
  """The config of conftest.fields, as a verb reads it."""
  config = run.load_config(f"{ROOT / 'experiments' / experiment}")
  words = [field.removeprefix("--config.").partition("=") for field in fields(data, *more)]
  run.override(config, {name: value for name, _, value in words})
  return config


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
  """A checkpoint of random parameters with the sizes of conftest.fields."""
  from tiny_aya_jax.data import tokenizer

  folder, config = tmp_path_factory.mktemp("base"), tiny(data, "pretrain.py:tiny")
  sha256 = tokenizer.load(data / "tokenizer.model").sha256
  meta = dict(model=config.model.to_dict(), tokenizer_sha256=sha256, T=32)
  checkpoint.save(folder, 0, dict(params=random_params(config.model, seed=7), meta=meta), keep=1)
  return folder


@pytest.fixture(scope="module")
def whole(data, base, tmp_path_factory):
  """Four steps of adapters, two microbatches each; exported at the end."""
  workdir = tmp_path_factory.mktemp("whole")
  assert train(data, workdir, f"--config.init_from={base}", "--config.export_every=4") == 0
  return workdir


def test_a_checkpoint_holds_the_base_as_it_was_and_is_read_merged(base, whole):
  before, _ = checkpoint.restore_params(base)
  apart, meta = checkpoint.restore_apart(whole)
  assert meta["adapter"] == dict(rank=3, alpha=6.0, matrices=list(ADAPTED), dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, adapters.split(apart)[1], before)
  assert all(np.any(x) for x in jax.tree.leaves(adapters.split(apart)[0]))  # the second were 0
  merged, _ = checkpoint.restore_params(whole)
  expected = adapters.merged(jax.device_get(apart), adapters.described(meta["adapter"]))
  shapes, read = checkpoint.leaves(whole)
  assert shapes == {"/".join(path): leaf.shape for path, leaf in flatten_dict(expected).items()}
  for path in (("embedding_VD",), ("periods", "full", "q_DNH"), ("periods", "sliding_1", "down_FD")):
    np.testing.assert_array_equal(read("/".join(path)), flatten_dict(expected)[path])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), merged, expected)
  exported, _ = huggingface.read(whole / "huggingface" / "4")  # bfloat16
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-6), exported, expected)


def test_there_are_moments_of_adapters_alone(whole):
  prints = saved.meta(whole)["fingerprints"]
  moments = {name.partition("periods")[2] for name in prints["optimizer"] if name.rpartition("/")[2] != "count"}
  assert moments == {name.partition("periods")[2] for name in prints["params"] if adapters.is_factor(name)}
  assert len(moments) == 4 * 2 * 7


def test_adapters_resume_to_the_same_bits_and_no_others(data, base, whole, tmp_path, capsys):
  shutil.copytree(whole / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
  begun = (f"--config.init_from={base}", "--config.data.accept_change=True")
  for other, said in (("adapter.rank=4", "rank 4"), ("adapter.alpha=7.0", "alpha 7.0"),
                      ("adapter.matrices=('q',)", "matrices ['q']"), ("dtype=bfloat16", "dtype bfloat16")):
    assert train(data, tmp_path, *begun, f"--config.{other}") == 65
    assert said in (error := capsys.readouterr().err) and "was trained with adapter: rank 3" in error
  assert call("train", "sft.py:tiny_global", tmp_path, *fields(data, *begun)) == 65
  assert "config.adapter says: none" in capsys.readouterr().err
  assert train(data, tmp_path, *begun[:1]) == 0
  assert saved.meta(tmp_path)["fingerprints"] == saved.meta(whole)["fingerprints"]


def test_what_was_learnt_is_the_base_of_another_run(data, whole):
  config = tiny(data, "sft.py:tiny_adapter", *ADAPTER)
  mesh = axes.mesh(**config.mesh.to_dict())
  with jax.set_mesh(mesh):
    state = start.start(config, begin.Begin(saved.find(whole), False, 0, 0, {}, None, ""), mesh)
  fresh, again = adapters.split(state["params"])
  learnt, _ = checkpoint.restore_params(whole)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-7), again, learnt)
  assert not np.any(fresh["periods"]["full"]["q_RNH"]) and np.any(fresh["periods"]["full"]["q_DR"])


@pytest.mark.parametrize("more, said", [
    (("--config.init_from=",), "an adapter on random weights"),
    (("--config.adapter.rank=0",), "expected at least 1"),
    (("--config.adapter.alpha=0.0",), "more than 0"),
    (("--config.adapter.matrices=()",), "is empty"),
    (("--config.adapter.matrices=('qq',)",), "unknown config.adapter.matrices 'qq'"),
])
def test_what_cannot_be_is_refused_before_anything_is_written(data, base, tmp_path, capsys, more, said):
  assert train(data, tmp_path / "run", f"--config.init_from={base}", *more) == 65
  assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_moments_of_adapters_fork_to_no_other_run(data, whole, tmp_path, capsys):
  assert call("train", "sft.py:tiny_global", tmp_path / "run", *fields(
      data, f"--config.init_from={whole}", "--config.init_what=state")) == 65
  assert "was trained with adapter: rank 3" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(data, whole, base, tmp_path_factory):
  """Folders: merged, its base, and the adapter alone."""
  from tiny_aya_jax.data import tokenizer

  folder = tmp_path_factory.mktemp("exported")
  for name, place in (("merged", whole), ("base", base)):
    params, meta = checkpoint.restore_params(place)
    huggingface.write(folder / name, params, ml_collections.ConfigDict(meta["model"]),
                      tokenizer.load(data / "tokenizer.model"))
  assert call("export", "export.py:tiny", folder, f"--config.checkpoint={whole}", "--config.name=adapter",
              f"--config.tokenizer={data / 'tokenizer.model'}", "--config.form=adapter") == 0
  return folder


def test_an_exported_adapter_has_the_names_and_shapes_of_peft(exported, whole):
  from safetensors.numpy import load_file

  tensors = load_file(exported / "adapter" / "adapter_model.safetensors")
  config = json.loads((exported / "adapter" / "adapter_config.json").read_text())
  base, merged = (load_file(exported / name / "model.safetensors") for name in ("base", "merged"))
  assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6.0, "LORA")
  assert config["target_modules"] == sorted(
      ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
  adapted = [name for name in base if "_proj" in name]
  assert len(tensors) == 2 * len(adapted) == 2 * 7 * 4
  for name in adapted:
    place = f"base_model.model.{name.removesuffix('.weight')}"
    one, other = tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"]
    assert one.shape == (3, base[name].shape[1]) and other.shape == (base[name].shape[0], 3)
    np.testing.assert_allclose(base[name] + 2 * other @ one, merged[name], rtol=0, atol=1e-6)
  assert json.loads((exported / "adapter" / "parity.json").read_text())["largest_logit_difference"] < 1e-4


def test_only_a_run_with_adapters_exports_one(data, base, tmp_path, capsys):
  assert call("export", "export.py:tiny", tmp_path, f"--config.checkpoint={base}", "--config.form=adapter",
              f"--config.tokenizer={data / 'tokenizer.model'}") == 65
  assert "was trained without adapters" in capsys.readouterr().err


def test_peft_computes_the_logits_of_the_merged_model(exported):
  torch = pytest.importorskip("torch", reason="needs the parity extra")
  transformers = pytest.importorskip("transformers", reason="needs the parity extra")
  peft = pytest.importorskip("peft", reason="needs peft, beside the parity extra")
  load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
  token_BT = torch.tensor(np.random.default_rng(0).integers(0, 600, (2, 29)))
  with torch.no_grad():
    theirs = peft.PeftModel.from_pretrained(load(exported / "base"), str(exported / "adapter"))(token_BT).logits
    ours, base = (load(exported / name)(token_BT).logits for name in ("merged", "base"))
  difference = (theirs - ours).abs().max()
  print(f"PEFT: logits up to {ours.abs().max():.1f} differ by {difference:.1e} at most")
  assert difference < 1e-4 < (ours - base).abs().max()


def test_plan_counts_moments_and_gradients_of_adapters_alone():
  config = run.load_config(f"{ROOT / 'experiments/sft.py'}:adapter")
  sizes = dict(data=1, fsdp=1, tensor=1, context=1)
  found = plan.estimate(config, sizes)
  count = config.adapter.rank * 36 * sum(  # inputs and outputs of each matrix
      (2048 + 2048, 2048 + 512, 2048 + 512, 2048 + 2048, *[2048 + 11008] * 3))
  assert found["moments"] == 8 * count
  assert found["parameters"] == 2 * 3_349_227_520 + 4 * count
