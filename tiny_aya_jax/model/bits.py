"""Bits per byte: the measure that compares languages, tokenizers and models.

bits per byte = nats / ln 2 / UTF-8 bytes of the targets; special tokens cost bits and count no
bytes. Sums are kept per source on the devices and divided once, at the end.
"""

import functools
import math

import jax
import jax.numpy as jnp

from tiny_aya_jax import axes
from tiny_aya_jax.model import losses
from tiny_aya_jax.model.transformer import hidden


def scorer(model, bytes_V, sources, *, chunk):
  """Jitted (params, batch, totals) -> totals: {"nats", "bytes", "tokens"} sums over `sources`.

  bytes_V: UTF-8 bytes of each token, at most cfg.V of them. Start from `zeros(sources)`.
  """
  bytes_V = jnp.zeros(model.cfg.V, jnp.int32).at[: len(bytes_V)].set(bytes_V)

  @functools.partial(jax.jit, donate_argnums=2)
  def score(params, batch, totals):
    _, _, aux = losses.next_token(
        hidden(params, batch, model), params["embedding_VD"], batch["target_BT"], batch["weight_BT"],
        logit_scale=model.cfg.logit_scale, chunk=chunk,
    )
    counted_BT = (batch["weight_BT"] > 0).astype(jnp.float32)
    parts = dict(
        nats=aux["nats_BT"], bytes=counted_BT * bytes_V[batch["target_BT"]], tokens=counted_BT
    )
    return jax.tree.map(lambda total, x: total + by_source(x, batch["source_B"], sources),
                        totals, parts)

  return score


def zeros(sources):
  """Empty totals of `sources` sources."""
  return {name: jnp.zeros(sources) for name in ("nats", "bytes", "tokens")}


def by_source(x_BT, source_B, sources):
  """Sums [B, T] to [sources]; rows of source -1 (padding) count nowhere."""
  return jax.ops.segment_sum(x_BT.sum(-1), source_B, num_segments=sources)


def evaluate(score, params, batches, mesh, languages):
  """Runs `score` over batches; returns {language: {"nats", "bytes", "tokens", "bits_per_byte"}}.

  languages: the language of each source; sources of one language are added.
  """
  totals = zeros(len(languages))
  with jax.set_mesh(mesh):
    for batch in batches:
      totals = score(params, axes.place(mesh, batch), totals)
  sums = {}
  for source, language in enumerate(languages):
    entry = sums.setdefault(language, dict(nats=0.0, bytes=0.0, tokens=0.0))
    for name in entry:
      entry[name] += float(totals[name][source])
  return {
      language: entry | dict(bits_per_byte=entry["nats"] / math.log(2) / max(entry["bytes"], 1))
      for language, entry in sums.items()
  }
