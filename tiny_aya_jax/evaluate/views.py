"""A measure of an evaluation, made ready to be shown: what the table and the page both need.

Rolls up nothing (rollups.py does) and writes neither text nor HTML (terminal.py, report.py).
"""

import math

FEWEST = 3  # languages that a plot or a roll-up needs to say anything


def of(result):
  """The measures of a result, each as _view makes it."""
  return [_view(result, measure) for measure in result["measures"]]


def _view(result, measure):
  """The measure with what all its parts ask for.

  names: columns to show; trained: those that are checkpoints; last and before: the two that are
  compared, before may be None; codes: languages that have anything; form: digits of a figure.
  """
  trained = list(result["checkpoints"])
  names = [name for name in measure["columns"] if name not in trained] + trained
  codes = [code for code in result["languages"] if code in measure["counts"]
           or any(code in column for column in measure["columns"].values())]
  filled = [name for name in names if any(
      value is not None for value in measure["columns"].get(name, {}).values())]
  before = result["baseline"] if result["baseline"] in filled else None
  after = [name for name in filled if name != before] or filled or names
  view = measure | dict(names=names, trained=trained or names, codes=codes, last=after[-1],
                        before=before if after[-1] != before else None, title=_title(measure),
                        baseline=result["baseline"])
  return view | dict(form=_form([*every(view, names), *every(view, view["beside"])]))


def _title(measure):
  task = measure["task"].replace("_", " ")
  return task if task == measure["measure"] else f"{task}: {measure['measure']}"


def _form(figures):
  """Four digits of the largest figure, three of one below one."""
  largest = max(map(abs, figures), default=0) or 1
  power = math.floor(math.log10(largest))
  return f".{min(max(3 - power - (power < 0), 0), 6)}f"


def firsts(views):
  """The first measure of each task."""
  return list({view["task"]: view for view in reversed(views)}.values())[::-1]


def few(view):
  """The codes that have too little to rank by."""
  return {code for code, count in view["counts"].items() if count < (view["few"] or 0)}


def values(view, name):
  """{code: value or None} of a column or of one beside it."""
  return view["columns"].get(name) or view["beside"].get(name) or {}


def every(view, names):
  """The values of columns that are known, as one list."""
  return [value for name in names for value in values(view, name).values() if value is not None]


def changes(view):
  """{code: last - before} where both are known."""
  before, last = values(view, view["before"]), values(view, view["last"])
  return {code: last[code] - before[code] for code in view["codes"]
          if last.get(code) is not None and before.get(code) is not None}


def regions(result, codes):
  """{region: codes}, both in table order."""
  groups = {}
  for code in codes:
    groups.setdefault(result["languages"][code]["region"], []).append(code)
  return groups


def compared(view, name):
  """Whether a column's share improved says anything: not of the baseline, nor of no training."""
  improved = view["summary"][name]["improved"]
  return improved is not None and name in view["trained"] and name != view["baseline"]


def ends(figures):
  """(lowest, highest)"""
  return (min(figures), max(figures)) if figures else (0, 1)


def place(view, value, scale):
  """0 (worst) to 100 (best) between the ends of a scale; what lies outside is put on the edge."""
  low, high = scale
  share = (value - low) / (high - low) if high > low else 0.5
  return 100 * min(max(1 - share if view["better"] == "lower" else share, 0), 1)


def signed(value, form):
  """With a minus as wide as the plus."""
  return f"{value:+{form}}".replace("-", "−")
