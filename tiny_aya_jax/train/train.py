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
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tiny_aya_jax import axes, run
from tiny_aya_jax.data import loader, mixture
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.model import bits, losses
from tiny_aya_jax.model.transformer import TinyAya
from tiny_aya_jax.train import checkpoint, metrics, optimizer


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
    state, data, start = _start(config, workdir, mesh, model, plan, tokenizer)
    _record(config, workdir, mesh, model, state)
    rows = loader.Loader(
        data["plan"], config.data.seed, config.data.batch, (jax.process_index(), jax.process_count())
    )
    sources = [source["name"] for source in data["plan"]["sources"]]
    rate = optimizer.schedule(config.schedule, config.steps, start)
    tx = optimizer.adamw(config.optimizer, rate)
    loss = functools.partial(
        next_token_loss, model=model, chunk=config.loss.chunk, z_loss=config.loss.z_loss
    )
    step = jax.jit(
        functools.partial(
            train_step, loss=loss, tx=tx, accumulate=config.accumulate, sources=len(sources)
        ),
        donate_argnums=0,
    )
    evaluate = _evaluator(config, mesh, model, validation, tokenizer)
    meta = _meta(config, tokenizer, start)
    return _loop(
        config, workdir, mesh, step, evaluate, rows, sources, rate, state, start, meta, tokenizer
    )


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


def _loop(config, workdir, mesh, step, evaluate, rows, sources, rate, state, start, meta, tokenizer):
  first, last = int(state["step"]), start + config.steps
  writer = metrics.Writer(workdir, first)
  stop = _stop_signal()
  began, window_began, window, pending = time.monotonic(), time.monotonic(), None, None
  tokens_a_step = config.data.batch * config.data.T

  def save(at):
    data = rows.state(at) | dict(plan=rows.plan, batch=config.data.batch)
    items = dict(params=state["params"], optimizer=state["optimizer"], data=data, meta=meta)
    checkpoint.save(workdir, at, items, keep=config.keep)

  def log(at, window, seconds, steps):
    """Writes the window's metrics; returns whether its loss was finite."""
    loss = float(window["nats"]) / steps
    nats_S, tokens_S = np.asarray(window["nats_S"]), np.asarray(window["tokens_S"])
    languages = _by_language(sources, nats_S, tokens_S)
    speed = steps * tokens_a_step / seconds
    writer.write(dict(
        step=at, loss=loss, grad_norm=float(window["grad_norm"]) / steps,
        learning_rate=float(rate(at - 1)), tokens_per_second=speed, seconds=time.monotonic() - began,
        tokens=float(tokens_S.sum()), languages=languages,
    ))
    run.say(
        f"step {at - start}/{config.steps}  loss {loss:.4f}  grad norm "
        f"{float(window['grad_norm']) / steps:.2f}  lr {float(rate(at - 1)):.2e}  {speed:,.0f} tokens/s"
        f"  {_extremes(languages)}"
    )
    return math.isfinite(loss)

  def assess(at):
    if evaluate is not None:
      found = evaluate(state["params"])
      writer.write(dict(step=at, evaluation=found, summary=bits.summary(found)))
      run.say("bits per byte: mean {mean:.4f}, {best} {lowest:.3f} .. {worst} {highest:.3f}".format(
          **bits.summary(found)))

  if first == start:
    assess(first)
  batches = rows.batches(first, config.data.threads, config.data.prefetch)
  ticks = range(first, last)
  for at in run.progress(ticks, "train") if sys.stdout.isatty() else ticks:
    _profile(config, workdir, at - start)
    state, report = step(state, axes.place(mesh, next(batches)))
    # Metrics of step n-1 are read while step n runs.
    if pending is not None:
      window = pending if window is None else jax.tree.map(jnp.add, window, pending)
    pending = dict(nats=report["loss"], grad_norm=report["grad_norm"],
                   nats_S=report["nats_S"], tokens_S=report["tokens_S"])
    done = at + 1
    ended = done == last or stop() or _time_up(config, began)
    if (done - start) % config.log_every == 0 or ended:
      window = pending if window is None else jax.tree.map(jnp.add, window, pending)
      pending = None
      steps = (done - start - 1) % config.log_every + 1
      steps = min(steps, done - first)
      jax.block_until_ready(window)
      finite = log(done, window, time.monotonic() - window_began, steps)
      window, window_began = None, time.monotonic()
      if not finite:
        run.say(f"loss is not finite at step {done}: stopping, checkpoints stay as they are")
        writer.close()
        return run.EXIT["not_finite"]
    if (done - start) % config.evaluate_every == 0 and not ended or done == last:
      assess(done)
      window_began = time.monotonic()
    if (done - start) % config.save_every == 0 or ended:
      save(done)
      window_began = time.monotonic()
    if ended and done != last:
      run.say(f"stopped at step {done}, saved: run the same command again to continue")
      writer.close()
      return run.EXIT["preempted"]
  writer.close()
  run.say(f"done: {checkpoint.find(workdir)}")
  return run.EXIT["done"]


