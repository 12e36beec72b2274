"""The preference losses, DPO and IPO, of packed pairs whose reference was scored before.

Of a pair, c and r are log p(answer) - log p_reference(answer), chosen and rejected, in nats; with
length_normalised they are divided by the answer's tokens. margin = c - r, and

  dpo   -log sigmoid(beta margin)           Rafailov et al. 2023, arXiv 2305.18290, Eq. 7
  ipo   (margin - 1 / (2 beta))^2           Azar et al. 2023, arXiv 2310.12036, Eq. 17

No second model is in memory: `score` wrote the reference beside the tokens. No logits either: the
head runs twice over the same hidden states, first for the log-probabilities, then, with what the
loss has for derivatives as the weights of the tokens, for the gradient.
"""

import jax
import jax.numpy as jnp

from tiny_aya_jax.axes import constrain
from tiny_aya_jax.model import bits, losses
from tiny_aya_jax.model.transformer import hidden

KINDS = dict(
    dpo=lambda margin, beta: jax.nn.softplus(-beta * margin),
    ipo=lambda margin, beta: jnp.square(margin - 1 / (2 * beta)),
)

SETTINGS = ("kind", "beta", "length_normalised")  # of config.loss: arguments of `compare`


def preference(hidden_BTD, embedding_VD, batch, *, kind, beta, length_normalised, logit_scale, chunk):
  """(sum over pairs, pairs, told) of a batch with target_BT, weight_BT, pair_BT, side_BT, reference_BJC.

  told: as `compare` says.
  """
  frozen = map(jax.lax.stop_gradient, (hidden_BTD, embedding_VD))
  nats_BJC = answer_nats(*frozen, batch, batch["reference_BJC"].shape[1], logit_scale=logit_scale, chunk=chunk)

  def loss(nats_BJC):
    told = compare(nats_BJC, batch, kind=kind, beta=beta, length_normalised=length_normalised)
    return told["loss"].sum(), told

  (sum, told), d_BJC = jax.value_and_grad(loss, has_aux=True)(nats_BJC)
  surrogate, _, _ = losses.next_token(
      hidden_BTD, embedding_VD, batch["target_BT"], batch["weight_BT"] * to_tokens(d_BJC, batch),
      logit_scale=logit_scale, chunk=chunk,
  )
  # The surrogate has the gradient of the loss, and another value.
  return surrogate + jax.lax.stop_gradient(sum - surrogate), told["pairs"].sum(), told


def answer_nats(hidden_BTD, embedding_VD, batch, J, *, logit_scale, chunk):
  """-log p of both answers to each of at most J pairs a row, in nats: [B, J, C], chosen first."""
  _, _, aux = losses.next_token(
      hidden_BTD, embedding_VD, batch["target_BT"], batch["weight_BT"], logit_scale=logit_scale,
      chunk=chunk,
  )
  return by_side(aux["nats_BT"], batch, J)


def compare(nats_BJC, batch, *, kind, beta, length_normalised):
  """{"pairs" (1), "loss", "margin", "accuracy" (margin > 0), "chosen", "rejected" (c, r)}: [B, J] each,
  0 where a row has no pair."""
  tokens_BJC = by_side(batch["weight_BT"], batch, nats_BJC.shape[1])
  ratio_BJC = -nats_BJC - batch["reference_BJC"]
  if length_normalised:
    ratio_BJC /= jnp.maximum(tokens_BJC, 1)
  margin_BJ = ratio_BJC[..., 0] - ratio_BJC[..., 1]
  real_BJ = (tokens_BJC.min(-1) > 0).astype(jnp.float32)
  found = dict(pairs=1.0, loss=KINDS[kind](margin_BJ, beta), margin=margin_BJ, accuracy=margin_BJ > 0,
               chosen=ratio_BJC[..., 0], rejected=ratio_BJC[..., 1])
  return {name: real_BJ * value for name, value in found.items()}


def references(params, batch, *, model, J, chunk):
  """log p of both answers to each pair of packed rows: [B, J, C], the same on every device."""
  return constrain(-answer_nats(
      hidden(params, batch, model), params["embedding_VD"], batch, J,
      logit_scale=model.cfg.logit_scale, chunk=chunk))


def totals(params, batch, before, *, model, config, sources):
  """{name: [sources]}: sums of what `compare` says of scored pairs, added to `before`, None for none."""
  nats_BJC = answer_nats(
      hidden(params, batch, model), params["embedding_VD"], batch, batch["reference_BJC"].shape[1],
      logit_scale=model.cfg.logit_scale, chunk=config.chunk)
  told = compare(nats_BJC, batch, **{name: config[name] for name in SETTINGS})
  found = {name: bits.by_source(x, batch["source_B"], sources) for name, x in told.items()}
  return found if before is None else jax.tree.map(jnp.add, before, found)


def likelier(params, batch, before, *, model, J, chunk, sources):
  """{"pairs", "likelier": [sources]} added to `before`, None for none: how many pairs there are, and of how
  many the chosen answer is the likelier one a token."""
  nats_BJC = answer_nats(hidden(params, batch, model), params["embedding_VD"], batch, J,
                         logit_scale=model.cfg.logit_scale, chunk=chunk)
  tokens_BJC = by_side(batch["weight_BT"], batch, J)
  real_BJ = (tokens_BJC.min(-1) > 0).astype(jnp.float32)
  mean_BJC = nats_BJC / jnp.maximum(tokens_BJC, 1)
  found = dict(pairs=real_BJ, likelier=real_BJ * (mean_BJC[..., 0] < mean_BJC[..., 1]))
  found = {name: bits.by_source(x_BJ, batch["source_B"], sources) for name, x_BJ in found.items()}
  return found if before is None else jax.tree.map(jnp.add, before, found)


def by_side(x_BT, batch, J):
  """Sums over the tokens of each pair and side: [B, J, C], chosen first."""
  pair_BTJ, side_BTC = _members(batch, J)
  return jnp.einsum("BT,BTJ,BTC->BJC", x_BT, pair_BTJ, side_BTC, precision="highest")


def to_tokens(x_BJC, batch):
  """The value of each token's pair and side, 0 outside of pairs: [B, T]."""
  pair_BTJ, side_BTC = _members(batch, x_BJC.shape[1])
  return jnp.einsum("BJC,BTJ,BTC->BT", x_BJC, pair_BTJ, side_BTC, precision="highest")


def _members(batch, J):
  return jax.nn.one_hot(batch["pair_BT"] - 1, J), jax.nn.one_hot(batch["side_BT"] - 1, 2)
