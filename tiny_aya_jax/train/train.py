"""One program for pretraining, cooldown and SFT: rows and a config in, checkpoints out.

It does not know what a stage is. A cooldown is another mixture and schedule forked from a trunk's
state; SFT is rows whose prompt tokens have weight 0. Order of start-up: this workdir's newest
checkpoint; else `init_from`; else scratch. Exit codes: run.EXIT.
"""

import contextlib
import fcntl
import math
import os
import signal
import sys
import time

import jax
import numpy as np

from tiny_aya_jax import axes, chips, run
from tiny_aya_jax.data import loader, mixture
from tiny_aya_jax.model import attention, bits
from tiny_aya_jax.train import (
    begin as begins, checkpoint, fields, metrics, optimizer, proof, saved, start, step
)


def main(config, workdir, plan, validation, tokenizer):
  """Trains to `config.steps` steps after the start or fork; returns an exit code.

  plan, validation (manifests) and tokenizer come from door.check. Resumes by the workdir alone.
  """
  mesh = axes.mesh(**config.mesh.to_dict())
  chips.refuse_other(config.topology, mesh.devices.flatten())
  fields.check_batch(config, mesh)
  attention.refuse_unless_possible(
      config.attention, config.dtype, config.model.H, mesh.devices.flat[0], mesh.shape["context"]
  )
  with _lock(workdir), jax.set_mesh(mesh):
    proof.keep_programs(workdir)
    model = step.model(config)
    begin = begins.decide(config, workdir, plan, tokenizer)  # again, now that nobody else saves
    plan = begin.plan
    state = start.start(config, begin, mesh, tokenizer)
    _record(config, workdir, mesh, model, state, tokenizer)
    proof.check_attention(config, mesh)
    rows = loader.Loader(plan, config.data.seed, config.data.batch, axes.process_part(mesh))
    sources = [source["name"] for source in plan["sources"]]
    rate = optimizer.schedule(config.schedule, config.steps, begin.start)
    if not saved.steps(workdir):
      run.say("\n".join(mixture.table(plan, (begin.start + config.steps) * config.data.batch)))
    advance = proof.program(config, mesh, rate, len(sources))
    evaluate = _evaluator(config, mesh, model, validation, tokenizer)
    meta = dict(
        model=config.model.to_dict(), T=config.data.T, tokenizer_sha256=tokenizer.sha256,
        start=begin.start, steps=config.steps, origin=begin.origin, run=begins.facts(config),
    )
    return _loop(config, workdir, mesh, advance, evaluate, rows, sources, rate, state, meta)


def _loop(config, workdir, mesh, advance, evaluate, rows, sources, rate, state, meta):
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
  slow = False  # whether it was said that the kernel leaves some rows to another
  batches = rows.batches(first, config.data.threads, config.data.prefetch)
  ticks = range(first, last)
  for at in run.progress(ticks, "train") if sys.stdout.isatty() else ticks:
    _profile(config, workdir, at - start)
    batch = next(batches)
    if (why := attention.slow_rows(config.attention, batch["segment_BT"])) and not slow:
      slow = True
      run.say(f"step {at - start + 1}: {why}")
    state, report = advance(state, axes.place(mesh, batch))
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

  def evaluate(params):
    rows = config.data.batch // config.accumulate  # at once: what fits when training fits here
    batches = loader.every_row_once(validation, rows, axes.process_part(mesh))
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


def _record(config, workdir, mesh, model, state, tokenizer):
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
  embedding = state["params"]["embedding_VD"].size
  matmul = "" if config.matmul == "dtype" else f", matmul {config.matmul}"
  run.say(
      f"{parameters:,} parameters ({parameters - embedding:,} without the embedding), mesh "
      f"{dict(mesh.shape)} of {mesh.devices.flat[0].device_kind}, {config.dtype}{matmul}, attention "
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
