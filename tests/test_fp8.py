"""8-bit matmuls: which operands, in which format, how far from exact, and whether it learns."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from conftest import full
from test_transformer import graded

from tiny_aya_jax import axes
from tiny_aya_jax.model import fp8
from tiny_aya_jax.model.transformer import Block, TinyAya
from tiny_aya_jax.train import guard, step

E4M3, E5M2 = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")
M, C, R = 48, 64, 32


def dots(jaxpr):
  """((left dtype, shape), (right dtype, shape)) of every dot in a jaxpr; a loop counts once."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield tuple((operand.aval.dtype, operand.aval.shape) for operand in equation.invars)
    for inner in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from dots(inner)


def formats(found):
  """Dots with an 8-bit operand, counted by (left, right) dtype."""
  pairs = [(left, right) for (left, _), (right, _) in found if {left, right} & {E4M3, E5M2}]
  return {pair: pairs.count(pair) for pair in set(pairs)}


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_block_has_seven_forward_dots_in_e4m3_and_twice_seven_with_an_e5m2_gradient(
    cfg, params, dtype):
  weights = jax.tree.map(lambda leaf: leaf[0], params["periods"]["full"])
  position_BT = np.arange(24, dtype=np.int32).reshape(1, 24)
  block = Block(cfg, jnp.dtype(dtype), "reference", None, "fp8")

  def run(weights, x_BTD):
    return block.apply({"params": weights}, x_BTD, np.ones_like(position_BT), position_BT)

  x_BTD = jnp.ones((1, 24, cfg.D), dtype)
  forward = list(dots(jax.make_jaxpr(run)(weights, x_BTD).jaxpr))
  assert formats(forward) == {(E4M3, E4M3): 7}
  right = [shape for (left, _), (_, shape) in forward if left == E4M3]
  D, F, heads, keys = cfg.D, cfg.F, cfg.N * cfg.H, cfg.K * cfg.H
  assert sorted(right) == sorted(
      [(D, heads), (D, keys), (D, keys), (heads, D), (D, F), (D, F), (F, D)])
  both = jax.grad(lambda *args: run(*args).astype(jnp.float32).sum(), argnums=(0, 1))
  assert formats(dots(jax.make_jaxpr(both)(weights, x_BTD).jaxpr)) == {
      (E4M3, E4M3): 7,
      (E5M2, E4M3): 7,  # dx = g w^T
      (E4M3, E5M2): 7,  # dw = x^T g
  }


def test_embedding_attention_and_head_stay_as_they_are(cfg, params, batch):
  found, plain = (
      list(dots(jax.make_jaxpr(graded(cfg, matmul=matmul))(params, batch).jaxpr))
      for matmul in ("fp8", "dtype"))
  assert formats(plain) == {}
  assert formats(found) == {(E4M3, E4M3): 28, (E5M2, E4M3): 28, (E4M3, E5M2): 28}
  assert len(found) == len(plain)  # so, every other dot is there, and in fp32


def test_what_is_kept_for_the_backward_pass_is_one_byte_an_element():
  x, w = jnp.ones((M, C), jnp.bfloat16), jnp.ones((C, R), jnp.bfloat16)
  kept = jax.tree.leaves(jax.eval_shape(lambda x, w: jax.vjp(fp8.dot, x, w)[1], x, w))
  assert sorted((leaf.dtype.name, leaf.shape) for leaf in kept) == [
      ("float32", ()), ("float32", ()), ("float8_e4m3fn", (M, C)), ("float8_e4m3fn", (C, R))]


