"""One program for pretraining, cooldown and SFT: rows and a config in, checkpoints out.

It does not know what a stage is. A cooldown is another mixture and schedule forked from a trunk's
state; SFT is rows whose prompt tokens have weight 0. Order of start-up: this workdir's newest
checkpoint; else `init_from`; else scratch. Exit codes: run.EXIT.
"""

import contextlib
import errno
import fcntl
import functools
import os
import signal
import sys
import time

import jax

from tiny_aya_jax import axes, chips, processes, run
from tiny_aya_jax.data import loader, mixture
from tiny_aya_jax.model import adapter, attention
from tiny_aya_jax.train import (
    begin as begins, fields, guard, hooks, ledger, metrics, optimizer, proof, saved, saver as savers, start,
    step, watchdog
)


def main(config, workdir, plan, validation, tokenizer):
  """Trains to `config.steps` steps after the start or fork; returns an exit code.

  plan, validation (manifests) and tokenizer come from door.check. Resumes by the workdir alone.
  """
  processes.join(config.guard.heartbeat_seconds)
  stop = _stop_signal()
  mesh = axes.mesh(**config.mesh.to_dict())
  chips.refuse_other(config.topology, mesh.devices.flatten())
  fields.check_batch(config, mesh)
  attention.refuse_unless_possible(
      config.attention, config.dtype, config.model.H, mesh.devices.flat[0], mesh.shape["context"]
  )
  with (_lock(workdir), jax.set_mesh(mesh),
        contextlib.closing(watchdog.Watchdog(workdir, config.guard.hang_seconds)) as dog):
    spent = ledger.Ledger(workdir)
    proof.keep_programs(workdir)
    model = step.model(config)
    with spent.spent("restore"):
      restored = dog.start("restoring", config.guard.save_seconds)
      begin, state = _within_memory(config, start.newest, config, workdir, plan, mesh, tokenizer)
      restored()
    plan = begin.plan
    _record(config, workdir, mesh, model, state, tokenizer, begin)
    rows = loader.Loader(plan, config.data.seed, config.data.batch, axes.process_part(mesh))
    rate = optimizer.schedule(config.schedule, config.steps, begin.start)
    if not saved.steps(workdir):
      run.say("\n".join(mixture.table(plan, (begin.start + config.steps) * config.data.batch)))
    with spent.spent("compile"):
      proof.check_attention(config, mesh)
      advance = _within_memory(config, proof.program, config, mesh, rate, len(plan["sources"]))
      processes.agreed(True)  # the first step has a limit: it does not wait for another's compiler
    after = [hooks.evaluation(config, workdir, mesh, model, validation, tokenizer)] if validation else []
    after += [hooks.export(config, workdir, tokenizer)] if config.export_every else []
    meta = dict(
        model=config.model.to_dict(), T=config.data.T, tokenizer_sha256=tokenizer.sha256,
        start=begin.start, steps=config.steps, origin=begin.origin, run=begins.facts(config),
        adapter=fields.adapter(config), remapped=begin.remapped,
    )
    spent.begin(int(state["step"]))
    try:
      with savers.Saver(workdir, config.keep, config.guard, dog) as saver:
        code = _loop(config, workdir, mesh, advance, after, rows, rate, state, meta, spent, dog, saver,
                     stop)
      if code == run.EXIT["not_finite"]:
        _distrust(workdir)
      return code
    finally:
      with contextlib.suppress(OSError, KeyError, TypeError):  # it must not hide how the run ended
        run.say(ledger.said(workdir))


