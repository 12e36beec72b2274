"""`splash` attention: the Pallas kernel of JAX for TPU, block-sparse, told our mask.

Segment ids, one LocalMask (never `CausalMask & LocalMask`: the conjunction streams dense mask blocks),
grouped queries without repeated keys, and shard_map, because the partitioner does not look into a
kernel: rows over (data, fsdp), heads over tensor, queries over context with the keys gathered.
Off a TPU it runs only interpreted, in tests.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import NamedSharding, PartitionSpec

from tiny_aya_jax.axes import axis_size
from tiny_aya_jax.model.collectives import ring_sum

BLOCK = 1024  # queries and keys of a tile, forward and backward; a shorter row has one tile
LANES = 128  # a tile's keys are a multiple of this
INTERPRET = False  # tests set it: the kernel as plain JAX operations, on any device
SAVED = "attention"  # checkpoint name of the output and its logsumexp, given inside the kernel


def splash(q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, segment_BS, position_BS, window):
  """`attention.reference` on a TPU; rows of any length, padded to whole tiles.

  Positions must rise by one along a segment and segments lie side by side: reach then follows from
  the index in the row.
  """
  T, N, H = q_BTNH.shape[1:]
  shards, own_heads = axis_size("context"), N // axis_size("tensor")
  tile = min(BLOCK, -(-T // (shards * LANES)) * LANES)
  q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)  # the kernel does not scale
  # Zeros up to whole tiles come last, so that no token before them sees them.
  rows = [
      jnp.pad(x, [(0, 0), (0, -T % (tile * shards))] + [(0, 0)] * (x.ndim - 2))
      for x in (q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS)
  ]
  kernel = _kernel(rows[0].shape[1], own_heads, window, tile, shards)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return _attend(kernel, *rows)[:, :T]
  heads, tokens = (PartitionSpec(("data", "fsdp"), "context", *last) for last in (["tensor"], []))
  tiles = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "context")))

  def part(kernel, q, k, v, segment_BT, segment_BS):
    segment_BS = jax.lax.all_gather(segment_BS, "context", axis=1, tiled=True)
    return _attend(kernel, q, _whole_rows(k), _whole_rows(v), segment_BT, segment_BS)

  return jax.shard_map(
      part, in_specs=(tiles, heads, heads, heads, tokens, tokens), out_specs=heads, check_vma=False
  )(kernel, *rows)[:, :T]


@jax.custom_vjp
def _whole_rows(x_BSKH):
  """Keys or values of a row from all of context; their gradients go back round a ring."""
  return jax.lax.all_gather(x_BSKH, "context", axis=1, tiled=True)


def _whole_rows_backward(_, d_BSKH):
  S = d_BSKH.shape[1] // axis_size("context")

  def part(place):
    return jax.lax.dynamic_slice_in_dim(d_BSKH, place * S, S, axis=1).astype(jnp.float32)

  return (ring_sum(part, "context", d_BSKH.dtype),)


_whole_rows.defvjp(lambda x_BSKH: (_whole_rows(x_BSKH), None), _whole_rows_backward)


def _kernel(T, N, window, tile, shards):
  reach = (None if window is None else window - 1, 0)
  mask = kernels.LocalMask((T, T), reach, 0, shard_count=shards)
  return kernels.make_splash_mha(
      kernels.MultiHeadMask([mask] * N),
      block_sizes=kernels.BlockSizes(
          block_q=tile, block_kv=tile, block_kv_compute=tile,
          block_q_dkv=tile, block_kv_dkv=tile, block_kv_dkv_compute=tile, use_fused_bwd_kernel=True,
      ),
      head_shards=1, q_seq_shards=shards, residual_checkpoint_name=SAVED, interpret=INTERPRET,
  )


def _attend(kernel, q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS):
  """What one device does: its rows, its heads, its stretch of queries against all keys."""
  q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
  out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, kernels.SegmentIds(segment_BT, segment_BS))
  return out_BNTH.swapaxes(1, 2)
