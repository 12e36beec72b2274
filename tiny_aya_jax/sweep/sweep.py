"""VERB sweep: many short runs over mixtures or any other field, and what each does to every language.

Shows first what all of it will read and cost (config.dry_run ends there); runs what the ledger does
not have yet; then fits laws, runs what they predict (config.law.confirm), and says which setting to
take and how sure that is. WORKDIR/ledger.jsonl, sweep.json, sweep.html, and a folder a run.
"""

import contextlib
import fcntl
import math
import shutil
import threading

from tiny_aya_jax import chips, run
from tiny_aya_jax.data import loader, mixture, tokenizer as tokenizers
from tiny_aya_jax.evaluate import rollups
from tiny_aya_jax.sweep import laws, ledger as ledgers, page, preview, protocol, runner, space, terminal, verdict

PREDICTED = "predicted optimum"  # the arm that laws.py asks for


def main(config, workdir):
  """Returns an exit code: 0 if every trial has an outcome, good or bad."""
  _check(config)
  data = _data(config)
  codes = sorted({manifest["language"] for manifest in data["manifests"]})
  found = [] if config.search == "optuna" else space.trials(config, space.arms(config, codes))
  plans = [protocol.planned(config, workdir, trial, data) for trial in found]
  _distinct(plans)
  if config.dry_run:
    _show(config, workdir, data, plans, ledgers.Ledger(workdir / "ledger.jsonl"))
    return run.EXIT["done"]
  workdir.mkdir(parents=True, exist_ok=True)
  with _lock(workdir):
    ledger = ledgers.Ledger(workdir / "ledger.jsonl")
    _show(config, workdir, data, plans, ledger)
    sweep = Sweep(config, workdir, ledger, data, plans)
    try:
      sweep.run()
    except runner.Stopped:
      run.say("stopped: what ran has saved; run the same command again to continue")
      return run.EXIT["preempted"]
    finally:
      result = sweep.write()  # what there is, also of a sweep that was stopped
  run.say(terminal.table(result))
  run.say(f"done: {workdir / 'sweep.html'}")
  return run.EXIT["done"]


def _check(config):
  space.check(config)
  protocol.check(config)
  run.choose("config.objective", config.objective, ("mean", "worst", "region", "floor"))
  if (config.objective == "floor") != (config.floor is not None):
    raise run.Refused(f"config.floor is {config.floor} and config.objective {config.objective!r}: the floor, in "
                      "bits per byte, belongs to the objective 'floor'")
  for name, least in {"at_once": 1, "retries": 0, "law.draws": 1, "law.best": 1, "law.confirm": 0}.items():
    group, _, field = name.rpartition(".")
    if (value := (config[group] if group else config)[field]) < least:
      raise run.Refused(f"config.{name} is {value}, expected at least {least}")
  if config.law.most_epochs is not None and not config.law.most_epochs > 0:
    raise run.Refused(f"config.law.most_epochs is {config.law.most_epochs}, expected more than 0")
  if config.law.confirm and not config.law.fit:
    raise run.Refused("config.law.confirm runs what the laws predict, and config.law.fit is off: set it")
  varied = [field for pair in config.arms for field, _ in pair[1]] + [
      axis[0] for axis in (*config.grid, *config.space)]
  if config.law.fit and "tokens" in varied:
    raise run.Refused("config.law.fit is set and `tokens` varies: a law is of trials of one length")
  if config.prefix and not shutil.which(config.prefix[0]):
    raise run.Refused(f"config.prefix begins with {config.prefix[0]!r}, which is no command here")
  if config.search == "optuna" and not run.installed("optuna"):
    raise run.Refused("config.search is 'optuna', which is not installed: pip install 'tiny_aya_jax[sweep]'")
  if config.topology:
    chips.parse(config.topology)


def _data(config):
  if not config.rows:  # a dry run
    T = run.load_config(config.trunk).data.T
    return dict(manifests=mixture.web(T), validation=[], tokenizer=None)
  manifests, validation = loader.read_manifests(config.rows), loader.read_manifests(config.validation)
  return dict(manifests=manifests, validation=validation, tokenizer=tokenizers.load(config.tokenizer))


