"""Loss of a language against mixture weights: fitted to a sweep's trials, tested on arms left out.

Runs no trial and shows nothing. Bits per byte y of language i under shares r, per form:

  constant     y_i = level_i: the mixture does nothing. The opponent.
  mixing_law   y_i = c_i + k_i exp(sum_g t_ig x_ig)          (data mixing laws, arXiv 2403.16952)
  regression   y_i = level_i + sum_g b_ig x_ig + b_i x_i,own^2    (as RegMix, arXiv 2407.01492)

7 to 60 arms cannot tell apart 70 weights of 70 languages, so a language sees four sums of shares:
its own; its kin's (same family and script); those of its script in other families; the largest
language's, which helps most of them. Script, then family, are what transfer follows (ATLAS, arXiv
2510.22037). They enter as x_ig = log(share + epsilon): shares span five orders of magnitude, and loss
is near a power of tokens down to those that transfer makes up for. Of a small epsilon the law's
exponential is that power, of a large one it is the paper's, of shares themselves.

A slope is the languages' common one plus a deviation under a ridge, so a language leans on the
others as far as that helps; epsilon and ridge are chosen by leaving arms out, all seeds together.
Not for mixtures far from the trials': laws do not extrapolate. Pure NumPy; a law is ready for JSON.
"""

import numpy as np

from tiny_aya_jax import run

FORMS = ("constant", "mixing_law", "regression")
GROUPS = ("own", "kin", "script", "largest")
# Arms to fit one, and one more to be tested on: a level, four slopes and one curvature.
LEAST = dict(constant=1, mixing_law=6, regression=6)
# Ours: of a slope's deviation, in bits per byte a standard deviation of x; and in rows.
RIDGES, EPSILONS, FOLDS = (0.05, 1.0), (1, 8, 64), 4
COMMON_RIDGE = 1e-3  # ours: next to nothing, for slopes that no trial tells apart
STEPS, CURVATURE_RIDGE, HUBER = 8, 0.01, 0.03  # ours: 15 steps foresee no better; bits per byte
CONCENTRATION, NOISE = (0.1, 1.0), 0.5  # ours: of blends of arms, and of a share's logarithm
REFITS = 20


def compared(trials, objective, languages, sizes, tokens, most_epochs, draws, best, seed):
  """What a sweep's record says under `laws`: every form tested, the one that is kept, its optimum.

  dict(noise: seed_noise, forms {form: cross_validated}, chosen, why, law, optimum, no_optimum: why
  there is none, else None). The form with the least error is kept; if that is the constant there is
  no optimum. Other arguments as in `optimum`. Refuses like `fit`, with one arm more than LEAST.
  """
  forms = {form: cross_validated(trials, form, languages, objective) for form in FORMS}
  chosen = min(forms, key=lambda form: forms[form]["error"])
  found = dict(noise=seed_noise(trials), forms=forms, chosen=chosen, why=_why(forms, chosen),
               law=fit(trials, chosen, languages), optimum=None, no_optimum=None)
  if chosen == "constant":
    return found | dict(no_optimum="no law says more of an arm than the mean of the others")
  try:
    return found | dict(optimum=optimum(found["law"], trials, objective, sizes, tokens, most_epochs,
                                        languages, draws, best, seed))
  except run.Refused as refused:  # what was tested above stands
    return found | dict(no_optimum=str(refused))


def _why(forms, chosen):
  said = ", ".join(f"{form} {found['error']:.4f}" for form, found in forms.items())
  least = "" if chosen != "constant" else ": neither law beats the mean of the other arms"
  return f"mean error in bits per byte on arms that were left out: {said}{least}"


def fit(trials, form, languages):
  """Trials of a sweep's record, {code: facts} -> a law, a dict of plain numbers.

  by_language {code: {coefficient: float}} has the formulae's names: c, k, t_own, ... or level, own,
  ..., own_squared; slopes are in bits per byte a natural logarithm of share. Refuses fewer arms than
  LEAST, no trial that is done, languages that only some of them measured.
  """
  return _fitted(_data(trials, languages, form, LEAST), form)


