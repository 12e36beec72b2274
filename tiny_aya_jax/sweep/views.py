"""A sweep made ready to be shown: what the terminal's table and the page both need.

Judges nothing (verdict.py does) and writes neither text nor HTML (terminal.py, page.py).
"""

import statistics

from tiny_aya_jax.sweep import verdict

MOST = 12  # arms that stand side by side; the best of them, where there are more
EPOCHS = 4  # up to which repeated text is worth nearly as much as new (arXiv 2305.16264)


def of(result):
  """dict: seen (the verdict), columns {arm: {code: bits per byte}}, bests {code: the lowest},
  regions {region: codes}, the smallest language first, tokens and epochs {arm: {code: mean over
  seeds}}, and shown, the arms that stand side by side, along x, then those without, best first."""
  seen = result["verdict"] or verdict.of(result)
  measured = verdict.columns(result)
  columns = {arm["arm"]: {code: measured[arm["arm"]][code] for code in seen["languages"]}
             for arm in seen["arms"]}
  bests = {code: min(bits[code] for bits in columns.values()) for code in seen["languages"]}
  trials = verdict.finished(result)[0]
  return dict(
      seen=seen, columns=columns, bests=bests, shown=_shown(seen["arms"]),
      regions=regions(result, seen["languages"]),
      **{key: {arm: _means(key, [trial for trial in trials if trial["arm"] == arm])
               for arm in columns} for key in ("tokens", "epochs")})


def _shown(arms):
  best = arms[:MOST]
  along = sorted((arm for arm in best if arm["x"] is not None), key=lambda arm: arm["x"])
  return [arm["arm"] for arm in along + [arm for arm in best if arm["x"] is None]]


def _means(key, trials):
  codes = dict.fromkeys(code for trial in trials for code in trial[key])
  return {code: statistics.fmean(trial[key].get(code, 0) for trial in trials) for code in codes}


def regions(result, codes):
  """{region: codes}, the region in table order, the smallest language first."""
  groups = {}
  for code in sorted(codes, key=lambda code: size(result, code)):
    groups.setdefault(result["languages"][code]["region"], []).append(code)
  order = dict.fromkeys(facts["region"] for facts in result["languages"].values())
  return {region: groups[region] for region in order if region in groups}


def size(result, code):
  """Bytes of the language in FineWeb-2; unknown is none."""
  return result["languages"][code]["fineweb_bytes"] or 0


def mean(column, codes):
  """Of a column, each language counted once."""
  return statistics.fmean(column[code] for code in codes)


def left_out(view):
  """Arms for which there was no room."""
  return [arm["arm"] for arm in view["seen"]["arms"] if arm["arm"] not in view["shown"]]


def above(view, arm):
  """(the most epochs of any language, languages above EPOCHS) or None, where nothing is known."""
  epochs = view["epochs"][arm].values()
  return (max(epochs), sum(value > EPOCHS for value in epochs)) if epochs else None


def count(value):
  """950 -> '950', 12,300 -> '12.3k'; three digits and a letter."""
  for unit in ("", "k", "M", "G", "T"):
    if value < 999.5 or unit == "T":
      break
    value /= 1000
  digits = 0 if value >= 99.95 or (not unit and value == int(value)) else 1
  return f"{value:.{digits}f}{unit}"


def repeats(value):
  """Epochs, as many digits as matter."""
  return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
