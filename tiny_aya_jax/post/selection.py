"""Which merge to keep: measured or predicted scores of candidates in, a choice and its reasons out.

A candidate is an operator at a strength, named "linear 0.5". As in report 3.3, the mean over the
region's languages and a strong minimum decide, among those whose safety does not regress against
the baseline, which is the Global model. Endpoints are candidates like others: with "linear 0" in
the sweep, keeping one of the two models can win.

Merges nothing and measures nothing; no jax. What `choose` and `fit` return is ready for JSON.
"""

import math
import statistics

import numpy as np

from tiny_aya_jax import run

NULL = "linear 0.5"  # what needs no search
RESAMPLES, SEED = 2_000, 0  # of the bootstrap
LEAST_ROWS, LEAST_REGIONS = 30, 3  # ours: one region is left out, and two are no trend
# Of `similarity.features`: those of one language, then those of the whole pair (tiny_aya.md 7.2).
FEATURES = ("log_kl_ab", "log_kl_ba", "log_p90_ab", "log_p90_ba", "agreement", "states_cosine",
            "log_distance", "norm_ratio", "task_cosine", "task_norm_ratio", "sign_agreement")


def candidate(operator, strength):
  """("linear", 0.5) -> "linear 0.5"."""
  return f"{operator} {strength:g}"


def parsed(name):
  """"linear 0.5" -> ("linear", 0.5)."""
  operator, _, strength = name.rpartition(" ")
  try:
    return operator, float(strength)
  except ValueError:
    raise run.Refused(f"candidate {name!r}: expected an operator and a strength, such as {NULL!r}") from None


# --- the choice ---------------------------------------------------------------------------------


def choose(scores, languages, *, minimum_weight, safety=None, baseline_safety=None, tolerance=0.0,
           items=None, source="measured"):
  """Chooses among candidates; returns dict(choice, why, source, settings, candidates, null).

  scores: {candidate: {code: score}}, higher is better; other languages than `languages` do not
  count. With w = minimum_weight,
    objective = (1 - w) * mean over the languages + w * minimum over the languages.
  safety: {candidate: figure}, higher is safer, of which baseline_safety - tolerance is the least
  allowed; without both, nothing is checked and the result says so. Candidates stand in the order
  of their rank: by objective to 12 digits, then higher minimum, then the null, then by operator and
  strength. The choice is the first allowed one; if none is, it is None: nothing is kept in its
  place, and `why` says what can be done.

  null: "linear 0.5" beside the choice. difference: of objectives and of means, choice less null.
  interval: 95% of the difference of means, resampled in pairs over languages or, given items
  {candidate: {code: [score, ...]}} in one order for all, over the items of each language. It does
  not know that the choice is the best of many: chance alone makes it look good.

  Refuses scores without the null, languages without a score, and safety of only some.
  """
  _check(scores, languages, minimum_weight, safety, baseline_safety, tolerance)
  least = None if safety is None else baseline_safety - tolerance
  rows = [_row(name, [scores[name][code] for code in languages], minimum_weight) | dict(
      safety=None if safety is None else safety[name],
      refused=_refused(None if safety is None else safety[name], least)) for name in scores]
  rows.sort(key=lambda row: (-round(row["objective"], 12), -round(row["minimum"], 12),
                             row["candidate"] != NULL, parsed(row["candidate"])))
  rows = [row | dict(rank=rank) for rank, row in enumerate(rows, 1)]
  best = next((row for row in rows if row["refused"] is None), None)
  settings = dict(languages=list(languages), minimum_weight=minimum_weight, tolerance=tolerance,
                  baseline_safety=baseline_safety)
  return dict(choice=best and best["candidate"], why=_why(rows, best, least), source=source,
              settings=settings, candidates=rows,
              null=_beside(rows, best, scores, languages, items))


