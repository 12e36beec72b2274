"""Quality against the amount of text: a plot a task, as SVG, with labels that touch nothing.

The labels are placed here, not by a browser: once for a phone, then more of them for a wide page.
"""

import html
import math
import statistics

from tiny_aya_jax.evaluate import views

TALL = 300  # pixels of a scatter; its width is the reader's
NARROW, BROAD = 300, 560  # widths at which labels are placed, the second set among the first
LETTER, LINE, DOT = 6.4, 12, 4  # pixels: of a label's letter and line, and a dot's radius
_REGIONS = ("Europe", "West Asia", "South Asia", "Asia Pacific", "Africa")  # style.py: r0 to r4
_SIDES = ("right", "left", "over", "under")


def of(result, shown):
  """A plot a task, higher is better everywhere, bits per byte turned over."""
  plots = [plot for view in views.firsts(shown)
           if view["task"] == "bits_per_byte" or view["better"] == "higher"
           for plot in _scatter(result, view)]
  if not plots:
    return
  regions = views.regions(result, result["languages"])
  key = " ".join(f"<span class=r{shade(region)}><i class=dot></i>{html.escape(region)}</span>"
                 for region in regions)
  yield "<h2 id=text>Quality against the amount of text</h2><p class=key>Of the last checkpoint,"
  yield "against UTF-8 bytes of the language in FineWeb-2; up is better. The line is the least"
  yield f"squares fit, and labels go first to the languages furthest from it. {key}</p>"
  yield f"<div class=plots>{''.join(plots)}</div>"


def shade(region):
  """The number of a region's colour; all that is no region shares one."""
  return _REGIONS.index(region) if region in _REGIONS else len(_REGIONS)


def _scatter(result, view):
  values, sizes = _measured(result, view)
  if len(values) < views.FEWEST or min(len(set(row.values())) for row in (values, sizes)) < 2:
    return
  across, up = views.ends(sizes.values()), views.ends(values.values())
  pairs = list(sizes.values()), list(values.values())
  fit, correlation = statistics.linear_regression(*pairs), statistics.correlation(*pairs)
  points = {code: (_along(sizes[code], across), _height(view, values[code], up))
            for code in values}
  strays = sorted(values, reverse=True,
                  key=lambda code: abs(values[code] - fit.intercept - fit.slope * sizes[code]))
  title = html.escape(view["title"])
  yield (f"<figure><figcaption>{title} <small><bdi>{html.escape(view['last'])}</bdi>, "
         f"{len(values)} languages; r = {views.signed(correlation, '.2f')}, "
         f"{views.signed(fit.slope, view['form'])} with ten times the text</small></figcaption>"
         f"<svg class=plot role=img aria-label='{title} against bytes of text'>"
         f"{_grid(view, across, up)}{_line_of(view, fit, across, up)}"
         f"{_dots(result, view, values, points)}{labels(points, _short(points), strays)}</svg>"
         "</figure>")


def _measured(result, view):
  """({code: value}, {code: log10 of bytes}) of the languages that have both."""
  last, values, sizes = views.values(view, view["last"]), {}, {}
  for code in view["codes"]:
    value, size = last.get(code), result["languages"][code]["fineweb_bytes"]
    if value is not None and size:
      values[code], sizes[code] = value, math.log10(size)
  return values, sizes


def _along(size, across):
  """Per cent of the width."""
  return 2 + 96 * (size - across[0]) / (across[1] - across[0])


def _height(view, value, up):
  """Pixels from the top."""
  return TALL - 8 - (TALL - 16) * views.place(view, value, up) / 100


def _grid(view, across, up):
  lines = []
  for value in round_values(*up):
    y = f"{_height(view, value, up):.0f}"
    lines.append(f"<line x1=0 x2=100% y1={y} y2={y} /><text x=-6 y={y} dy=4 text-anchor=end>"
                 f"{value:g}</text>")
  for power in range(math.ceil(across[0]), math.floor(across[1]) + 1):
    x = f"{_along(power, across):.1f}%"
    lines.append(f"<line x1={x} x2={x} y1=0 y2={TALL} /><text x={x} y={TALL + 15} "
                 f"text-anchor=middle>{_bytes(power)}</text>")
  return f"<g class=grid>{''.join(lines)}</g>"


def _line_of(view, fit, across, up):
  left, right = (_height(view, fit.intercept + fit.slope * size, up) for size in across)
  return f"<line class=fit x1=2% x2=98% y1={left:.0f} y2={right:.0f} />"


def round_values(low, high):
  """About five round numbers between both ends."""
  step = 10 ** math.floor(math.log10((high - low) / 2))
  step *= next(many for many in (0.5, 1, 2, 5) if (high - low) / (step * many) <= 6)
  return [round(count * step, 9) for count in range(math.ceil(low / step),
                                                    math.floor(high / step) + 1)]


def _bytes(power):
  """6 -> '1 MB', 13 -> '10 TB'."""
  unit = min(max(power // 3, 0), 5)
  return f"{10 ** (power - 3 * unit):g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[unit]}"


def _dots(result, view, values, points):
  groups = []
  for region, codes in views.regions(result, points).items():
    dots = "".join(
        f"<circle cx={points[code][0]:.1f}% cy={points[code][1]:.0f}><title>"
        f"{html.escape(result['languages'][code]['name'])}: {values[code]:{view['form']}}"
        "</title></circle>" for code in codes)
    groups.append(f"<g class=r{shade(region)}>{dots}</g>")
  return "".join(groups)


def labels(points, words, order):
  """SVG of {key: word} that touch no dot and no other, on a phone; more where there is room.

  points: {key: (per cent of the width, pixels from the top)}; order: keys, the needed ones first.
  """
  groups, widths = {}, (NARROW, BROAD)
  taken = {width: [(x * width / 100 - DOT, y - DOT, x * width / 100 + DOT, y + DOT)
                   for x, y in points.values()] for width in widths}
  left = list(order)
  for needed, name in ((widths, ""), (widths[1:], " broad")):
    for code in list(left):
      side = next((side for side in _SIDES if all(
          _free(_box(points[code], words[code], side, width), taken[width], width)
          for width in needed)), None)
      if side:
        left.remove(code)
        for width in widths:
          taken[width].append(_box(points[code], words[code], side, width))
        x, y = points[code]
        groups.setdefault(side + name, []).append(
            f"<text x={x:.1f}% y={y:.0f}>{html.escape(words[code])}</text>")
  return "".join(f"<g class='{name}'>{''.join(texts)}</g>" for name, texts in groups.items())


def _short(codes):
  """{code: the part before '_'} where no two share it, else the whole."""
  starts = [code.partition("_")[0] for code in codes]
  return {code: start if starts.count(start) == 1 else code for code, start in zip(codes, starts)}


def _box(point, word, side, width):
  x, y, long = point[0] * width / 100, point[1], LETTER * len(word)
  left = dict(right=x + 6, left=x - 6 - long, over=x - long / 2, under=x - long / 2)[side]
  top = dict(right=y - LINE / 2, left=y - LINE / 2, over=y - 6 - LINE, under=y + 6)[side]
  return left, top, left + long, top + LINE


def _free(box, taken, width):
  inside = box[0] >= 0 and box[2] <= width and box[1] >= -4 and box[3] <= TALL
  return inside and not any(_touch(box, other) for other in taken)


def _touch(one, other):
  return (one[0] < other[2] and other[0] < one[2]) and (one[1] < other[3] and other[1] < one[3])