def _distinct(plans):
  seen = {}
  for planned in plans:
    other = seen.setdefault(planned.key, planned.trial)
    if other is not planned.trial:
      raise run.Refused(f"trials {other.name} and {planned.trial.name} are the same run: leave one out")


def _show(config, workdir, data, plans, ledger):
  shown = plans or [_first_draw(config, workdir, data)]
  print("\n".join(preview.lines(config, shown, ledger)), flush=True)


def _first_draw(config, workdir, data):
  """What Optuna would ask first, to have something to show."""
  trial = space.trial(config, "suggestion 0", space.suggested(config, []), 0)
  try:
    return protocol.planned(config, workdir, trial, data)
  except run.Refused as refusal:
    return protocol.refused(trial, refusal)


@contextlib.contextmanager
def _lock(workdir):
  """One sweep a workdir; the lock dies with its process."""
  with open(workdir / "lock", "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise run.Refused(f"another sweep holds {workdir}: stop it, or use another --workdir") from None
    except OSError as error:
      run.say(f"{workdir} has no locks ({error.strerror}): a second sweep in it would not be noticed")
    yield


class Sweep:
  """What lanes share: plans grow with what Optuna or the laws ask for."""

  def __init__(self, config, workdir, ledger, data, plans):
    self.config, self.workdir, self.ledger, self.data = config, workdir, ledger, data
    self.plans, self.laws, self.predicted = plans, None, None
    self._lock, self._objective = threading.Lock(), dict(kind=config.objective, floor=config.floor)

  def run(self):
    """Runs what has no outcome yet, then what the laws ask for."""
    if self.config.search == "optuna":
      self._run(self._next_suggestion(), asking=True)
    else:
      self._run_all(self.plans)
    if self.config.law.fit:
      self._fit()

  def write(self):
    """Writes sweep.json and sweep.html; returns the record."""
    result = self._record()
    run.write_json(self.workdir / "sweep.json", result)
    run.write_text(self.workdir / "sweep.html", page.page(result))
    return result

  def _run_all(self, plans):
    waiting = [planned for planned in plans if not self.ledger.settled(planned)]
    if len(waiting) < len(plans):
      run.say(f"{len(plans) - len(waiting)} of {len(plans)} trials are done already")
    self._run(iter(waiting), asking=False)

  def _run(self, waiting, asking):
    """waiting: an iterator of Planned. With `asking` a trunk may be wanted by what is not planned yet."""
    def take():
      with self._lock:
        return next(waiting, None)

    def told(planned, outcome):
      run.say(_said(planned, outcome))
      if not self.config.keep and not asking:
        with self._lock:
          self._remove([planned])

    runner.Runner(self.config, self.workdir, self.ledger).run(take, told)
    if not self.config.keep and asking:
      self._remove(self.plans)

  def _remove(self, plans):
    """Checkpoints of trials that are settled, and trunks that none needs which is not."""
    needed = {stage.key for planned in self.plans if not self.ledger.settled(planned) for stage in planned.stages}
    for planned in plans:
      if planned.stages and self.ledger.settled(planned):
        for stage in planned.stages:
          if stage.key not in needed:
            last = stage is planned.stages[-1]
            _remove(stage.workdir / "checkpoints" if last else stage.workdir)

  def _next_suggestion(self):
    """Optuna's suggestions, planned; those of before come first, what train would refuse is kept as that."""
    question = run.fingerprint([list(map(str, self.config.space)), self.config.seed, self._objective])
    asked = [space.tuples(row["settings"]) for row in self.ledger.rows
             if row["event"] == "asked" and row["key"] == question]
    for number in range(self.config.draws):
      if number == len(asked):
        asked.append(space.suggested(self.config, [(one.trial.settings, self._value(one)) for one in self.plans]))
        self.ledger.append(event="asked", key=question, settings=asked[-1])
      trial = space.trial(self.config, f"suggestion {number}", asked[number], 0)
      try:
        planned = protocol.planned(self.config, self.workdir, trial, self.data)
      except run.Refused as refusal:
        planned = protocol.refused(trial, refusal)
        self.ledger.append(event="outcome", key=planned.key, trial=trial.name, state="refused", why=str(refusal))
      again = any(planned.key == one.key for one in self.plans)
      self.plans.append(planned)
      if planned.stages and not again and not self.ledger.settled(planned):
        yield planned

  def _value(self, planned):
    """Of the objective; None: not known yet, inf: it came to nothing."""
    outcome = self.ledger.outcomes().get(planned.key)
    if outcome is None:
      return None
    if outcome["state"] != "done":
      return math.inf
    return verdict.value(outcome["bits_per_byte"], self._objective, _facts(outcome["bits_per_byte"]))

  def _fit(self):
    """Fits laws to what was measured, and runs the mixture that they predict."""
    asked, result = self.config.law, self._record()
    trials = [trial for trial in result["trials"] if trial["state"] == "done"]
    try:
      self.laws = laws.compared(
          trials, result["objective"], result["languages"], sizes=result["sizes"], tokens=self.config.tokens,
          most_epochs=asked.most_epochs, draws=asked.draws, best=asked.best, seed=self.config.seed)
    except run.Refused as refusal:  # what was measured stands
      run.say(f"no laws: {refusal}")
      return
    run.say(f"laws: {self.laws['why']}")
    if not self.laws["optimum"] or not asked.confirm:
      return
    self.predicted = self.laws["optimum"]["predicted"]
    settings = {"data.mixture.kind": "explicit", "data.mixture.weights": weights(self.laws["optimum"]["shares"])}
    tests = [protocol.planned(self.config, self.workdir, space.trial(self.config, PREDICTED, settings, seed), self.data)
             for seed in range(asked.confirm)]
    self.plans += tests
    self._run_all(tests)

  def _record(self):
    """The record that laws, verdict and page read (sweep.json)."""
    config, outcomes = self.config, self.ledger.outcomes()
    trials = [_trial(planned, outcomes.get(planned.key, dict(state="waiting", why=None))) for planned in self.plans]
    whole = [planned for planned in self.plans if planned.stages]
    tests = [trial for trial in trials if trial["arm"] == PREDICTED and trial["state"] == "done"]
    result = dict(
        name=config.title, objective=self._objective, x=config.x, tokens=config.tokens,
        axes=sorted({field for planned in self.plans for field in planned.trial.settings}),
        target=dict(config.imitate) if config.imitate.tokens else None,
        row=whole[0].stages[0].config.data.T if whole else 1, sizes=whole[0].sizes if whole else {},
        languages=_facts(sorted({code for planned in whole for code in planned.tokens})), trials=trials,
        laws=self.laws, tests=[
            dict(arm=PREDICTED, seed=trial["seed"], predicted=self.predicted, measured=trial["bits_per_byte"])
            for trial in tests],
        verdict=None, made=run.provenance(config),
    )
    return result | dict(verdict=verdict.of(result))


def _trial(planned, outcome):
  trial, done = planned.trial, outcome["state"] == "done"
  return dict(trial=trial.name, arm=trial.arm, seed=trial.seed, x=trial.x, settings=trial.settings,
              state=outcome["state"], why=outcome["why"]) | (dict(
                  tokens=planned.tokens, epochs=planned.epochs, operations=planned.operations,
                  **{name: outcome[name] for name in ("bits_per_byte", "bytes", "seconds")}) if done else {})


def _said(planned, outcome):
  words = outcome["why"]
  if outcome["state"] == "done":
    mean = rollups.summary(outcome["bits_per_byte"], "lower")
    words = f"mean {mean['mean']:.4f}, worst {next(iter(mean['worst']))} {mean['poorest']:.3f} bits per byte"
  return f"{planned.trial.name}: {outcome['state']}, {words}"


def _facts(codes):
  return {code: rollups.facts(code) for code in codes}


def _remove(folder):
  """Out of sight first: half a folder would be taken for a damaged run."""
  if folder.exists():
    hidden = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def weights(shares):
  """{code: share} -> the weights of an explicit mixture that sums to 1, what no row can hold left out."""
  kept = {code: round(share, 9) for code, share in shares.items() if share > 1e-8}
  largest = max(kept, key=kept.get)
  kept[largest] = round(kept[largest] + 1 - math.fsum(kept.values()), 9)
  return tuple(kept.items())
