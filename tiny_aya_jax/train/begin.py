"""Where a run begins, decided from files alone, before jax is imported.

This workdir's newest checkpoint; else `init_from`; else scratch. A resume is the same run or it is
refused: another model, T or tokenizer always, another rate, mixture, batch or seed unless
`accept_change`, which appends to the plan so that every source's counter goes on. A fork
(`init_what` "state") takes parameters, moments, step and counters of a trunk; "params" takes
parameters only, at step 0, and with `init_tokenizer` those of another vocabulary (remap.py). Adapters
(config.adapter) begin with "params", on merged ones, and go on as they were. start.py loads what is
decided here.
"""

import math
import pathlib
from typing import NamedTuple

from tiny_aya_jax import run
from tiny_aya_jax.data import loader, mixture, rules, tokenizer as tokenizers
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import fields, remap, saved


class Begin(NamedTuple):
  """`path` gives parameters, and if `whole` moments and step too; the plan is the run's own."""

  path: pathlib.Path | None  # a checkpoint or a Hugging Face folder; None: scratch
  whole: bool
  step: int  # the optimiser step it goes on from
  start: int  # the step at which the run or its fork began: schedules count from here
  plan: dict
  origin: dict | None  # {"step", "params": digest} of what the run was begun from
  said: str
  rows: remap.Rows | None = None  # how the embedding that `path` has becomes this run's
  remapped: dict | None = None  # the counts of `rows`, and the old tokenizer; meta keeps it


def decide(config, workdir, plan, tokenizer, step=None):
  """config, workdir, door.check's plan and tokenizer -> Begin; raises Refused, writes nothing.

  step: of this workdir's checkpoint to go on from; None: the newest, if there is one.
  """
  if step is not None or saved.steps(workdir):
    path = saved.path(workdir, step if step is not None else saved.steps(workdir)[-1])
    return _resume(config, path, plan, tokenizer)
  if broken := saved.incomplete(workdir) or saved.aside(workdir):
    raise run.Refused(f"{broken[-1]} is no whole checkpoint and {workdir} has no other: nothing is begun "
                      f"anew behind your back; give another --workdir, or remove {workdir}")
  if gone := saved.gone(workdir):
    raise run.Refused(f"{workdir} has no checkpoint any more, its ledger says that step {gone} was saved: "
                      f"nothing is begun anew behind your back; give another --workdir, or remove {workdir}")
  if not config.init_from:
    if config.adapter.rank is not None:
      raise run.Refused(f"config.adapter.rank is {config.adapter.rank} and config.init_from is not set: an "
                        "adapter on random weights adapts nothing; name a checkpoint or a folder")
    return Begin(None, False, 0, 0, plan, None, f"parameters from scratch, seed {config.seed}")
  run.existing("init_from", config.init_from)
  if config.init_what == "state":
    return _fork(config, plan, tokenizer)
  if huggingface.is_folder(config.init_from):
    path, origin = pathlib.Path(config.init_from), None
    if config.loss.kind != "next_token":  # else nobody asks, and the files are large
      origin = dict(step=0, params=run.fingerprint(huggingface.digests(path)))
    model, named = _folder(path)
  else:
    path = saved.find(config.init_from)
    meta = saved.meta(path)
    model, named, origin = meta["model"], meta["tokenizer_sha256"], _origin(meta)
  begin = Begin(path, False, 0, 0, plan, origin, f"parameters from {path}, step 0")
  if config.init_tokenizer:
    return _remapped(config, begin, model, named, tokenizer)
  if not _is_tokenizer(named, tokenizer):
    raise run.Refused(f"{path} has another tokenizer than {config.tokenizer}: with its own in "
                      "config.init_tokenizer the rows of its embedding are remapped")
  same_fields(path, model, config.model.to_dict())
  return begin


def _folder(path):
  """(model, tokenizer) of a Hugging Face folder, whose files are all there and whole."""
  _, cfg = huggingface.open_folder(path)
  return cfg.to_dict(), tokenizers.load(path / "tokenizer.json")