def _start(config, workdir, mesh, model, plan, tokenizer):
  """(state, {"plan"}, step the run or fork began at), by the start-up order of this file."""
  tx = optimizer.adamw(config.optimizer, lambda step: 0.0)  # its state does not depend on the rate

  def scratch(key):
    params = model.init(key, *(jnp.ones((1, 2), jnp.int32),) * 3)["params"]
    return dict(step=jnp.int32(0), params=params, optimizer=tx.init(params))

  abstract = jax.eval_shape(scratch, jax.random.key(config.seed))
  placed = axes.shardings(mesh, abstract)
  abstract = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, placed
  )
  if checkpoint.steps(workdir):
    return _resume(config, workdir, abstract, plan, tokenizer)
  if config.init_from and config.init_what == "state":
    return _fork(config, abstract, plan, tokenizer)
  state = jax.jit(scratch, out_shardings=placed)(jax.random.key(config.seed))
  if config.init_from:
    state["params"] = _initial_params(config, abstract["params"], tokenizer)
    state["optimizer"] = jax.jit(tx.init, out_shardings=placed["optimizer"])(state["params"])
    run.say(f"parameters from {config.init_from}, step 0")
  else:
    run.say(f"parameters from scratch, seed {config.seed}")
  return state, dict(plan=plan), 0


def _resume(config, workdir, abstract, plan, tokenizer):
  path = checkpoint.find(workdir)
  meta = checkpoint.meta(path)
  _same_model(path, meta, config, tokenizer)
  items = checkpoint.restore(path, {name: abstract[name] for name in checkpoint.TREES})
  changes = _changes(meta["run"], _run_facts(config))
  data = items["data"]
  wanted = _follow(config, data, plan)
  if wanted["segments"][-1]["thresholds"] != data["plan"]["segments"][-1]["thresholds"]:
    changes.append("data.mixture or the rows")
  if changes and not config.data.accept_change:
    raise run.Refused(
        f"{path} was trained with another {'; '.join(changes)}: set them back, or continue each "
        "language's counter under the new ones with --config.data.accept_change=True"
    )
  if changes:
    run.say("accepted change:", "; ".join(changes))
    data["plan"] = _continue(wanted, data, config.data.batch)
  run.say(f"resumed from {path}")
  state = dict(step=jnp.int32(meta["step"]), **{name: items[name] for name in checkpoint.TREES})
  return state, dict(plan=_with_paths(data["plan"], plan)), meta["start"]


def _fork(config, abstract, plan, tokenizer):
  path = checkpoint.find(config.init_from)
  meta = checkpoint.meta(path)
  _same_model(path, meta, config, tokenizer)
  items = checkpoint.restore(path, {name: abstract[name] for name in checkpoint.TREES})
  data = items["data"]
  forked = _follow(config, data, plan)
  run.say(f"forked from {path}: moments, step {meta['step']} and data counters go on")
  state = dict(step=jnp.int32(meta["step"]), **{name: items[name] for name in checkpoint.TREES})
  return state, dict(plan=_continue(forked, data, config.data.batch)), meta["step"]