def _check(scores, languages, minimum_weight, safety, baseline_safety, tolerance):
  if not languages:
    raise run.Refused("selection needs the region's languages, none were given")
  if NULL not in scores:
    raise run.Refused(f"scores are of {', '.join(scores) or 'nothing'}, expected {NULL!r} among them: "
                      "it is shown beside any choice")
  for name in scores:
    parsed(name)
    missing = [code for code in languages
               if scores[name].get(code) is None or not math.isfinite(scores[name][code])]
    if missing:
      raise run.Refused(f"{name} has no finite score in {', '.join(missing)}: measure it in all of the "
                        "region's languages, or choose by fewer")
  if not 0 <= minimum_weight <= 1:
    raise run.Refused(f"minimum_weight is {minimum_weight}, expected 0 (the mean alone) to 1 (the minimum)")
  if tolerance < 0:
    raise run.Refused(f"the tolerance of safety is {tolerance}, expected at least 0")
  if (safety is None) != (baseline_safety is None):
    raise run.Refused("safety is compared with the baseline's: give both, or neither")
  if missing := sorted(scores.keys() - safety.keys() if safety else ()):
    raise run.Refused(f"safety was not measured of {', '.join(missing)}: none can be chosen unseen")


def _row(name, values, weight):
  mean, minimum = statistics.fmean(values), min(values)
  return dict(candidate=name, mean=mean, minimum=minimum,
              objective=(1 - weight) * mean + weight * minimum)


def _refused(safety, least):
  """Why a candidate is not allowed; None if it is. Sums of decimals may be off by an ulp."""
  if safety is None or safety >= least - 1e-12:
    return None
  return f"safety {safety:g} is below {least:g}"


def _why(rows, best, least):
  if best is None:
    return (f"no candidate of {len(rows)} keeps safety at {least:g} or above: keep the baseline, sweep "
            "strengths nearer to it, or allow a larger tolerance")
  limit = "safety was not measured" if least is None else f"safety at least {least:g}"
  passed = rows[: best["rank"] - 1]
  return f"best objective of {len(rows)} candidates, {limit}" + (
      f"; {len(passed)} with a better one are less safe" if passed else "")


def _beside(rows, best, scores, languages, items):
  """The null's own row, with what the choice gains on it."""
  null = next(row for row in rows if row["candidate"] == NULL)
  if best is None:
    return null | dict(difference=None, interval=None, over=None)
  difference = {name: best[name] - null[name] for name in ("objective", "mean")}
  if items:
    pairs = [_paired(items, best["candidate"], code) for code in languages]
  else:
    pairs = [np.array([scores[best["candidate"]][code] - scores[NULL][code] for code in languages])]
  return null | dict(difference=difference, interval=_interval(pairs),
                     over="items" if items else "languages")


def _paired(items, name, code):
  """Differences of one language's items, candidate less null."""
  one, other = (items.get(which, {}).get(code, []) for which in (name, NULL))
  if not one or len(one) != len(other):
    raise run.Refused(f"{code} has {len(one)} items of {name} and {len(other)} of {NULL}: a paired "
                      "interval needs the same ones of both")
  return np.asarray(one, np.float64) - np.asarray(other, np.float64)


def _interval(groups):
  """95% of the mean over groups of the means of values, each group resampled in itself."""
  random = np.random.default_rng(SEED)
  means = np.mean([_resampled(values, random) for values in groups], axis=0)
  return [float(np.quantile(means, share)) for share in (0.025, 0.975)]


def _resampled(values, random):
  """[RESAMPLES] means of samples with replacement: how often each value is in a sample, times it."""
  n = len(values)
  return random.multinomial(n, np.full(n, 1 / n), RESAMPLES) @ values / n


# --- scores without a measurement ---------------------------------------------------------------


def read_rows(paths):
  """Rows for `fit` out of the merge.json of earlier merges.

  Reads of each: "region", "similarity" (similarity.features of its pair) and "scores" {candidate:
  {code: score}} that were measured. A row: dict(region, code, candidate, features, gain): gain is
  the score less the null's.
  """
  rows = []
  for path in paths:
    found = run.read_json(path, "earlier merge")
    lacks = [name for name in ("region", "similarity", "scores") if not found.get(name)]
    if lacks or NULL not in found["scores"]:
      raise run.Refused(f"{path} lacks {', '.join(lacks) or NULL}: only merges that were measured teach")
    rows += rows_of(found["region"], found["similarity"], found["scores"])
  return rows


def rows_of(region, similarity, scores):
  """The rows of one merge; languages that the probe or the null does not have are left out."""
  return [
      dict(region=region, code=code, candidate=name, features=features(similarity, code),
           gain=score - scores[NULL][code])
      for name, column in scores.items() for code, score in column.items()
      if code in similarity["functional"]["languages"] and scores[NULL].get(code) is not None
      and score is not None and name != NULL]