def _is_tokenizer(named, tokenizer):
  """named: the sha256 that a checkpoint has, or the Tokenizer of a folder."""
  return named == tokenizer.sha256 if isinstance(named, str) else named.same_ids(tokenizer)


def _remapped(config, begin, model, named, tokenizer):
  old = tokenizers.load(config.init_tokenizer)
  if not _is_tokenizer(named, old):
    raise run.Refused(f"{begin.path} was not trained with config.init_tokenizer, {config.init_tokenizer}: "
                      "give the one that it was")
  if old.size > model["V"]:
    raise run.Refused(f"{config.init_tokenizer} has {old.size} ids, {begin.path} only {model['V']} rows")
  if old.same_ids(tokenizer):
    raise run.Refused(f"config.init_tokenizer, {config.init_tokenizer}, has the ids of config.tokenizer: there is "
                      "nothing to remap; unset it")
  same_fields(begin.path, model | dict(V=config.model.V), config.model.to_dict())
  rows = remap.rows(old, tokenizer, model["V"], config.model.V)
  return begin._replace(rows=rows, remapped=rows.counts | dict(tokenizer_sha256=old.sha256),
                        said=f"{begin.said}; {remap.said(rows.counts)}")


def _resume(config, path, plan, tokenizer):
  meta, data = saved.meta(path), saved.data(path)
  _same_model(path, meta, config, tokenizer)
  _same_adapter(path, meta, config)
  _same_length(path, meta, config)
  done = meta["step"] - meta["start"]
  if config.epochs is not None and data["batch"] != config.data.batch:
    raise run.Refused(f"{path} read {data['batch']} rows a step, and config.epochs counts {config.data.batch} "
                      "from the first: keep the batch, or set config.steps")
  if config.steps < done:
    raise run.Refused(f"{path} has {done} steps behind it, config.steps is {config.steps}")
  changes = _changes(trained(meta), facts(config)) + _changed_steps(meta, config, done)
  origin = _origin_now(config, meta)
  if origin != meta.get("origin"):
    changes.append(f"{config.init_from}, trained anew since")
  began = data["plan"]["segments"][-1]["start_row"]
  wanted = _follow(config, data, plan, meta["start"], began)
  if config.data.plan:
    if mixture.plan_sha256(plan) != data["plan_sha256"]:
      changes.append("data.plan")
  elif mixture.drawn(wanted) != mixture.drawn(data["plan"]):
    changes.append("data.mixture or the rows")
  if changes and not config.data.accept_change:
    raise run.Refused(
        f"{path} was trained with another {'; '.join(changes)}: set them back, or continue each "
        "language's counter under the new ones with --config.data.accept_change=True"
    )
  followed = data["plan"]
  if config.data.plan:
    followed = plan
  elif changes:
    here = meta["step"] * config.data.batch
    followed = _continue(
        _follow(config, data, plan, meta["start"], here), data, config.data.batch)
  said = [f"resumed from {path}"]
  said += [f"accepted change: {'; '.join(changes)}"] if changes else []
  return Begin(
      path, True, meta["step"], meta["start"], _with_paths(followed, plan), origin,
      "\n".join(said), remapped=meta.get("remapped"),
  )


def _fork(config, plan, tokenizer):
  path = saved.find(config.init_from)
  meta, data = saved.meta(path), saved.data(path)
  _same_model(path, meta, config, tokenizer)
  _same_adapter(path, meta, config)
  _same_length(path, meta, config)
  if data["seed"] != config.data.seed and not config.data.accept_change:
    raise run.Refused(
        f"{path} read its rows in the order of seed {data['seed']}, config.data.seed is "
        f"{config.data.seed}: rows would come twice; give the trunk's, or accept it with "
        "--config.data.accept_change=True"
    )
  forked = _follow(config, data, plan, meta["step"], meta["step"] * config.data.batch)
  if not config.data.plan:
    forked = _continue(forked, data, config.data.batch)
  return Begin(
      path, True, meta["step"], meta["step"], forked, _origin(meta),
      f"forked from {path}: moments, step {meta['step']} and data counters go on",
  )


