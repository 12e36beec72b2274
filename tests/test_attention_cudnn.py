"""attention_cudnn: all but the kernel, which is played by its documented meaning, on a CPU.

`fused` reads and writes flat buffers at element offsets, as cuDNN does; what no sequence covers is
NaN, as unwritten memory may be. It stands below JAX's own code, which is thus part of the test.
"""

import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir

from conftest import packed
from tiny_aya_jax import axes, run
from tiny_aya_jax.model import attention, attention_cudnn

library = attention_cudnn.library
T, N, K, H = 24, 6, 2, 8
# Rows with padding, of single tokens, full, of one document; eight, for meshes.
DOCUMENTS = ((7, 1, 9), (10, 14), (1, 1, 1, 1), (24,), (23,), (3, 5, 16), (12, 12), (2, 2, 2, 2, 2))
GPU = dict(
  device_kind="a GPU", compute_capability="9.0",
  client=types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000"),
)


@pytest.fixture(autouse=True)
def device(monkeypatch):
  """A Hopper GPU with cuDNN 9.10, as far as JAX and we ask."""
  device = types.SimpleNamespace(**GPU)
  monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(library, "check_compute_capability", lambda asked: True)
  monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda asked: False)
  monkeypatch.setattr(attention_cudnn, "SEGMENTS", 8)
  monkeypatch.setattr(attention_cudnn, "FEW", 3)
  monkeypatch.setattr(attention_cudnn, "BLOCK", 7)
  monkeypatch.setattr(jax, "devices", lambda *_: [device])
  return device


def fused(q, k, v, _, q_length, k_length, q_offset, k_offset, *_tables, is_training=1, **settings):
  """cuDNN's ragged attention: sequence s is its lengths from its offsets on, in elements."""
  (B, T, N, H), (K, S) = q.shape, (k.shape[2], len(q_length.ravel()))
  assert settings["mask_type"] == library.MaskType.PADDING_CAUSAL
  at = jnp.arange(T)

  def tokens(length, offset, heads):
    place = offset.ravel()[:S, None] + at * heads * H  # [S, T]
    place = jnp.where(at < length.reshape(S, 1), place, B * T * heads * H)
    return place[..., None, None] + jnp.arange(heads * H).reshape(heads, H)

  q_place, k_place = tokens(q_length, q_offset, N), tokens(k_length, k_offset, K)
  read = functools.partial(jnp.take, mode="fill", fill_value=0)
  q_STKGH = read(q.ravel(), q_place).reshape(S, T, K, N // K, H).astype(jnp.float32)
  k_STKH, v_STKH = (read(x.ravel(), k_place).astype(jnp.float32) for x in (k, v))
  score = jnp.einsum("stkgh,sukh->skgtu", q_STKGH, k_STKH) * settings["scale"]
  distance = at[:, None] - at
  window = settings["sliding_window_length"]
  seen = (distance >= 0) & (distance < (window or T))
  share = jax.nn.softmax(jnp.where(seen, score, -1e30), axis=-1)
  out = jnp.einsum("skgtu,sukh->stkgh", share, v_STKH).reshape(S, T, N, H).astype(q.dtype)
  flat = jnp.full(q.size, jnp.nan, q.dtype).at[q_place].set(out, mode="drop")
  return [flat.reshape(q.shape), jnp.zeros((S, N, T), jnp.float32)][: 1 + is_training]


def fused_backward(q, k, v, *rest, **settings):
  *rest, _, _, d_out = rest
  _, pull = jax.vjp(lambda *x: fused(*x, *rest, is_training=False, **settings)[0], q, k, v)
  return list(pull(d_out))


mlir.register_lowering(
  library._dot_product_attention_fwd_p, mlir.lower_fun(fused, multiple_results=True), platform="cpu"
)
mlir.register_lowering(
  library._dot_product_attention_bwd_p, mlir.lower_fun(fused_backward, multiple_results=True),
  platform="cpu",
)


def heads(rows, T=T):
  random = np.random.default_rng(0)
  return [jnp.asarray(random.normal(size=(rows, T, n, H)), jnp.bfloat16) for n in (N, K, K, N)]


def graded(backend, documents, window, T=T):
  """(q, k, v, direction) -> (out, gradients of out along direction), jitted."""
  segment_BT, position_BT = packed(documents, T)

  def value(q, k, v, direction):
    rows = dict(segment_BT=jnp.asarray(segment_BT), position_BT=jnp.asarray(position_BT))
    out = attention.attention(q, k, v, **rows, window=window, backend=backend)
    return jnp.sum((out * direction).astype(jnp.float32)), out

  return jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))


