"""The model: what may not change the loss or its gradients, and what no token may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from conftest import DOCUMENTS, T, backends, packed
from tiny_aya_jax import axes
from tiny_aya_jax.model import attention, attention_splash, losses, transformer
from tiny_aya_jax.model.transformer import TinyAya

MESHES = [  # the last two, which split most letters, with every backend
  (dict(data=8, fsdp=1), "reference"),
  (dict(fsdp=8), "reference"),
  (dict(fsdp=4, tensor=2), "reference"),
  *((dict(data=2, fsdp=2, tensor=2), backend) for backend in backends()),
  *((dict(data=2, fsdp=2, context=2), backend) for backend in backends()),
]
BACKENDS = backends()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(attention, "CHUNK", 12)  # 20 tokens: a block and a rest
  monkeypatch.setattr(attention_splash, "INTERPRET", True)


@pytest.fixture(scope="module")
def plain(cfg, params, batch):
  """Loss and gradients of the plainest setting on one device."""
  return jax.jit(graded(cfg))(params, batch)


def graded(cfg, chunk=512, **settings):
  """(params, batch) -> (mean loss, gradients)."""
  model = TinyAya(cfg, **settings)

  def loss(params, batch):
    hidden_BTD = model.apply(
      {"params": params}, batch["token_BT"], batch["segment_BT"], batch["position_BT"]
    )
    sum, count, _ = losses.next_token(
      hidden_BTD,
      params["embedding_VD"],
      batch["target_BT"],
      batch["weight_BT"],
      logit_scale=cfg.logit_scale,
      z_loss=1e-3,
      chunk=chunk,
    )
    return sum / count

  return jax.value_and_grad(loss)


def assert_same(one, other):
  """The law of fp32: relative 1e-5 on the loss, 1e-4 on every gradient leaf."""
  np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
  for (path, mine), theirs in zip(
    jax.tree_util.tree_leaves_with_path(one[1]), jax.tree.leaves(other[1])
  ):
    mine, theirs = np.asarray(mine), np.asarray(theirs)
    assert np.linalg.norm(theirs) > 0, jax.tree_util.keystr(path)
    error = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)
    assert error < 1e-4, f"{jax.tree_util.keystr(path)} is off by {error:.1e}"


@pytest.mark.parametrize("sizes, backend", MESHES, ids=str)
def test_the_mesh_changes_nothing(cfg, params, batch, plain, sizes, backend):
  mesh = axes.mesh(**sizes)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
  spread = axes.shardings(mesh, params)
  with jax.set_mesh(mesh):
    step = jax.jit(graded(cfg, backend=backend), in_shardings=(spread, rows))
    loss, gradients = step(jax.device_put(params, spread), jax.device_put(batch, rows))
  assert_same((loss, gradients), plain)


@pytest.mark.parametrize(
  "settings",
  [
    dict(remat="full"),
    dict(unroll=2),
    dict(backend="chunked", remat="full"),
    dict(chunk=7),
  ],
  ids=str,
)
def test_remat_unroll_and_chunking_change_nothing(cfg, params, batch, plain, settings):
  assert_same(jax.jit(graded(cfg, **settings))(params, batch), plain)


def test_remat_recomputes_and_unroll_unrolls(cfg, params, batch):
  """Otherwise the test above would compare a program with itself."""

  def program(**settings):
    return str(jax.make_jaxpr(graded(cfg, **settings))(params, batch))

  assert "remat" in program(remat="full") or "checkpoint" in program(remat="full")
  assert "remat" not in program() and "checkpoint" not in program()
  assert program(unroll=2) != program()


def test_the_gradients_of_the_table_add_up_from_lookup_and_head(cfg, params, batch, plain):
  def loss(params):
    hidden_BTD = TinyAya(cfg).apply(
      {"params": params}, batch["token_BT"], batch["segment_BT"], batch["position_BT"]
    )
    logits_BTV = transformer.logits(params, hidden_BTD, cfg)
    total_BT = jax.nn.logsumexp(logits_BTV, -1)
    target_BT = jnp.take_along_axis(logits_BTV, batch["target_BT"][..., None], -1)[..., 0]
    nats_BT = total_BT - target_BT + 1e-3 * total_BT**2
    return (batch["weight_BT"] * nats_BT).sum() / batch["weight_BT"].sum()

  assert_same(jax.jit(jax.value_and_grad(loss))(params), plain)


def test_a_frequent_token_keeps_its_gradient_in_bfloat16(cfg):
  """A tenth of a text is one token: summed in bfloat16, its gradient would lose half."""
  random = np.random.default_rng(0)
  token_BT = random.integers(0, cfg.V, (8, 4000), dtype=np.int32)
  token_BT[random.random(token_BT.shape) < 0.1] = 7
  weight_BTD = random.uniform(0.5, 1.5, (*token_BT.shape, cfg.D)).astype(np.float32)

  def gradient(dtype):
    def loss(embedding_VD):
      return (transformer.look_up(embedding_VD, token_BT, dtype) * weight_BTD).sum()

    return np.asarray(jax.jit(jax.grad(loss))(np.ones((cfg.V, cfg.D), np.float32)))

  exact, rounded = gradient(jnp.float32), gradient(jnp.bfloat16)
  np.testing.assert_allclose(exact[7], weight_BTD[token_BT == 7].sum(0), rtol=1e-5)
  np.testing.assert_allclose(rounded, exact, rtol=2e-3)


@pytest.fixture(scope="module", params=BACKENDS)
def reach(request, cfg, params):
  """(documents of a row, positions whose hidden states count) -> the positions they see.

  Every token of the row is another one, so a row of the table's gradient is the gradient of one
  position's embedding; the head is not in it. Boolean [T], exact: bitwise zero or not.
  """
  token_BT = np.random.default_rng(3).permutation(cfg.V)[:T].astype(np.int32)[None]
  model = TinyAya(cfg, backend=request.param)

  @jax.jit
  @jax.grad
  def gradient(params, segment_BT, position_BT, counted_BT):
    hidden_BTD = model.apply({"params": params}, token_BT, segment_BT, position_BT)
    direction = jnp.cos(jnp.arange(hidden_BTD.size)).reshape(hidden_BTD.shape)
    return jnp.sum(jnp.where(counted_BT[..., None], hidden_BTD * direction, 0))

  def seen(documents, counted):
    counted_BT = np.isin(np.arange(T), counted)[None]
    gradient_VD = np.asarray(gradient(params, *packed([documents], T), counted_BT)["embedding_VD"])
    assert np.isfinite(gradient_VD).all()
    return np.abs(gradient_VD[token_BT[0]]).max(-1) > 0

  return seen


def test_the_gradient_of_a_document_with_respect_to_the_others_is_exactly_zero(reach):
  for start, stop in ((0, 8), (8, 13), (13, 17), (17, 20)):  # three documents and padding
    own = np.arange(start, stop)
    np.testing.assert_array_equal(reach((8, 5, 4), own), np.isin(np.arange(T), own))


def test_the_future_is_invisible_and_the_whole_past_is_seen(reach):
  for at in (0, 4, 12, T - 1):  # the full layers see beyond the window of 5
    np.testing.assert_array_equal(reach((T,), at), np.arange(T) <= at)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_is_the_same_alone_and_packed_behind_another(cfg, params, batch, backend):
  def hidden(token_BT, documents):
    segment_BT, position_BT = packed(documents, token_BT.shape[1])
    return np.asarray(
      jax.jit(TinyAya(cfg, backend=backend).apply)(
        {"params": params}, token_BT, segment_BT, position_BT
      )
    )

  together = hidden(batch["token_BT"], DOCUMENTS)
  alone = np.zeros_like(batch["token_BT"])
  for row, lengths in enumerate(DOCUMENTS):  # the last document of each row moves to its front
    stop = sum(lengths)
    alone[row, : lengths[-1]] = batch["token_BT"][row, stop - lengths[-1] : stop]
  apart = hidden(alone, [lengths[-1:] for lengths in DOCUMENTS])
  for row, lengths in enumerate(DOCUMENTS):
    stop = sum(lengths)
    packed_TD, alone_TD = together[row, stop - lengths[-1] : stop], apart[row, : lengths[-1]]
    np.testing.assert_allclose(packed_TD, alone_TD, rtol=0, atol=1e-6 * np.abs(alone_TD).max())


def test_only_distances_within_a_document_count(cfg, params, batch):
  apply = jax.jit(TinyAya(cfg).apply)
  rest = batch["segment_BT"]
  here = apply({"params": params}, batch["token_BT"], rest, batch["position_BT"])
  moved = apply({"params": params}, batch["token_BT"], rest, batch["position_BT"] + 100 * rest)
  wrong = apply({"params": params}, batch["token_BT"], rest, 2 * batch["position_BT"])
  np.testing.assert_allclose(moved, here, atol=1e-4)
  assert np.abs(wrong - here).max() > 0.1


def test_layer_norm_is_the_definition_in_fp32_and_keeps_the_dtype(cfg):
  random = np.random.default_rng(0)
  x_BTD = (random.normal(size=(2, 3, cfg.D)) * 3 + 50).astype(np.float32)
  norm_D = random.uniform(0.5, 2, cfg.D).astype(np.float32)
  for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 2e-2)):
    given = np.asarray(jnp.asarray(x_BTD, dtype), np.float64)
    centred = given - given.mean(-1, keepdims=True)
    expected = centred / np.sqrt(given.var(-1, keepdims=True) + cfg.norm_epsilon) * norm_D
    out = transformer.layer_norm(jnp.asarray(x_BTD, dtype), norm_D, cfg)
    assert out.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(out, np.float64), expected, atol=tolerance, rtol=tolerance
    )


def test_rotation_turns_neighbouring_pairs_by_the_position(cfg):
  x_BTNH = np.random.default_rng(0).normal(size=(1, 6, cfg.N, cfg.H))
  position_BT = np.array([[0, 1, 2, 0, 7, 300]])
  pair = x_BTNH[..., 0::2] + 1j * x_BTNH[..., 1::2]
  theta = cfg.rope_theta ** (-np.arange(0, cfg.H, 2) / cfg.H)
  turned = pair * np.exp(1j * position_BT[..., None, None] * theta)
  out = np.asarray(
    transformer.rotate(jnp.asarray(x_BTNH, jnp.float32), position_BT, cfg.rope_theta)
  )
  np.testing.assert_allclose(out[..., 0::2], turned.real, atol=1e-4)
  np.testing.assert_allclose(out[..., 1::2], turned.imag, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_activations_have_the_asked_dtype_and_logits_are_fp32(cfg, params, batch, dtype):
  rows = batch["token_BT"], batch["segment_BT"], batch["position_BT"]
  hidden_BTD = jax.eval_shape(TinyAya(cfg, dtype).apply, {"params": params}, *rows)
  assert hidden_BTD.dtype == dtype
  logits_BTV = jax.eval_shape(lambda x: transformer.logits(params, x, cfg), hidden_BTD)
  assert logits_BTV.dtype == jnp.float32
  assert logits_BTV.shape == (*batch["token_BT"].shape, cfg.V)
