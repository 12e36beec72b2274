"""The plots of a sweep as SVG: mean against worst language, and bits per byte along the axis.

Better is up and to the right, as on the page of an evaluation, so bits per byte are turned over.
Labels are placed here (scatters.labels), not by a browser. Every figure stands in a table as well.
"""

import html
import math

from tiny_aya_jax.evaluate import scatters
from tiny_aya_jax.evaluate.views import ends, signed
from tiny_aya_jax.sweep import verdict, views

TALL, LINE = scatters.TALL, 13  # pixels of a plot and of a line of its labels
EDGE = 4  # per cent of the width, and pixels twice, that stay free on either side


def front(result, view):
  """Mean against worst language: a dot an arm, a small one a seed, a line through the front."""
  arms = view["seen"]["arms"]
  if len(arms) < 2:
    return
  seeds = list(_seeds(result, view))
  points = [(arm["mean"], arm["worst"]["value"]) for arm in arms] + seeds
  across, up = (_ends(values) for values in zip(*points))
  place = lambda mean: 100 - _along(mean, across)
  height = lambda worst: _height(worst, up)
  dots = {arm["arm"]: (place(arm["mean"]), height(arm["worst"]["value"])) for arm in arms}
  small = "".join(f"<circle class=seed cx={place(mean):.1f}% cy={height(worst):.0f} />"
                  for mean, worst in seeds)
  order = sorted(dots, key=lambda arm: arm not in view["seen"]["front"])
  yield ("<figure><figcaption>Mean against worst language <small>bits per byte, lower is better "
         "and to the upper right; ringed: recommended; on the line: no other arm is better in "
         "both; small: single seeds</small></figcaption>"
         "<svg class=plot role=img aria-label='mean against worst language'>"
         f"{_grid_across(across, place)}{_grid_up(up, height)}"
         f"{_front_line(view, dots)}{small}{_arm_dots(view, arms, dots)}"
         f"{scatters.labels(dots, {arm: arm for arm in dots}, order)}</svg>"
         "<p class='key across'>mean over languages</p></figure>")


def _seeds(result, view):
  """(mean, worst) of the trials of arms that have several."""
  several = {arm["arm"] for arm in view["seen"]["arms"] if len(arm["seeds"]) > 1}
  for trial in verdict.finished(result)[0]:
    if trial["arm"] in several:
      bits = {code: trial["bits_per_byte"][code] for code in view["seen"]["languages"]}
      yield tuple(verdict.value(bits, dict(kind=kind), result["languages"])
                  for kind in ("mean", "worst"))


def _ends(values):
  """(lowest, highest), never the same."""
  low, high = ends(list(values))
  return (low, high) if high > low else (low - 0.005, high + 0.005)


def _along(value, across):
  """Per cent of the width, the lowest on the left."""
  return EDGE + (100 - 2 * EDGE) * (value - across[0]) / (across[1] - across[0])


def _height(value, up):
  """Pixels from the top, the lowest at the top."""
  return 2 * EDGE + (TALL - 4 * EDGE) * (value - up[0]) / (up[1] - up[0])


def _grid_up(up, height, form="g"):
  lines = "".join(
      f"<line x1=0 x2=100% y1={height(value):.0f} y2={height(value):.0f} />"
      f"<text x=-6 y={height(value):.0f} dy=4 text-anchor=end>{_tick(value, form)}</text>"
      for value in scatters.round_values(*up))
  return f"<g class=grid>{lines}</g>"


def _tick(value, form):
  return signed(value, form.lstrip("+")).lstrip("" if "+" in form else "+") if value else "0"


def _grid_across(across, place, form="g"):
  lines = "".join(_upright(place(value), _tick(value, form))
                  for value in scatters.round_values(*across))
  return f"<g class=grid>{lines}</g>"


def _upright(x, word):
  return (f"<line x1={x:.1f}% x2={x:.1f}% y1=0 y2={TALL} /><text x={x:.1f}% y={TALL + 15} "
          f"text-anchor=middle>{word}</text>")


def _front_line(view, dots):
  points = sorted(dots[arm] for arm in view["seen"]["front"])
  return "".join(f"<line class=fit x1={a:.1f}% y1={b:.0f} x2={c:.1f}% y2={d:.0f} />"
                 for (a, b), (c, d) in zip(points, points[1:]))


def _arm_dots(view, arms, dots):
  marks = []
  for arm in arms:
    x, y = dots[arm["arm"]]
    if arm["arm"] == view["seen"]["recommended"]:
      marks.append(f"<circle class=ring cx={x:.1f}% cy={y:.0f} />")
    marks.append(f"<circle class={'front' if arm['front'] else 'beaten'} cx={x:.1f}% cy={y:.0f}>"
                 f"<title>{html.escape(arm['arm'])}: {arm['mean']:.4f}, "
                 f"{arm['worst']['value']:.4f}</title></circle>")
  return "".join(marks)


# --- along the axis -----------------------------------------------------------------------------


