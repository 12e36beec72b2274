"""What a sweep says, with its uncertainty: objectives, noise, ranking, recommendation in words.

Reads the record of a sweep (sweep.json) and nothing else: no files, no jax. Lower is better always.
An arm is a setting, its trials differ in their seed only. Noise is the standard deviation between
them, pooled over arms; an interval is 95% of Student's t, of one comparison, uncorrected for many.
Only what is told of languages is corrected: 95% for all of them together (Bonferroni).
"""

import collections
import functools
import math
import statistics

import numpy as np

MISS = 0.05  # of intervals leave the truth out
POWER = 1.96 + 0.84  # standard errors for a test at 5% that finds a difference in 80% of cases
LOSERS = 5
ALIVE = ("waiting", "running")


def value(bits_per_byte, objective, languages):
  """Of {code: bits per byte} under an objective; infinite where a language is above the floor."""
  figures = _figures(bits_per_byte, objective, languages)
  return math.inf if _broken(bits_per_byte, objective) else figures["objective"]


def _figures(bits_per_byte, objective, languages):
  """{name: figure} of one trial: objective (floor: the mean, broken or not), mean, worst, region,
  ("region", name) and ("language", code)."""
  regions = collections.defaultdict(list)
  for code, bits in bits_per_byte.items():
    regions[languages[code]["region"]].append(bits)
  regions = {("region", name): statistics.fmean(bits) for name, bits in regions.items()}
  kinds = dict(mean=statistics.fmean(bits_per_byte.values()), worst=max(bits_per_byte.values()),
               region=max(regions.values()))
  main = kinds["mean" if objective["kind"] == "floor" else objective["kind"]]
  return dict(objective=main) | kinds | regions | {
      ("language", code): bits for code, bits in bits_per_byte.items()}


def _broken(bits_per_byte, objective):
  """{code: bits per byte} of the languages above the floor."""
  if objective["kind"] != "floor":
    return {}
  return {code: bits for code, bits in bits_per_byte.items() if bits > objective["floor"]}


# --- noise --------------------------------------------------------------------------------------


def noise(trials, objective, languages):
  """Standard deviations between seeds of one arm, pooled over arms with several; None without any.

  dict(freedom, objective, mean, worst, region, regions {name}, languages {code}, paired). paired
  is what remains of the objective's when each seed's common part is taken out of arms that ran
  the same seeds, dict(objective, freedom), or None.
  """
  groups = [rows for rows in _by_arm(trials).values() if len(rows) > 1]
  if not groups:
    return None
  names = list(_figures(trials[0]["bits_per_byte"], objective, languages))
  tables = [np.array([_row(trial, objective, languages, names) for trial in rows])
            for rows in groups]
  freedom = sum(len(table) - 1 for table in tables)
  squares = sum(((table - table.mean(0)) ** 2).sum(0) for table in tables)
  found = dict(zip(names, map(float, np.sqrt(squares / freedom))))
  parts = {kind: {name[1]: found.pop(name) for name in names if name[0] == kind}
           for kind in ("region", "language")}
  return dict(freedom=freedom) | found | dict(
      regions=parts["region"], languages=parts["language"],
      paired=_paired(groups, [table[:, names.index("objective")] for table in tables]))


def _by_arm(trials):
  """{arm: its trials by seed}, in the order of the record."""
  arms = {}
  for trial in trials:
    arms.setdefault(trial["arm"], []).append(trial)
  return {arm: sorted(rows, key=lambda trial: trial["seed"]) for arm, rows in arms.items()}


def _row(trial, objective, languages, names):
  figures = _figures(trial["bits_per_byte"], objective, languages)
  return [figures[name] for name in names]


def _paired(groups, columns):
  """Residuals of arm + seed, among arms that ran the same seeds."""
  same = collections.defaultdict(list)
  for rows, column in zip(groups, columns):
    same[tuple(trial["seed"] for trial in rows)].append(column)
  tables = [np.array(columns) for columns in same.values() if len(columns) > 1]
  freedom = sum((arms - 1) * (seeds - 1) for arms, seeds in (table.shape for table in tables))
  if not freedom:
    return None
  squares = sum(((table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()) ** 2).sum()
                for table in tables)
  return dict(objective=float(np.sqrt(squares / freedom)), freedom=freedom)


