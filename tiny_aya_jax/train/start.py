"""Where a run begins: this workdir's newest checkpoint; else `init_from`; else scratch.

A resume is the same run or it is refused: another model, T or tokenizer always, another rate,
mixture, batch or seed unless `accept_change`, which appends to the plan so that every source's
counter goes on. A fork (`init_what` "state") takes parameters, moments, step and counters of a
trunk; "params" takes parameters only, at step 0.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tiny_aya_jax import axes, run
from tiny_aya_jax.data import mixture, tokenizer as tokenizers
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import checkpoint, optimizer


def start(config, workdir, mesh, model, plan, tokenizer):
  """Returns (state, plan, step the run or fork began at).

  state: {"step", "params", "optimizer"}, placed on the mesh. plan: door.check's, or the
  checkpoint's continued.
  """
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
  if config.init_from:
    params = _initial_params(config, abstract["params"], tokenizer)
    moments = jax.jit(tx.init, out_shardings=placed["optimizer"])(params)
    run.say(f"parameters from {config.init_from}, step 0")
    return dict(step=jnp.int32(0), params=params, optimizer=moments), plan, 0
  run.say(f"parameters from scratch, seed {config.seed}")
  return jax.jit(scratch, out_shardings=placed)(jax.random.key(config.seed)), plan, 0


def _resume(config, workdir, abstract, plan, tokenizer):
  path = checkpoint.find(workdir)
  meta = checkpoint.meta(path)
  _same_model(path, meta, config, tokenizer)
  _same_length(path, meta, config)
  changes = _changes(meta["run"], _facts(config))
  data = checkpoint.restore_data(path)
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
  if config.data.plan:
    data["plan"] = plan
  elif changes:
    data["plan"] = _continue(wanted, data, config.data.batch)
  items = checkpoint.restore(path, {name: abstract[name] for name in checkpoint.TREES})
  run.say(f"resumed from {path}")
  state = dict(step=jnp.int32(meta["step"]), **{name: items[name] for name in checkpoint.TREES})
  return state, _with_paths(data["plan"], plan), meta["start"]


def _fork(config, abstract, plan, tokenizer):
  path = checkpoint.find(config.init_from)
  meta = checkpoint.meta(path)
  _same_model(path, meta, config, tokenizer)
  _same_length(path, meta, config)
  data = checkpoint.restore_data(path)
  if data["seed"] != config.data.seed and not config.data.accept_change:
    raise run.Refused(
        f"{path} read its rows in the order of seed {data['seed']}, config.data.seed is "
        f"{config.data.seed}: rows would come twice; give the trunk's, or accept it with "
        "--config.data.accept_change=True"
    )
  forked = _follow(config, data, plan)
  items = checkpoint.restore(path, {name: abstract[name] for name in checkpoint.TREES})
  run.say(f"forked from {path}: moments, step {meta['step']} and data counters go on")
  state = dict(step=jnp.int32(meta["step"]), **{name: items[name] for name in checkpoint.TREES})
  return state, forked if config.data.plan else _continue(forked, data, config.data.batch), meta["step"]


def _follow(config, data, plan):
  """The checkpoint's plan, and from its row on this run's mixture.

  A plan file is taken as it is, if it has the same counters at the checkpoint's row.
  """
  row = data["step"] * data["batch"]
  if config.data.plan:
    if _drawn(plan, row) != _drawn(data["plan"], row):
      raise run.Refused(
          f"{config.data.plan} does not continue the checkpoint's plan: its counters at row {row} "
          "differ; append to the checkpoint's plan instead"
      )
    if data["batch"] != config.data.batch:
      raise run.Refused("with config.data.plan the batch cannot change: rows would be skipped")
    return plan
  return mixture.append(data["plan"], row, config.data.mixture.to_dict(), plan["sources"])


def _drawn(plan, row):
  """Counters of the sources drawn so far: one that joins later changes nothing before."""
  return {name: count for name, count in mixture.counts(plan, row).items() if count}


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
    if not np.array_equal(tokenizers.load(path / "tokenizer.json").bytes_V, tokenizer.bytes_V):
      raise run.Refused(f"{path} has another tokenizer than {config.tokenizer}")
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)
  path = checkpoint.find(path)
  _same_model(path, checkpoint.meta(path), config, tokenizer)
  return checkpoint.restore(path, dict(params=abstract), names=("params",))["params"]


def _same_model(path, meta, config, tokenizer):
  _same_fields(path, meta["model"], config.model.to_dict())
  if meta["tokenizer_sha256"] != tokenizer.sha256:
    raise run.Refused(
        f"{path} was trained with tokenizer {meta['tokenizer_sha256'][:12]}, "
        f"{config.tokenizer} is {tokenizer.sha256[:12]}"
    )


def _same_length(path, meta, config):
  if meta["T"] != config.data.T:
    raise run.Refused(f"{path} was trained on rows of T={meta['T']}, config.data.T is {config.data.T}")


def _same_fields(path, theirs, ours):
  differ = [f"{key} {theirs.get(key)} (here {ours.get(key)})"
            for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
  if differ:
    raise run.Refused(f"{path} is another model: " + ", ".join(differ))


def meta(config, tokenizer, start):
  return dict(model=config.model.to_dict(), T=config.data.T, tokenizer_sha256=tokenizer.sha256,
              start=start, run=_facts(config))


def _facts(config):
  """What a resume may change only with accept_change."""
  return dict(schedule=config.schedule.to_dict(), optimizer=config.optimizer.to_dict(),
              batch=config.data.batch, seed=config.data.seed, z_loss=config.loss.z_loss,
              dtype=config.dtype)


def _changes(before, now):
  return [f"{key} {before[key]} (now {now[key]})" for key in now if before[key] != now[key]]