def features(similarity, code):
  """[float] in the order of FEATURES: of one language, and of the pair; NaN for what has no value."""
  part, whole = similarity["functional"]["languages"][code], similarity["structural"]["whole"]
  logs = dict(log_kl_ab=part["kl_ab"]["mean"], log_kl_ba=part["kl_ba"]["mean"],
              log_p90_ab=part["kl_ab"]["p90"], log_p90_ba=part["kl_ba"]["p90"],
              log_distance=whole["distance"])
  found = whole | dict(agreement=part["agreement"], states_cosine=statistics.fmean(part["cosine"]))
  found |= {name: math.log(max(value, 1e-9)) for name, value in logs.items()}
  return [math.nan if found.get(name) is None else float(found[name]) for name in FEATURES]


def fit(rows, ridge):
  """A predictor of gains over the null, with its leave-one-region-out error beside it.

  Ridge regression, (X'X + ridge I)^-1 X'y in closed form, of
    gain = sum over k, f of weight[k, f] * phi_k(candidate) * z_f,
  phi: t = strength - 0.5 and strength^2 - 0.25, then for each operator but linear 1 and the same
  two; z: 1 and the standardised features, 0 for one without a value. The null has phi 0 and gains
  nothing, and a feature by itself, equal for all candidates, could not rank them.

  error: regions, rows, root mean squares of what is left of the gains of each region when the
  others predict them (ours), and of the gains themselves (nothing: all score like the null);
  better, whether ours is less. Refuses fewer than LEAST_ROWS rows or LEAST_REGIONS regions.
  """
  regions = sorted({row["region"] for row in rows})
  if len(rows) < LEAST_ROWS or len(regions) < LEAST_REGIONS:
    raise run.Refused(f"a predictor from {len(rows)} rows of {len(regions)} regions, expected at least "
                      f"{LEAST_ROWS} of {LEAST_REGIONS}: measure more merges")
  if ridge <= 0:
    raise run.Refused(f"ridge is {ridge}, expected more than 0")
  left = [row["gain"] - gain for region in regions
          for part in [[row for row in rows if row["region"] == region]]
          for row, gain in zip(part, _gains(_fitted([row for row in rows if row["region"] != region], ridge),
                                            part))]
  ours, nothing = (math.sqrt(statistics.fmean(x * x for x in values))
                   for values in (left, [row["gain"] for row in rows]))
  return _fitted(rows, ridge) | dict(error=dict(regions=len(regions), rows=len(rows), ours=ours,
                                                nothing=nothing, better=ours < nothing))


def predict(predictor, similarity, candidates, languages):
  """{candidate: {code: gain over the null}}: scores for `choose`, with source='predicted'.

  The minimum is then the least that any language gains; the null's own scores are 0.
  Refuses operators that no earlier merge used, and languages that the probe does not have.
  """
  if unknown := sorted({parsed(name)[0] for name in candidates} - set(predictor["operators"])):
    raise run.Refused(f"no earlier merge used {', '.join(unknown)}: only {', '.join(predictor['operators'])}")
  if absent := [code for code in languages if code not in similarity["functional"]["languages"]]:
    raise run.Refused(f"the probe has no rows in {', '.join(absent)}")
  found = {}
  for name in candidates:
    rows = [dict(candidate=name, features=features(similarity, code)) for code in languages]
    found[name] = dict(zip(languages, _gains(predictor, rows)))
  return found


def _fitted(rows, ridge):
  values = np.array([row["features"] for row in rows], np.float64)
  mean, deviation = zip(*(_moments(column[~np.isnan(column)]) for column in values.T))
  predictor = dict(operators=sorted({parsed(row["candidate"])[0] for row in rows} | {parsed(NULL)[0]}),
                   mean=[*mean], deviation=[*deviation], ridge=ridge)
  X, y = _design(predictor, rows), np.array([row["gain"] for row in rows], np.float64)
  weights = np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ y)
  return predictor | dict(weights=weights.tolist())


def _moments(column):
  """(mean, deviation), the latter 1 where nothing differs."""
  if not len(column):
    return 0.0, 1.0
  return float(column.mean()), float(column.std()) if np.ptp(column) > 1e-9 else 1.0