@functools.cache
def student(freedom, miss=MISS):
  """The t outside of which `miss` of Student's distribution lies; whole degrees of freedom."""
  low, high = 0.0, 1e6
  for _ in range(70):
    middle = (low + high) / 2
    low, high = (middle, high) if _within(middle, freedom) < 1 - miss else (low, middle)
  return high


def _within(t, freedom):
  """P(|T| < t): Abramowitz and Stegun 26.7.3 and 26.7.4."""
  angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
  term = math.cos(angle) if odd else 1.0
  total = term if freedom > 1 else 0.0
  for step in range(2 + odd, freedom, 2):
    term *= (step - 1) / step * math.cos(angle) ** 2
    total += term
  total *= math.sin(angle)
  return 2 / math.pi * (angle + total) if odd else total


# --- the verdict --------------------------------------------------------------------------------


def of(result):
  """The record's `verdict`, plain JSON:

  languages   codes that every finished trial has;   partial: those that only some have
  noise       as `noise`
  arms        finished ones, best first: arm, x, seeds, lost (seeds that came to nothing), objective
              (mean over seeds; None where the floor is broken), deviation and error (of the
              objective: this arm's own between seeds, and pooled / sqrt(seeds)), mean,
              mean_deviation, worst dict(language, value), region dict(region, value), both means
              over seeds of each seed's worst, broken {code: bits}, difference (from the
              recommended arm, as `difference`), front, dominated_by [arm]
  recommended an arm, or None where there is nothing to choose from;   front: arms
  drowned     True where no arm can be told from the recommended one; None without noise
  losers      of the recommended arm, as `_losers`
  words       recommendation, warning, losses, unfinished: sentences or None
  states      {state: trials};   failures: [dict(trial, arm, seed, state, why)]
  sensitivity as `sensitivity`
  """
  trials, failures = finished(result)
  codes, partial = _shared(result, trials)
  trials = [trial | dict(bits_per_byte={code: trial["bits_per_byte"][code] for code in codes})
            for trial in trials] if codes else []
  found = noise(trials, result["objective"], result["languages"])
  arms = _ranked(result, trials, found)
  chosen = arms[0]["arm"] if len(arms) > 1 and arms[0]["objective"] is not None else None
  for arm in arms:
    arm["lost"] = sum(trial["arm"] == arm["arm"] for trial in failures)
    arm["difference"] = None if chosen in (None, arm["arm"]) else difference(arms[0], arm, found)
  seen = dict(
      languages=codes, partial=partial, noise=found, arms=arms, recommended=chosen,
      front=[arm["arm"] for arm in arms if arm["front"]], drowned=_drowned(arms, found),
      losers=_losers(trials, arms, chosen, found), failures=failures,
      states=dict(collections.Counter(trial["state"] for trial in result["trials"])),
      sensitivity=_sensitivity(result, trials, arms, found))
  return seen | dict(words=_words(result, seen))


def finished(result):
  """(trials that are done and whose figures are finite, [dict] of those that came to nothing)."""
  good, bad = [], []
  for trial in result["trials"]:
    done = trial["state"] == "done"
    if done and trial["bits_per_byte"] and all(
        map(math.isfinite, trial["bits_per_byte"].values())):
      good.append(trial)
    elif trial["state"] not in ALIVE:
      why = "its bits per byte are missing or not finite" if done else trial["why"]
      bad.append({key: trial[key] for key in ("trial", "arm", "seed", "state")} | dict(why=why))
  return good, bad


def _shared(result, trials):
  """(codes of the record that all trials have, codes that only some have)"""
  counts = collections.Counter(code for trial in trials for code in trial["bits_per_byte"])
  codes = [code for code in result["languages"] if counts[code] == len(trials) and trials]
  return codes, [code for code in result["languages"] if 0 < counts[code] < len(trials)]