def curves(result, view):
  """Means of regions and of all along x, each as its change from the smallest x."""
  arms = along(view)
  if len(arms) < 3:
    return
  lines = _lines(view, arms)
  place = _scale([arm["x"] for arm in arms])
  up = _ends(value for changes in lines.values() for value in changes)
  height = lambda change: _height(change, up)
  shapes = "".join(_curve(name, changes, [place(arm["x"]) for arm in arms], height)
                   for name, changes in lines.items())
  yield ("<figure><figcaption>Regions along the axis <small>bits per byte, change from "
         f"{html.escape(arms[0]['arm'])}; up is better{_common(view)}</small></figcaption>"
         "<svg class='plot curves' role=img aria-label='change of each region along the axis'>"
         f"{_grid_up(up, height, '+.2g')}<g class=grid>"
         f"{''.join(_upright(*tick) for tick in _ticks(arms, place))}</g>{shapes}"
         f"{_names(lines, height)}</svg><p class='key across'>{html.escape(_axis(result))}</p>"
         "</figure>")


def along(view):
  """Arms with x, by it, one at each."""
  arms = {arm["x"]: arm for arm in reversed(view["seen"]["arms"]) if arm["x"] is not None}
  return [arms[x] for x in sorted(arms)]


def _lines(view, arms):
  """{name: changes along the arms}, None being the mean over all languages."""
  groups = view["regions"] | {None: view["seen"]["languages"]}
  means = {name: [views.mean(view["columns"][arm["arm"]], codes) for arm in arms]
           for name, codes in groups.items()}
  return {name: [value - row[0] for value in row] for name, row in means.items()}


def _common(view):
  noise = view["seen"]["noise"]
  return f"; noise of the mean between seeds ±{noise['mean']:.4f}" if noise else ""


def _scale(values):
  """x -> per cent of the width, by logarithm where all are positive."""
  turn = math.log if min(values) > 0 else float
  across = turn(min(values)), turn(max(values))
  return lambda x: _along(turn(x), across)


def _ticks(arms, place):
  """(per cent, word), none too near to the one before."""
  last = -math.inf
  for arm in arms:
    if place(arm["x"]) - last > 7:
      last = place(arm["x"])
      yield last, f"{arm['x']:g}"


def _axis(result):
  return result.get("x") or ", ".join(result["axes"])


def _curve(name, changes, places, height):
  points = [(x, height(change)) for x, change in zip(places, changes)]
  lines = "".join(f"<line x1={a:.1f}% y1={b:.0f} x2={c:.1f}% y2={d:.0f} />"
                  for (a, b), (c, d) in zip(points, points[1:]))
  dots = "".join(f"<circle cx={x:.1f}% cy={y:.0f}><title>{html.escape(name or 'mean')} "
                 f"{change:+.4f}</title></circle>" for (x, y), change in zip(points, changes))
  return f"<g class='{_shade(name)} curve'>{lines}{dots}</g>"


def _shade(name):
  return f"r{scatters.shade(name)}" if name else "every"


def _names(lines, height):
  """Names at the right ends, pushed apart."""
  rows = sorted((height(changes[-1]), name or "") for name, changes in lines.items())
  places, last = [], -LINE
  for y, name in rows:
    last = max(y, last + LINE)
    places.append([last, name])
  over = max(0, last - TALL)
  words = []
  for index, (y, name) in enumerate(places):
    low = min(y, TALL - LINE * (len(places) - 1 - index)) if over else y
    words.append(f"<text class={_shade(name)} x=100% y={low:.0f} dx=8 dy=4>"
                 f"{html.escape(name or 'mean')}</text>")
  return f"<g class=names>{''.join(words)}</g>"


# --- predicted against measured -----------------------------------------------------------------


def predicted(result, test):
  """A plot of one test of a law: a dot a language, on the diagonal where the law was right.

  test: dict(arm, predicted, measured), both {code: bits per byte}, or what is left of them.
  """
  codes = list(test["measured"])
  if len(codes) < 3:
    return
  both = _ends(test[key][code] for key in ("predicted", "measured") for code in codes)
  place = lambda value: _along(value, both)
  height = lambda value: TALL - _height(value, both)
  dots = "".join(
      f"<circle class=r{scatters.shade(result['languages'][code]['region'])} "
      f"cx={place(test['predicted'][code]):.1f}% cy={height(test['measured'][code]):.0f}><title>"
      f"{html.escape(result['languages'][code]['name'])}: predicted "
      f"{signed(test['predicted'][code], '.3f')}, measured {signed(test['measured'][code], '.3f')}"
      "</title></circle>" for code in codes)
  yield (f"<figure><figcaption>{html.escape(test['arm'])} <small>above the language's mean over "
         "other arms, in bits per byte: predicted across, measured up; the law was right on the "
         f"line. {_key(result, codes)}</small></figcaption><svg class=plot role=img aria-label="
         "'predicted against measured'>"
         f"{_grid_up(both, height, '+.2g')}{_grid_across(both, place, '+.2g')}<line class=fit "
         f"x1={EDGE}% x2={100 - EDGE}% y1={TALL - 2 * EDGE} y2={2 * EDGE} />{dots}</svg></figure>")


def _key(result, codes):
  """The colours of regions."""
  words = "".join(f" <span class=r{scatters.shade(region)}><i class=dot></i>{html.escape(region)}"
                  "</span>" for region in views.regions(result, codes))
  return f"<span class=key>{words}</span>"