def _gains(predictor, rows):
  return (_design(predictor, rows) @ np.array(predictor["weights"])).tolist()


def _design(predictor, rows):
  """[rows, phi x z]; an operator that was not there to be fitted is taken for linear."""
  values = np.array([row["features"] for row in rows], np.float64)
  z = np.nan_to_num((values - predictor["mean"]) / predictor["deviation"])
  z = np.column_stack([np.ones(len(rows)), z])
  phi = np.array([_phi(predictor, row["candidate"]) for row in rows])
  return (phi[:, :, None] * z[:, None, :]).reshape(len(rows), -1)


def _phi(predictor, name):
  (operator, strength), (plain, middle) = parsed(name), parsed(NULL)
  moved = (strength - middle, strength**2 - middle**2)
  return [*moved, *(value if operator == one else 0.0
                    for one in predictor["operators"] if one != plain for value in (1.0, *moved))]


# --- do two rankings agree ----------------------------------------------------------------------


def agreement(predicted, measured):
  """dict(candidates, spearman, kendall) of two results of `choose`, by objective.

  Over the candidates that both have: Spearman's rho (ties share their mean rank) and Kendall's
  tau-b; None where one of the two does not tell its candidates apart.
  """
  one, other = ({row["candidate"]: row["objective"] for row in result["candidates"]}
                for result in (predicted, measured))
  both = [name for name in one if name in other]
  x, y = (np.round([column[name] for name in both], 12) for column in (one, other))
  return dict(candidates=len(both), spearman=_correlation(_ranks(x), _ranks(y)), kendall=_kendall(x, y))


def _ranks(x):
  """Ranks from 1; ties share their mean."""
  return ((x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2)


def _correlation(x, y):
  x, y = x - x.mean(), y - y.mean()
  scale = math.sqrt((x @ x) * (y @ y))
  return float(x @ y / scale) if scale else None


def _kendall(x, y):
  signs = [np.sign(values[:, None] - values)[np.triu_indices(len(values), 1)] for values in (x, y)]
  scale = math.sqrt(math.prod(float(sign @ sign) for sign in signs))
  return float(signs[0] @ signs[1] / scale) if scale else None


# --- for people ---------------------------------------------------------------------------------


def table(result, predictor=None, compared=None):
  """A result of `choose` as text; beside it a predictor's error, and `agreement` with a measurement."""
  return "\n".join(_lines(result, predictor, compared))


def _lines(result, predictor, compared):
  weight, languages = result["settings"]["minimum_weight"], result["settings"]["languages"]
  yield (f"{result['source']} over {len(languages)} languages, objective = {1 - weight:g} mean + "
         f"{weight:g} minimum")
  width = max(len(row["candidate"]) for row in result["candidates"])
  yield f"{'rank':>4}  {'':{width}}{'objective':>11}{'mean':>10}{'minimum':>10}{'safety':>10}"
  for row in result["candidates"]:
    mark = "*" if row["candidate"] == result["choice"] else " "
    safety = "-" if row["safety"] is None else f"{row['safety']:.4f}"
    yield (f"{row['rank']:>3}{mark}  {row['candidate']:{width}}{row['objective']:>11.4f}{row['mean']:>10.4f}"
           f"{row['minimum']:>10.4f}{safety:>10}  {row['refused'] or ''}").rstrip()
  yield f"choice: {result['choice'] or 'none'}: {result['why']}"
  if (null := result["null"])["difference"]:
    low, high = null["interval"]
    yield (f"beside {NULL}: objective {null['difference']['objective']:+.4f}, mean "
           f"{null['difference']['mean']:+.4f}, 95% of it over {null['over']} {low:+.4f} .. {high:+.4f} "
           f"(as if it were not the best of {len(result['candidates'])})")
  if predictor:
    error = predictor["error"]
    yield (f"predictor: error {error['ours']:.4f} on regions that were left out, of {error['nothing']:.4f} "
           f"by calling all equal: {'better' if error['better'] else 'NOT better'}")
  if compared and compared["spearman"] is not None:
    yield (f"predicted and measured ranks of {compared['candidates']}: Spearman "
           f"{compared['spearman']:+.2f}, Kendall {compared['kendall']:+.2f}")