def _ranked(result, trials, found):
  arms = [_arm(result, name, rows, found) for name, rows in _by_arm(trials).items()]
  for arm in arms:
    arm["dominated_by"] = [other["arm"] for other in arms if _dominates(other, arm)]
    arm["front"] = not arm["dominated_by"]
  return sorted(arms, key=lambda arm: (len(arm["broken"]), arm["objective"] or arm["mean"]))


def _arm(result, name, rows, found):
  objective, languages = result["objective"], result["languages"]
  figures = [_figures(trial["bits_per_byte"], objective, languages) for trial in rows]
  mean = {key: statistics.fmean(row[key] for row in figures) for key in figures[0]}
  deviation = {key: statistics.stdev(row[key] for row in figures) if len(rows) > 1 else None
               for key in ("objective", "mean")}
  bits = {key[1]: figure for key, figure in mean.items() if key[0] == "language"}
  broken = _broken(bits, objective)
  worst_region = max((key for key in mean if key[0] == "region"), key=mean.get)[1]
  return dict(
      arm=name, x=rows[0]["x"], seeds=[trial["seed"] for trial in rows],
      objective=None if broken else mean["objective"], deviation=deviation["objective"],
      error=found and found["objective"] / math.sqrt(len(rows)), mean=mean["mean"],
      mean_deviation=deviation["mean"], broken=broken,
      worst=dict(language=max(bits, key=bits.get), value=mean["worst"]),
      region=dict(region=worst_region, value=mean["region"]))


def _dominates(one, other):
  pairs = [(one["mean"], other["mean"]), (one["worst"]["value"], other["worst"]["value"])]
  return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def difference(one, other, found):
  """How far `other` is above `one`: dict(value, low, high, told, paired, seeds), both as in `of`.

  told: whether the interval leaves zero out; seeds: of each arm, that a test at 5% would need to
  find this difference in 80% of cases, n = 2 (1.96 + 0.84)^2 (sd / difference)^2. Without noise
  they are None; None altogether where a floor is broken.
  """
  if None in (one["objective"], other["objective"]):
    return None
  paired = bool(found and found["paired"] and one["seeds"] == other["seeds"])
  apart = dict(value=other["objective"] - one["objective"], paired=paired)
  if not found:
    return apart | dict(low=None, high=None, told=None, seeds=None)
  source = found["paired"] if paired else found
  half = _half(source["objective"], source["freedom"], one, other)
  seeds = 2 * (POWER * source["objective"] / apart["value"]) ** 2 if apart["value"] else None
  return apart | dict(low=apart["value"] - half, high=apart["value"] + half,
                      told=abs(apart["value"]) > half, seeds=seeds and math.ceil(seeds))


def _half(deviation, freedom, one, other, comparisons=1):
  """Half of the interval of a difference of two arms' means."""
  t = student(freedom, MISS / comparisons)
  return t * deviation * math.sqrt(1 / len(one["seeds"]) + 1 / len(other["seeds"]))


def _drowned(arms, found):
  apart = [arm["difference"]["told"] for arm in arms if arm["difference"]]
  return not any(apart) if found and apart else None


def _losers(trials, arms, chosen, found):
  """[dict(language, value, best (arm), best_value, difference, told)], the greatest loss first."""
  if chosen is None:
    return []
  columns, known = _columns(trials), {arm["arm"]: arm for arm in arms}
  bests = {code: min(columns, key=lambda arm: columns[arm][code]) for code in columns[chosen]}
  losses = {code: columns[chosen][code] - columns[best][code] for code, best in bests.items()}
  return [dict(
      language=code, value=columns[chosen][code], best=bests[code],
      best_value=columns[bests[code]][code], difference=losses[code],
      told=found and losses[code] > _half(
          found["languages"][code], found["freedom"], known[chosen], known[bests[code]],
          len(losses) * (len(arms) - 1)))
      for code in sorted(losses, key=losses.get, reverse=True)[:LOSERS] if losses[code] > 0]


def columns(result):
  """{arm: {code: bits per byte, mean of its seeds}} of all that is finished."""
  return _columns(finished(result)[0])


def _columns(trials):
  return {arm: {code: statistics.fmean(trial["bits_per_byte"][code] for trial in rows)
                for code in rows[0]["bits_per_byte"]
                if all(code in trial["bits_per_byte"] for trial in rows)}
          for arm, rows in _by_arm(trials).items()}


