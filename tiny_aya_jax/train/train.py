"""One program for pretraining, cooldown and SFT: rows and a config in, checkpoints out.

It does not know what a stage is. A cooldown is another mixture and schedule forked from a trunk's
state; SFT is rows whose prompt tokens have weight 0. Order of start-up: this workdir's newest
checkpoint; else `init_from`; else scratch. Exit codes: run.EXIT.
"""

import contextlib
import fcntl
import functools
import math
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tiny_aya_jax import axes, run
from tiny_aya_jax.data import loader, mixture
from tiny_aya_jax.model import bits, losses
from tiny_aya_jax.model.transformer import TinyAya
from tiny_aya_jax.train import begin as begins, checkpoint, metrics, optimizer, saved, start


def main(config, workdir, plan, validation, tokenizer):
  """Trains to `config.steps` steps after the start or fork; returns an exit code.

  plan, validation (manifests) and tokenizer come from door.check. Resumes by the workdir alone.
  """
  mesh = axes.mesh(**config.mesh.to_dict())
  _check_batch(config, mesh)
  with _lock(workdir), jax.set_mesh(mesh):
    model = TinyAya(
        config.model, jnp.dtype(config.dtype), config.attention, config.remat, config.unroll
    )
    begin = begins.decide(config, workdir, plan, tokenizer)  # again, now that nobody else saves
    plan = begin.plan
    state = start.start(config, begin, mesh, model, tokenizer)
    _record(config, workdir, mesh, model, state, tokenizer)
    rows = loader.Loader(
        plan, config.data.seed, config.data.batch, (jax.process_index(), jax.process_count())
    )
    sources = [source["name"] for source in plan["sources"]]
    rate = optimizer.schedule(config.schedule, config.steps, begin.start)
    loss = functools.partial(
        next_token_loss, model=model, chunk=config.loss.chunk, z_loss=config.loss.z_loss
    )
    step = jax.jit(
        functools.partial(
            train_step, loss=loss, tx=optimizer.adamw(config.optimizer, rate),
            accumulate=config.accumulate, sources=len(sources),
        ),
        donate_argnums=0,
    )
    if not saved.steps(workdir):
      run.say("\n".join(mixture.table(plan, (begin.start + config.steps) * config.data.batch)))
    evaluate = _evaluator(config, mesh, model, validation, tokenizer)
    meta = dict(
        model=config.model.to_dict(), T=config.data.T, tokenizer_sha256=tokenizer.sha256,
        start=begin.start, steps=config.steps, origin=begin.origin, run=begins.facts(config),
    )
    return _loop(config, workdir, mesh, step, evaluate, rows, sources, rate, state, meta)


def next_token_loss(params, batch, *, model, chunk, z_loss):
  """(sum, count, aux) of losses.next_token for one batch of packed rows."""
  hidden_BTD = model.apply(
      {"params": params}, batch["token_BT"], batch["segment_BT"], batch["position_BT"]
  )
  return losses.next_token(
      hidden_BTD, params["embedding_VD"], batch["target_BT"], batch["weight_BT"],
      logit_scale=model.cfg.logit_scale, z_loss=z_loss, chunk=chunk,
  )


def train_step(state, batch, *, loss, tx, accumulate, sources):
  """(state, global batch) -> (state, metrics). Gradients are of the mean over all tokens.

  state: {"step", "params", "optimizer"}. The batch is split into `accumulate` parts whose sums,
  not means, are added, so the result does not depend on how it is split. metrics: loss in nats a
  token, grad_norm, tokens, and nats_S, tokens_S per source.
  """
  def part(carry, rows):
    def summed(params):
      sum, count, aux = loss(params, rows)
      return sum, (count, aux["nats_BT"])

    (sum, (count, nats_BT)), grads = jax.value_and_grad(summed, has_aux=True)(state["params"])
    per_source = dict(
        nats_S=bits.by_source(nats_BT, rows["source_B"], sources),
        tokens_S=bits.by_source(rows["weight_BT"], rows["source_B"], sources),
    )
    return jax.tree.map(jnp.add, carry, (grads, sum, count, per_source)), None

  zero = (
      jax.tree.map(jnp.zeros_like, state["params"]), jnp.float32(0), jnp.float32(0),
      dict(nats_S=jnp.zeros(sources), tokens_S=jnp.zeros(sources)),
  )
  if accumulate == 1:
    (grads, sum, count, per_source), _ = part(zero, batch)
  else:
    (grads, sum, count, per_source), _ = jax.lax.scan(part, zero, _microbatches(batch, accumulate))
  count = jnp.maximum(count, 1)
  grads = jax.tree.map(lambda grad: grad / count, grads)
  updates, moments = tx.update(grads, state["optimizer"], state["params"])
  new_state = dict(
      step=state["step"] + 1, params=optax.apply_updates(state["params"], updates),
      optimizer=moments,
  )
  report = dict(loss=sum / count, grad_norm=optax.tree.norm(grads), tokens=count, **per_source)
  return new_state, report


