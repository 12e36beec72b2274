"""proof: the kernels of a program, read from its text; a backend that is wrong is found before a step."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from conftest import backends, packed
from test_hlo import module
from tiny_aya_jax import axes, plan, run
from tiny_aya_jax.model import attention, attention_splash, fp8
from tiny_aya_jax.train import proof, step

ROOT = pathlib.Path(__file__).parents[1]
B, T, N, K, H = 2, 16, 4, 2, 8


def compiled(backend, matmul="dtype"):
  """HLO of one attention with a projection before it, and gradients, for this machine."""
  segment_BT, position_BT = packed(((7, 9), (16,)), T)

  def value(x_BTD, w_DD):
    flat = (fp8.dot if matmul == "fp8" else jnp.matmul)(x_BTD.reshape(-1, N * H), w_DD)
    x_BTNH = flat.reshape(B, T, N, H)
    return attention.attention(
        x_BTNH, x_BTNH[:, :, :K], x_BTNH[:, :, K:], segment_BT=segment_BT, position_BT=position_BT,
        window=5, backend=backend,
    ).sum()

  shapes = jax.ShapeDtypeStruct((B, T, N * H), jnp.float32), jax.ShapeDtypeStruct((N * H,) * 2, jnp.float32)
  return jax.jit(jax.grad(value, argnums=(0, 1))).lower(*shapes).compile().as_text()


@pytest.fixture(scope="module")
def texts():
  return {"chunked": compiled("chunked", "fp8"), "reference": compiled("reference")}


def test_attention_by_xla_is_said_to_be_xla(texts):
  assert proof.kernels(texts["reference"], "reference", "dtype") == "attention reference: XLA"
  assert proof.kernels(texts["chunked"], "chunked", "dtype") == "attention chunked: XLA"


def test_8_bit_matmuls_are_found_or_refused(texts):
  said = proof.kernels(texts["chunked"], "chunked", "fp8")
  assert said == "attention chunked: XLA, matmul fp8: e4m3, e5m2"
  with pytest.raises(run.Refused, match="no e4m3 and no e5m2"):
    proof.kernels(texts["reference"], "reference", "fp8")
  with pytest.raises(run.Refused, match="holds no e5m2"):
    proof.kernels(texts["chunked"].replace("f8e5m2", "bf16"), "chunked", "fp8")


def calls(*named):
  """HLO with a custom call for each (target, name of a Pallas kernel or '')."""
  return module("\n".join(
      f'  %k.{at} = f32[4,8]{{1,0}} custom-call(%p), custom_call_target="{target}", '
      f'metadata={{op_name="jit(step)/{name}/pallas_call"}}' if name else
      f'  %k.{at} = f32[4,8]{{1,0}} custom-call(%p), custom_call_target="{target}"'
      for at, (target, name) in enumerate(named)
  ))


SPLASH = [("tpu_custom_call", f"splash_mha_{name}") for name in (
    "fwd_segmented_residuals", "dkv_segmented_no_residuals")]
CUDNN = [("__cudnn$fmhaSoftmax", ""), ("__cudnn$fmhaSoftmaxBackward", "")]
OTHER = [("AllocateBuffer", ""), ("__cublas$lt$matmul$f8", "")]


@pytest.mark.parametrize("backend, kernels", [("splash", SPLASH), ("cudnn", CUDNN)])
def test_a_kernel_is_there_forward_and_backward_or_the_program_is_refused(backend, kernels):
  said = proof.kernels(calls(*kernels, *OTHER), backend, "dtype")
  assert said == f"attention {backend}: " + ", ".join(
      sorted(name or target for target, name in kernels))
  for held in (OTHER, kernels[:1], kernels[1:]):
    with pytest.raises(run.Refused, match=f"is '{backend}' and .* one forward and one backward"):
      proof.kernels(calls(*held), backend, "dtype")


@pytest.mark.parametrize("asked, held", [
    ("chunked", SPLASH), ("reference", CUDNN), ("splash", CUDNN + SPLASH), ("cudnn", SPLASH)])
def test_a_kernel_that_was_not_asked_for_is_refused(asked, held):
  with pytest.raises(run.Refused, match=f"is '{asked}' and the compiled program attends with"):
    proof.kernels(calls(*held), asked, "dtype")


@pytest.fixture
def config(monkeypatch):
  monkeypatch.setattr(attention_splash, "INTERPRET", True)
  config = run.load_config(f"{ROOT / 'experiments/pretrain.py'}:tiny")
  config.model.update(N=N, K=K, H=H)
  return config


def check(config, **sizes):
  mesh = axes.mesh(**sizes)
  with jax.set_mesh(mesh):
    proof.check_attention(config, mesh)


@pytest.mark.parametrize("sizes, dtype", [
    (dict(data=2, fsdp=2, tensor=2), "float32"), (dict(fsdp=2, context=4), "bfloat16")])
@pytest.mark.parametrize("backend", backends())
def test_every_backend_equals_reference_on_every_mesh(config, backend, sizes, dtype, capsys):
  config.attention, config.dtype = backend, dtype
  check(config, **sizes)
  said = capsys.readouterr().out
  assert said.startswith(f"attention {backend} equals reference") or backend == "reference" and not said


def shifted(window):
  """A backend whose window is one too wide, or else whose documents see each other."""
  def broken(q, k, v, segment_BT, position_BT, segment_BS, position_BS, asked):
    if window and asked:
      asked += 1
    elif not window:
      segment_BT = segment_BS = jnp.ones_like(segment_BT)
    return attention.reference(q, k, v, segment_BT, position_BT, segment_BS, position_BS, asked)

  return broken


def test_a_broken_backend_is_refused(config, monkeypatch):
  config.dtype = "bfloat16"
  rolled = lambda q, *rest: attention.reference(jnp.roll(q, 1, axis=0), *rest)  # another row's queries
  for broken in (shifted(True), shifted(False), rolled, lambda q, *_: q * jnp.nan):
    monkeypatch.setitem(attention.BACKENDS, "chunked", broken)
    with pytest.raises(run.Refused, match="'chunked' differs from 'reference' by .* at most 3e-02"):
      check(config)


@pytest.fixture
def own_cache(monkeypatch):
  """No folder in the environment; JAX's setting as it was, afterwards."""
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update("jax_compilation_cache_dir", before)
  compilation_cache.reset_cache()


