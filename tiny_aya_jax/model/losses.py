"""Losses: hidden states in, (sum, count, aux) out. Whoever averages, averages once, over tokens.

Logits exist only for a chunk of positions at a time, in fp32. The gradients of the hidden states
and of the tied table are computed in the forward loop, while a chunk's logits are there, so the
backward pass only scales them: three matmuls, no recompute (performance.md 2.4).
"""

import functools

import jax
import jax.numpy as jnp


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
  head_VD = embedding_VD.astype(hidden_BTD.dtype)

  def step(sum, part):
    chunk_sum, nats_BT, _ = _chunk_loss(*part, head_VD, logit_scale, z_loss)
    return sum + chunk_sum, nats_BT

  parts = _split((hidden_BTD, target_BT, weight_BT), chunk)
  sum, nats = jax.lax.scan(step, jnp.float32(0), parts)
  return sum, _join(nats, target_BT.shape[1])


def _forward(hidden_BTD, embedding_VD, target_BT, weight_BT, logit_scale, z_loss, chunk):
  head_VD = embedding_VD.astype(hidden_BTD.dtype)

  def step(carry, part):
    sum, d_head_VD = carry
    chunk_sum, nats_BT, d_logits_BTV = _chunk_loss(*part, head_VD, logit_scale, z_loss)
    V, D = head_VD.shape
    flat_logits = d_logits_BTV.astype(head_VD.dtype).reshape(-1, V)
    flat_hidden = part[0].reshape(-1, D)
    d_head_VD += jnp.matmul(flat_logits.T, flat_hidden, preferred_element_type=jnp.float32)
    return (sum + chunk_sum, d_head_VD), (nats_BT, (flat_logits @ head_VD).reshape(part[0].shape))

  parts = _split((hidden_BTD, target_BT, weight_BT), chunk)
  zero = (jnp.float32(0), jnp.zeros(embedding_VD.shape, jnp.float32))
  (sum, d_head_VD), (nats, d_hidden) = jax.lax.scan(step, zero, parts)
  T = target_BT.shape[1]
  return (sum, _join(nats, T)), (_join(d_hidden, T), d_head_VD.astype(embedding_VD.dtype))


def _backward(logit_scale, z_loss, chunk, gradients, cotangent):
  d_hidden_BTD, d_head_VD = gradients
  scale = cotangent[0]  # nats_BT carries no gradient: next_token stops it
  return (d_hidden_BTD * scale.astype(d_hidden_BTD.dtype), d_head_VD * scale, None, None)


_weighted_sum.defvjp(_forward, _backward)


def _chunk_loss(hidden_BTD, target_BT, weight_BT, head_VD, logit_scale, z_loss):
  """(sum, weighted nats_BT, gradient of the sum with respect to hidden @ head^T) of one chunk."""
  V, D = head_VD.shape
  raw = jnp.matmul(hidden_BTD.reshape(-1, D), head_VD.T, preferred_element_type=jnp.float32)
  logits_BTV = raw.reshape(*target_BT.shape, V) * logit_scale
  largest_BT = logits_BTV.max(-1)
  share_BTV = jnp.exp(logits_BTV - largest_BT[..., None])
  total_BT = share_BTV.sum(-1)
  logsumexp_BT = largest_BT + jnp.log(total_BT)
  target_logit_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], -1)[..., 0]
  nats_BT = weight_BT * (logsumexp_BT - target_logit_BT)
  sum = jnp.sum(nats_BT + weight_BT * z_loss * jnp.square(logsumexp_BT))

  scale_BT = weight_BT * (1 + 2 * z_loss * logsumexp_BT) / total_BT
  hit_BTV = target_BT[..., None] == jnp.arange(V)
  d_logits_BTV = share_BTV * scale_BT[..., None] - jnp.where(hit_BTV, weight_BT[..., None], 0)
  return sum, nats_BT, d_logits_BTV * logit_scale


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
