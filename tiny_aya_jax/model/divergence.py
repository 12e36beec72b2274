"""Two models over the same tokens: how far apart their predictions are, and their hidden states.

Not a loss: nothing here has a gradient. Logits of both exist only for a chunk of positions at a
time, and hidden states of one period of layers.
"""

import jax
import jax.numpy as jnp

from tiny_aya_jax import axes
from tiny_aya_jax.model.transformer import BLOCKS, Block, Period, layer_norm, logits, look_up


def states(model, pair, batch):
  """Parameters of two models of one shape -> (both final hidden_BTD, cosine [L, 4, B, T]).

  The cosine is of the two outputs of each block, which are the residual stream behind it: layer
  4l + j is [l, j]. The periods of both models are scanned side by side, and Flax captures what the
  blocks of one period return; captured in the scan of TinyAya, every layer's states would exist.
  """
  period = Period(model.cfg, model.dtype, model.backend, "none", model.matmul)

  def step(both, weights):
    ends, outputs = zip(*(_blocks(period, *one, batch) for one in zip(weights, both)))
    return ends, jnp.stack([_cosine(*block) for block in zip(*outputs)])

  both = tuple(axes.shard(look_up(params["embedding_VD"], batch["token_BT"], model.dtype), "BTD")
               for params in pair)
  both, cosine = jax.lax.scan(step, both, tuple(params["periods"] for params in pair))
  return [layer_norm(x_BTD, params["norm_D"], model.cfg) for x_BTD, params in zip(both, pair)], cosine


def _blocks(period, params, x_BTD, batch):
  """(x_BTD behind a period, [x_BTD behind each of its blocks])."""
  (x_BTD, _), found = period.apply(
      {"params": params}, x_BTD, batch["segment_BT"], batch["position_BT"],
      capture_intermediates=lambda module, _: isinstance(module, Block), mutable=["intermediates"])
  return x_BTD, [found["intermediates"][name]["__call__"][0] for name in BLOCKS]


def _cosine(x_BTD, y_BTD):
  x_BTD, y_BTD = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
  return jnp.sum(x_BTD * y_BTD, -1) / (jnp.linalg.norm(x_BTD, axis=-1) * jnp.linalg.norm(y_BTD, axis=-1))


def predictions(cfgs, pair, hidden, chunk):
  """dict(kl_ab_BT, kl_ba_BT, agree_BT) of the next-token distributions of two models, a and b.

  kl_ab_BT is KL(a || b) in nats over the whole vocabulary, kl_ba_BT the other way; agree_BT, 1
  where their likeliest tokens are one. cfgs, pair, hidden: two model configs, parameters and
  hidden_BTD; V is one. chunk: positions of a row whose logits exist at a time.
  """
  # Whole over fsdp once, not once a chunk.
  heads = [axes.constrain(params["embedding_VD"].astype(x_BTD.dtype), "tensor", None)
           for params, x_BTD in zip(pair, hidden)]

  def part(hidden):
    return _apart(*(logits(dict(embedding_VD=head_VD), x_BTD, cfg)
                    for head_VD, x_BTD, cfg in zip(heads, hidden, cfgs)))

  T = hidden[0].shape[1]
  found = jax.lax.map(part, [_split(x_BTD, min(chunk, T)) for x_BTD in hidden])
  return {name: axes.shard(_join(x, T), "BT") for name, x in found.items()}


def _apart(a_BTV, b_BTV):
  """Each term of p_b - p_a - p_a log(p_b / p_a) is at least 0 and their sum is KL(a || b).

  The plain sum of p_a log(p_a / p_b) has the rounding error of both logsumexps, 1e-6 nats; here it
  enters squared, so that models that are nearly one have a KL with digits.
  """
  top_BTV = (a_BTV >= a_BTV.max(-1, keepdims=True)) & (b_BTV >= b_BTV.max(-1, keepdims=True))
  a_BTV, b_BTV = jax.nn.log_softmax(a_BTV), jax.nn.log_softmax(b_BTV)
  p_a_BTV, p_b_BTV, log_BTV = jnp.exp(a_BTV), jnp.exp(b_BTV), b_BTV - a_BTV
  return dict(
      kl_ab_BT=jnp.sum(p_b_BTV - p_a_BTV - p_a_BTV * log_BTV, -1),
      kl_ba_BT=jnp.sum(p_a_BTV - p_b_BTV + p_b_BTV * log_BTV, -1),
      agree_BT=top_BTV.any(-1).astype(jnp.float32),  # argmax is a slow loop on CPU
  )


def _split(x_BTD, chunk):
  """[B, T, D] -> [chunks, B, chunk, D]; a chunk takes every so many-th position of a row.

  Not a stretch of it: where the axis context splits T, each device has a part of each chunk.
  """
  B, T, D = x_BTD.shape
  chunks = -(-T // chunk)
  x_BTD = jnp.pad(x_BTD, ((0, 0), (0, -T % chunks), (0, 0)))
  return jnp.moveaxis(x_BTD.reshape(B, -1, chunks, D), 2, 0)


def _join(x, T):
  """[chunks, B, chunk] -> [B, T], the padding dropped."""
  return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1)[:, :T]