@pytest.mark.parametrize("dtype, short", (("bfloat16", "bf16"), ("float32", "f32")))
def test_the_program_is_a_dot_of_8_bit_operands_whose_own_result_a_scalar_multiplies(dtype, short):
  """The form that XLA:GPU makes a cublasLt FP8 call with the scale in it (gemm_rewriter.cc)."""
  x, w = jnp.ones((M, C), dtype), jnp.ones((C, R), dtype)
  text = jax.jit(lambda x, w, g: jax.vjp(fp8.dot, x, w)[1](g)).lower(x, w, x @ w).as_text()
  text += jax.jit(fp8.dot).lower(x, w).as_text()
  for left, right, shape in (
      (f"{M}x{C}xf8E4M3FN", f"{C}x{R}xf8E4M3FN", f"{M}x{R}x{short}"),
      (f"{M}x{R}xf8E5M2", f"{C}x{R}xf8E4M3FN", f"{M}x{C}x{short}"),
      (f"{M}x{C}xf8E4M3FN", f"{M}x{R}xf8E5M2", f"{C}x{R}x{short}"),
  ):
    types = rf"\(tensor<{left}>, tensor<{right}>\) -> tensor<{shape}>"
    dot = re.search(rf"(%\S+) = stablehlo.dot_general .*{types}", text)
    assert dot, (left, right, shape)
    after = text[dot.end():]
    scaled = re.search(rf"stablehlo.multiply {dot[1]}, (%\S+) : tensor<{shape}>", after)
    assert scaled, after
    types = rf"\(tensor<{short}>\) -> tensor<{shape}>"
    assert re.search(rf"{scaled[1]} = stablehlo.broadcast_in_dim .*{types}", after)


def tensors(kind, dtype, seed=0):
  """x [M, C], w [C, R] and a gradient [M, R], at scales that 8 bits do not hold unscaled."""
  random = np.random.default_rng(seed)
  scales = dict(plain=(1, 1, 1), small_and_large=(1e-6, 1e4, 1e-6),
                large_and_small=(1e4, 1e-6, 1e4),
                far=(1e-20, 1e20, 1e-5), outliers=(1, 1, 1))[kind]
  drawn = [random.normal(0, scale, shape)
           for scale, shape in zip(scales, ((M, C), (C, R), (M, R)))]
  if kind == "outliers":
    for array, factor in zip(drawn, (1e6, 1e3, 1e12)):
      array[3, 5] *= factor
  return [jnp.asarray(array, dtype) for array in drawn]


def exact(*arrays):
  return [np.asarray(array, np.float64) for array in arrays]


def rounding(array, dtype):
  """The most that quantising may move each element: half a step of a normal or subnormal number."""
  info, largest = jnp.finfo(dtype), np.abs(array).max()
  step = float(info.smallest_subnormal) * 2 * largest / float(info.max)  # the scale is at most that
  return np.maximum(np.abs(array) * float(info.eps) / 2, step / 2)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kind", ("plain", "small_and_large", "large_and_small", "far", "outliers"))
def test_values_and_gradients_are_exact_within_the_rounding_of_the_formats(kind, dtype):
  x, w, g = tensors(kind, dtype)
  y, pull = jax.vjp(jax.jit(fp8.dot), x, w)
  dx, dw = pull(g)
  assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
  x, w, g, y, dx, dw = exact(x, w, g, y, dx, dw)
  last = float(jnp.finfo(dtype).eps)
  for found, (a, a8), (b, b8) in (
      (y, (x, E4M3), (w, E4M3)), (dx, (g, E5M2), (w.T, E4M3)), (dw, (x.T, E4M3), (g, E5M2)),
  ):
    da, db = rounding(a, a8), rounding(b, b8)
    allowed = da @ np.abs(b) + np.abs(a) @ db + da @ db
    assert (np.abs(found - a @ b) <= allowed + last * (np.abs(a @ b) + allowed) + 1e-30).all()
    error = np.linalg.norm(found - a @ b) / np.linalg.norm(a @ b)
    assert error < 0.08, error  # measured: 0.039 forward, 0.062 backward