# --- who gains and who loses --------------------------------------------------------------------


def sensitivity(result):
  """Per language, what the axis does to it; of flattening, where x is a temperature.

  dict(languages {code: dict(best (arm), spread (worst arm - best), over_noise (spread / standard
  deviation between seeds), correlation (of ranks, with x), change (largest x - smallest), told)},
  ends [arm, arm], gain [code], lose [code], size_correlation (of ranks: change with the
  language's amount of text)). None where there are fewer than three arms with x. over_noise and
  told need noise; without it gain and lose go by the sign alone.
  """
  return of(result)["sensitivity"]


def _sensitivity(result, trials, arms, found):
  columns, along = _columns(trials), sorted((arm for arm in arms if arm["x"] is not None),
                                            key=lambda arm: arm["x"])
  along = along if len(along) > 2 and along[0]["x"] < along[-1]["x"] else []
  codes = columns[arms[0]["arm"]] if arms else []
  rows = {code: _sensitive(code, columns, along, found, len(codes)) for code in codes}
  moved = {code: row["change"] for code, row in rows.items() if row["told"] is not False and along}
  sized = [code for code in rows if along and result["languages"][code]["fineweb_bytes"]]
  return dict(
      languages=rows, ends=[along[0]["arm"], along[-1]["arm"]] if along else None,
      gain=sorted((code for code in moved if moved[code] < 0), key=moved.get),
      lose=sorted((code for code in moved if moved[code] > 0), key=moved.get, reverse=True),
      size_correlation=rank_correlation(
          [result["languages"][code]["fineweb_bytes"] for code in sized],
          [rows[code]["change"] for code in sized]))


def _sensitive(code, columns, along, found, many):
  best, worst = (end(columns, key=lambda arm: columns[arm][code]) for end in (min, max))
  spread = columns[worst][code] - columns[best][code]
  bits = [columns[arm["arm"]][code] for arm in along]
  deviation = found and found["languages"][code]
  change = bits[-1] - bits[0] if along else None
  told = None
  if along and found:
    told = abs(change) > _half(deviation, found["freedom"], along[0], along[-1], many)
  return dict(best=best, spread=spread, over_noise=spread / deviation if deviation else None,
              correlation=rank_correlation([arm["x"] for arm in along], bits),
              change=change, told=told)


def rank_correlation(one, other):
  """Spearman's, ties sharing their mean rank; None of fewer than three or where nothing varies."""
  if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
    return None
  return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values):
  array = np.array(values)
  below, level = (array[:, None] > array).sum(1), (array[:, None] == array).sum(1)
  return (below + (level - 1) / 2).tolist()


# --- words --------------------------------------------------------------------------------------


def _words(result, seen):
  return dict(recommendation=_recommendation(result, seen), warning=_warning(result, seen),
              losses=_losses(result, seen), unfinished=_unfinished(result, seen))


def aim(objective, languages):
  """What is made small, as words."""
  mean = f"mean over {languages} languages"
  return dict(mean=mean, worst="worst language", region="mean of the worst region",
              floor=f"{mean} with none above {objective['floor']} bits per byte")[objective["kind"]]


def _recommendation(result, seen):
  arms = seen["arms"]
  goal = aim(result["objective"], len(seen["languages"]))
  if not arms:
    return "No trial is finished: there is nothing to recommend."
  best = arms[0]
  if best["objective"] is None:
    return (f"No arm keeps every language at or below {result['objective']['floor']} bits per "
            f"byte: nothing is recommended. Nearest is {best['arm']}, with {_many(best['broken'])} "
            "above it.")
  if len(arms) == 1:
    return (f"Only one arm is finished, {best['arm']} ({goal}: {best['objective']:.4f} bits per "
            "byte): there is nothing to compare it with.")
  error = "" if best["error"] is None else f", standard error {best['error']:.4f}"
  return (f"{best['arm']} is recommended: of {len(arms)} arms it has the lowest {goal}, "
          f"{best['objective']:.4f} bits per byte ({_seeds(best)}{error}){_ahead(arms)}")


def _many(codes):
  return f"{len(codes)} language{'s' * (len(codes) != 1)}"