def _follow(config, data, plan, start, start_row):
  """The checkpoint's plan, and from its row on this run's mixture.

  start: the step at which the run began; start_row: the row from which its mixture's budget counts.
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
  followed = rule(config, plan["sources"], start, start_row)
  return mixture.append(data["plan"], row, followed, plan["sources"])


def plan(config, manifests):
  """The run's plan: config.data.plan, a file, or the rule of config.data.mixture over the rows."""
  if config.data.plan:
    given = run.read_json(config.data.plan, "config.data.plan")
    mixture.check(given, config.data.plan)
    for key, value in dict(T=config.data.T, tokenizer_sha256=manifests[0]["tokenizer_sha256"]).items():
      if given[key] != value:
        raise run.Refused(f"{config.data.plan} is for rows of {key} {given[key]}, these have {value}")
    places = {manifest["name"]: manifest["path"] for manifest in manifests}  # rows may have moved
    given["sources"] = [source | dict(path=places.get(source["name"], source["path"]))
                        for source in given["sources"]]
    loader.planned(given)
    run.say(f"config.data.plan is followed, {config.data.plan}: config.data.mixture is not read")
    return given
  sources = cut(config, manifests)
  return mixture.plan(sources, rule(config, sources))


def cut(config, manifests):
  """The manifests, or what config.data.cut leaves of them."""
  share, sizes = config.data.cut.share, config.data.cut.sizes
  if share is None:
    return manifests
  if sizes not in fields.CUT_SIZES:
    sizes = run.read_json(sizes, "config.data.cut.sizes")
  return mixture.cut(manifests, share, mixture.cut_sizes(manifests, sizes))


def check_rows(config, manifests, validation, tokenizer):
  """Refuses rows, or a vocabulary, that are not what the config trains on."""
  kind = loader.FIELDS if config.loss.kind == "next_token" else loader.SCORED
  for folder, found in ((config.data.rows, manifests), (config.data.validation, validation)):
    for manifest in found:
      loader.check_fields(manifest, (kind,) if found is manifests else (kind, loader.FIELDS))
      if manifest["fields"] == loader.SCORED and manifest["pairs"] != config.loss.pairs:
        raise run.Refused(f"{manifest['path']} has at most {manifest['pairs']} pairs a row, "
                          f"config.loss.pairs is {config.loss.pairs}: set it to what pack was given")
    for manifest in found[:1]:  # read_manifests refuses mixtures of T or tokenizer
      if manifest["T"] != config.data.T:
        raise run.Refused(
            f"{folder} holds rows of T={manifest['T']}, config.data.T is {config.data.T}: "
            "pack again, or set config.data.T"
        )
      if manifest["tokenizer_sha256"] != tokenizer.sha256:
        raise run.Refused(
            f"{folder} was packed with tokenizer {manifest['tokenizer_sha256'][:12]}, "
            f"{config.tokenizer} is {tokenizer.sha256[:12]}"
        )
  if tokenizer.size > config.model.V:
    raise run.Refused(
        f"{config.tokenizer} has {tokenizer.size} ids, config.model.V only {config.model.V} rows"
    )


def settle_steps(config, manifests):
  """Sets config.steps to those of config.epochs, if only these are set; else epochs are not read."""
  if config.steps is not None:
    config.epochs = None
    return
  config.steps = 1  # to read the plan with; only a budget depends on it
  config.steps = steps(config, manifests)
  run.say(f"{config.epochs:g} epochs are {config.steps} steps of {config.data.batch} rows")
  fields.check(config)  # a schedule of so many steps


def steps(config, manifests):
  """The steps of config.epochs: so many times the rows of the sources that are drawn from."""
  kind = run.choose("mixture kind", config.data.mixture.kind, rules.READS)
  if not config.data.plan and "budget" in rules.READS[kind] and config.data.mixture.budget is None:
    raise run.Refused("config.epochs says how many steps, and the budget of this mixture is what the steps "
                      "hold: set config.data.mixture.budget, or config.steps")
  planned = plan(config, manifests)
  drawn = mixture.drawn(planned)
  rows = sum(source["rows"] for source in planned["sources"] if source["name"] in drawn)
  return max(math.ceil(config.epochs * rows / config.data.batch), 1)


