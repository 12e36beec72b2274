"""attention: every backend against a slow loop; windows counted, the future unseen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import backends, packed
from tiny_aya_jax import axes
from tiny_aya_jax.model import attention, attention_splash

B, T, N, K, H = 2, 23, 6, 2, 16
ONE = ((23,), (23,))
PACKED = ((7, 1, 9), (10, 13))
# On a GPU the kernel is measured: TEST_PLATFORMS=cuda python -m pytest tests/test_attention.py
gpu = pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="no GPU: unmeasured")
BACKENDS = [*backends(), pytest.param("cudnn", marks=gpu)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(attention, "CHUNK", 8)  # 23 tokens: two blocks and a rest
  monkeypatch.setattr(attention_splash, "INTERPRET", True)


def heads(T=T, seed=0, dtype=jnp.float32, scale=1.0):
  random = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
  q, k, v = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
  return q * scale, k, v


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def attend(q, k, v, documents, window, backend):
  segment_BT, position_BT = packed(documents, q.shape[1])
  return attention.attention(
    q, k, v, segment_BT=segment_BT, position_BT=position_BT, window=window, backend=backend
  )


def loop(q, k, v, documents, window):
  """The definition, one query at a time, in fp64; documents are the only thing it knows."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for row, lengths in enumerate(documents):
    starts = np.cumsum([0, *lengths])
    for start, length in zip(starts, [*lengths, q.shape[1] - sum(lengths)]):
      for at in range(start, start + length):
        first = start if window is None else max(start, at - window + 1)
        for head in range(q.shape[2]):
          shared = head // (q.shape[2] // k.shape[2])
          score = k[row, first : at + 1, shared] @ q[row, at, head] / np.sqrt(q.shape[3])
          share = np.exp(score - score.max())
          out[row, at, head] = share / share.sum() @ v[row, first : at + 1, shared]
  return out