def _loop(config, workdir, mesh, advance, after, rows, rate, state, meta, spent, dog, saver, stop):
  first, start = int(state["step"]), meta["start"]
  last = start + config.steps
  writer = metrics.Writer(workdir, first, resumed=first > start)
  sources = [source["name"] for source in rows.plan["sources"]]
  since = time.monotonic()
  reports = []  # of the steps since the last line; on the devices until then
  before, owed = None, False  # the report of the step before; whether a save is due
  checked = functools.partial(_within_memory, config, advance)  # the first step

  def items(at):
    data = rows.state(at) | dict(plan=rows.plan, batch=config.data.batch)
    return dict(params=state["params"], optimizer=state["optimizer"], data=data,
                meta=meta | dict(guard=guard.to_json(state["guard"])))

  def log(at):
    """Writes and prints the steps since the last line."""
    found, skipped = metrics.window(sources, *jax.device_get(reports))
    for index, why, loss, grad_norm in skipped:
      _skipped(writer, rows, at - len(reports) + 1 + index, why, loss, grad_norm)
    speed = len(reports) * config.data.batch * config.data.T / (time.monotonic() - since)
    writer.write(dict(step=at) | found | dict(
        learning_rate=float(rate(at - 1)), tokens_per_second=speed, seconds=time.time() - run.BEGAN))
    run.say(
        f"step {at - start}/{config.steps}  loss {found['loss']:.4f}  grad norm {found['grad_norm']:.2f}  "
        f"lr {float(rate(at - 1)):.2e}  {speed:,.0f} tokens/s  {metrics.extremes(found['languages'])}"
    )
    spent.write(at, saver.saved)

  def follow(at):
    """What is due after a step, once: a start finds what is done, and makes up for what is not.

    Returns whether there was anything.
    """
    did = False
    for name, due, done, do in after:
      # Process 0 answers for all: the others may see a file later.
      if due(start, at) and processes.agreed(jax.process_index() > 0 or not done(at)):
        with dog.watch(name, compiles=True), spent.spent(name):
          do(writer, at, state["params"])
        did = True
    return did

  follow(first)
  since = time.monotonic()
  slow = False  # whether it was said that the kernel leaves some rows to another
  batches = rows.batches(first, config.data.threads, config.data.prefetch)
  ticks = range(first, last)
  for at in run.progress(ticks, "train") if sys.stdout.isatty() else ticks:
    _profile(config, workdir, at - start)
    with dog.watch("a step"):
      with spent.spent("data"):
        batch = next(batches)
      if (why := attention.slow_rows(config.attention, batch["segment_BT"])) and not slow:
        slow = True
        run.say(f"step {at - start + 1}: {why}")
      with spent.spent("step"):
        vote = step.STOP if stop() or _time_up(config) else step.SAVE if saver.failed() else step.GO_ON
        placed = axes.place(mesh, batch) | dict(vote_P=axes.own(mesh, vote))
        state, report = checked(state, placed)
        checked = advance
        reports.append(report)
        # Waits for the step before while this one runs: what all processes then know alike.
        asked, not_finite = (map(int, jax.device_get((before["vote"], before["not_finite"])))
                             if before else (step.GO_ON, 0))
        before = report
        done = at + 1
        ended = done == last or asked == step.STOP
        owed = owed or asked == step.SAVE or (done - start) % config.save_every == 0
        logging = ended or owed or (done - start) % config.log_every == 0
        if logging:  # nothing is saved before it was looked at
          not_finite = int(report["not_finite"])
        saving = ended or owed and not not_finite  # a state that makes no steps replaces no good one
        owed = owed and not saving
    failed = not_finite >= config.guard.not_finite
    if logging or failed:
      log(done)
      reports, since = [], time.monotonic()
    if failed:
      run.say(f"loss or gradient was not finite {not_finite} steps in a row, lately: none applied")
      writer.close()
      return run.EXIT["not_finite"]
    if saving:
      with spent.spent("save"):
        saver.start(done, items(done))
    followed = (done == last or not ended) and follow(done)
    if ended:
      with spent.spent("save"):
        saver.finish(done, items(done))
    if saving or followed:
      since = time.monotonic()
    if ended:
      break
  _profile(config, workdir, None)
  writer.close()
  if first < last:
    spent.write(done, saver.saved)
  if first < last and done < last:
    run.say(f"stopped at step {done}, saved: run the same command again to continue")
    return run.EXIT["preempted"]
  run.say(f"done: {saved.find(workdir)}")
  return run.EXIT["done"]


