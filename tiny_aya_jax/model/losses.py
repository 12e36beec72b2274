"""Losses: hidden states in, (sum, count, aux) out. Whoever averages, averages once, over tokens.

Logits exist only for a chunk of positions at a time, in fp32. The gradients of the hidden states
and of the tied table are computed in the forward loop, while a chunk's logits are there, so the
backward pass only scales them: three matmuls, no recompute (performance.md 2.4).

On a mesh the vocabulary of the head is split over (tensor, fsdp), though the table's rows are split
over tensor only and its columns over fsdp: one exchange gives each device whole rows, a chunk's
hidden states are gathered while the chunk before computes, each device makes its own columns of the
logits for the tokens of all, and the sums that are their gradients go round a ring while the next
part is multiplied. Neither the table nor its gradient ever exists whole: at full size on 16 devices
that is 3 GiB a device less, and half the bytes (0.5 GiB of hidden states a sequence each way, for 2
of table).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tiny_aya_jax.model.collectives import ring_sum

HEAD = ("tensor", "fsdp")  # the axes that share the vocabulary, outermost first
_TOKENS = PartitionSpec(("data", "fsdp"), "context")
_TABLE = PartitionSpec("tensor", "fsdp")


def next_token(
    hidden_BTD, embedding_VD, target_BT, weight_BT, *, logit_scale, z_loss=0.0, chunk=512
):
  """Cross-entropy of target_BT under softmax(logit_scale * hidden @ embedding^T), in nats.

  Returns (sum, count, aux): sum of weight * (nats + z_loss * logsumexp^2), count = sum of weights,
  aux = {"nats_BT": weight * nats, not differentiable}. The embedding is used in the dtype of the
  hidden states. chunk: positions of a row whose logits exist at a time.
  """
  sum, nats_BT = _weighted_sum(
      hidden_BTD, embedding_VD, target_BT, weight_BT, logit_scale, z_loss, chunk
  )
  return sum, weight_BT.sum(), dict(nats_BT=jax.lax.stop_gradient(nats_BT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _weighted_sum(hidden_BTD, embedding_VD, target_BT, weight_BT, logit_scale, z_loss, chunk):
  def part(axes, *arrays):
    head_VD = _head(axes, arrays[1], hidden_BTD.dtype)

    def step(sum, part):
      chunk_sum, nats_BT, _ = _chunk_loss(
          axes, *_everyone(axes, part), head_VD, V, logit_scale, z_loss
      )
      return sum + chunk_sum, nats_BT

    parts = _split((arrays[0], *arrays[2:]), chunk)
    sum, nats = jax.lax.scan(step, jnp.float32(0), parts)
    return _over(axes, jax.lax.psum, sum, ("data", "fsdp", "context")), _join(nats, arrays[2].shape[1])

  V = embedding_VD.shape[0]
  return _on_mesh(part, (PartitionSpec(), _TOKENS))(hidden_BTD, embedding_VD, target_BT, weight_BT)


def _forward(hidden_BTD, embedding_VD, target_BT, weight_BT, logit_scale, z_loss, chunk):
  def part(axes, *arrays):
    head_VD = _head(axes, arrays[1], hidden_BTD.dtype)

    def step(carry, coming):
      sum, d_head_VD, everyone = carry
      coming = _everyone(axes, coming)  # while this chunk's matmuls run
      chunk_sum, nats_BT, d_logits_BTV = _chunk_loss(axes, *everyone, head_VD, V, logit_scale, z_loss)
      d_logits_BTV = d_logits_BTV.astype(head_VD.dtype)
      flat_logits = d_logits_BTV.reshape(-1, head_VD.shape[0])
      flat_hidden = everyone[0].reshape(flat_logits.shape[0], -1)
      d_head_VD += jnp.matmul(flat_logits.T, flat_hidden, preferred_element_type=jnp.float32)
      return (sum + chunk_sum, d_head_VD, coming), (nats_BT, _d_own(axes, d_logits_BTV, head_VD))

    parts = _split((arrays[0], *arrays[2:]), chunk)
    first = _everyone(axes, jax.tree.map(lambda x: x[0], parts))
    zero = jnp.float32(0), jnp.zeros(head_VD.shape, jnp.float32), first
    parts = jax.tree.map(lambda x: jnp.roll(x, -1, 0), parts)
    (sum, d_head_VD, _), (nats, d_hidden) = jax.lax.scan(step, zero, parts)
    T = arrays[2].shape[1]
    sum = _over(axes, jax.lax.psum, sum, ("data", "fsdp", "context"))
    d_table_VD = _d_table(axes, d_head_VD, arrays[1].shape[0]).astype(embedding_VD.dtype)
    return (sum, _join(nats, T)), (_join(d_hidden, T), d_table_VD)

  V = embedding_VD.shape[0]
  return _on_mesh(part, ((PartitionSpec(), _TOKENS), (_TOKENS, _TABLE)))(
      hidden_BTD, embedding_VD, target_BT, weight_BT
  )


def _backward(logit_scale, z_loss, chunk, gradients, cotangent):
  d_hidden_BTD, d_head_VD = gradients
  scale = cotangent[0]  # nats_BT carries no gradient: next_token stops it
  return (d_hidden_BTD * scale.astype(d_hidden_BTD.dtype), d_head_VD * scale, None, None)


_weighted_sum.defvjp(_forward, _backward)


def _on_mesh(part, out_specs):
  """`part(axes, hidden, table, target, weight)` on every device; axes: {axis: size} above 1."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = {axis: size for axis, size in mesh.shape.items() if size > 1}
  part = functools.partial(part, axes)
  return part if not axes else jax.shard_map(
      part, in_specs=(_TOKENS, _TABLE, _TOKENS, _TOKENS), out_specs=out_specs, check_vma=False
  )


