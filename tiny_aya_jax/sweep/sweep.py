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

from tiny_aya_jax import chips, flops, run
from tiny_aya_jax.data import loader, mixture
from tiny_aya_jax.evaluate import rollups
from tiny_aya_jax.sweep import laws, page, protocol, runner, space, terminal, verdict

PLANNED_MFU = 0.40  # as in plan: no roofline is reached
SHOWN = 7  # arms beside each other in a terminal
PREDICTED = "predicted optimum"  # the arm that laws.py asks for


def main(config, workdir):
  """Returns an exit code: 0 if every trial has an outcome, good or bad."""
  _check(config)
  data = _data(config)
  if config.search == "optuna" and not run.installed("optuna"):
    raise run.Refused("config.search is 'optuna', which is not installed: pip install 'tiny_aya_jax[sweep]'")
  codes = sorted({manifest["language"] for manifest in data["manifests"]})
  found = [] if config.search == "optuna" else space.trials(config, space.arms(config, codes))
  plans = [protocol.planned(config, workdir, trial, data) for trial in found]
  _distinct(plans)
  if not config.dry_run:
    workdir.mkdir(parents=True, exist_ok=True)
  ledger = runner.Ledger(workdir / "ledger.jsonl")
  print("\n".join(preview(config, plans or [_first_draw(config, workdir, data)], ledger)), flush=True)
  if config.dry_run:
    return run.EXIT["done"]
  with _lock(workdir):
    try:
      plans = _run(config, workdir, ledger, plans, data)
      result = _record(config, plans, ledger, data)
      if config.law.fit:
        result = _with_laws(config, workdir, ledger, plans, data, result)
    except runner.Stopped:
      run.say("stopped: what ran has saved; run the same command again to continue")
      return run.EXIT["preempted"]
  _write(workdir, result)
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
    if (config[group] if group else config)[field] < least:
      raise run.Refused(f"config.{name} is {(config[group] if group else config)[field]}, expected at least {least}")
  if config.law.most_epochs is not None and not config.law.most_epochs > 0:
    raise run.Refused(f"config.law.most_epochs is {config.law.most_epochs}, expected more than 0")
  if config.law.confirm and not config.law.fit:
    raise run.Refused("config.law.confirm runs what the laws predict, and config.law.fit is off: set it")
  if config.topology:
    chips.parse(config.topology)


def _data(config):
  if not config.rows:  # a dry run
    T = run.load_config(config.trunk).data.T
    return dict(manifests=mixture.web(T), validation=[], tokenizer_sha256="")
  manifests, validation = loader.read_manifests(config.rows), loader.read_manifests(config.validation)
  return dict(manifests=manifests, validation=validation, tokenizer_sha256=run.sha256(config.tokenizer))


def _distinct(plans):
  seen = {}
  for planned in plans:
    other = seen.setdefault(planned.key, planned.trial)
    if other is not planned.trial:
      raise run.Refused(f"trials {other.name} and {planned.trial.name} are the same run: leave one out")


def _first_draw(config, workdir, data):
  """What Optuna would ask first, to have something to show."""
  settings = space.suggested(config, [])
  return protocol.planned(config, workdir, space.trial(config, "suggestion 0", settings, 0), data)


def _run(config, workdir, ledger, plans, data):
  """Runs what has no outcome yet; returns all that was planned, Optuna's among them."""
  waiting = [planned for planned in plans if not _settled(ledger, planned)]
  if config.search == "optuna":
    plans = []
    take = _asking(config, workdir, ledger, plans, data)
  else:
    if len(waiting) < len(plans):
      run.say(f"{len(plans) - len(waiting)} of {len(plans)} trials are done already")
    queue, lock = list(waiting), threading.Lock()

    def take():
      with lock:
        return queue.pop(0) if queue else None

  uses = {}
  for planned in waiting:
    for stage in planned.stages[:-1]:
      uses[stage.key] = uses.get(stage.key, 0) + 1

  def told(planned, outcome):
    run.say(_said(planned, outcome))
    if not config.keep and outcome["state"] == "done":
      shutil.rmtree(planned.stages[-1].workdir / "checkpoints", ignore_errors=True)
      for stage in planned.stages[:-1]:
        uses[stage.key] = uses.get(stage.key, 1) - 1
        if uses[stage.key] <= 0:
          shutil.rmtree(stage.workdir, ignore_errors=True)

  runner.Runner(config, workdir, ledger).run(take, told)
  return plans


def _settled(ledger, planned):
  """Whether a trial has its outcome; what was refused or failed is tried again by the next call."""
  return ledger.outcomes().get(planned.key, {}).get("state") in ("done", "diverged")


def _said(planned, outcome):
  words = outcome["why"]
  if outcome["state"] == "done":
    mean = rollups.summary(outcome["bits_per_byte"], "lower")
    words = f"mean {mean['mean']:.4f}, worst {next(iter(mean['worst']))} {mean['poorest']:.3f} bits per byte"
  return f"{planned.trial.name}: {outcome['state']}, {words}"