def predict(law, shares):
  """{code: share}, absent is 0 -> {code: bits per byte}, of the languages that the trials measured."""
  if strangers := sorted(shares.keys() - set(law["codes"])):
    raise run.Refused(f"the law knows nothing of {', '.join(strangers)}: no trial had them")
  share_S = np.array([shares.get(code, 0.0) for code in law["codes"]])
  return dict(zip(law["measured"], _predicted(law, share_S).tolist()))


# --- is it true ---------------------------------------------------------------------------------


def cross_validated(trials, form, languages, objective):
  """Each arm, the mean of its seeds, foreseen by a law of the others; the ridge is theirs too.

  dict(error: mean absolute, bits per byte, over languages and arms; error_of_means: of the mean over
  languages; by_language {code: error}; arms {arm: dict(predicted, measured)}: the objective, None
  where a floor is broken; error_of_objective: mean absolute, where both are; rank: Spearman's of the
  two. Both are None where there is nothing to compare, and rank of a constant: the mean of the others
  ranks arms backwards).
  """
  data = _data(trials, languages, form, {name: arms + 1 for name, arms in LEAST.items()})
  loss_AI = _arms(data)[1]
  found_AI = np.stack([_left_out(data, form, arm) for arm in range(len(loss_AI))])
  error_AI = np.abs(found_AI - loss_AI)
  predicted_A, measured_A = (_objective(x, objective, data["measured"], languages)
                             for x in (found_AI, loss_AI))
  kept_A = np.isfinite(predicted_A) & np.isfinite(measured_A)
  return dict(
      error=float(error_AI.mean()),
      error_of_means=float(np.abs(found_AI.mean(1) - loss_AI.mean(1)).mean()),
      by_language=dict(zip(data["measured"], error_AI.mean(0).tolist())),
      arms={arm: dict(predicted=_finite(predicted), measured=_finite(measured))
            for arm, predicted, measured in zip(data["arms"], predicted_A, measured_A)},
      error_of_objective=float(np.abs(predicted_A - measured_A)[kept_A].mean()) if kept_A.any() else None,
      rank=None if form == "constant" else _rank_correlation(predicted_A, measured_A))


def _left_out(data, form, arm):
  """[measured]: what a law of the other arms foresees of this one."""
  law = _fitted(_rows(data, data["arm"] != arm), form)
  return _predicted(law, data["share"][data["arm"] == arm]).mean(0)


def seed_noise(trials):
  """Standard deviations over seeds of the same arm, pooled; None if no arm has two that are done.

  dict(by_language {code: bits per byte}, pooled: over languages too, of_mean: of the mean over
  languages, degrees: seeds less arms).
  """
  done = [trial for trial in trials if trial["state"] == "done"]
  arms, codes = {}, [*done[0]["bits_per_byte"]] if done else []
  for trial in done:
    arms.setdefault(trial["arm"], []).append([trial["bits_per_byte"][code] for code in codes])
  rest = [np.array(rows) - np.mean(rows, 0) for rows in arms.values() if len(rows) > 1]
  if not rest:
    return None
  rest_NI, degrees = np.concatenate(rest), sum(len(rows) - 1 for rows in rest)
  square_I = (rest_NI**2).sum(0) / degrees
  return dict(by_language=dict(zip(codes, np.sqrt(square_I).tolist())),
              pooled=float(np.sqrt(square_I.mean())),
              of_mean=float(np.sqrt((rest_NI.mean(1) ** 2).sum() / degrees)), degrees=degrees)


