"""`cudnn` attention: NVIDIA's fused kernel on Hopper or newer, each document a sequence of its own.

The public jax.nn.dot_product_attention knows no documents, so this calls the private function below
it, whose docstring and source (jax 0.10.2 to 0.12) say:
- lengths [B, M] and offsets [B, M + 1] of a row's sequences, in tokens, are filled up with -1; the
  entries >= 0 of all rows are moved together, so a row gives as many offsets as lengths;
- the window is (position - W, position]: W keys, the query included. jax.nn passes 1 + the left
  half-width, so HF's 4096 is its (4095, 0) and 4096 here. Without a causal mask beside it a window
  shows the future (jax#39576): there is no such call in this file;
- nothing is promised about tokens of no sequence (JAX's own test masks them out, gradients too).
  Padding is therefore a sequence too, as it is a segment in `reference`.
One shard_map, as in attention_splash.py: the function's own sharding rule does not tie the lengths
to the rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as library
from jax.sharding import PartitionSpec

from tiny_aya_jax import run
from tiny_aya_jax.axes import axis_size
from tiny_aya_jax.model.attention import reference

# Sequences a row may have, padding one of them; static. For each of them the kernel's backward pass
# holds N * T * H times 8 bytes: 8.06 GiB a row for 64 at N=16, T=8192, H=128 (H200, cuDNN 9.19), and
# takes its time for it. So most rows have room for FEW; those with more go one at a time.
FEW, SEGMENTS = 16, 64
BLOCK = 512  # queries whose scores exist at a time where a row has more
VERSION = 90600  # cuDNN 9.6, the least that JAX's own test of packed rows asks for


def cudnn(q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, segment_BS, position_BS, window):
  """`attention.reference` in 16 bits on a GPU; refuses what the kernel cannot do.

  Rows attend to themselves, and each segment lies in one piece with positions that rise by one.
  Where one row of a device has more than SEGMENTS segments, its rows take blocks of `reference`:
  slower, right.
  """
  B, T, N, H = q_BTNH.shape
  refuse_unless_possible(q_BTNH.dtype, H, jax.devices()[0], axis_size("context"))
  tokens, N = B // (axis_size("data") * axis_size("fsdp")) * T, N // axis_size("tensor")
  if tokens * N * H >= 2**31:
    raise run.Refused(
        f"attention 'cudnn' counts queries in 32 bits: {tokens:,} tokens of {N} heads of {H} on a "
        "device are too many; use a smaller batch or config.accumulate"
    )
  attend = functools.partial(_attend, window=window if window is None or window < T else None)
  if not jax.sharding.get_abstract_mesh().empty:
    batch = PartitionSpec(("data", "fsdp"))
    heads = PartitionSpec(("data", "fsdp"), None, "tensor")
    attend = jax.shard_map(
        attend, in_specs=(heads, heads, heads, batch, batch), out_specs=heads, check_vma=False
    )
  # JAX's check refuses odd rows in training, bias or not; none sees a zero at the end before it.
  rows = [
      jnp.pad(x, [(0, 0), (0, T % 2)] + [(0, 0)] * (x.ndim - 2))
      for x in (q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT)
  ]
  return attend(*rows)[:, :T]


def refuse_unless_possible(dtype, H, device, context=1):
  """Refuses, in one sentence, what keeps the kernel from running with heads of width H on device.

  context: devices that share a row's queries.
  """
  asked = "attention 'cudnn' needs"
  if "cuda" not in getattr(device.client, "platform_version", "").lower():
    raise run.Refused(f"{asked} an NVIDIA GPU, not {device.device_kind}: use 'chunked' or 'splash'")
  capability = tuple(int(part) for part in device.compute_capability.split("."))
  if capability < (9, 0):
    raise run.Refused(
        f"{asked} compute capability 9.0 (Hopper) or newer, {device.device_kind} has "
        f"{device.compute_capability}: use 'chunked'"
    )
  if jnp.dtype(dtype) != jnp.bfloat16:
    raise run.Refused(f"{asked} config.dtype 'bfloat16', not {jnp.dtype(dtype).name!r}")
  if H % 8 or H > 128:
    raise run.Refused(f"{asked} heads of a width that 8 divides, at most 128, not {H}")
  if context > 1:
    raise run.Refused(f"{asked} whole rows: config.mesh.context is {context}, not 1")
  try:
    version = library.check_cudnn_version()
  except RuntimeError:
    raise run.Refused(f"{asked} cuDNN, which is not there: install the 'cuda' extra") from None
  least = 91100 if capability == (10, 3) else VERSION  # JAX refuses 10.3 below 9.11
  if version < least:
    raise run.Refused(f"{asked} cuDNN {least} or newer, {version} is installed")


def _attend(q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, *, window):
  """What one device does: its rows and heads, by the kernel where every row has few segments."""
  most = _starts(segment_BT).sum(axis=1).max()
  return jax.lax.switch(
      (most > FEW).astype(jnp.int32) + (most > SEGMENTS),
      [functools.partial(way, window=window) for way in (_fused, _row_by_row, _slow)],
      q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT,
  )


def _fused(q_BTNH, k_BSKH, v_BSKH, segment_BT, _, *, window, most=None):
  lengths, offsets = sequences(segment_BT, most or FEW)
  return library.dot_product_attention(
      q_BTNH, k_BSKH, v_BSKH, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets,
      kv_offsets=offsets, scale=q_BTNH.shape[-1] ** -0.5, qkv_layout="BTNH",
      mask_type=library.MaskType.PADDING_CAUSAL, sliding_window_length=window,
  )


def _row_by_row(*inputs, window):
  """The kernel with room for SEGMENTS, whose scratch is then that of one row."""
  def row(inputs):
    return _fused(*(x[None] for x in inputs), window=window, most=SEGMENTS)[0]

  return jax.lax.map(jax.checkpoint(row), inputs)  # else its residuals are kept beside the others'


def _slow(q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, *, window):
  """`reference`, BLOCK queries at a time, all of one shape: XLA:GPU tunes every shape of a matmul by
  itself, and `chunked` has 16 of each (minutes on an H200)."""
  T = q_BTNH.shape[1]
  block = min(BLOCK, T)

  @jax.checkpoint  # else both branches' residuals are kept
  def attend(q_BTNH, k_BSKH, v_BSKH):
    def part(queries):
      return reference(queries[0], k_BSKH, v_BSKH, *queries[1:], segment_BT, position_BT, window)

    out = jax.lax.map(jax.checkpoint(part), tuple(_split(x, block) for x in (
        q_BTNH, segment_BT, position_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(q_BTNH.shape[0], -1, *q_BTNH.shape[2:])[:, :T]

  return attend(q_BTNH, k_BSKH, v_BSKH)


def _split(x_BT, block):
  """[B, T, ..] -> [T / block, B, block, ..], zero-padded."""
  x_BT = jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % block)] + [(0, 0)] * (x_BT.ndim - 2))
  return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, block, *x_BT.shape[2:]), 1, 0)


def sequences(segment_BT, most):
  """Document numbers -> lengths [B, most] and offsets [B, most + 1] in tokens, int32, -1 beyond.

  [[1, 1, 2, 0]], 4 -> [[2, 1, 1, -1]], [[0, 2, 3, -1, -1]]. Segments after the first `most` of a
  row are left out.
  """
  number_BT = jnp.cumsum(_starts(segment_BT), axis=1) - 1
  # A segment begins after all tokens of lower number: at T, if there is none of its number.
  begins = jnp.sum(number_BT[:, None] < jnp.arange(most + 1)[:, None], axis=-1, dtype=jnp.int32)
  lengths = jnp.diff(begins)
  offsets = jnp.where(lengths > 0, begins[:, :-1], -1)
  return jnp.where(lengths > 0, lengths, -1), jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1)


def _starts(segment_BT):
  """Boolean [B, T]: the first token of each segment, padding included."""
  changes = segment_BT[:, 1:] != segment_BT[:, :-1]
  return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


def _each_by_its_own_heads(fix):
  """jax 0.10.2 counts key offsets in query heads, so grouped queries read other tokens' keys.

  `fix` turns lengths and offsets of tokens into what cuDNN counts. Asked once about the queries and
  once about the keys it is right in every version (mended by jax#39521, in 0.11.2 and later).
  """

  def fixed(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key):
    counts = q_seqlen, kv_seqlen, q_offsets, kv_offsets
    queries, keys = fix(*counts, query, query), fix(*counts, key, key)
    return queries[0], keys[1], queries[2], keys[3]

  return fixed


library._fix_seqlen_offsets = _each_by_its_own_heads(library._fix_seqlen_offsets)
