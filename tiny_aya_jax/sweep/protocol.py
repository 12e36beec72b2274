"""A trial as runs of `train`: a trunk and a quick cooldown forked from it, and what each will read.

The report's protocol (2.2: 200B tokens, the last 40B of them a linear cooldown) at any scale. Here
are configs, commands and plans; nothing is run. Trials that differ in their cooldown alone share
one trunk. With config.imitate.tokens each source is cut as in mixture.cut (simulated epoching).
"""

import functools
import pathlib
from typing import NamedTuple

from tiny_aya_jax import flops, run
from tiny_aya_jax.data import mixture, rules
from tiny_aya_jax.sweep import space
from tiny_aya_jax.train import begin, fields, saved

# Where things lie, and what changes no result.
_NEUTRAL = ("data.rows", "data.validation", "tokenizer", "init_from", "init_tokenizer", "data.cut.sizes",
            "data.threads", "data.prefetch", "log_every", "save_every", "keep", "stop_after", "profile", "show",
            "topology", "price")


class Stage(NamedTuple):
  """One run of `train`; key: the fingerprint of all that its result depends on."""

  name: str  # trunk or cooldown
  key: str
  workdir: pathlib.Path
  config: object  # train's, as it will be read
  flags: dict  # {field: value} beside the config file
  file: str  # FILE:variant

  @property
  def arguments(self):
    """What Python is told."""
    return ["-m", "tiny_aya_jax", "train", f"--config={self.file}", f"--workdir={self.workdir}",
            *(f"--config.{field}={value}" for field, value in self.flags.items())]


class Planned(NamedTuple):
  """A trial with what it will run and read."""

  trial: space.Trial
  key: str
  stages: tuple
  tokens: dict  # {code: tokens}, all stages
  sizes: dict  # {code: tokens that an epoch of the language has here}
  epochs: dict  # {code: tokens / size}
  operations: float
  remarks: list  # the mixture's warnings


def check(config):
  """Refuses numbers that are no protocol, before a trial is looked at."""
  unpacked = config.dry_run and not config.rows  # may be asked before anything is packed
  for field in ("trunk", "cooldown", *(() if unpacked else ("rows", "validation", "tokenizer"))):
    if not config[field]:
      raise run.Refused(f"config.{field} is not set")
  for field in ("trunk", "cooldown"):
    run.load_config(config[field])
  if config.imitate.tokens is not None and not config.imitate.tokens >= config.tokens:
    raise run.Refused(f"config.imitate.tokens is {config.imitate.tokens:g}, less than the {config.tokens:g} of "
                      "a trial: there is nothing to cut")


def planned(config, workdir, trial, data):
  """A Trial -> Planned; data: dict(manifests, validation, tokenizer: None before any is made).

  Refuses what train would.
  """
  own = {field: trial.settings.get(field, config[field]) for field in space.OWN}
  if not own["tokens"] > 0 or not 0 <= own["cooldown_share"] < 1:
    raise run.Refused(f"arm {trial.arm!r} has {own['tokens']} tokens and a cooldown_share of "
                      f"{own['cooldown_share']}, expected more than 0, and from 0 to below 1")
  try:
    stages = _stages(config, workdir, trial, own, data)
    plan = begin.plan(stages[0].config, data["manifests"])
    row = stages[0].config.steps * stages[0].config.data.batch
    for stage in stages[1:]:
      steps, batch = stages[0].config.steps, stage.config.data.batch
      rule = begin.rule(stage.config, plan["sources"], steps, steps * batch)
      plan = mixture.append(plan, row, rule, plan["sources"])
      row += stage.config.steps * batch
  except run.Refused as refusal:
    raise run.Refused(f"arm {trial.arm!r}: {refusal}") from None
  drawn, sizes = amounts(plan, row)
  remarks = [line for line in mixture.table(plan, row) if line.startswith("warning: ")]
  return Planned(trial, run.fingerprint([stage.key for stage in stages]), stages, drawn, sizes,
                 {code: amount / sizes[code] for code, amount in drawn.items()},
                 sum(map(operations, stages)), remarks)


def refused(trial, why):
  """A Planned that nothing will run."""
  key = run.fingerprint([trial.settings, trial.seed, str(why)])
  return Planned(trial, key, (), {}, {}, {}, 0.0, [f"refused: {why}"])


def tokens(stage):
  """Tokens that a run trains on."""
  return stage.config.steps * stage.config.data.batch * stage.config.data.T


def operations(stage):
  """Floating-point operations of a run's training."""
  return tokens(stage) * flops.per_token(stage.config.model, stage.config.data.T)["total"]


def refuse_changed(stage):
  """A run reads its config file when it starts: it must say what it said when the sweep began."""
  if str(_read(stage.file, stage.flags)) != str(stage.config):
    raise run.Refused(f"{stage.file} has changed since this sweep began: its trials would be of two kinds; start "
                      "the same command again, which runs what the new one needs")