def _microbatches(batch, accumulate):
  """[B, ..] -> [M, B/M, ..]: rows are dealt out like cards, so each device keeps its own."""
  return jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
  )


def _loop(config, workdir, mesh, step, evaluate, rows, sources, rate, state, meta):
  first, start = int(state["step"]), meta["start"]
  last = start + config.steps
  writer, stop = metrics.Writer(workdir, first, resumed=first > start), _stop_signal()
  began = since = time.monotonic()
  reports = []  # of the steps since the last line; on the devices until then

  def save(at):
    data = rows.state(at) | dict(plan=rows.plan, batch=config.data.batch)
    items = dict(params=state["params"], optimizer=state["optimizer"], data=data, meta=meta)
    checkpoint.save(workdir, at, items, keep=config.keep)

  def log(at):
    """Writes and prints the steps since the last line; returns whether they were finite."""
    window = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(reports))
    tokens = float(window["tokens"].sum())
    loss = float((window["loss"] * window["tokens"]).sum() / max(tokens, 1))  # one mean, over tokens
    grad_norm = float(window["grad_norm"].mean())
    languages = _by_language(sources, window["nats_S"].sum(0), window["tokens_S"].sum(0))
    speed = len(reports) * config.data.batch * config.data.T / (time.monotonic() - since)
    writer.write(dict(
        step=at, loss=loss, grad_norm=grad_norm, learning_rate=float(rate(at - 1)),
        tokens=tokens, tokens_per_second=speed,
        seconds=time.monotonic() - began, languages=languages,
    ))
    run.say(
        f"step {at - start}/{config.steps}  loss {loss:.4f}  grad norm {grad_norm:.2f}  lr "
        f"{float(rate(at - 1)):.2e}  {speed:,.0f} tokens/s  {_extremes(languages)}"
    )
    return math.isfinite(loss) and math.isfinite(grad_norm)

  def assess(at):
    if evaluate is not None:
      found = evaluate(state["params"])
      summary = bits.summary(found)
      writer.write({"step": at, "from": config.init_from or "scratch", "evaluation": found,
                    "summary": summary})
      run.say("bits per byte: mean {mean:.4f}, {best} {lowest:.3f} .. {worst} {highest:.3f}".format(
          **summary))

  # A stop at a step that is due saves without evaluating: the next start makes up for it.
  if first == start or (_due(config, first - start) and not metrics.evaluated(workdir, first)):
    assess(first)
    since = time.monotonic()
  batches = rows.batches(first, config.data.threads, config.data.prefetch)
  ticks = range(first, last)
  for at in run.progress(ticks, "train") if sys.stdout.isatty() else ticks:
    _profile(config, workdir, at - start)
    state, report = step(state, axes.place(mesh, next(batches)))
    reports.append(report)
    done = at + 1
    ended = done == last or stop() or _time_up(config, began)
    saving = ended or (done - start) % config.save_every == 0
    if saving or (done - start) % config.log_every == 0:  # nothing is saved before it was looked at
      finite, reports = log(done), []
      if not finite:
        run.say(f"loss or gradient is not finite at step {done}: stopping, checkpoints stay as they are")
        writer.close()
        return run.EXIT["not_finite"]
      since = time.monotonic()
    if done == last or (_due(config, done - start) and not ended):
      assess(done)
      since = time.monotonic()
    if saving:
      save(done)
      since = time.monotonic()
    if ended:
      break
  _profile(config, workdir, None)
  writer.close()
  if first < last and done < last:
    run.say(f"stopped at step {done}, saved: run the same command again to continue")
    return run.EXIT["preempted"]
  run.say(f"done: {saved.find(workdir)}")
  return run.EXIT["done"]


