"""Small trials trained together in one program, beside the same one after another.

The trials differ in data and learning rate. Together: states and batches have an axis of
trials in front, which is vmapped and shared by the devices; apart: each trial makes its step in
turn, its batch shared by the devices. Every trial must have the same loss either way, or the
comparison is void. `sweep` does not train so: on two CPU cores 2, 4 or 8 trials together make
1.01, 0.97 or 0.93 of the tokens a second that they make apart, and a process for each core
(config.at_once of a sweep) 1.02. On an accelerator, with room for one process, this decides.
"""

import functools
import statistics
import time

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tiny_aya_jax import axes, bench, bench_steps, run
from tiny_aya_jax.bench_steps import GIB, Fields
from tiny_aya_jax.train import optimizer, step


def main(config):
  """Prints versions, shapes, turn by turn medians; -> {P: {side: [seconds of a step of all]}}."""
  bench.keep_threads(config.threads)
  bench.keep_memory()
  config, cfg, devices = Fields(config.to_dict()), config.model, jax.devices()[: config.devices]
  n, split = len(devices), (*config.populations, config.batch)
  if not 0 < n == config.devices or any(size < 1 or size % n for size in split):
    raise run.Refused(
        f"config.devices is {config.devices} of {jax.device_count()}: expected 1 to all, and that "
        f"populations {config.populations} and a batch of {config.batch} split over them")
  run.say(f"{bench.versions('jax', 'jaxlib')}; {n} x {devices[0].device_kind}")
  run.say(f"{4 * cfg.L} layers, D {cfg.D}, F {cfg.F}, {cfg.N}/{cfg.K} heads of {cfg.H}, V {cfg.V}, "
          f"window {cfg.window}; a trial: batch {config.batch} x {config.T}, "
          f"{config.tokens:,} tokens, {config.dtype}, attention {config.attention}, "
          f"loss chunk {config.loss_chunk}")
  return {P: _race(config, P, devices) for P in config.populations}


def _race(config, P, devices):
  trials, what, advance = _trials(config, P), f"population {P}", {}
  for side, prepare in dict(together=_together, apart=_apart).items():
    began = time.monotonic()
    advance[side], compiled = prepare(config, *trials, devices)
    size = compiled.memory_analysis().temp_size_in_bytes / GIB
    run.say(f"{what}: {side} ready in {time.monotonic() - began:.1f} s, temporaries {size:.2f} GiB "
            "a device")
  losses = {side: [step() for _ in range(bench.AGREED_STEPS)][-1].tolist()
            for side, step in advance.items()}
  bench.agree(losses, config.tolerance * min(losses["apart"]), run.say)
  seconds = {side: [] for side in advance}
  for turn in range(config.turns):
    for side, step in advance.items():
      step()  # untimed, as in bench.py
      seconds[side] += [bench.timed(step) for _ in range(config.steps)]
    speed = {side: P * config.batch * config.T / statistics.median(times)
             for side, times in seconds.items()}
    figures = [f"{side} {found:,.0f} tokens/s, {3600 * found / config.tokens:,.1f} trials an hour"
               for side, found in speed.items()]
    run.say(f"{what}, turn {turn + 1}/{config.turns}: {'; '.join(figures)}; together / apart "
            f"{speed['together'] / speed['apart']:.2f}")
  return seconds


def _trials(config, P):
  """(a state; [batch] * P; learning rates [P]): trial p draws from the first V / (p + 1) tokens,
  for a mixture of its own."""
  random, shape = np.random.default_rng(config.seed), (config.batch, config.T + 1)
  state = bench_steps._state(bench_steps._train_config(config), bench_steps._params(config))
  tops = [max(config.model.V // (p + 1), 2) for p in range(P)]
  rows = [bench_steps._batch(random.integers(0, top, shape, np.int32)) for top in tops]
  rates = config.optimizer.learning_rate * 0.5 ** (np.arange(P) % 4)
  return jax.device_get(state), rows, np.float32(rates)


def _together(config, state, rows, rates, devices):
  """(a function of nothing: a step of every trial -> losses [P]; the compiled step)."""
  # The axes of the model are there, of size 1: its own shard_maps name them.
  mesh = Mesh(np.array(devices).reshape(-1, 1, 1, 1, 1), ("population", *axes.AXES),
              axis_types=(AxisType.Auto,) * 5)
  spec = PartitionSpec("population")
  place = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
  stack = lambda: place(jax.tree.map(lambda *x: np.stack(x), *rows))
  advance = jax.jit(jax.shard_map(
      jax.vmap(functools.partial(_advance, config)), mesh=mesh, in_specs=spec, out_specs=spec,
      axis_names={"population"}, check_vma=False), donate_argnums=0)
  held = [place(jax.tree.map(lambda leaf: np.stack([leaf] * len(rows)), state))]
  compiled = advance.lower(held[0], stack(), place(rates)).compile()

  def steps():
    state, losses = compiled(held.pop(), stack(), place(rates))
    held.append(state)
    return np.array(jax.block_until_ready((losses, state))[0])

  return steps, compiled


def _apart(config, state, rows, rates, devices):
  """As `_together`, one trial after another."""
  mesh = axes.mesh(data=-1, fsdp=1, devices=devices)
  place = lambda batch: axes.place(mesh, batch | dict(vote_P=np.zeros(mesh.size, np.int32)))
  with jax.set_mesh(mesh):
    states = [jax.device_put(state, axes.shardings(mesh, state)) for _ in rows]
    advance = jax.jit(functools.partial(_advance, config), donate_argnums=0)
    compiled = advance.lower(states[0], place(rows[0]), rates[0]).compile()

  def steps():
    losses = []
    for p, batch in enumerate(rows):
      states[p], loss = compiled(states[p], place(batch), rates[p])
      losses.append(loss)
    return np.array(jax.device_get(jax.block_until_ready((losses, states))[0]))

  return steps, compiled


def _advance(config, state, batch, rate):
  """What `train` compiles, but that the learning rate is an input: (state, loss)."""
  fields = bench_steps._train_config(config)
  loss = functools.partial(step.next_token_loss, model=step.model(fields), config=fields.loss)
  state, report = step.train_step(
      state, batch, loss=loss, tx=optimizer.adamw(fields.optimizer, lambda _: rate),
      accumulate=fields.accumulate, sources=1, sigma=fields.guard.sigma)
  return state, report["loss"]