@pytest.mark.parametrize("documents", [ONE, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_a_slow_loop(backend, window, documents):
  q, k, v = heads(dtype=dtype(backend))
  out = attend(q, k, v, documents, window, backend)
  allowed = dict(atol=2e-2, rtol=1e-2) if backend == "cudnn" else dict(atol=2e-6, rtol=1e-5)
  np.testing.assert_allclose(np.float64(out), loop(q, k, v, documents, window), **allowed)


def dtype(backend):
  return jnp.bfloat16 if backend == "cudnn" else jnp.float32


@pytest.mark.parametrize("heads_per_key", [1, 6])
def test_query_heads_share_key_heads_in_order(heads_per_key):
  q, k, v = heads()
  k, v = (jnp.repeat(x[:, :, :1], N // heads_per_key, axis=2) for x in (k, v))
  k = k * (1 + jnp.arange(k.shape[2])[:, None])  # every key head different
  out = attend(q, k, v, PACKED, 5, "reference")
  np.testing.assert_allclose(out, loop(q, k, v, PACKED, 5), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
  "length", [T, 16, 5], ids=["not a multiple", "a multiple", "below a chunk"]
)
@pytest.mark.parametrize("window", [None, 5, 9])
def test_chunked_equals_reference_forward_and_gradient(window, length):
  inputs = heads(length)
  documents = ((length,), (3, length - 3))
  d = jnp.asarray(np.random.default_rng(1).normal(size=(B, length, N, H)), jnp.float32)
  (reference, *d_reference), (chunked, *d_chunked) = (
    graded(inputs, d, documents, window, backend) for backend in ("reference", "chunked"))
  assert relative(chunked, reference) < 1e-5
  for ours, theirs in zip(d_chunked, d_reference):
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("length", [256, 200], ids=["two tiles", "a tile and a part"])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("shared", [1, 2, 4], ids="{} queries a key".format)
def test_splash_in_tiles_of_128_equals_reference_forward_and_gradient(
    monkeypatch, shared, packed, window, length):
  monkeypatch.setattr(attention_splash, "BLOCK", 128)
  # Packed: a document across the edge of the tiles, one of one token, padding at the end.
  documents = ((70, 1, 90), (length - 9,)) if packed else ((length,), (length,))
  inputs = wide_heads(length, shared)
  same(graded(*inputs, documents, window, "splash"), graded(*inputs, documents, window, "reference"))


@pytest.mark.parametrize("window", [None, 64])
def test_splash_over_context_sees_and_moves_the_keys_of_every_part(monkeypatch, window):
  monkeypatch.setattr(attention_splash, "BLOCK", 128)
  documents, inputs = ((250, 1, 240), (100, 400)), wide_heads(512, 2)  # over the edges of four parts
  reference = graded(*inputs, documents, window, "reference")
  with jax.set_mesh(axes.mesh(fsdp=2, context=4)):
    same(graded(*inputs, documents, window, "splash"), reference)


def wide_heads(length, shared):
  """((q, k, v), the gradient that comes back) with `shared` of 4 query heads to a key head of 32."""
  random, keys = np.random.default_rng(0), 4 // shared
  q, k, v, d = (
    jnp.asarray(random.normal(size=(B, length, heads, 32)), jnp.float32) for heads in (4, keys, keys, 4))
  return (q, k, v), d


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def graded(inputs, d, documents, window, backend):
  """The output and the gradients of q, k and v."""
  out, pull = jax.vjp(lambda *qkv: attend(*qkv, documents, window, backend), *inputs)
  return out, *pull(d)


def same(ours, theirs):
  for x, y in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5)


def relative(x, y):
  return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))


@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_W_sees_exactly_W_tokens_itself_included(backend, window):
  q, k, v = heads(dtype=dtype(backend))
  at = 17
  before = np.float32(attend(q, k, v, ONE, window, backend)[:, at])
  for distance in range(at + 1):
    moved = [x.at[:, at - distance].add(1.0) for x in (k, v)]
    after = np.float32(attend(q, *moved, ONE, window, backend)[:, at])
    if distance < window:
      assert np.abs(after - before).max(-1).min() > 0, f"distance {distance} is not seen"
    else:
      np.testing.assert_array_equal(after, before, f"distance {distance} is seen")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_and_other_documents_have_a_gradient_of_exactly_zero(backend, window):
  q, k, v = heads(dtype=dtype(backend))
  segment_BT, position_BT = packed(PACKED, T)
  at = 14  # in the third document of row 0, the second of row 1

  def seen(k, v):
    return attend(q, k, v, PACKED, window, backend)[:, at].sum()

  distance_BT = position_BT[:, at : at + 1] - position_BT
  seen_BT = (segment_BT == segment_BT[:, at : at + 1]) & (distance_BT >= 0)
  seen_BT &= distance_BT < (window or T)
  for gradient in jax.jit(jax.grad(seen, argnums=(0, 1)))(k, v):
    touched_BT = np.abs(np.float32(gradient)).sum((-1, -2)) > 0
    np.testing.assert_array_equal(touched_BT, seen_BT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_inputs_keep_an_fp32_softmax(backend):
  # Scores in the hundreds: in bfloat16 they would be rounded to 1 or 2, and shares be off by e.
  q, k, v = heads(dtype=jnp.bfloat16, scale=64.0)
  out = attend(q, k, v, PACKED, None, backend)
  assert out.dtype == jnp.bfloat16
  expected = loop(q, k, v, PACKED, None)
  assert np.abs(np.asarray(out, np.float64) - expected).max() < 0.03
  rounded = jnp.asarray(jnp.einsum("bthd,bshd->bhts", q[:, :, :K], k), jnp.bfloat16)
  assert np.abs(np.asarray(rounded, np.float64)).max() > 128  # the premise


def test_a_cache_needs_the_reference_backend():
  q, k, v = heads()
  segment_BT, position_BT = packed(ONE, T)
  rows = dict(segment_BT=segment_BT, position_BT=position_BT)
  with pytest.raises(ValueError, match="chunked"):
    attention.attention(
      q, k, v, **rows, segment_BS=segment_BT, position_BS=position_BT, backend="chunked"
    )


@pytest.mark.parametrize("slots", [1, 4, 7])
def test_a_ring_holds_the_newest_positions_each_in_its_slot(slots):
  newest_B = np.arange(12)
  position_BS = np.asarray(attention.ring_positions(newest_B, slots))
  for newest, row in zip(newest_B, position_BS):
    held = {p for p in row if p >= 0}
    assert held == set(range(max(0, newest - slots + 1), newest + 1))
    assert all(p % slots == slot for slot, p in enumerate(row))


def test_writing_a_ring_replaces_one_slot_and_leaves_the_others():
  k_BSKH = jnp.zeros((2, 4, K, H))
  k_BTKH, v_BTKH = jnp.ones((2, 1, K, H)), 2 * jnp.ones((2, 1, K, H))
  keys = attention.ring_write(k_BSKH, k_BSKH, k_BTKH, v_BTKH, np.array([[6], [1]]))
  np.testing.assert_array_equal(keys["k_BSKH"][:, :, 0, 0], [[0, 0, 1, 0], [0, 1, 0, 0]])
  np.testing.assert_array_equal(keys["v_BSKH"][:, :, 0, 0], [[0, 0, 2, 0], [0, 2, 0, 0]])
  np.testing.assert_array_equal(keys["position_BS"], [[4, 5, 6, 3], [0, 1, -2, -1]])
  np.testing.assert_array_equal(keys["segment_BS"], [[1, 1, 1, 1], [1, 1, 0, 0]])
