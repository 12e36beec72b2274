"""What averages hide: facts of a language, and a column of figures rolled up. No page, no file."""

import math
import statistics

from tiny_aya_jax import languages, run

HIGH, MIDDLE = 100e9, 10e9  # ours: round, and each of the three holds a quarter of the 70 or more
GROUPS = ("region", "script", "family", "tier")
WORST = 5


def facts(code):
  """dict(name, script, family, region, tier, fineweb_bytes); 'code' and strangers are no error."""
  try:
    found = languages.find(code)
  except run.Refused:
    place = "Code" if code == languages.CODE else "Other"
    return dict(name=code, script=code.partition("_")[2], family=place, region=place,
                tier="unknown", fineweb_bytes=None)
  return dict(name=found.name, script=found.script, family=found.family, region=found.region,
              tier=tier(found.fineweb_bytes), fineweb_bytes=found.fineweb_bytes)


def tier(fineweb_bytes):
  """'high' from 100 GB of FineWeb-2 (30 of the 70), 'middle' from 10 GB (18), or 'low' (22)."""
  if fineweb_bytes >= HIGH:
    return "high"
  return "middle" if fineweb_bytes >= MIDDLE else "low"


def summary(column, better, baseline=None):
  """{code: value or None} -> dict, all over the languages that have a finite one, each counted once:

  languages, missing, mean, deviation (of the population), poorest (the value furthest from
  `better`, 'lower' or 'higher'), worst {code: value} (five, poorest first), improved (share of the
  languages in both that are strictly better than in `baseline`), by {group: {name: dict(mean,
  languages)}}. Of nothing, a figure is None.
  """
  if better not in ("lower", "higher"):
    raise ValueError(f"better is {better!r}, expected 'lower' or 'higher'")
  present = {code: value for code, value in column.items() if value is not None and math.isfinite(value)}
  order = sorted(present, key=present.get, reverse=better == "lower")
  return dict(
      languages=len(present),
      missing=len(column) - len(present),
      mean=statistics.fmean(present.values()) if present else None,
      deviation=statistics.pstdev(present.values()) if present else None,
      poorest=present[order[0]] if present else None,
      worst={code: present[code] for code in order[:WORST]},
      improved=_improved(present, better, baseline or {}),
      by={group: _means(present, group) for group in GROUPS},
  )


def _improved(present, better, baseline):
  pairs = [(value, baseline[code]) for code, value in present.items()
           if baseline.get(code) is not None]
  if not pairs:
    return None
  return sum(new < old if better == "lower" else new > old for new, old in pairs) / len(pairs)


def _means(present, group):
  """{name of a group: dict(mean, languages)}, in the order of the column."""
  members = {}
  for code, value in present.items():
    members.setdefault(facts(code)[group], []).append(value)
  return {name: dict(mean=statistics.fmean(values), languages=len(values))
          for name, values in members.items()}