def _follow(config, data, plan):
  """The checkpoint's plan, and from its row on this run's mixture; or the file config.data.plan."""
  if config.data.plan:
    return plan
  row = data["step"] * data["batch"]
  return mixture.append(data["plan"], row, config.data.mixture.to_dict(), plan["sources"])


def _continue(plan, data, batch):
  """Moves the last segment to where `batch` rows a step put the checkpoint's step."""
  start_row = data["step"] * batch
  earlier = [segment for segment in plan["segments"][:-1] if segment["start_row"] < start_row]
  return plan | dict(segments=[*earlier, plan["segments"][-1] | dict(start_row=start_row)])


def _with_paths(plan, current):
  """The same plan with the sources where they lie now."""
  paths = {source["name"]: source["path"] for source in current["sources"]}
  sources = [source | dict(path=paths.get(source["name"], source["path"]))
             for source in plan["sources"]]
  return plan | dict(sources=sources)


def _initial_params(config, abstract, tokenizer):
  path = pathlib.Path(config.init_from)
  if (path / "config.json").exists():
    params, cfg = huggingface.read(path)
    _same_fields(path, cfg.to_dict(), config.model.to_dict())
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)
  path = checkpoint.find(path)
  _same_model(path, checkpoint.meta(path), config, tokenizer)
  return checkpoint.restore(path, dict(params=abstract), names=("params",))["params"]


def _same_model(path, meta, config, tokenizer):
  _same_fields(path, meta["model"], config.model.to_dict())
  for name, given in (("tokenizer_sha256", tokenizer.sha256), ("T", config.data.T)):
    if name in meta and meta[name] != given and not (name == "T" and config.init_what == "params"):
      raise run.Refused(f"{path} was trained with {name} {meta[name]}, this run has {given}")


def _same_fields(path, theirs, ours):
  differ = [f"{key} {theirs.get(key)} (here {ours.get(key)})"
            for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
  if differ:
    raise run.Refused(f"{path} is another model: " + ", ".join(differ))


def _meta(config, tokenizer, start):
  return dict(model=config.model.to_dict(), T=config.data.T, tokenizer_sha256=tokenizer.sha256,
              start=start, run=_run_facts(config))


def _run_facts(config):
  """What a resume may change only with accept_change."""
  return dict(schedule=config.schedule.to_dict(), optimizer=config.optimizer.to_dict(),
              batch=config.data.batch, seed=config.data.seed, loss=config.loss.z_loss)


def _changes(before, now):
  return [f"{key} {before[key]} (now {now[key]})" for key in now if before[key] != now[key]]


def _evaluator(config, mesh, model, validation, tokenizer):
  """params -> bits per byte per language of the validation rows; None without any."""
  if not validation:
    return None
  languages = [manifest["language"] for manifest in validation]
  score = bits.scorer(model, tokenizer.bytes_V, len(languages), chunk=config.loss.chunk)
  process = (jax.process_index(), jax.process_count())

  def evaluate(params):
    batches = loader.every_row_once(validation, config.data.batch, process)
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


def _record(config, workdir, mesh, model, state):
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
  embedding = state["params"]["embedding_VD"].size
  run.say(
      f"{parameters:,} parameters ({parameters - embedding:,} without the embedding), mesh "
      f"{dict(mesh.shape)} of {mesh.devices.flat[0].device_kind}, {config.dtype}, attention "
      f"{model.backend}, remat {model.remat}"
  )
  if jax.process_index() == 0:
    run.write_json(workdir / "run.json", run.provenance(config) | dict(
        parameters=parameters, devices=[str(mesh.devices.flat[0].device_kind), mesh.size]))
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
  """Traces steps [start, stop) of the run to workdir/profile."""
  if tuple(config.profile) and step == config.profile[0]:
    jax.profiler.start_trace(os.fspath(workdir / "profile"))
  elif tuple(config.profile) and step == config.profile[1]:
    jax.profiler.stop_trace()