def rule(config, sources, start=0, start_row=0):
  """config.data.mixture; a budget that it reads and leaves unset is what the rows hold from
  `start_row` to the end of a run that began at step `start`."""
  rows = (start + config.steps) * config.data.batch - start_row
  return mixture.with_budget(config.data.mixture.to_dict(), sources, max(rows, 1))


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


LOSS = ("kind", "beta", "length_normalised")


def facts(config):
  """What a resume may change only with accept_change."""
  return dict(schedule=config.schedule.to_dict(), optimizer=config.optimizer.to_dict(),
              batch=config.data.batch, seed=config.data.seed, z_loss=config.loss.z_loss,
              loss={name: config.loss[name] for name in LOSS[: None if config.loss.kind != "next_token" else 1]},
              dtype=config.dtype, matmul=config.matmul,
              guard=dict(window=config.guard.window, sigma=config.guard.sigma))


def trained(meta):
  """The `facts` of a checkpoint; where it is older than a field, all that there was before it."""
  optimizer = meta["run"]["optimizer"]
  adamw = dict(mu_dtype="float32") | optimizer["adamw"]
  none = dict(matmul="dtype", loss=dict(kind="next_token"), guard=dict(window=128, sigma=math.inf))
  return none | meta["run"] | dict(optimizer=optimizer | dict(adamw=adamw))


def _changes(before, now):
  return [f"{key} {before.get(key)} (now {now[key]})" for key in now if before.get(key) != now[key]]


def _changed_steps(meta, config, done):
  """Another number of steps is another rate once the rate falls; before, it changes nothing."""
  before = meta.get("steps", config.steps)
  falls_after = min(_constant_steps(config.schedule, steps) for steps in (before, config.steps))
  changed = before != config.steps and done > falls_after
  return [f"steps {before} (now {config.steps})"] if changed else []


def _constant_steps(schedule, steps):
  """How many first steps have a rate that does not depend on `steps` (optimizer.schedule)."""
  return 1 + (steps - schedule.decay_steps if schedule.shape == "wsd" else schedule.warmup_steps)


def _origin(meta):
  return dict(step=meta["step"], params=run.fingerprint(meta["fingerprints"]["params"]))


def _origin_now(config, meta):
  """What `init_from` holds today at the step that the run began from.

  A trunk may have gone on since, be pruned, moved, damaged or removed: then nothing is known against it.
  """
  origin = meta.get("origin")
  if not origin or not config.init_from:
    return origin
  for path in (pathlib.Path(config.init_from),
               pathlib.Path(config.init_from) / "checkpoints" / str(origin["step"])):
    try:
      if saved.is_checkpoint(path) and saved.meta(path)["step"] == origin["step"]:
        return _origin(saved.meta(path))
    except saved.Damaged:  # the trunk's: it says nothing of this run
      pass
  return origin


def _same_model(path, meta, config, tokenizer):
  same_fields(path, meta["model"], config.model.to_dict())
  if meta["tokenizer_sha256"] != tokenizer.sha256:
    raise run.Refused(
        f"{path} was trained with tokenizer {meta['tokenizer_sha256'][:12]}, "
        f"{config.tokenizer} is {tokenizer.sha256[:12]}"
    )


def _same_adapter(path, meta, config):
  theirs, ours = meta.get("adapter"), fields.adapter(config)
  if theirs != ours:
    said = [", ".join(f"{key} {value}" for key, value in found.items()) if found else "none"
            for found in (theirs, ours)]
    raise run.Refused(
        f"{path} was trained with adapter: {said[0]}; config.adapter says: {said[1]}. Set it back, or begin "
        "another --workdir with config.init_what 'params', which merges what was learnt"
    )


def _same_length(path, meta, config):
  if meta["T"] != config.data.T:
    raise run.Refused(f"{path} was trained on rows of T={meta['T']}, config.data.T is {config.data.T}")


def same_fields(path, theirs, ours):
  """Refuses a model of other sizes or constants, naming each."""
  differ = [f"{key} {theirs.get(key)} (here {ours.get(key)})"
            for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
  if differ:
    raise run.Refused(f"{path} is another model: " + ", ".join(differ))