def _over(axes, collective, x, names, **settings):
  """The collective over those of `names` that the mesh has; x itself if there is none."""
  names = tuple(name for name in names if name in axes)
  return collective(x, names, **settings) if names else x


def _head(axes, table_VD, dtype):
  """This device's part of the table -> its rows of the head, whole; zero rows make them even."""
  table_VD = table_VD.astype(dtype)
  if "fsdp" not in axes:
    return table_VD
  table_VD = jnp.pad(table_VD, ((0, -table_VD.shape[0] % axes["fsdp"]), (0, 0)))
  return jax.lax.all_to_all(table_VD, "fsdp", split_axis=0, concat_axis=1, tiled=True)


def _d_table(axes, d_head_VD, V):
  """The way back of `_head`: gradients of whole rows -> of this device's part of the table."""
  d_head_VD = _over(axes, jax.lax.psum, d_head_VD, ("data", "context"))
  if "fsdp" not in axes:
    return d_head_VD
  return jax.lax.all_to_all(d_head_VD, "fsdp", split_axis=1, concat_axis=0, tiled=True)[:V]


def _everyone(axes, arrays):
  """Rows of a chunk -> those of all devices of fsdp."""
  gather = functools.partial(_over, axes, jax.lax.all_gather, names=("fsdp",), tiled=True)
  return tuple(map(gather, arrays))


def _d_own(axes, d_logits_BTV, head_VD):
  """Gradient of own hidden states, of all columns: a sum that goes round the ring of fsdp."""
  B = d_logits_BTV.shape[0] // axes.get("fsdp", 1)

  def part(place):
    rows_BTV = d_logits_BTV
    if "fsdp" in axes:
      rows_BTV = jax.lax.dynamic_slice_in_dim(d_logits_BTV, place * B, B)
    flat = rows_BTV.reshape(-1, head_VD.shape[0])
    return jnp.matmul(flat, head_VD, preferred_element_type=jnp.float32)

  sum = ring_sum(part, "fsdp", head_VD.dtype)
  return _over(axes, jax.lax.psum, sum, ("tensor",)).reshape(B, d_logits_BTV.shape[1], -1)


def _chunk_loss(axes, hidden_BTD, target_BT, weight_BT, head_VD, V, logit_scale, z_loss):
  """One chunk of all rows of fsdp: (sum and weighted nats_BT of own rows; for all rows, the gradient
  of the sum with respect to this device's columns of hidden @ head^T)."""
  own = functools.partial(_own, axes)
  rows, D = head_VD.shape
  row_V, real_V = _rows(axes, rows, V)

  raw = jnp.matmul(hidden_BTD.reshape(-1, D), head_VD.T, preferred_element_type=jnp.float32)
  logits_BTV = raw.reshape(*target_BT.shape, rows) * logit_scale
  if real_V is not None:
    logits_BTV = jnp.where(real_V, logits_BTV, -jnp.inf)
  largest_BT = _over(axes, jax.lax.pmax, logits_BTV.max(-1), HEAD)
  share_BTV = jnp.exp(logits_BTV - largest_BT[..., None])
  hit_BTV = target_BT[..., None] == row_V
  total_BT, target_logit_BT = _over(
      axes, jax.lax.psum, (share_BTV.sum(-1), jnp.where(hit_BTV, logits_BTV, 0).sum(-1)), HEAD
  )
  logsumexp_BT = largest_BT + jnp.log(total_BT)
  nats_BT = weight_BT * (logsumexp_BT - target_logit_BT)
  sum = jnp.sum(own(nats_BT + weight_BT * z_loss * jnp.square(logsumexp_BT)))

  scale_BT = weight_BT * (1 + 2 * z_loss * logsumexp_BT) / total_BT
  d_logits_BTV = share_BTV * scale_BT[..., None] - jnp.where(hit_BTV, weight_BT[..., None], 0)
  return sum, own(nats_BT), d_logits_BTV * logit_scale


def _rows(axes, rows, V):
  """(ids of this device's rows of the head, which of them exist or None if all do)."""
  f, t = axes.get("fsdp", 1), axes.get("tensor", 1)
  place = jax.lax.axis_index("fsdp") if f > 1 else 0
  local_V = place * rows + jnp.arange(rows)
  first = (jax.lax.axis_index("tensor") if t > 1 else 0) * (V // t)
  exists = None if rows * f * t == V else local_V < V // t
  ids = first + local_V
  return (ids if exists is None else jnp.where(exists, ids, -1)), exists


def _own(axes, x_BT):
  """This device's rows of an array of all rows of fsdp."""
  if "fsdp" not in axes:
    return x_BT
  B = x_BT.shape[0] // axes["fsdp"]
  return jax.lax.dynamic_slice_in_dim(x_BT, jax.lax.axis_index("fsdp") * B, B)


def _split(arrays, chunk):
  """[B, T, ..] -> [T / chunk, B, chunk, ..], zero-padded: zeros have weight 0."""
  def split(x):
    pad = -x.shape[1] % min(chunk, x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, min(chunk, x.shape[1] - pad), *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(split, arrays)


def _join(x, T):
  """[T / chunk, B, chunk, ..] -> [B, T, ..], the padding dropped."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]
