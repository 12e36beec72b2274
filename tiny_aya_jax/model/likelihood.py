"""Log-probabilities of chosen tokens of rows: what multiple choice and perplexities are made of.

Not the loss: logits exist only at the positions that are asked for, a few of a row, so that a
question of a thousand tokens with an answer of one costs one row of the head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tiny_aya_jax import axes
from tiny_aya_jax.model.transformer import logits

CHUNK_BYTES = 256 << 20  # of logits that exist at a time, on each device


def scorer(model):
  """Jitted (params, batch) -> (nats_BE, greedy_BE).

  batch: token_BT, segment_BT and position_BT of packed rows, and of E marked places of each row
  place_BE, a column of T, and target_BE. nats_BE is the log of the probability that target_BE is
  the token behind that place; greedy_BE, whether no token is likelier.
  """

  @jax.jit
  def score(params, batch):
    hidden_BTD = model.apply(
        {"params": params}, batch["token_BT"], batch["segment_BT"], batch["position_BT"])
    hidden_BED = jnp.take_along_axis(hidden_BTD, batch["place_BE"][..., None], axis=1)
    # Whole over fsdp once, not once a chunk.
    head_VD = axes.constrain(params["embedding_VD"].astype(hidden_BED.dtype), "tensor", None)
    part = functools.partial(_chosen, dict(embedding_VD=head_VD), model.cfg)
    B, E = batch["target_BE"].shape
    chunk = min(E, max(1, CHUNK_BYTES * _rows_over() // (4 * B * model.cfg.V)))
    chunks = (_split(hidden_BED, chunk), _split(batch["target_BE"], chunk))
    nats, greedy = jax.lax.map(lambda one: part(*one), chunks)
    return tuple(axes.constrain(_join(x, E), *_ROWS) for x in (nats, greedy))

  return score


_ROWS = PartitionSpec(("data", "fsdp"), None)


def _rows_over():
  return axes.axis_size("data") * axes.axis_size("fsdp")


def _chosen(params, cfg, hidden_BED, target_BE):
  logits_BEV = logits(params, hidden_BED, cfg)
  chosen_BE = jnp.take_along_axis(logits_BEV, target_BE[..., None], axis=-1)[..., 0]
  greedy_BE = chosen_BE >= logits_BEV.max(-1)  # argmax is a slow loop on CPU
  return chosen_BE - jax.nn.logsumexp(logits_BEV, axis=-1), greedy_BE


def _split(x_BE, chunk):
  """[B, E, ..] -> [chunks, B, chunk, ..]; the last chunk is filled up."""
  B, E = x_BE.shape[:2]
  chunks = -(-E // chunk)
  x_BE = jnp.pad(x_BE, ((0, 0), (0, chunks * chunk - E), *((0, 0),) * (x_BE.ndim - 2)))
  return x_BE.reshape(B, chunks, chunk, *x_BE.shape[2:]).swapaxes(0, 1)


def _join(x, E):
  """[chunks, B, chunk] -> [B, E]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :E]