def test_the_largest_values_fit_the_format():
  limit = float(jnp.finfo(jnp.bfloat16).max)
  for format in (E4M3, E5M2):
    for scale in (1e-30, 1.0, 447.9, 448.0, 449.0, limit):
      x8, factor = fp8.quantised(jnp.asarray([scale, -scale, scale / 3], jnp.float32), format)
      x8, factor = np.asarray(x8, np.float64), float(factor)
      assert np.log2(factor) % 1 == 0 and np.abs(x8).max() <= float(jnp.finfo(format).max)
      np.testing.assert_allclose(x8[0] * factor, scale, rtol=float(jnp.finfo(format).eps) / 2)


def test_zeros_give_zeros_and_infinities_are_not_hidden():
  zeros, ones = jnp.zeros((M, C), jnp.bfloat16), jnp.ones((C, R), jnp.bfloat16)
  y, pull = jax.vjp(fp8.dot, zeros, ones)
  dx, dw = pull(jnp.ones_like(y))
  assert not y.any() and not dw.any() and (dx == R).all()
  y, pull = jax.vjp(fp8.dot, zeros.at[:].set(1), ones)
  assert not any(d.any() for d in pull(jnp.zeros_like(y)))
  for bad in (jnp.inf, jnp.nan):
    assert jnp.isnan(fp8.dot(zeros.at[0, 0].set(bad), ones)).all()


def apart(one, other):
  """Relative distance of two gradient trees, the largest of any leaf."""
  return max(jax.tree.leaves(jax.tree.map(
      lambda a, b: float(np.linalg.norm(exact(a)[0] - exact(b)[0]) / np.linalg.norm(exact(b)[0])),
      one, other)))


def assert_same(one, other):
  """Measured 3e-6; one element that rounds the other way elsewhere moves a gradient by 1e-3."""
  np.testing.assert_allclose(one[0], other[0], rtol=1e-4)
  assert apart(one[1], other[1]) < 5e-3


@pytest.fixture(scope="module")
def eight(cfg, params, batch):
  """Loss and gradients with 8-bit matmuls, in fp32, in the plainest setting on one device."""
  return jax.jit(graded(cfg, matmul="fp8"))(params, batch)


def test_the_gradient_of_the_whole_model_has_the_length_and_direction_of_bfloat16s(
    cfg, params, batch, eight):
  """Through eight layers of random weights roundings add up as unbiased noise of their size does.

  Such noise in their place, six draws: 0.20 to 0.27 apart, 0.94 to 0.99 along the exact gradient.
  """
  plain = jax.jit(graded(cfg, dtype=jnp.bfloat16))(params, batch)
  (loss, mine), (plain_loss, theirs) = (
      (loss, np.concatenate([exact(leaf)[0].ravel() for leaf in jax.tree.leaves(gradients)]))
      for loss, gradients in (eight, plain))
  assert 1e-5 < abs(loss / plain_loss - 1) < 1e-2  # measured 3.3e-3
  assert np.linalg.norm(mine - theirs) < 0.3 * np.linalg.norm(theirs)  # measured 0.23
  assert 0.9 < mine @ theirs / (theirs @ theirs) < 1.1  # measured 0.94


@pytest.mark.parametrize("settings", (dict(remat="full"), dict(unroll=2)), ids=str)
def test_remat_and_scan_change_nothing(cfg, params, batch, eight, settings):
  loss, gradients = jax.jit(graded(cfg, matmul="fp8", **settings))(params, batch)
  assert_same((loss, gradients), eight)


def test_accumulation_changes_nothing(cfg, params, batch):
  loss = functools.partial(
      step.next_token_loss, model=TinyAya(cfg, matmul="fp8"),
      config=ml_collections.ConfigDict(dict(chunk=8, z_loss=0.0)))
  tx = optax.sgd(1.0)
  state = dict(step=jnp.int32(0), params=params, optimizer=tx.init(params), guard=guard.fresh(128))
  results = []
  for accumulate in (1, 4):
    advance = jax.jit(functools.partial(
        step.train_step, loss=loss, tx=tx, accumulate=accumulate, sources=1, sigma=6.0))
    rest = dict(source_B=np.zeros(8, np.int32), vote_P=np.zeros(1, np.int32))
    after, report = advance(state, batch | rest)
    gradients = jax.tree.map(jnp.subtract, state["params"], after["params"])
    results.append((report["loss"], gradients))
  assert_same(*results)  # the parts have scales of their own: powers of two, so the same roundings