def _asking(config, workdir, ledger, plans, data):
  """take() for Optuna: what was asked before is taken up first, then a new suggestion; `plans` grows."""
  lock, objective = threading.Lock(), _objective(config)
  asked = [row["settings"] for row in ledger.rows if row["event"] == "asked"][: config.draws]
  asked = [{field: tuple(value) if isinstance(value, list) else value for field, value in settings.items()}
           for settings in asked]

  def value(planned):
    outcome = ledger.outcomes().get(planned.key)
    if outcome is None:
      return None
    if outcome["state"] != "done":
      return math.inf
    return verdict.value(outcome["bits_per_byte"], objective, _facts(outcome["bits_per_byte"]))

  def take():
    with lock:
      while len(plans) < config.draws:
        number = len(plans)
        if number == len(asked):
          asked.append(space.suggested(config, [(one.trial.settings, value(one)) for one in plans]))
          ledger.append(event="asked", key="", number=number, settings=asked[-1])
        trial = space.trial(config, f"suggestion {number}", asked[number], 0)
        plans.append(protocol.planned(config, workdir, trial, data))
        if not _settled(ledger, plans[-1]):
          return plans[-1]
      return None

  return take


def _objective(config):
  return dict(kind=config.objective, floor=config.floor)


def _facts(codes):
  return {code: rollups.facts(code) for code in codes}


def _record(config, plans, ledger, data):
  """The record that laws, verdict and page read (sweep.json)."""
  outcomes, trials = ledger.outcomes(), []
  for planned in plans:
    trial, outcome = planned.trial, outcomes.get(planned.key, dict(state="waiting", why=None))
    row = dict(trial=trial.name, arm=trial.arm, seed=trial.seed, x=trial.x, settings=trial.settings,
               state=outcome["state"], why=outcome["why"])
    if outcome["state"] == "done":
      row |= dict(tokens=planned.tokens, epochs=planned.epochs, operations=planned.operations,
                  **{name: outcome[name] for name in ("bits_per_byte", "bytes", "seconds")})
    trials.append(row)
  codes = {code for planned in plans for code in planned.tokens}
  result = dict(
      name=config.title, objective=_objective(config),
      axes=sorted({field for planned in plans for field in planned.trial.settings}), x=config.x,
      target=dict(tokens=config.imitate.tokens, sizes=config.imitate.sizes) if config.imitate.tokens else None,
      tokens=config.tokens, row=plans[0].stages[0].config.data.T, languages=_facts(sorted(codes)), sizes=plans[0].sizes, trials=trials, laws=None,
      tests=[], verdict=None, made=run.provenance(config),
  )
  return result | dict(verdict=verdict.of(result))


def _with_laws(config, workdir, ledger, plans, data, result):
  """The record with laws fitted to its trials, and with the runs that test what they predict."""
  asked = config.law
  trials = [trial for trial in result["trials"] if trial["state"] == "done"]
  try:
    result["laws"] = laws.compared(
        trials, result["objective"], result["languages"], sizes=result["sizes"], tokens=config.tokens,
        most_epochs=asked.most_epochs, draws=asked.draws, best=asked.best, seed=config.seed)
  except run.Refused as refusal:  # what was measured stands
    run.say(f"no laws: {refusal}")
    return result
  optimum = result["laws"]["optimum"]
  if not asked.confirm or not optimum:
    return result
  settings = {"data.mixture.kind": "explicit", "data.mixture.weights": weights(optimum["shares"])}
  tests = [protocol.planned(config, workdir, space.trial(config, PREDICTED, settings, seed), data)
           for seed in range(asked.confirm)]
  _run(config, workdir, ledger, tests, data)
  whole = _record(config, [*plans, *tests], ledger, data)
  measured = [trial for trial in whole["trials"] if trial["arm"] == PREDICTED and trial["state"] == "done"]
  return whole | dict(laws=result["laws"], tests=[
      dict(arm=PREDICTED, seed=trial["seed"], predicted=optimum["predicted"], measured=trial["bits_per_byte"])
      for trial in measured])


def weights(shares):
  """{code: share} -> the weights of an explicit mixture that sums to 1, what no row can hold left out."""
  kept = {code: round(share, 9) for code, share in shares.items() if share > 1e-8}
  largest = max(kept, key=kept.get)
  kept[largest] = round(kept[largest] + 1 - math.fsum(kept.values()), 9)
  return tuple(kept.items())


def _write(workdir, result):
  run.write_json(workdir / "sweep.json", result)
  run.write_text(workdir / "sweep.html", page.page(result))


