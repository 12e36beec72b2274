"""An evaluation as text for a terminal: a line a language, then a line a measure.

`result` is report.py's. No mean without its spread and worst language; what does not fit is named.
"""

import statistics

from tiny_aya_jax.evaluate import views

WIDE = 132  # characters of a terminal's line; tasks that do not fit stand in the lines below


def table(result):
  """Plain text: a line a language, main figures of each task beside; then a line a measure."""
  shown = views.of(result)
  return "\n".join([*_language_lines(result, shown), "", *_measure_lines(shown)]).strip("\n")


def _language_lines(result, shown):
  """Regions with their means, languages under them, and the mean over all."""
  if not shown:
    return
  columns, left = _fitting(_columns(shown))
  counts = shown[0]["counts"]
  yield _line("", shown[0]["unit"], [_right(column["head"], column) for column in columns])
  for region, codes in views.regions(result, result["languages"]).items():
    yield _line(f"{region} ({len(codes)})", "", [_mean_cell(column, codes) for column in columns])
    for code in codes:
      size = f"{counts[code]:,}" if code in counts else "-"
      yield _line(f"  {code}", size, [_cell(column, code) for column in columns])
  everything = list(result["languages"])
  yield _line("mean", f"{sum(counts.values()):,}",
              [_mean_cell(column, everything) for column in columns])
  few = {view["unit"]: f"{view['few']:,} {view['unit']}" for view in shown if view["few"]}
  yield f"* below {' or '.join(few.values())}: too little to rank by" if few else ""
  if left:
    yield f"no room here for {', '.join(left)}: see the page"


def _line(name, size, cells):
  return f"{name:20}{size:>10}{''.join(cells)}".rstrip()


def _columns(shown):
  """dict(task, head, values, form, few) each: bits per byte whole, other tasks' last checkpoint."""
  for view in views.firsts(shown):
    column = dict(task=view["task"], form=view["form"], few=views.few(view))
    if view["task"] == "bits_per_byte":
      yield from (column | dict(head=name, values=views.values(view, name))
                  for name in view["names"])
      continue
    yield column | dict(head=view["task"], values=views.values(view, view["last"]))
    if view["before"]:
      yield column | dict(head="change", values=views.changes(view), form="+" + view["form"])
  for view in views.firsts(shown):
    for name, values in view["beside"].items():
      yield dict(task=name, head=name, values=values, form=view["form"], few=views.few(view))


def _fitting(columns):
  """What fits into WIDE, by whole tasks, and the names of those that do not."""
  groups = {}
  for column in columns:
    width = max(len(column["head"]) + 3, 9)
    groups.setdefault(column["task"], []).append(column | dict(width=width))
  room, fitting, left = WIDE - 30, [], []
  for task, group in groups.items():
    needed = sum(column["width"] for column in group)
    if needed > room and fitting:
      left.append(task)
      continue
    fitting += group
    room -= needed
  return fitting, left


def _cell(column, code):
  value = column["values"].get(code)
  return _right("-" if value is None else f"{value:{column['form']}}", column,
                "*" if code in column["few"] else " ")


def _mean_cell(column, codes):
  values = [value for code in codes if (value := column["values"].get(code)) is not None]
  return _right(f"{statistics.fmean(values):{column['form']}}" if values else "-", column)


def _right(text, column, mark=" "):
  """Figures end one short of the column: there stands the mark of those that rest on too little."""
  return f"{text:>{column['width'] - 1}}{mark}"


def _measure_lines(shown):
  """Mean, deviation, worst language and share improved, of each measure and column."""
  for view in shown:
    yield f"{view['title']}, {view['better']} is better"
    for name in view["names"]:
      summary = view["summary"].get(name)
      if summary and summary["languages"]:
        yield _measure_line(view, name, summary)


def _measure_line(view, name, summary):
  worst = next(iter(summary["worst"]))
  better = f"   improved {summary['improved']:.0%}" if views.compared(view, name) else ""
  return (f"  {name:16}{summary['mean']:>9{view['form']}} +- {summary['deviation']:{view['form']}}"
          f" over {summary['languages']:>2}"
          f"   worst {worst} {summary['worst'][worst]:{view['form']}}{better}")