def _stages(config, workdir, trial, own, data):
  """(trunk, cooldown), or the trunk alone."""
  share, stage = own["cooldown_share"], functools.partial(_stage, trial, own, data, workdir)
  common = {"seed": trial.seed, "data.seed": trial.seed}
  if config.rows:
    common |= {"data.rows": config.rows, "tokenizer": config.tokenizer}
  else:
    common |= {"data.mixture.within": ()}  # mixture.web has one source a language
  if config.imitate.tokens is not None:
    common |= {"data.cut.share": own["tokens"] / config.imitate.tokens, "data.cut.sizes": config.imitate.sizes}
  last = {"data.validation": config.validation or "", "evaluate_every": 0}  # once, at the end
  trunk = stage("trunk", config.trunk, common | ({} if share else last), 1 - share, [])
  if trunk.config.init_what == "state":
    raise run.Refused(f"{config.trunk} forks from a trunk (init_what 'state'): a sweep trains trunks of its own")
  if not share:
    return (trunk,)
  forked = common | last | dict(init_from=trunk.workdir, init_what="state")
  return trunk, stage("cooldown", config.cooldown, forked, share, [trunk.key])


def _stage(trial, own, data, workdir, name, file, flags, share, before):
  """share: of the trial's tokens; before: keys of the runs that it goes on from."""
  flags = flags | _of_stage(name, trial.settings)
  read = _read(file, {field: _written(value) for field, value in flags.items()})
  if "budget" in rules.READS.get(read.data.mixture.kind, ()) and read.data.mixture.budget is None:
    # Of the whole trial: both stages then draw alike, and the cap holds of both together.
    flags = flags | {"data.mixture.budget": float(own["tokens"])}
  rows = own["tokens"] * share / max(read.data.T, 1)
  flags = flags | dict(steps=max(round(rows / max(read.data.batch, 1)), 1))
  flags = {field: _written(value) for field, value in flags.items()}
  read = _read(file, flags)
  _check(read, file, data)
  key = _key(before, read, data)
  folder = "trunks" if name == "trunk" and not read.data.validation else "trials"
  return Stage(name, key, (workdir / folder / key[:12]).absolute(), read, flags, file)


def _check(read, file, data):
  """Refuses what `train` would, and what a sweep cannot compare."""
  fields.check(read)
  if read.loss.kind != "next_token":
    raise run.Refused(f"config.loss.kind of {file} is {read.loss.kind!r}: a sweep measures bits per byte of text")
  if read.data.plan:
    raise run.Refused(f"config.data.plan of {file} is {read.data.plan}: a sweep's plans are those of its mixtures")
  if data["tokenizer"]:
    begin.check_rows(read, data["manifests"], data["validation"], data["tokenizer"])


def _read(file, flags):
  found = run.load_config(file)
  run.override(found, flags)
  return found


def _key(before, read, data):
  """Fingerprint of all that a run's result depends on, with digests of what its config only names."""
  text = {field: value for field, value in _leaves(read) if field not in _NEUTRAL}
  sizes = read.data.cut.sizes
  named = [sizes if sizes in fields.CUT_SIZES else run.sha256(sizes), None if before else _origin(read.init_from)]
  named += [run.sha256(read.init_tokenizer)] if read.init_tokenizer else []
  manifests = [[[m["name"], m["sha256"]] for m in found]
               for found in (data["manifests"], data["validation"] if read.data.validation else [])]
  return run.fingerprint([before, text, named, manifests, data["tokenizer"] and data["tokenizer"].sha256])


def _origin(place):
  """What the first stage begins with: a checkpoint's parameters, or the files of a Hugging Face folder."""
  if not place:
    return None
  if (pathlib.Path(place) / "config.json").exists():
    files = sorted(pathlib.Path(place).iterdir())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
  return saved.meta(place)["fingerprints"]


def _of_stage(name, settings):
  """{train field: value} of the settings that concern a stage; its own win over those of both."""
  found = {field: value for field, value in settings.items()
           if field not in space.OWN and field.partition(".")[0] not in space.STAGES}
  return found | {field.partition(".")[2]: value for field, value in settings.items()
                  if field.startswith(f"{name}.")}


def _written(value):
  """As it is given on a command line."""
  return repr(value) if isinstance(value, tuple) else str(value)


def _leaves(config, prefix=""):
  for name in sorted(config.keys()):
    if hasattr(config[name], "keys"):
      yield from _leaves(config[name], f"{prefix}{name}.")
    else:
      yield prefix + name, config[name]


def amounts(plan, row):
  """({code: tokens of the global rows before `row`}, {code: tokens in an epoch}) of a plan."""
  drawn, tokens, sizes = mixture.counts(plan, row), {}, {}
  for source in plan["sources"]:
    code = source["language"]
    tokens[code] = tokens.get(code, 0) + drawn[source["name"]] * source["tokens"] / source["rows"]
    sizes[code] = sizes.get(code, 0) + source.get("size", source["tokens"])
  return tokens, sizes