@pytest.mark.parametrize("sizes", (
    dict(data=2, fsdp=2, tensor=2), dict(data=2, fsdp=2, context=2)), ids=str)
def test_the_mesh_changes_nothing_as_the_scale_is_of_the_whole_tensor(
    cfg, params, batch, eight, sizes):
  mesh = axes.mesh(**sizes)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
  spread = axes.shardings(mesh, params)
  with jax.set_mesh(mesh):
    graded_step = jax.jit(graded(cfg, matmul="fp8"), in_shardings=(spread, rows))
    loss, gradients = graded_step(jax.device_put(params, spread), jax.device_put(batch, rows))
  assert_same((loss, gradients), eight)


T = 32
TINY = ml_collections.ConfigDict(dict(
    D=64, F=128, N=4, K=2, H=16, V=256, L=1, window=16, rope_theta=50000.0, logit_scale=1.0,
    norm_epsilon=1e-5))


def walks(steps, rows, T, seed=0):
  """Random walks [steps, rows, T + 1] on a graph with four successors, of 4, 3, 2 and 1 in 10."""
  random = np.random.default_rng(seed)
  successor = random.integers(0, TINY.V, (TINY.V, 4))
  token = np.zeros((steps * rows, T + 1), np.int32)
  token[:, 0] = random.integers(0, TINY.V, steps * rows)
  choice = random.choice(4, (steps * rows, T), p=(0.4, 0.3, 0.2, 0.1))
  for t in range(T):
    token[:, t + 1] = successor[token[:, t], choice[:, t]]
  return token.reshape(steps, rows, T + 1)


def curve(steps, **settings):
  """Training losses [steps] of a tiny model on random walks, whose entropy is 1.28 nats a token."""
  model, tx = TinyAya(TINY, **settings), optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, steps), b2=0.95))
  token_SBT = jnp.asarray(walks(steps, 8, T))
  position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (8, T))
  ones_BT = jnp.ones((8, T), jnp.int32)

  def loss(params, token_BT):
    sum, count, _ = step.next_token_loss(params, dict(
        token_BT=token_BT[:, :-1], target_BT=token_BT[:, 1:], segment_BT=ones_BT,
        position_BT=position_BT, weight_BT=ones_BT.astype(jnp.float32),
    ), model=model, config=ml_collections.ConfigDict(dict(chunk=T, z_loss=0.0)))
    return sum / count

  def advance(state, token_BT):
    params, moments = state
    value, gradients = jax.value_and_grad(loss)(params, token_BT)
    updates, moments = tx.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  params = TinyAya(TINY).init(jax.random.key(0), ones_BT, ones_BT, ones_BT)["params"]
  run = jax.jit(
      lambda state: jax.lax.scan(advance, state, token_SBT)[1],
      compiler_options=dict(xla_backend_optimization_level=1),  # at 0 a step takes 4 times as long
  )
  return np.asarray(run((params, tx.init(params))))


@full
def test_fp8_learns_what_bfloat16_and_float32_learn():
  losses = {
      name: curve(300, **settings) for name, settings in dict(
          float32=dict(), bfloat16=dict(dtype=jnp.bfloat16),
          fp8=dict(dtype=jnp.bfloat16, matmul="fp8"),
      ).items()}
  last = {name: curve[-50:].mean() for name, curve in losses.items()}
  print(last)  # measured: 1.3915, 1.3913, 1.3928
  assert losses["fp8"][0] > 5.5 and 1.28 < last["fp8"] < 1.5
  assert not np.array_equal(losses["fp8"], losses["bfloat16"])
  for other in ("float32", "bfloat16"):
    assert abs(last["fp8"] / last[other] - 1) < 0.01, last
