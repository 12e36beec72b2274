"""Loss of a language against mixture weights: fitted to a sweep's trials, tested on arms left out.

Runs and draws nothing. Bits per byte y of language i under shares r, per form:

  constant     y_i = level_i: the mixture does nothing. The opponent.
  mixing_law   y_i = c_i + k_i exp(sum_g t_ig x_ig)          (data mixing laws, arXiv 2403.16952)
  regression   y_i = level_i + sum_g b_ig x_ig + b_i x_i,own^2    (as RegMix, arXiv 2407.01492)

7 to 60 arms cannot tell apart 70 weights of 70 languages, so a language sees four sums of shares:
its own; its kin's (same family and script); those of its script in other families; the largest
language's, which helps most of them. Script, then family, are what transfer follows (ATLAS, arXiv
2510.22037). They enter as x_ig = log(share + epsilon), because shares span five orders of magnitude
and loss is near a power of tokens; the law's exponential is then that power. In shares themselves, as
in its paper, it foresaw left-out arms worse on every synthetic truth tried. epsilon is about one row:
the least share that any language of the trials has.

A slope is the languages' common one plus a deviation under a ridge that is chosen by leaving arms
out, so a language leans on the others as far as that helps. Seeds of an arm are left out together.
Not for mixtures far from the trials': laws do not extrapolate. Pure NumPy; a law is ready for JSON.
"""

import numpy as np

from tiny_aya_jax import run

FORMS = ("constant", "mixing_law", "regression")
GROUPS = ("own", "kin", "script", "largest")
# Arms to fit one, and one more to be tested on: a level, four slopes and one curvature.
LEAST = dict(constant=1, mixing_law=6, regression=6)
RIDGES, FOLDS = (0.01, 0.1, 1.0), 5  # ours: of a deviation in bits per byte a standard deviation of x
COMMON_RIDGE = 1e-3  # ours: next to nothing, for slopes that no trial tells apart
STEPS, CURVATURE_RIDGE, HUBER = 8, 0.01, 0.03  # ours: after 8 steps nothing moves; 3 seeds' deviations
CONCENTRATION, NOISE = (0.1, 1.0), 0.2  # ours: of blends of arms, and of a share's logarithm
REFITS = 20


def fit(trials, form, languages):
  """Trials of a sweep's record, {code: facts} -> a law, a dict of plain numbers.

  by_language {code: {coefficient: float}} has the formulae's names: c, k, t_own, ... or level, own,
  ..., own_squared; slopes are in bits per byte a natural logarithm of share. Refuses fewer arms than
  LEAST, no trial that is done, a language that only some of them measured.
  """
  return _fitted(_data(trials, languages, form, LEAST), form)


def predict(law, shares):
  """{code: share}, absent is 0 -> {code: bits per byte}, of the languages that the trials measured."""
  if strangers := sorted(shares.keys() - set(law["codes"])):
    raise run.Refused(f"the law knows nothing of {', '.join(strangers)}: no trial had them")
  share_S = np.array([shares.get(code, 0.0) for code in law["codes"]])
  return dict(zip(law["by_language"], _predicted(law, share_S[None])[0].tolist()))


# --- data ---------------------------------------------------------------------------------------


def _data(trials, languages, form, least):
  """Done trials as dict(share [trials, codes], loss [trials, measured], arm [trials], codes, ...)."""
  run.choose("form of a law", form, FORMS)
  done = [trial for trial in trials if trial["state"] == "done"]
  arms = sorted({trial["arm"] for trial in done}, key=[trial["arm"] for trial in done].index)
  if not done:
    raise run.Refused(f"none of {len(trials)} trials is done: there is nothing to fit a law to")
  if len(arms) < least[form]:
    raise run.Refused(f"{form} needs {least[form]} arms, {len(arms)} have finished: add settings to the "
                      "sweep; seeds of the same arm do not count")
  codes, measured = list(languages), [code for code in languages if code in done[0]["bits_per_byte"]]
  for trial in done:
    _check(trial, codes, measured)
  token = np.array([[trial["tokens"].get(code, 0) for code in codes] for trial in done], np.float64)
  return dict(
      share=token / token.sum(1, keepdims=True),
      loss=np.array([[trial["bits_per_byte"][code] for code in measured] for trial in done]),
      arm=np.array([arms.index(trial["arm"]) for trial in done]),
      arms=arms, codes=codes, measured=measured, languages=languages)