def _skipped(writer, rows, done, why, loss, grad_norm):
  """Says of a step that its update was not applied, and which rows it was made of."""
  ids = rows.ids(done - 1)
  writer.skip(dict(step=done, why=why, loss=loss, grad_norm=grad_norm, rows=ids))
  run.say(f"step {done}: no update, {why}: loss {loss:.4f}, grad norm {grad_norm:.2f}, rows {ids[0]} to "
          f"{ids[-1]} (all in skipped.jsonl)")


def _distrust(workdir):
  """Sets the newest checkpoint aside, if there is another: the rows changed and it stayed as bad."""
  *older, newest = saved.steps(workdir)[-2:] or [None]
  if not older:
    return
  if jax.process_index() == 0:
    saved.set_aside(saved.find(workdir), "suspect")
  run.say(f"{newest} is set aside as suspect, the next start goes on from {older[0]}")


def _within_memory(config, call, *arguments):
  """call(*arguments), refused if a device has no room for it: it would have none the next time."""
  try:
    return call(*arguments)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise run.Refused(
        f"out of memory on {jax.local_devices()[0].device_kind}: {' '.join(str(error).split())[:300]}: set "
        f"config.accumulate above {config.accumulate}, another config.remat than {config.remat!r}, or "
        "more devices of config.mesh.fsdp; tiny-aya plan says what fits"
    ) from error


def _record(config, workdir, mesh, model, state, tokenizer, begin):
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
  embedding = state["params"]["embedding_VD"].size
  trained = sum(leaf.size for leaf in jax.tree.leaves(adapter.split(state["params"])[0]))
  beside = f", {trained:,} of them trained: adapters of rank {config.adapter.rank}" if config.adapter.rank else ""
  matmul = "" if config.matmul == "dtype" else f", matmul {config.matmul}"
  run.say(
      f"{parameters:,} parameters ({parameters - embedding:,} without the embedding){beside}, mesh "
      f"{dict(mesh.shape)} of {mesh.devices.flat[0].device_kind}, {config.dtype}{matmul}, attention "
      f"{model.backend}, remat {model.remat}"
  )
  if jax.process_index() == 0:
    record = run.provenance(config) | dict(
        parameters=parameters, devices=[str(mesh.devices.flat[0].device_kind), mesh.size],
        tokenizer_sha256=tokenizer.sha256, from_step=int(state["step"]), remapped=begin.remapped,
    )
    path = workdir / "run.json"  # the newest start first, the earlier ones kept
    earlier = run.read_json(path, "run record") if path.exists() else None
    starts = [earlier, *earlier.pop("earlier")] if earlier else []
    run.write_json(path, record | dict(earlier=starts))
    (workdir / "config.txt").write_text(str(config) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _lock(workdir):
  """One run a workdir: the lock dies with its process, so a stale one never blocks.

  It holds on one machine, and between machines where the file system has locks (NFS; not a bucket).
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / "lock", "a")
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
      raise  # it may pass: a crash is tried again
    raise run.Refused(f"{workdir} cannot be written to ({error.strerror}): give another --workdir") from None
  with file:
    try:
      if jax.process_index() == 0:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise run.Refused(
          f"another run holds {workdir}: stop it, or use another --workdir"
      ) from None
    except OSError as error:
      run.say(f"{workdir} has no locks ({error.strerror}): a second run in it would not be noticed")
    yield


def _stop_signal():
  """() -> whether SIGTERM came; a second one ends the process at once."""
  received = []

  def remember(number, _):
    received.append(number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  signal.signal(signal.SIGTERM, remember)
  return lambda: bool(received)


def _time_up(config):
  return bool(config.stop_after) and time.time() - run.BEGAN > config.stop_after


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