def assert_close(ours, theirs):
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(np.float32(x), np.float32(y), atol=5e-2, rtol=3e-2)
    x, y = np.float64(x), np.float64(y)
    assert np.linalg.norm(x - y) <= 1e-2 * np.linalg.norm(y)


@pytest.mark.parametrize("most", [1, 2, 4, 8, 24])
def test_lengths_and_offsets_equal_a_loop_over_tokens(most):
  segment_BT, _ = packed(DOCUMENTS, T)
  lengths, offsets = jax.jit(attention_cudnn.sequences, static_argnums=1)(segment_BT, most)
  assert lengths.dtype == offsets.dtype == jnp.int32
  for row, length, offset in zip(segment_BT, lengths, offsets):
    starts = [at for at in range(T) if at == 0 or row[at] != row[at - 1]]
    expected = [stop - start for start, stop in zip(starts, [*starts[1:], T])][:most]
    starts, beyond = starts[:most], [-1] * (most - len(starts[:most]))
    assert length.tolist() == expected + beyond
    assert offset.tolist() == starts + beyond + [-1]


def test_the_docstring_shows_lengths_and_offsets_as_they_are():
  lengths, offsets = attention_cudnn.sequences(jnp.array([[1, 1, 2, 0]]), 4)
  assert lengths.tolist() == [[2, 1, 1, -1]] and offsets.tolist() == [[0, 2, 3, -1, -1]]


def test_offsets_reach_the_kernel_in_elements_of_queries_and_of_keys():
  segment_BT, _ = packed(DOCUMENTS, T)
  lengths, offsets = attention_cudnn.sequences(segment_BT, 8)
  q, k, *_ = heads(len(DOCUMENTS))
  fixed = library._fix_seqlen_offsets(lengths, lengths, offsets, offsets, q, k)
  q_length, k_length, q_offset, k_offset = (np.asarray(x).ravel() for x in fixed)
  flat = np.asarray(segment_BT).ravel() + np.arange(8).repeat(T) * 100
  starts = np.flatnonzero(np.diff(flat, prepend=-1))
  lasting = np.diff(starts, append=flat.size)
  for length in (q_length, k_length):
    np.testing.assert_array_equal(length, np.pad(lasting, (0, length.size - lasting.size)))
  for offset, width in ((q_offset, N * H), (k_offset, K * H)):  # in one piece up to the very end
    filled = np.pad(starts, (0, offset.size - starts.size), constant_values=flat.size)
    np.testing.assert_array_equal(offset, filled * width)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_the_kernel_as_documented_equals_reference_forward_and_gradient(window):
  inputs = heads(len(DOCUMENTS))
  ours = graded("cudnn", DOCUMENTS, window)(*inputs)
  assert_close(ours, graded("reference", DOCUMENTS, window)(*inputs))


def test_rows_of_an_odd_length_train_too():
  documents = ((7, 1, 9), (10, 13))
  inputs = heads(2, T=23)
  expected = graded("reference", documents, 5, T=23)(*inputs)
  assert_close(graded("cudnn", documents, 5, T=23)(*inputs), expected)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_every_device_gives_the_kernel_its_own_rows_and_heads(sizes, monkeypatch):
  inputs = heads(len(DOCUMENTS))
  monkeypatch.setattr(attention_cudnn, "SEGMENTS", 5)  # one device takes `chunked`, the rest do not
  expected = graded("reference", DOCUMENTS, 5)(*inputs)
  mesh = axes.mesh(**sizes, devices=jax.local_devices())
  names = "q_BTNH", "k_BTKH", "v_BTKH", "direction_BTNH"
  with jax.set_mesh(mesh):
    ours = graded("cudnn", DOCUMENTS, 5)(*axes.place(mesh, dict(zip(names, inputs))).values())
  assert_close(ours, expected)


