"""What a sweep tries: a config in, trials out, each a dict of train fields. Runs nothing.

An arm is a setting, a trial an arm with a seed. Arms are the product of `arms` (fields that belong
together, by name) and `grid` (values of one field); with "random" also draws from `space`, draw n being
a function of (config.seed, n) alone; with "optuna" these only, each after what earlier ones measured.

A field is one of train's config, of both stages, or of one: `trunk.steps`, `cooldown.data.mixture.within`;
or the sweep's own `tokens` and `cooldown_share`. Distributions of `space`:

  (field, "uniform" | "log" | "whole", low, high)    both ends included
  (field, "choice", (value, ...))
  (field, "factors", of regions, of languages)       pairs for data.mixture.keep: each language's share
                                                     times exp of two normal deviates of these deviations
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.evaluate import rollups

SEARCHES = ("grid", "random", "optuna")
OWN = ("tokens", "cooldown_share")  # fields of the sweep that a trial may set
STAGES = ("trunk", "cooldown")
# What the protocol decides: where data lie and a stage begins, how long it is, who is measured and when.
SET = dict.fromkeys(("seed", "data.seed"), "config.seeds") | dict.fromkeys(("steps", "epochs"), "config.tokens") | (
    dict.fromkeys(("data.cut.share", "data.cut.sizes"), "config.imitate")) | dict.fromkeys(
        ("init_from", "init_what", "init_tokenizer", "data.rows", "data.validation", "data.plan", "tokenizer",
         "evaluate_every", "loss.kind", "stop_after", "show", "workdir"), "the sweep's own")
DISTRIBUTIONS = dict(uniform=2, log=2, whole=2, choice=1, factors=2)  # numbers that each needs


class Trial(NamedTuple):
  """settings: {field: value}; x: the arm's number on the main axis, None if it has none."""

  name: str
  arm: str
  seed: int
  x: float | None
  settings: dict


def check(config):
  """Refuses what describes no set of trials."""
  run.choose("config.search", config.search, SEARCHES)
  unread = dict(grid=("space",), random=(), optuna=("arms", "grid"))[config.search]
  for field in unread:
    if config[field]:
      raise run.Refused(f"config.{field} is set, and config.search is {config.search!r}, which does not read it")
  if config.search != "grid" and not config.space:
    raise run.Refused(f"config.search is {config.search!r} and config.space is empty: there is nothing to draw")
  for pair in config.arms:
    if not _pair(pair) or not isinstance(pair[1], tuple) or not all(map(_pair, pair[1])):
      raise run.Refused(f"{pair!r} in config.arms is no arm: expected (name, ((field, value), ...)), and "
                        "(name, ((field, value),)) for one field")
  for pair in config.grid:
    if not _pair(pair) or not isinstance(pair[1], (tuple, list)) or not pair[1]:
      raise run.Refused(f"{pair!r} in config.grid is no axis: expected (field, (value, ...)), and (field, (value,)) "
                        "for one value")
  for axis in config.space:
    if not isinstance(axis, tuple) or len(axis) < 2 or len(axis) != 2 + DISTRIBUTIONS.get(axis[1], -9):
      raise run.Refused(f"{axis!r} in config.space is no distribution: expected (field, kind, ...) as in "
                        "tiny_aya_jax/sweep/space.py")
    if axis[1] in ("uniform", "log", "whole") and not axis[2] <= axis[3]:
      raise run.Refused(f"{axis[0]} in config.space goes from {axis[2]} to {axis[3]}, expected a low end first")
    if axis[1] == "log" and not axis[2] > 0:
      raise run.Refused(f"{axis[0]} in config.space is 'log' from {axis[2]}, expected more than 0")
    if axis[1] == "factors" and config.search == "optuna":
      raise run.Refused("'factors' in config.space are drawn at random: set config.search to 'random'")
  for name in ("seeds", "draws"):
    if config[name] < 1:
      raise run.Refused(f"config.{name} is {config[name]}, expected at least 1")
  if config.search == "optuna" and (config.seeds > 1 or config.more_seeds):
    raise run.Refused("config.seeds and config.more_seeds are not read with Optuna, which asks each setting once")