def _check(trial, codes, measured):
  if strangers := sorted(trial["tokens"].keys() - set(codes)):
    raise run.Refused(f"trial {trial['trial']} drew {', '.join(strangers)}, not among the sweep's languages")
  if set(trial["bits_per_byte"]) != set(measured) or not measured:
    raise run.Refused(f"trial {trial['trial']} measured {len(trial['bits_per_byte'])} languages, expected "
                      f"the same {len(measured)} as the first trial and at least one: measure them alike")
  if not np.isfinite([*trial["bits_per_byte"].values()]).all() or not any(trial["tokens"].values()):
    raise run.Refused(f"trial {trial['trial']} is done, but drew nothing or has bits per byte that are not "
                      "finite: mark it as diverged")


def _rows(data, index):
  """The same data with these trials only, in this order, maybe repeated."""
  return data | {name: data[name][index] for name in ("share", "loss", "arm")}


# --- forms --------------------------------------------------------------------------------------


def _fitted(data, form, ridge=None):
  """A law of one form; without a ridge, the one that foresees left-out folds of arms best."""
  if ridge is None and form != "constant":
    ridge = _ridge(data, form)
  law = dict(form=form, ridge=ridge, arms=len(set(data["arm"].tolist())), trials=len(data["arm"]),
             epsilon=float(data["share"][data["share"] > 0].min()),
             largest=data["codes"][int(data["share"].mean(0).argmax())], codes=data["codes"],
             kinds={code: [data["languages"][code][name] for name in ("family", "script")]
                    for code in data["codes"]})
  law["by_language"] = dict.fromkeys(data["measured"])
  columns = dict(constant=_constant, mixing_law=_mixing_law, regression=_regression)[form](law, data)
  rows = np.column_stack([*columns.values()]).tolist()
  law["by_language"] = {code: dict(zip(columns, row)) for code, row in zip(data["measured"], rows)}
  return law


def _ridge(data, form):
  """Folds of whole arms; of two ridges that do as well, the larger."""
  errors = {ridge: 0.0 for ridge in RIDGES}
  fold = np.unique(data["arm"], return_inverse=True)[1] % FOLDS
  for left in range(FOLDS):
    for ridge in RIDGES:
      law = _fitted(_rows(data, fold != left), form, ridge)
      here = _rows(data, fold == left)
      errors[ridge] += np.abs(_predicted(law, here["share"]) - here["loss"]).sum()
  return min(reversed(RIDGES), key=errors.get)


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
    square_IPP = np.einsum("ni,nip,niq->ipq", trust_NI, gradient_NIP, gradient_NIP, optimize=True)
    right_IP = np.einsum("ni,nip->ip", trust_NI * rest_NI, gradient_NIP) + pull_IP * weight_P
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
  power_NI = np.clip(np.einsum("nig,ig->ni", z_NIG, slope_IG) * q_I, -8, 3)
  growth_NI = np.exp(power_NI)
  bend_NI = (growth_NI * power_NI - growth_NI + 1) / q_I
  return level_I + (growth_NI - 1) / q_I, np.concatenate(
      [np.ones_like(bend_NI)[..., None], growth_NI[..., None] * z_NIG, bend_NI[..., None]], -1)


def _slopes(z_NIG, rest_NI, ridge):
  """[languages, features]: s + d_i that minimise the squares left plus ridge |d_i|^2.

  With G_i = z_i'z_i, b_i = z_i'y_i and A_i = (G_i + ridge)^-1: s = (sum A_i G_i)^-1 sum A_i b_i.
  """
  G_IGG = np.einsum("nig,nih->igh", z_NIG, z_NIG, optimize=True)
  b_IG = np.einsum("nig,ni->ig", z_NIG, rest_NI)
  unit = np.eye(z_NIG.shape[-1])
  A_IGG = np.linalg.inv(G_IGG + ridge * unit)
  common_G = np.linalg.solve((A_IGG @ G_IGG).sum(0) + COMMON_RIDGE * unit,
                             (A_IGG @ b_IG[..., None]).sum(0))[:, 0]
  return common_G + (A_IGG @ (b_IG - G_IGG @ common_G)[..., None])[..., 0]


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
  code_S, one_I1 = np.array(law["codes"]), np.array([*law["by_language"]])[:, None]
  family_S, script_S = np.array([law["kinds"][code] for code in law["codes"]]).T
  order_I = [law["codes"].index(code) for code in law["by_language"]]
  other_IS = one_I1 != code_S
  kin_IS = other_IS & (script_S[order_I, None] == script_S)
  family_IS = family_S[order_I, None] == family_S
  return np.stack([~other_IS, kin_IS & family_IS, kin_IS & ~family_IS,
                   other_IS & (code_S == law["largest"])], 1).astype(np.float64)


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