@pytest.mark.parametrize("most, taken", [(5, "chunked"), (6, "the kernel")])
def test_rows_of_too_many_segments_are_right_and_take_chunked(most, taken, monkeypatch):
  monkeypatch.setattr(attention_cudnn, "SEGMENTS", most)  # the last row has five, and padding
  inputs = heads(len(DOCUMENTS))
  expected = graded("reference", DOCUMENTS, 5)(*inputs)
  assert_close(graded("cudnn", DOCUMENTS, 5)(*inputs), expected)
  broken = lambda *inputs, **_: jnp.full_like(inputs[0], jnp.nan)  # noqa: E731
  monkeypatch.setattr(attention_cudnn, "_fused", broken)
  _, out = graded("cudnn", DOCUMENTS, 5)(*inputs)
  assert np.isfinite(np.float32(out)).all() == (taken == "chunked")


def test_padding_is_finite_and_gives_real_tokens_no_gradient():
  q, k, v, direction = heads(len(DOCUMENTS))
  segment_BT, _ = packed(DOCUMENTS, T)
  real = jnp.asarray(segment_BT > 0)[..., None, None]
  gradients, out = graded("cudnn", DOCUMENTS, 5)(q, k, v, jnp.where(real, 0, direction))
  assert np.isfinite(np.float32(out)).all()
  for gradient in gradients:
    assert not np.float32(jnp.where(real, gradient, 0)).any()


def test_names_and_remat_go_around_it():
  inputs = heads(len(DOCUMENTS))
  segment_BT, position_BT = map(jnp.asarray, packed(DOCUMENTS, T))
  policy = jax.checkpoint_policies.save_only_these_names("attention")

  def value(q, k, v, direction, remat):
    def attend(q, k, v):
      rows = dict(segment_BT=segment_BT, position_BT=position_BT)
      return attention.attention(q, k, v, **rows, window=5, backend="cudnn")

    attend = jax.checkpoint(attend, policy=policy) if remat else attend
    return jnp.sum((attend(q, k, v) * direction).astype(jnp.float32))

  grad = jax.jit(jax.grad(value, argnums=(0, 1, 2)), static_argnums=4)
  for one, other in zip(grad(*inputs, True), grad(*inputs, False)):
    np.testing.assert_array_equal(np.float32(one), np.float32(other))


@pytest.mark.parametrize("window, told", [(None, 0), (1, 1), (5, 5), (T, 0)])
def test_the_program_for_a_gpu_asks_for_padding_causal_and_for_W_keys(window, told):
  inputs = heads(len(DOCUMENTS))
  traced = graded("cudnn", DOCUMENTS, window).trace(*inputs)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  calls = re.findall(r"@__cudnn\$(\w+)\(.*?backend_config = \"(.*?[^\\])\"", text)
  names = sorted(name for name, _ in calls)
  # Row by row the forward pass is made again for the backward one.
  assert names == 3 * ["fmhaSoftmax"] + 2 * ["fmhaSoftmaxBackward"]
  rooms = []
  for _, config in calls:
    config = json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
    assert config["mask_type"] == "PADDING_CAUSAL"  # what causal is called where there are lengths
    assert config["sliding_window_length"] == told
    rooms.append(config["max_seg_per_batch"])
    assert config["fmha_scale"] == pytest.approx(H**-0.5) and config["dropout_rate"] == 0
  assert sorted(rooms) == 2 * [attention_cudnn.FEW] + 3 * [attention_cudnn.SEGMENTS]