def _pair(value):
  return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def arms(config, codes):
  """[(arm, settings)] of a grid, and of random draws; codes: the languages there are."""
  named = [(name, dict(pairs)) for name, pairs in config.arms] or [("", {})]
  axes = [[(field, value) for value in values] for field, values in config.grid]
  found = []
  if config.search == "grid" or config.arms or config.grid:
    for (name, settings), *chosen in itertools.product(named, *axes):
      words = [name, *(f"{field.rpartition('.')[2]} {value}" for field, value in chosen)]
      found.append((", ".join(filter(None, words)) or "as it is", settings | dict(chosen)))
  if config.search == "random":
    found += [(f"draw {number}", drawn(config, number, codes)) for number in range(config.draws)]
  return found


def drawn(config, number, codes):
  """{field: value} of draw `number`."""
  return {field: _draw(kind, numbers, np.random.default_rng((config.seed, number, axis)), codes)
          for axis, (field, kind, *numbers) in enumerate(config.space)}


def _draw(kind, numbers, random, codes):
  if kind == "choice":
    return numbers[0][random.integers(len(numbers[0]))]
  if kind == "factors":
    return _factors(*numbers, random, codes)
  low, high = numbers
  if kind == "whole":
    return int(random.integers(low, high + 1))
  if kind == "log":
    return float(np.exp(random.uniform(math.log(low), math.log(high))))
  return float(random.uniform(low, high))


def _factors(of_regions, of_languages, random, codes):
  """((code, factor), ...): a language's own deviate on its region's, by name, so by no order."""
  region = {code: rollups.facts(code)["region"] for code in sorted(codes)}
  common = {name: random.normal(0, of_regions) for name in sorted(set(region.values()))}
  return tuple((code, float(f"{np.exp(common[name] + random.normal(0, of_languages)):.6g}"))
               for code, name in region.items())


def trials(config, found):
  """[(arm, settings)] -> trials, the first seed of every arm first."""
  names = [arm for arm, _ in found]
  if len(set(names)) < len(names):
    raise run.Refused(f"two arms are called {max(names, key=names.count)!r}: give them other names")
  more = dict(config.more_seeds)
  for arm in more:
    run.choose("arm in config.more_seeds", arm, names)
  count = {arm: max(more.get(arm, 1), config.seeds) for arm in names}
  return [trial(config, arm, settings, seed)
          for seed in range(max(count.values())) for arm, settings in found if seed < count[arm]]


def trial(config, arm, settings, seed):
  """The Trial of an arm and a seed (0, 1, ...), which is added to config.seed."""
  for field in settings:
    stage, _, rest = field.partition(".")
    if (mine := rest if stage in STAGES else field) in SET:
      raise run.Refused(f"arm {arm!r} sets {field}: {mine} is {SET[mine].replace('config', 'decided by config')}")
  x = settings.get(config.x) if config.x else None
  name = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in arm)
  return Trial(f"{name}_seed-{config.seed + seed}", arm, config.seed + seed,
               x if isinstance(x, (int, float)) else None, dict(settings))


def suggested(config, earlier):
  """Optuna's next {field: value}: a function of config.seed and of `earlier`, [(settings, value or None)].

  A value is what was measured, lower is better; None is still under way; inf, of what diverged or broke a
  floor, counts as worse than all that was measured. Needs optuna.
  """
  import optuna

  optuna.logging.set_verbosity(optuna.logging.WARNING)
  known = {field: _distribution(optuna, kind, numbers) for field, kind, *numbers in config.space}
  sampler = optuna.samplers.TPESampler(seed=config.seed + len(earlier), constant_liar=True)
  study = optuna.create_study(direction="minimize", sampler=sampler)
  state = optuna.trial.TrialState
  finite = [value for _, value in earlier if value is not None and math.isfinite(value)]
  worse = max(finite, default=0.0) + 1
  for settings, value in earlier:
    study.add_trial(optuna.trial.create_trial(
        state=state.RUNNING if value is None else state.COMPLETE,
        value=None if value is None else min(value, worse), params=settings, distributions=known))
  return dict(study.ask(known).params)


def tuples(settings):
  """{field: value} out of JSON: its lists were tuples."""
  def deep(value):
    return tuple(map(deep, value)) if isinstance(value, list) else value

  return {field: deep(value) for field, value in settings.items()}


def _distribution(optuna, kind, numbers):
  kinds = optuna.distributions
  if kind == "choice":
    return kinds.CategoricalDistribution(numbers[0])
  if kind == "whole":
    return kinds.IntDistribution(*numbers)
  return kinds.FloatDistribution(*numbers, log=kind == "log")