def _due(config, steps):
  return steps % config.evaluate_every == 0


def _evaluator(config, mesh, model, validation, tokenizer):
  """params -> bits per byte per language of the validation rows; None without any."""
  if not validation:
    return None
  languages = [manifest["language"] for manifest in validation]
  score = bits.scorer(model, tokenizer.bytes_V, len(languages), chunk=config.loss.chunk)
  process = (jax.process_index(), jax.process_count())

  def evaluate(params):
    rows = config.data.batch // config.accumulate  # at once: what fits when training fits here
    batches = loader.every_row_once(validation, rows, process)
    return bits.evaluate(score, params, batches, mesh, languages)

  return evaluate


def _by_language(sources, nats_S, tokens_S):
  languages = {}
  for name, nats, tokens in zip(sources, nats_S.tolist(), tokens_S.tolist()):
    entry = languages.setdefault(name.split("/")[0], [0.0, 0.0])
    entry[0], entry[1] = entry[0] + nats, entry[1] + tokens
  return {language: dict(loss=nats / tokens, tokens=tokens)
          for language, (nats, tokens) in languages.items() if tokens}


def _extremes(languages):
  order = sorted(languages, key=lambda language: languages[language]["loss"])
  shown = [order[0], order[-1]] if len(order) > 1 else order
  return "  ".join(f"{language} {languages[language]['loss']:.2f}" for language in shown)


def _check_batch(config, mesh):
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = config.data.batch // config.accumulate
  if rows % devices:
    raise run.Refused(
        f"a batch of {config.data.batch} rows in {config.accumulate} parts leaves {rows} rows, which "
        f"do not split over {devices} devices of (data, fsdp)"
    )
  if config.data.T % mesh.shape["context"]:
    raise run.Refused(
        f"rows of T={config.data.T} do not split over {mesh.shape['context']} devices of 'context'"
    )


def _record(config, workdir, mesh, model, state, tokenizer):
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
  embedding = state["params"]["embedding_VD"].size
  run.say(
      f"{parameters:,} parameters ({parameters - embedding:,} without the embedding), mesh "
      f"{dict(mesh.shape)} of {mesh.devices.flat[0].device_kind}, {config.dtype}, attention "
      f"{model.backend}, remat {model.remat}"
  )
  if jax.process_index() == 0:
    record = run.provenance(config) | dict(
        parameters=parameters, devices=[str(mesh.devices.flat[0].device_kind), mesh.size],
        tokenizer_sha256=tokenizer.sha256, from_step=int(state["step"]),
    )
    path = workdir / "run.json"  # the newest start first, the earlier ones kept
    earlier = run.read_json(path, "run record") if path.exists() else None
    starts = [earlier, *earlier.pop("earlier")] if earlier else []
    run.write_json(path, record | dict(earlier=starts))
    (workdir / "config.txt").write_text(str(config) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _lock(workdir):
  """One run a workdir: the lock dies with its process, so a stale one never blocks."""
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "lock", "a") as file:
    try:
      if jax.process_index() == 0:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise run.Refused(
          f"another run holds {workdir}: stop it, or use another --workdir"
      ) from None
    yield


def _stop_signal():
  """() -> whether SIGTERM came; a second one ends the process at once."""
  received = []

  def remember(number, _):
    received.append(number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  signal.signal(signal.SIGTERM, remember)
  return lambda: bool(received)


def _time_up(config, began):
  return bool(config.stop_after) and time.monotonic() - began > config.stop_after


def _profile(config, workdir, step):
  """Traces steps [start, stop) of the run to workdir/profile; step None is the end of the run."""
  if not config.profile:
    return
  if step == config.profile[0]:
    jax.profiler.start_trace(os.fspath(workdir / "profile"))
    _TRACING.append(step)
  elif _TRACING and step in (config.profile[1], None):
    jax.profiler.stop_trace()
    _TRACING.clear()


_TRACING = []  # the step a trace began at, while one runs