def test_a_program_is_kept_in_the_workdir_and_a_damaged_one_compiled_anew(
    config, own_cache, tmp_path, monkeypatch, capsys
):
  def compiled(*_):
    return jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((4, 4))).compile()

  def said():
    proof.keep_programs(tmp_path)
    assert jnp.array_equal(proof.program(config, axes.mesh(), None, 1)(x), jnp.sin(x) @ x)
    return capsys.readouterr().out

  x = jnp.eye(4)
  monkeypatch.setattr(step, "compiled", compiled)
  folder = tmp_path / "compilation_cache"
  assert f"(cache miss, kept in {folder})" in said()
  assert "(cache hit), " in said() and "attention chunked: XLA" in said()
  for entry in folder.glob("*-cache"):
    entry.write_bytes(entry.read_bytes()[:100])
  with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
    assert "(cache hit)" not in said()


TPU = """
import jax
from tiny_aya_jax import axes, chips, plan, run
from tiny_aya_jax.train import proof, step

config = run.load_config("experiments/pretrain.py")
config.model.update(D=128, N=2, K=1, H=128, F=128, V=256, L=1, window=64)
config.data.T, config.data.batch, config.loss.chunk = 256, 8, 64
mesh = axes.mesh(data=2, devices=plan.devices(chips.parse("2xv5e:2x2")))
print([[chip.slice_index for chip in replica.flat] for replica in mesh.devices])
compiled = step.compiled(config, mesh, lambda step: 1e-3, sources=3)
print(proof.kernels(compiled.as_text(), "splash", "dtype"))
state = step.abstract(mesh, jax.eval_shape(step.scratch(config)))
print(jax.tree.all(jax.tree.map(lambda out, leaf: out.is_equivalent_to(leaf.sharding, leaf.ndim),
                                compiled.output_shardings[0], state)))
"""


def test_two_tpu_slices_hold_splash_and_give_the_state_back_as_they_took_it():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
  environment.update(plan.COMPILE_ONLY)
  done = subprocess.run([sys.executable, "-c", TPU], env=environment, capture_output=True, text=True,
                        timeout=300, cwd=ROOT)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.splitlines() == [
      "[[0, 0, 0, 0], [1, 1, 1, 1]]",
      "attention splash: splash_mha_dkv_segmented_no_residuals, splash_mha_fwd_segmented_residuals",
      "True",
  ]