def _seeds(arm):
  return f"{len(arm['seeds'])} seed{'s' * (len(arm['seeds']) != 1)}"


def _ahead(arms):
  """The rest of the sentence: how far the next arm is, and which arms cannot be told from it."""
  others = [arm for arm in arms[1:] if arm["difference"]]
  if not others:
    return "; all other arms break the floor."
  apart = others[0]["difference"]
  ahead = f", {apart['value']:.4f} below the next, {others[0]['arm']}"
  if apart["told"] is None:
    return f"{ahead}."
  ahead += f" (95% interval {interval(apart)})"
  level = [arm["arm"] for arm in others if not arm["difference"]["told"]]
  return f"{ahead}." + (f" It cannot be told from {_listed(level)}." if level else "")


def interval(apart):
  """'-0.0010 to 0.0042'"""
  return f"{apart['low']:.4f} to {apart['high']:.4f}"


def _listed(names, most=6):
  """'a, b and c'; of very many, the first."""
  if len(names) > most:
    return f"{', '.join(names[:most])} and {len(names) - most} more"
  return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _warning(result, seen):
  """What would settle it, where noise hides the difference or nothing is known of noise."""
  if seen["recommended"] is None:
    return None
  if not seen["noise"]:
    return ("Nothing is known of the noise, for no arm has two finished seeds: no difference has "
            "an interval, and the order may be chance. Two seeds of two arms would tell.")
  level = [arm for arm in seen["arms"] if arm["difference"] and not arm["difference"]["told"]]
  if not level:
    return None
  return f"{_hidden(seen, level)} {_settled(result, seen, level[0])}"


def _hidden(seen, level):
  scale = (f"between seeds of one arm the objective varies with a standard deviation of "
           f"{seen['noise']['objective']:.4f} ({seen['noise']['freedom']} degrees of freedom)")
  if seen["drowned"]:
    spread = max(arm["difference"]["value"] for arm in level)
    return (f"The noise exceeds the effect: {scale}, between best and worst arm there is "
            f"{spread:.4f}, and no arm can be told from {seen['recommended']}.")
  return (f"The noise hides the difference to {len(level)} of {len(seen['arms']) - 1} arms: "
          f"{scale}.")


def _settled(result, seen, next_best):
  seeds = next_best["difference"]["seeds"]
  words = f"{next_best['arm']} has the same value, which no number of seeds will part"
  if seeds:
    words = (f"To tell {next_best['arm']} from {seen['recommended']}, if the difference is the one "
             f"seen, takes about {seeds:,} seeds of each")
  held = {}
  for trial in finished(result)[0]:
    held |= {code: trial["bytes"][code] for code in seen["languages"] if code in trial["bytes"]}
  least = min(held, key=held.get, default=None)
  least = (f" (least: {result['languages'][least]['name']}, {held[least]:,} bytes)"
           if least else "")
  return (f"{words}. The part of the noise that is validation's falls with more held-out bytes"
          f"{least}.")


def _losses(result, seen):
  if not seen["losers"]:
    return None
  rows = [f"{result['languages'][row['language']]['name']} {row['difference']:.4f} "
          f"({row['best']}{'' if row['told'] is not False else ', within noise'})"
          for row in seen["losers"]]
  return (f"Under {seen['recommended']} these languages are furthest above the arm that is best "
          f"for them: {', '.join(rows)}.")


def _unfinished(result, seen):
  parts = []
  alive = {state: seen["states"][state] for state in ALIVE if state in seen["states"]}
  if alive:
    states = " and ".join(f"{count} {state}" for state, count in alive.items())
    parts.append(f"Of {len(result['trials'])} trials {states}: this is said of the others.")
  if seen["failures"]:
    parts.append(f"{len(seen['failures'])} of {len(result['trials'])} trials came to nothing.")
  halved = [arm["arm"] for arm in seen["arms"] if arm["lost"]]
  if halved:
    parts.append(f"The figures of {_listed(halved)} are of the seeds that survived.")
  if seen["partial"]:
    parts.append(f"Left out, because only some trials measured them: {_listed(seen['partial'])}.")
  return " ".join(parts) or None