def _rank_correlation(one, other):
  """Spearman's rho; ties share their mean rank."""
  ranks = [(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2 for x in (one, other)]
  one, other = (rank - rank.mean() for rank in ranks)
  scale = np.sqrt((one @ one) * (other @ other))
  return float(one @ other / scale) if scale else None


def _finite(value):
  return float(value) if np.isfinite(value) else None


# --- the best mixture ---------------------------------------------------------------------------


def optimum(law, trials, objective, sizes, tokens, most_epochs, languages, draws, best, seed):
  """The mixture that the law likes best among `draws` near the trials', and how far to believe it.

  Draws are blends of the arms' shares, half arithmetic and half geometric, with noise (NOISE) on
  each share. Caps share <= most_epochs * sizes[code] / tokens are then met exactly; what is above
  goes to the others in proportion (most_epochs None: no caps; absent from sizes: share 0). The
  `best` of the lowest objective are averaged, as RegMix does.

  dict(shares {code: share}, predicted {code: bits per byte}, value: its objective, capped [codes at
  their cap], spread [lowest, highest objective of the averaged], draws, best, seed; deviation of the
  value, and floor_kept: share of REFITS laws of resampled arms in which a floor holds; arm: the best
  measured within the caps (of all, if none is), dict(arm, measured, predicted, within_caps); gain:
  predicted of that arm less ours, dict(value, deviation, agree: share of the refits with a gain); arm
  and gain are None if no arm keeps the floor). The deviation does not know that the form itself may
  be wrong: error_of_objective of cross_validated does. Measure the mixture before it is believed.

  Refuses caps that sum to less than 1, a floor that no draw keeps, a constant law.
  """
  if law["form"] == "constant":
    raise run.Refused("a constant law has no optimum: all mixtures are equal to it")
  if not 0 < best <= draws:
    raise run.Refused(f"the best {best} of {draws} mixtures are to be averaged, expected 1 to {draws}")
  data = _data(trials, languages, law["form"], LEAST)
  arms_AS, loss_AI = _arms(data)
  cap_S = _caps(data["codes"], arms_AS.any(0), sizes, tokens, most_epochs)
  share_S, spread = _best_draw(law, arms_AS, cap_S, objective, languages, draws, best, seed)
  values_A = _objective(loss_AI, objective, law["measured"], languages)
  within_A = (arms_AS <= 1.01 * cap_S + _row(data)).all(1)  # an arm is of whole rows
  arm = int(np.lexsort((values_A, ~within_A, np.isinf(values_A)))[0])
  found = _believed(law, data, share_S, arms_AS[arm], objective, languages, seed)
  if np.isinf(values_A[arm]):
    found |= dict(arm=None, gain=None)
  else:
    found["arm"] |= dict(arm=data["arms"][arm], measured=float(values_A[arm]),
                         within_caps=bool(within_A[arm]))
  return dict(
      shares=dict(zip(data["codes"], share_S.tolist())),
      predicted=dict(zip(law["measured"], _predicted(law, share_S).tolist())),
      capped=[code for code, share, cap in zip(data["codes"], share_S, cap_S) if share == cap > 0],
      spread=spread, draws=draws, best=best, seed=seed) | found


def _best_draw(law, arms_AS, cap_S, objective, languages, draws, best, seed):
  """([codes] shares, [lowest, highest objective of those that were averaged])."""
  blend_NS = _blends(arms_AS, draws, np.random.default_rng(seed))
  share_NS = _capped(blend_NS, cap_S)
  value_N = _objective(_predicted(law, share_NS), objective, law["measured"], languages)
  order = np.argsort(value_N, kind="stable")[:best]
  order = order[np.isfinite(value_N[order])]
  if not len(order):
    raise run.Refused(f"none of {draws} mixtures keeps every language at or under {objective['floor']} "
                      "bits per byte, as the law foresees them: raise the floor, or sweep other mixtures")
  share_S = _capped(share_NS[order].mean(0), cap_S)
  if not np.isfinite(_objective(_predicted(law, share_S), objective, law["measured"], languages)):
    share_S = share_NS[order[0]]  # a mean of mixtures that keep the floor need not keep it
  return share_S, value_N[order[[0, -1]]].tolist()


def _believed(law, data, share_S, arm_S, objective, languages, seed):
  """Value, gain on an arm, and both again by laws of resampled arms; a floor is counted apart."""
  plain = objective | dict(kind="mean") if objective["kind"] == "floor" else objective
  both = np.stack([share_S, arm_S])
  refits = [_fitted(_resampled(data, [seed, refit]), law["form"], law) for refit in range(REFITS)]
  ours, arms = np.array([_objective(_predicted(one, both), plain, law["measured"], languages)
                         for one in (law, *refits)]).T
  kept = [np.isfinite(_objective(_predicted(one, share_S), objective, law["measured"], languages))
          for one in refits]
  gain = arms - ours
  return dict(value=float(ours[0]), deviation=float(ours[1:].std()), floor_kept=float(np.mean(kept)),
              arm=dict(predicted=float(arms[0])),
              gain=dict(value=float(gain[0]), deviation=float(gain[1:].std()),
                        agree=float((gain[1:] > 0).mean())))


def _resampled(data, seed):
  """As many arms, drawn with replacement, each with all its seeds."""
  count = len(data["arms"])
  chosen = np.random.default_rng(seed).integers(0, count, count)
  return _rows(data, np.concatenate([np.flatnonzero(data["arm"] == arm) for arm in chosen]))


def _caps(codes, used_S, sizes, tokens, most_epochs):
  """[codes]: the most that each may have of the whole; 0 for languages that no trial drew."""
  if most_epochs is None:
    return used_S.astype(np.float64)
  cap_S = np.array([min(1.0, most_epochs * sizes.get(code, 0.0) / tokens) for code in codes]) * used_S
  if cap_S.sum() < 1:
    raise run.Refused(
        f"{most_epochs:g} epochs of all languages are {cap_S.sum():.4g} of the {tokens:,} tokens of a "
        f"trial: allow at least {most_epochs / max(cap_S.sum(), 1e-9):.3g}, or shorten the run that is imitated")
  return cap_S


def _blends(arms_AS, draws, random):
  """[draws, codes] that sum to 1: the arms themselves, then blends of few or of many of them."""
  least = arms_AS[arms_AS > 0].min()  # its logarithm stands for that of nothing
  strength_N1 = np.exp(random.uniform(*np.log(CONCENTRATION), (draws, 1)))
  weight_NA = random.standard_gamma(strength_N1, (draws, len(arms_AS)))
  weight_NA /= weight_NA.sum(1, keepdims=True)
  half = draws // 2
  share_NS = np.concatenate(
      [weight_NA[:half] @ arms_AS, np.exp(weight_NA[half:] @ np.log(arms_AS + least))])
  share_NS *= np.exp(NOISE * random.standard_normal(share_NS.shape))
  share_NS[: len(arms_AS)] = arms_AS[:draws]
  share_NS = np.maximum(share_NS, 1e-12) * arms_AS.any(0)  # above 0, to be able to take what others may not
  return share_NS / share_NS.sum(1, keepdims=True)


def _capped(share_NS, cap_S):
  """Shares that sum to 1 -> the same under their caps, in proportion where they are free."""
  held_NS = np.zeros(share_NS.shape, bool)
  while (over_NS := (share_NS > cap_S) & ~held_NS).any():
    held_NS |= over_NS
    free_NS, taken_NS = np.where(held_NS, 0.0, share_NS), np.where(held_NS, cap_S, 0.0)
    left_N1 = np.maximum(1 - taken_NS.sum(-1, keepdims=True), 0)
    share_NS = taken_NS + free_NS * left_N1 / np.maximum(free_NS.sum(-1, keepdims=True), 1e-300)
  return share_NS


def _objective(loss_NI, objective, measured, languages):
  """[..., measured] bits per byte -> [...], lower is better; inf where the floor is broken."""
  kind = run.choose("objective", objective["kind"], ("mean", "worst", "region", "floor"))
  if kind == "worst":
    return loss_NI.max(-1)
  if kind == "floor":
    return np.where(loss_NI.max(-1) <= objective["floor"], loss_NI.mean(-1), np.inf)
  if kind == "region":
    region_I = np.array([languages[code]["region"] for code in measured])
    return np.max([loss_NI[..., region_I == region].mean(-1) for region in np.unique(region_I)], 0)
  return loss_NI.mean(-1)


# --- data ---------------------------------------------------------------------------------------


def _data(trials, languages, form, least):
  """Done trials as dict(share [trials, codes], loss [trials, measured], arm [trials]: its place in
  arms, arms, codes, measured, languages)."""
  run.choose("law", form, FORMS)
  done = [trial for trial in trials if trial["state"] == "done"]
  if not done:
    raise run.Refused(f"none of {len(trials)} trials is done: there is nothing to fit a law to")
  arms = list(dict.fromkeys(trial["arm"] for trial in done))
  if len(arms) < least[form]:
    raise run.Refused(f"{form} needs {least[form]} arms, {len(arms)} are done: add settings to the sweep; "
                      "more seeds of the same arm do not count")
  codes, measured = list(languages), [code for code in languages if code in done[0]["bits_per_byte"]]
  for trial in done:
    _check(trial, codes, measured)
  token = np.array([[trial["tokens"].get(code, 0) for code in codes] for trial in done], np.float64)
  loss = np.array([[trial["bits_per_byte"][code] for code in measured] for trial in done])
  return dict(share=token / token.sum(1, keepdims=True), loss=loss, arms=arms, codes=codes,
              arm=np.array([arms.index(trial["arm"]) for trial in done]), measured=measured,
              languages=languages)


def _check(trial, codes, measured):
  if strangers := sorted(trial["tokens"].keys() - set(codes)):
    raise run.Refused(f"trial {trial['trial']} drew {', '.join(strangers)}: not a language of the sweep")
  if set(trial["bits_per_byte"]) != set(measured) or not measured:
    raise run.Refused(f"trial {trial['trial']} measured {len(trial['bits_per_byte'])} languages, expected "
                      f"the same {len(measured)} as the first trial and at least one: measure them alike")
  if not np.isfinite([*trial["bits_per_byte"].values()]).all() or not any(trial["tokens"].values()):
    raise run.Refused(f"trial {trial['trial']} is done, but drew nothing or has bits per byte that are not "
                      "finite: mark it as diverged")


def _row(data):
  """The least share that any language of the trials has: about one row of a trial."""
  return float(data["share"][data["share"] > 0].min())


def _rows(data, index):
  """The same data with these trials only, in this order, maybe repeated."""
  return data | {name: data[name][index] for name in ("share", "loss", "arm")}


def _arms(data):
  """Means over seeds: shares [arms, codes] and bits per byte [arms, measured]."""
  rows = [data["arm"] == arm for arm in range(len(data["arms"]))]
  return tuple(np.stack([data[name][here].mean(0) for here in rows]) for name in ("share", "loss"))


# --- forms --------------------------------------------------------------------------------------


def _fitted(data, form, settings=None):
  """A law of one form; settings: its dict(ridge, epsilon), else those that foresee arms best."""
  if settings is None:
    settings = dict(ridge=None, epsilon=None) if form == "constant" else _settings(data, form)
  share, codes = data["share"], data["codes"]
  law = dict(
      form=form, ridge=settings["ridge"], epsilon=settings["epsilon"], arms=len(np.unique(data["arm"])),
      trials=len(share), largest=codes[int(share.mean(0).argmax())], codes=codes, measured=data["measured"],
      kinds={code: [data["languages"][code][name] for name in ("family", "script")] for code in codes})
  columns = dict(constant=_constant, mixing_law=_mixing_law, regression=_regression)[form](law, data)
  rows = np.column_stack([*columns.values()]).tolist()
  named = (dict(zip(columns, row)) for row in rows)
  return law | dict(by_language=dict(zip(law["measured"], named)))


def _settings(data, form):
  """Each fold of whole arms is foreseen by a law of the others; the least absolute error wins."""
  choices = [dict(ridge=ridge, epsilon=count * _row(data)) for count in EPSILONS for ridge in RIDGES]
  fold = np.unique(data["arm"], return_inverse=True)[1] % FOLDS

  def error(settings):
    laws = [_fitted(_rows(data, fold != left), form, settings) for left in range(FOLDS)]
    return sum(np.abs(_predicted(law, data["share"][fold == left]) - data["loss"][fold == left]).sum()
               for left, law in enumerate(laws))

  return min(choices, key=error)


def _constant(law, data):
  return dict(level=data["loss"].mean(0))


def _regression(law, data):
  """Least squares in closed form, on standardised features; coefficients are of x itself."""
  z_NIG, mean_IG, deviation_G = _standardised(_features(law, data["share"]))
  z_NIG = np.concatenate([z_NIG, z_NIG[..., :1] ** 2], -1)
  center_IG, level_I = z_NIG.mean(0), data["loss"].mean(0)
  slope_IG = _slopes(z_NIG - center_IG, data["loss"] - level_I, law["ridge"])
  level_I = level_I - (slope_IG * center_IG).sum(-1)
  square_I, slope_IG = slope_IG[:, -1] / deviation_G[0] ** 2, slope_IG[:, :-1] / deviation_G
  slope_IG = slope_IG * _members(law).any(-1)
  level_I = level_I - (slope_IG * mean_IG).sum(-1) + square_I * mean_IG[:, 0] ** 2
  slope_IG[:, 0] -= 2 * square_I * mean_IG[:, 0]
  return dict(level=level_I) | dict(zip(GROUPS, slope_IG.T)) | dict(own_squared=square_I)


def _mixing_law(law, data):
  """Gauss-Newton on all languages at once, of y = a + (exp(q s.z) - 1) / q, under Huber's loss.

  s is the slope in the middle of the trials and q the curvature: with q near 0 it is a line, and
  both are pulled to the languages' mean. Then k = 1 / q, c = a - k and t = q s.
  """
  z_NIG, mean_IG, deviation_G = _standardised(_features(law, data["share"]))
  loss_NI = data["loss"]
  level_I, curve_I = loss_NI.mean(0), np.zeros(loss_NI.shape[1])  # the curvature's logarithm
  slope_IG = _slopes(z_NIG, loss_NI - level_I, law["ridge"])
  weight_P = np.array([0.0, *[law["ridge"]] * len(GROUPS), CURVATURE_RIDGE])
  for _ in range(STEPS):
    value_NI, gradient_NIP = _curve(z_NIG, level_I, slope_IG, curve_I)
    rest_NI = loss_NI - value_NI
    trust_NI = np.minimum(1, HUBER / np.maximum(np.abs(rest_NI), 1e-12))
    pull_IP = np.column_stack([0 * level_I, slope_IG.mean(0) - slope_IG, curve_I.mean() - curve_I])
    square_IPP, right_IP = _products(gradient_NIP, rest_NI, trust_NI)
    right_IP = right_IP + pull_IP * weight_P
    step_IP = np.linalg.solve(square_IPP + np.diag(weight_P), right_IP[..., None])[..., 0]
    level_I = level_I + step_IP[:, 0]
    slope_IG = slope_IG + step_IP[:, 1:-1]
    curve_I = np.clip(curve_I + np.clip(step_IP[:, -1], -1, 1), -3, 3)
  q_I = np.exp(curve_I)
  t_IG = q_I[:, None] * slope_IG / deviation_G * _members(law).any(-1)
  return dict(c=level_I - 1 / q_I, k=np.exp(-(t_IG * mean_IG).sum(-1)) / q_I) | {
      f"t_{group}": t_I for group, t_I in zip(GROUPS, t_IG.T)}


def _curve(z_NIG, level_I, slope_IG, curve_I):
  """[trials, languages], and its gradient in level, slopes and the curvature's logarithm."""
  q_I = np.exp(curve_I)
  power_NI = np.clip((z_NIG * slope_IG).sum(-1) * q_I, -8, 3)
  growth_NI = np.exp(power_NI)
  bend_NI = (growth_NI * power_NI - growth_NI + 1) / q_I
  return level_I + (growth_NI - 1) / q_I, np.concatenate(
      [np.ones_like(bend_NI)[..., None], growth_NI[..., None] * z_NIG, bend_NI[..., None]], -1)


def _slopes(z_NIG, rest_NI, ridge):
  """[languages, features]: s + d_i that minimise the squares left plus ridge |d_i|^2.

  With G_i = z_i'z_i, b_i = z_i'y_i and A_i = (G_i + ridge)^-1: s = (sum A_i G_i)^-1 sum A_i b_i.
  """
  G_IGG, b_IG = _products(z_NIG, rest_NI, np.ones_like(rest_NI))
  unit = np.eye(z_NIG.shape[-1])
  A_IGG = np.linalg.inv(G_IGG + ridge * unit)
  common_G = np.linalg.solve((A_IGG @ G_IGG).sum(0) + COMMON_RIDGE * unit,
                             (A_IGG @ b_IG[..., None]).sum(0))[:, 0]
  return common_G + (A_IGG @ (b_IG - G_IGG @ common_G)[..., None])[..., 0]


def _products(z_NIP, rest_NI, trust_NI):
  """Each language's z'wz [I, P, P] and z'wy [I, P]."""
  weighed_IPN = (trust_NI[..., None] * z_NIP).transpose(1, 2, 0)
  return weighed_IPN @ z_NIP.transpose(1, 0, 2), (weighed_IPN @ rest_NI.T[..., None])[..., 0]


def _standardised(x_NIG):
  """Less each language's mean, by one deviation a feature: the languages' slopes stay comparable."""
  mean_IG = x_NIG.mean(0)
  deviation_G = np.sqrt(((x_NIG - mean_IG) ** 2).mean((0, 1)))
  deviation_G = np.where(deviation_G > 1e-9, deviation_G, 1.0)
  return (x_NIG - mean_IG) / deviation_G, mean_IG, deviation_G


def _features(law, share_NS):
  """[..., codes] -> [..., measured, GROUPS]: log(sum of the members' shares + epsilon)."""
  members_GIS = _members(law).transpose(1, 0, 2)
  return np.log(np.stack([share_NS @ member_IS.T for member_IS in members_GIS], -1) + law["epsilon"])


def _members(law):
  """float [measured, GROUPS, codes]: 1 where a code's share counts in a language's group."""
  codes = law["codes"]
  one_I1, code_S = np.array([[codes.index(code)] for code in law["measured"]]), np.arange(len(codes))
  family_S, script_S = (np.unique([law["kinds"][code][place] for code in codes], return_inverse=True)[1]
                        for place in (0, 1))  # numbers: comparing words takes longer than a fit
  other_IS = one_I1 != code_S
  kin_IS, family_IS = other_IS & (script_S[one_I1] == script_S), family_S[one_I1] == family_S
  return np.stack([~other_IS, kin_IS & family_IS, kin_IS & ~family_IS,
                   other_IS & (code_S == codes.index(law["largest"]))], 1).astype(np.float64)


def _predicted(law, share_NS):
  """[..., codes] -> [..., measured] bits per byte."""
  column = {name: np.array([row[name] for row in law["by_language"].values()])
            for name in next(iter(law["by_language"].values()))}
  if law["form"] == "constant":
    return np.broadcast_to(column["level"], (*share_NS.shape[:-1], len(column["level"])))
  x_NIG = _features(law, share_NS)
  if law["form"] == "mixing_law":
    power_NI = sum(column[f"t_{group}"] * x_NIG[..., g] for g, group in enumerate(GROUPS))
    return column["c"] + column["k"] * np.exp(power_NI)
  line_NI = sum(column[group] * x_NIG[..., g] for g, group in enumerate(GROUPS))
  return column["level"] + line_NI + column["own_squared"] * x_NIG[..., 0] ** 2