@contextlib.contextmanager
def _lock(workdir):
  """One sweep a workdir; the lock dies with its process."""
  with open(workdir / "lock", "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise run.Refused(f"another sweep holds {workdir}: stop it, or use another --workdir") from None
    yield


# --- before anything runs -----------------------------------------------------------------------


def preview(config, plans, ledger):
  """Text lines: every arm with what it reads, and what all of it costs."""
  arms = {}
  for planned in plans:
    arms.setdefault(planned.trial.arm, []).append(planned)
  first = plans[0]
  count = f"up to {config.draws}" if config.search == "optuna" else str(len(plans))
  yield f"{config.title}: {count} trials of {len(arms)} arms"
  if not config.rows:
    yield (f"  no rows given (config.rows): languages as large as FineWeb-2, {mixture.WEB_BYTES_A_TOKEN} bytes a "
           "token; before cleaning, so every real epoch is longer")
  for stage in first.stages:
    cfg, tokens = stage.config, stage.config.steps * stage.config.data.batch * stage.config.data.T
    yield (f"  {stage.name:9} {stage.file}: {cfg.steps} steps of {cfg.data.batch} x {cfg.data.T}, {tokens:,} tokens, "
           f"{flops.parameters(cfg.model):,} parameters")
  if config.imitate.tokens:
    yield (f"  imitates {config.imitate.tokens:.3g} tokens: sources are cut to {config.tokens / config.imitate.tokens:.3g} "
           f"of their {dict(rows='packed rows', web='FineWeb-2 size').get(config.imitate.sizes, config.imitate.sizes)}")
  yield f"{'arm':32} {'seeds':>5} {'> 4 epochs':>11} {'none':>5}   most epochs"
  for arm, group in arms.items():
    epochs = group[0].epochs
    none = sum(not tokens for tokens in group[0].tokens.values())
    most = sorted(epochs, key=epochs.get, reverse=True)[:3]
    over = sum(value > mixture.MOST_EPOCHS for value in epochs.values())
    yield (f"{arm:32} {len(group):>5} {over:>11} {none:>5}   "
           + ", ".join(f"{code} {epochs[code]:.3g}" for code in most))
  if config.dry_run:
    yield from _epochs(arms)
  yield from _warnings(config, plans)
  yield from _cost(config, plans, ledger)


def _epochs(arms):
  """A line a language, most text first: epochs of the imitated run under the first arms."""
  shown = list(arms)[:SHOWN]
  codes = sorted(arms[shown[0]][0].sizes, key=arms[shown[0]][0].sizes.get, reverse=True)
  yield f"{'epochs':14}{'tokens':>10} " + "".join(f"{arm[-13:]:>14}" for arm in shown)
  for code in codes:
    cells = "".join(f"{arms[arm][0].epochs[code]:>14.3g}" for arm in shown)
    yield f"{code:14}{arms[shown[0]][0].sizes[code]:>10.3g} {cells}"
  if len(arms) > len(shown):
    yield f"  no room here for {len(arms) - len(shown)} other arms"


def _warnings(config, plans):
  """What is true of every arm is said once."""
  said = {}
  for planned in plans:
    for remark in planned.remarks:
      said.setdefault(remark, []).append(planned.trial.arm)
  arms = {planned.trial.arm for planned in plans}
  for remark, of in said.items():
    if set(of) == arms:
      yield f"  {remark}"
  if config.search != "optuna" and len(plans) == len(arms):
    yield "  warning: one seed an arm: nothing will tell an effect from noise (config.seeds, config.more_seeds)"
  least = max(laws.LEAST.values()) + 1  # one is left out
  if config.law.fit and config.search != "optuna" and len(arms) < least:
    yield f"  warning: laws need {least} arms, these are {len(arms)}"


def _cost(config, plans, ledger):
  runs = {stage.key: stage for planned in plans for stage in planned.stages}
  draws = config.draws if config.search == "optuna" else 1  # one was planned, to be shown
  tokens, operations = (draws * sum(map(count, runs.values())) for count in (protocol.tokens, protocol.operations))
  outcomes = ledger.outcomes()
  left = [planned for planned in plans if not _settled(ledger, planned)]
  yield (f"  {draws * len(runs)} runs, {tokens / 1e9:.4g}B tokens, {operations:.3g} operations of training; "
         f"{draws * len(left)} trials are left to run, {config.at_once} at once")
  if config.topology:
    slice = chips.parse(config.topology)
    hours = operations / (PLANNED_MFU * slice.chip.flops * slice.size) / 3600
    price = slice.chip.price if config.price is None else config.price
    yield (f"  on {slice.name} at {PLANNED_MFU:.0%} of its peak (assumed; small models stay far below): {hours:,.1f} hours a "
           f"slice in all, {hours / config.at_once:,.1f} with {config.at_once} slices, "
           f"{hours * slice.size * price:,.0f} USD at {price:.2f} a chip-hour")
  known = [(outcomes[planned.key]["seconds"], planned.operations) for planned in plans
           if outcomes.get(planned.key, {}).get("state") == "done"]
  if known and left:
    rate = sum(seconds for seconds, _ in known) / sum(count for _, count in known)
    hours = rate * sum(planned.operations for planned in left) / config.at_once / 3600
    yield f"  at the speed of the {len(known)} that ended: {hours:,.2f} hours to go"
  if config.keep:
    size = sum(12 * flops.parameters(stage.config.model) for stage in runs.values())
    yield f"  checkpoints: {draws * size / 2**30:,.1f} GiB (config.keep=False removes those of finished trials)"
