"""One training step: a batch and a state in, the next state out. What is compiled, and all of it.

It knows neither files nor workdirs, so that `plan` and `bench` compile exactly what `train` runs.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from tiny_aya_jax import axes, chips
from tiny_aya_jax.axes import axis_size, constrain
from tiny_aya_jax.model import adapter, bits, losses, preference
from tiny_aya_jax.model.transformer import TinyAya, hidden
from tiny_aya_jax.train import fields, guard, optimizer


def model(config):
  """The transformer that a train config describes."""
  return TinyAya(
      config.model, jnp.dtype(config.dtype), config.attention, config.remat, config.unroll,
      config.matmul, adapter.described(fields.adapter(config)),
  )


def step(config, rate, sources):
  """The jitted train_step of a config: (state, batch) -> (state, metrics); the state is donated.

  rate: optax schedule. sources: how many the batch's source_B counts.
  """
  loss = functools.partial(LOSSES[config.loss.kind], model=model(config), config=config.loss)
  return jax.jit(
      functools.partial(
          train_step, loss=loss, tx=optimizer.adamw(config.optimizer, rate),
          accumulate=config.accumulate, sources=sources, sigma=config.guard.sigma,
      ),
      donate_argnums=0,
  )


def compiled(config, mesh, rate, sources):
  """`step` compiled for the devices of a mesh, there or not (plan.py): a jax.stages.Compiled."""
  with jax.set_mesh(mesh):
    state = abstract(mesh, jax.eval_shape(scratch(config)))
    lowered = step(config, rate, sources).lower(state, batch(config, mesh))
    return lowered.compile(compiler_options=chips.compiler_options(mesh.devices.flat[0].device_kind))


def scratch(config):
  """A function of nothing: the state {"step", "params", "optimizer", "guard"} of a run that begins."""
  tx = optimizer.adamw(config.optimizer, lambda step: 0.0)  # its state does not depend on the rate
  # Parameters do not depend on how they are used, but for adapters.
  shape = TinyAya(config.model, adapter=adapter.described(fields.adapter(config)))

  def draw():
    rows = jnp.ones((axis_size("data") * axis_size("fsdp"), axis_size("context")), jnp.int32)
    params = shape.init(jax.random.key(config.seed), rows, rows, rows)["params"]
    params = adapter.held(params, jnp.dtype(config.dtype))
    return dict(step=jnp.int32(0), params=params, optimizer=tx.init(adapter.split(params)[0]),
                guard=guard.fresh(config.guard.window))

  return draw


def abstract(mesh, tree):
  """ShapeDtypeStructs of a tree of arrays or structs, each with the sharding of its name."""
  return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      tree, axes.shardings(mesh, tree),
  )


def batch(config, mesh):
  """ShapeDtypeStructs of one global batch, laid out by their letters."""
  B, T = config.data.batch, config.data.T
  names = dict.fromkeys(("token_BT", "target_BT", "segment_BT", "position_BT"), jnp.int32)
  names |= dict(weight_BT=jnp.float32, source_B=jnp.int32, vote_P=jnp.int32)
  if config.loss.kind != "next_token":
    names |= dict(pair_BT=jnp.int32, side_BT=jnp.int32, reference_BJC=jnp.float32)
  sizes = dict(B=B, T=T, P=mesh.size, J=config.loss.pairs, C=2)
  return {
      name: jax.ShapeDtypeStruct(
          [sizes[letter] for letter in axes.letters(name)], dtype, sharding=axes.activation(mesh, name)
      )
      for name, dtype in names.items()
  }


def next_token_loss(params, batch, *, model, config):
  """(sum, count, {"tokens", "loss": [B, T]}) of losses.next_token for one batch of packed rows."""
  sum, count, aux = losses.next_token(
      hidden(params, batch, model), params["embedding_VD"], batch["target_BT"], batch["weight_BT"],
      logit_scale=model.cfg.logit_scale, z_loss=config.z_loss, chunk=config.chunk,
  )
  return sum, count, dict(tokens=batch["weight_BT"], loss=aux["nats_BT"])


def preference_loss(params, batch, *, model, config):
  """(sum, count, told [B, J]) of preference.preference for one batch of packed, scored pairs."""
  return preference.preference(
      hidden(params, batch, model), params["embedding_VD"], batch, logit_scale=model.cfg.logit_scale,
      chunk=config.chunk, **{name: config[name] for name in preference.SETTINGS},
  )


LOSSES = dict(next_token=next_token_loss, dpo=preference_loss, ipo=preference_loss)  # config.loss.kind


# vote_P: what the process of a device asks all to do after this step; the largest wins, and every
# process reads the same answer in the report. A signal or a clock is of one process only.
GO_ON, SAVE, STOP = 0, 1, 2


def train_step(state, batch, *, loss, tx, accumulate, sources, sigma):
  """(state, global batch) -> (state, metrics). Gradients are of the mean over all tokens.

  They and the moments are of what is trained (adapter.split); the rest goes through as it is.
  state: {"step", "params", "optimizer", "guard"}. The batch is split into `accumulate` parts whose
  sums, not means, are added, so the result does not depend on how it is split. An update that
  guard.judge does not want is not applied. metrics: loss in nats a token (or a pair), grad_norm,
  count of tokens (pairs), verdict, not_finite (steps in a row), vote, and what the loss tells, summed
  per source: loss_S, tokens_S and the like.
  """
  trained, frozen = adapter.split(state["params"])

  def part(rows):
    def summed(trained):
      sum, count, told = loss(adapter.join(trained, frozen), rows)
      return sum, (count, told)

    (sum, (count, told)), grads = jax.value_and_grad(summed, has_aux=True)(trained)
    return grads, sum, count, {
        f"{name}_S": bits.by_source(x, rows["source_B"], sources) for name, x in told.items()}

  rows = {name: x for name, x in batch.items() if name != "vote_P"}
  if accumulate == 1:
    grads, sum, count, per_source = part(rows)
  else:
    parts = _microbatches(rows, accumulate)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                        jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts)))
    (grads, sum, count, per_source), _ = jax.lax.scan(
        lambda carry, rows: (jax.tree.map(jnp.add, carry, part(rows)), None), zero, parts)
  count = jnp.maximum(count, 1)
  grads = jax.tree.map(lambda grad: grad / count, grads)
  updates, moments = tx.update(grads, state["optimizer"], trained)
  updated = dict(params=optax.apply_updates(trained, updates), optimizer=moments)
  grad_norm = optax.tree.norm(grads)
  verdict, guarded = guard.judge(state["guard"], sum / count, grad_norm, sigma)
  kept = jax.tree.map(functools.partial(guard.keep, verdict), updated,
                      dict(params=trained, optimizer=state["optimizer"]))
  kept["params"] = adapter.join(kept["params"], frozen)
  report = dict(loss=sum / count, grad_norm=grad_norm, count=count, verdict=verdict,
                not_finite=guarded["not_finite"], vote=batch["vote_P"].max(), **per_source)
  return kept | dict(step=state["step"] + 1, guard=guarded), jax.tree.map(constrain, report)


def _microbatches(batch, accumulate):
  """[B, ..] -> [M, B/M, ..]: rows are dealt out like cards, so each device keeps its own."""
  return jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
  )