@pytest.mark.parametrize("window", [None, 5])
def test_a_window_is_never_asked_for_without_a_causal_mask(window, monkeypatch):
  asked = []

  def record(q, *_, **settings):
    asked.append(settings)
    return q

  monkeypatch.setattr(library, "dot_product_attention", record)
  q, k, v, _ = heads(len(DOCUMENTS))
  rows = [jnp.asarray(x) for x in packed(DOCUMENTS, T)]
  jax.make_jaxpr(lambda *x: attention.cudnn(*x, *rows, *rows, window))(q, k, v)
  assert [settings["mask_type"] for settings in asked] == 2 * [library.MaskType.PADDING_CAUSAL]


@pytest.mark.parametrize(
  "change, asked, message",
  [
    (dict(client=types.SimpleNamespace(platform_version="cpu")), {}, "an NVIDIA GPU, not a GPU"),
    (dict(client=types.SimpleNamespace(platform_version="rocm 7")), {}, "an NVIDIA GPU"),
    (dict(compute_capability="8.0"), {}, "a GPU has 8.0"),
    (dict(compute_capability="10.3"), {}, "cuDNN 91100 or newer, 91000 is installed"),
    ({}, dict(dtype="float32"), "'bfloat16', not 'float32'"),
    ({}, dict(H=12), "at most 128, not 12"),
    ({}, dict(H=256), "at most 128, not 256"),
    ({}, dict(context=2), "config.mesh.context is 2, not 1"),
  ],
)
def test_what_the_kernel_cannot_do_is_refused_in_a_sentence(change, asked, message):
  asked = dict(dtype="bfloat16", H=128, device=types.SimpleNamespace(**GPU)) | asked
  attention_cudnn.refuse_unless_possible("bfloat16", 128, asked["device"])
  vars(asked["device"]).update(change)
  with pytest.raises(run.Refused, match=message):
    attention_cudnn.refuse_unless_possible(**asked)


def test_an_old_or_missing_cudnn_is_refused(device, monkeypatch):
  monkeypatch.setattr(library, "check_cudnn_version", lambda: 90500)
  with pytest.raises(run.Refused, match="cuDNN 90600 or newer, 90500"):
    attention_cudnn.refuse_unless_possible("bfloat16", 128, device)
  monkeypatch.undo()  # this machine has none
  with pytest.raises(run.Refused, match="which is not there"):
    attention_cudnn.refuse_unless_possible("bfloat16", 128, device)


def test_float32_and_too_many_tokens_are_refused_where_it_is_called():
  rows = jax.ShapeDtypeStruct((2**11, 2**14), jnp.int32)

  def shapes(dtype):
    q, k = (jax.ShapeDtypeStruct((2**11, 2**14, n, 64), dtype) for n in (1, 1))
    return q, k, k, rows, rows, rows, rows

  call = functools.partial(jax.eval_shape, lambda *x: attention.cudnn(*x, 5))
  with pytest.raises(run.Refused, match="float32"):
    call(*shapes(jnp.float32))
  with pytest.raises(run.Refused, match="33,554,432 tokens"):
    call(*shapes(jnp.bfloat16))


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_a_kernel_that_the_devices_lack_is_refused_before_anything_begins(backend):
  cpu = jax.local_devices()[0]
  with pytest.raises(run.Refused, match=backend):
    attention.refuse_unless_possible(backend, "bfloat16", 128, cpu)
  for possible in ("chunked", "reference"):
    attention.refuse_unless_possible(possible, "bfloat16", 128, cpu)


def test_rows_that_the_kernel_leaves_to_another_are_named():
  few, many = (np.repeat(np.arange(1, n + 1), 2)[None] for n in (attention_cudnn.SEGMENTS, attention_cudnn.SEGMENTS + 1))
  assert attention.slow_rows("cudnn", few) == "" == attention.slow_rows("chunked", many)
  assert f"{attention_cudnn.SEGMENTS + 1} segments" in attention.slow_rows("cudnn", many)
