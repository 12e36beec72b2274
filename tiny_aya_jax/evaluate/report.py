"""An evaluation as one HTML page: no library, no script, no network, and every figure is text.

Measures and rolls up nothing (rollups.py does), and shows no mean without its spread and its worst
language. `result` is what evaluate writes: measures of {column: {language: value}}, where a column
is a checkpoint, or 'untrained'.
"""

import html
import itertools
import statistics

from tiny_aya_jax.evaluate import rollups, scatters, style, views

_GROUPS = dict(region="region", script="script", family="family", tier="text in FineWeb-2")
_TIERS = dict(high=f"high, ≥ {rollups.HIGH / 1e9:.0f} GB", low="low",
              middle=f"middle, ≥ {rollups.MIDDLE / 1e9:.0f} GB")


def page(result):
  """HTML, complete without scripts: overview, a section a measure, plots, what was left out."""
  shown = views.of(result)
  body = [
      *_head(result, shown),
      *_overview(result, shown),
      *(part for index, view in enumerate(shown) for part in _section(result, index, view)),
      *scatters.of(result, shown),
      *_fertility(result),
      *_colophon(result, shown),
  ]
  return style.document("Evaluation by language", style.sheet(result, shown), body)


def _head(result, shown):
  few = any(views.few(view) for view in shown)
  yield f"<h1>Evaluation of {len(result['languages'])} languages</h1><ul class=checkpoints>"
  for index, (name, checkpoint) in enumerate(result["checkpoints"].items()):
    base = " <em>others are compared with this one</em>" if name == result["baseline"] else ""
    yield (f"<li><i class=s{index}></i><b><bdi>{_text(name)}</bdi></b> step "
           f"{_text(checkpoint['step'])}, {_text(checkpoint['dtype'])}{base}"
           f"<br><code><bdi>{_text(checkpoint['path'])}</bdi></code></li>")
  yield "</ul><p>A mean counts each language once and hides the ones that lose: read the deviation"
  yield "(±), the worst language and the lists below it. In strips, changes and scatters better is"
  yield "to the right or up, whatever the measure; bars start at zero."
  yield "<b>*</b> marks a language with too little to rank by.</p>" if few else "</p>"


def _text(value):
  return html.escape(str(value))


# --- overview: a row a measure, a column a checkpoint -------------------------------------------


def _overview(result, shown):
  if not shown:
    yield "<p>No measure was asked for.</p>"
    return
  names = max((view["names"] for view in shown), key=len)
  heads = "".join(f"<th scope=col>{_swatch(result, name)}</th>" for name in names)
  yield f"<h2>Overview</h2><table class='overview o{len(names)}'><thead><tr>"
  yield f"<th scope=col>measure</th>{heads}</tr></thead><tbody>"
  for index, view in enumerate(shown):
    cells = "".join(_overview_cell(result, view, name) for name in names)
    yield (f"<tr><th scope=row><a href='#m{index}'>{_text(view['title'])}</a> "
           f"<small>{view['better']} is better</small></th>{cells}</tr>")
  yield "</tbody></table>"
  yield from _often_worst(result, shown)


def _swatch(result, name):
  """A column's name with the colour of its bars."""
  known = list(result["checkpoints"])
  shade = f"s{known.index(name)}" if name in known else "untrained"
  return f"<i class={shade}></i><bdi>{_text(name)}</bdi>"


def _overview_cell(result, view, name):
  summary = view["summary"].get(name)
  if not summary or not summary["languages"]:
    return f"<td data-name='{_text(name)}' class=none>–</td>"
  worst = next(iter(summary["worst"]))
  lines = [f"worst {_text(result['languages'][worst]['name'])} {summary['poorest']:{view['form']}}"]
  if views.compared(view, name):
    lines.append(f"<b>{summary['improved']:.0%}</b> improved")
  if summary["missing"]:
    lines.append(f"{summary['missing']} missing")
  return (f"<td data-name='{_text(name)}'><b>{summary['mean']:{view['form']}}</b> "
          f"± {summary['deviation']:{view['form']}}{_rug(view, name)}"
          f"<small>{'<br>'.join(lines)}</small></td>")


def _rug(view, name):
  """A strip with a tick a language, and a longer one at the mean."""
  ends = views.ends(views.every(view, view["trained"]))
  values = views.every(view, [name])
  places = [0, *sorted(round(3 * views.place(view, value, ends)) for value in values)]
  ticks = "".join(f"m{step - last}-8v8" for last, step in itertools.pairwise(places))
  mean = 3 * views.place(view, statistics.fmean(values), ends)
  return ("<svg class=rug viewBox='-2 0 304 14' preserveAspectRatio=none aria-hidden=true>"
          f"<path d='M0 11{ticks}'/><path class=mean d='M{mean:.0f} 0v14'/></svg>")


def _often_worst(result, shown):
  """The languages that are among the worst five of many tasks: no table of means shows them."""
  main = [view for view in views.firsts(shown) if len(view["codes"]) > rollups.WORST]
  counts = {}
  for view in main:
    for code in (view["summary"].get(view["last"]) or dict(worst={}))["worst"]:
      counts[code] = counts.get(code, 0) + 1
  often = sorted((code for code in counts if counts[code] > 1), key=counts.get, reverse=True)[:8]
  if often:
    words = ", ".join(f"{_label(result, code)}&nbsp;<b>{counts[code]}</b>" for code in often)
    yield (f"<p>Most often among the worst {rollups.WORST} of the last checkpoint, over the main "
           f"measures of {len(main)} tasks: {words}.</p>")


def _label(result, code):
  return f"{_text(result['languages'][code]['name'])} <i>{_text(code)}</i>"


# --- a section a measure ------------------------------------------------------------------------


def _section(result, index, view):
  summary = view["summary"].get(view["last"])
  short = ""
  if summary and summary["languages"]:
    worst = result["languages"][next(iter(summary["worst"]))]["name"]
    short = (f"<span>{summary['mean']:{view['form']}} ± {summary['deviation']:{view['form']}}, "
             f"worst {_text(worst)} {summary['poorest']:{view['form']}}</span>")
  yield (f"<details{' open' if index == 0 else ''}><summary><h2>{_text(view['title'])}</h2>{short}"
         f"</summary><p id=m{index}>{_about(result, view)}</p>")
  yield from _changed(view)
  yield from _rolled_up(result, view)
  yield from _languages(result, view)
  yield "</details>"


def _about(result, view):
  """Sentences on what is measured, how it is drawn and which languages are not in it."""
  note = (view["note"] or "no note").rstrip(".")
  words = [f"<b>{view['better'].capitalize()} is better.</b>",
           f"<bdi>{_text(note[:1].upper() + note[1:])}</bdi>."]
  if views.few(view):
    words.append(f"* below {view['few']:,} {_text(view['unit'])}: too little to rank by.")
  if view["chance"] is not None:
    words.append(f"<u class=chance></u> chance, {view['chance']:g}.")
  absent = [code for code in result["languages"] if code not in view["codes"]]
  if absent:
    words.append(f"Nothing to measure {len(absent)} of {len(result['languages'])} languages with: "
                 f"{_text(', '.join(absent))}.")
  return " ".join(words)


def _changed(view):
  """Every language from the baseline to the last checkpoint, the greatest loss first."""
  changes = views.changes(view) if view["before"] else {}
  if not changes:
    return
  before, last = views.values(view, view["before"]), views.values(view, view["last"])
  gains = {code: -change if view["better"] == "lower" else change
           for code, change in changes.items()}
  ends = views.ends([column[code] for column in (before, last) for code in changes])
  yield _changed_head(view, gains, ends)
  for code in sorted(gains, key=gains.get):
    side = "" if gains[code] > 0 else " class=worse" if gains[code] < 0 else " class=same"
    a, b = (f"{views.place(view, column[code], ends):.1f}" for column in (before, last))
    yield (f"<li{side}>{_text(code)}<i style=--a:{a};--b:{b}></i>"
           f"{views.signed(changes[code], view['form'])}</li>")
  yield "</ul>"


def _changed_head(view, gains, ends):
  left, right = ends[::-1] if view["better"] == "lower" else ends
  better, worse = (sum(sign * gain > 0 for gain in gains.values()) for sign in (1, -1))
  return (f"<h3><bdi>{_text(view['before'])}</bdi> → <bdi>{_text(view['last'])}</bdi>: "
          f"<b class=better>{better} better</b>, <b class=worse>{worse} worse</b></h3>"
          f"<p class=key>From <u class=tick></u> to <i class=dot></i> better or "
          f"<i class='dot diamond'></i> worse, on a scale from {left:{view['form']}} to "
          f"{right:{view['form']}}; greatest loss first.</p><ul class=change>")


def _rolled_up(result, view):
  """Four small tables of means; groups of one language stand together in one line."""
  by = (view["summary"].get(view["last"]) or dict(by={}))["by"]
  if len(view["codes"]) < views.FEWEST or not by:
    return
  names = view["trained"]
  heads = "".join(f"<th scope=col>{_swatch(result, name)}</th>" for name in names)
  yield "<h3>Means by region, script, family and amount of text, worst first</h3>"
  yield "<div class=groups>"
  for group in rollups.GROUPS:
    yield (f"<table class='k{len(names)} small'><thead><tr><th scope=col>{_GROUPS[group]}</th>"
           f"{heads}</tr></thead><tbody>")
    for name, count, cells in _group_rows(view, group, names):
      figures = "".join(f"<td>{_figure(view, cell)}</td>" for cell in cells)
      yield f"<tr><th>{_text(name)} <i>{count}</i></th>{figures}</tr>"
    yield "</tbody></table>"
  yield "</div>"


def _group_rows(view, group, names):
  """(name, languages, [mean of each column]) of groups, then of what is alone in its group."""
  by = {name: view["summary"][name]["by"].get(group, {}) if name in view["summary"] else {}
        for name in names}
  last = by.get(view["last"], {})
  means = {name: row["mean"] for name, row in last.items()}
  order = _worst_first(view, last, means)
  alone = [name for name in order if last[name]["languages"] == 1]
  alone = alone if len(alone) > 1 else []
  for name in order:
    if name not in alone:
      yield (_TIERS.get(name, name) if group == "tier" else name, last[name]["languages"],
             [by[column].get(name, {}).get("mean") for column in names])
  if alone:
    yield ("one language each", len(alone),
           [_mean(by[column][name]["mean"] for name in alone if name in by[column])
            for column in names])


def _worst_first(view, codes, values):
  """Sorted; those without a value last, ties in the order given."""
  sign = -1 if view["better"] == "lower" else 1
  return sorted(codes, key=lambda code: (values.get(code) is None, sign * (values.get(code) or 0)))


def _mean(values):
  values = list(values)
  return statistics.fmean(values) if values else None


def _figure(view, value):
  return "–" if value is None else f"{value:{view['form']}}"


def _languages(result, view):
  """The table of all figures: a row a language with its bars, by region."""
  last, limit = views.values(view, view["last"]), _limit(view)
  chance = f" style=--chance:{_share(view['chance'], limit)}%" if view["chance"] else ""
  names = view["names"] + list(view["beside"])
  yield (f"<h3>Every language</h3><p class=key>By region, worst first by "
         f"<bdi>{_text(view['last'])}</bdi>; a region's line is the mean of it.</p>"
         f"<table class='k{len(names)} beside{len(view['beside'])} all'{chance}>"
         f"{_language_head(result, view, limit)}")
  for region, codes in views.regions(result, view["codes"]).items():
    yield f"<tbody>{_region_row(view, region, codes)}"
    yield from (_language_row(result, view, code, limit)
                for code in _worst_first(view, codes, last))
    yield "</tbody>"
  yield "</table>"


def _limit(view):
  """The right end of the bars: what has no training ('untrained') is no part of their scale."""
  values = views.every(view, [*view["trained"], *view["beside"]])
  return max([*values, view["chance"] or 0]) or 1


def _language_head(result, view, limit):
  columns = [_swatch(result, name) for name in view["names"]]
  columns += [f"<u class=u{index}></u>{_text(name)}" for index, name in enumerate(view["beside"])]
  heads = "".join(f"<th scope=col>{column}</th>" for column in columns)
  return (f"<thead><tr><th scope=col>language</th><th scope=col>{_text(view['unit'])}</th>"
          f"<td class=axis><span>0</span><span>{limit:{view['form']}}</span></td>{heads}</tr>"
          "</thead>")


def _language_row(result, view, code, limit):
  count = f"{view['counts'][code]:,}" if code in view["counts"] else "–"
  mark = "<b>*</b>" if code in views.few(view) else ""
  cells = "".join(f"<td>{_figure(view, views.values(view, name).get(code))}</td>"
                  for name in [*view["names"], *view["beside"]])
  return (f"<tr><th>{_label(result, code)}</th><td>{count}{mark}</td>"
          f"{_bars(view, code, limit)}{cells}</tr>")


def _region_row(view, region, codes):
  columns = [views.values(view, name) for name in [*view["names"], *view["beside"]]]
  means = [_mean(value for code in codes if (value := column.get(code)) is not None)
           for column in columns]
  cells = "".join(f"<td>{_figure(view, mean)}</td>" for mean in means)
  return (f"<tr class=region><th scope=rowgroup>{_text(region)} <i>{len(codes)}</i></th>"
          f"<td></td><td class=axis></td>{cells}</tr>")


def _bars(view, code, limit):
  """A cell whose style draws a bar a checkpoint, with a mark for each column beside."""
  widths = ";".join(f"--{index}:{_share(views.values(view, name).get(code) or 0, limit)}"
                    for index, name in enumerate(view["trained"]))
  marks = [(index, view["beside"][name].get(code)) for index, name in enumerate(view["beside"])]
  return f"<td style={widths}>" + "".join(
      f"<u class=u{index} style=--x:{_share(value, limit)}%></u>"
      for index, value in marks if value is not None) + "</td>"


def _share(value, limit):
  return f"{round(100 * min(max(value / limit, 0), 1), 1):g}"


# --- fertility, and the end of the page ---------------------------------------------------------


def _fertility(result):
  """Tokens per 100 bytes, the dearest language first."""
  rates = {code: 100 / row["bytes_per_token"] for code, row in (result["fertility"] or {}).items()
           if row["bytes_per_token"]}
  if not rates:
    return
  most = max(rates.values())
  yield (f"<h2 id=fertility>What the vocabulary costs</h2><p class=key>Tokens per 100 bytes of the "
         f"held-out text, most first; {most / min(rates.values()):.1f} times as many in the "
         "dearest language as in the cheapest. More tokens are less text in a context and in a "
         "budget of training tokens.</p><ul class='change cost'>")
  for code in sorted(rates, key=rates.get, reverse=True):
    tokens = result["fertility"][code]["tokens"]
    yield (f"<li title='{tokens:,} tokens'>{_text(code)}"
           f"<i style=--b:{_share(rates[code], most)}></i>{rates[code]:.1f}</li>")
  yield "</ul>"


def _colophon(result, shown):
  yield "<h2 id=end>How it was made</h2><dl>"
  for view in shown:
    if view["signature"]:
      yield (f"<dt>Signature of {_text(view['title'])}</dt>"
             f"<dd><code><bdi>{_text(view['signature'])}</bdi></code></dd>")
  if result["judge"]:
    spent = ", ".join(f"{key} {_amount(value)}" for key, value in result["judge"]["spent"].items())
    yield (f"<dt>Judge</dt><dd><bdi>{_text(result['judge']['model'])}</bdi>; spent: "
           f"{_text(spent or 'nothing')}</dd>")
  for row in result["unscored"]:
    yield (f"<dt>Not scored: {_text(row['task'].replace('_', ' '))}</dt>"
           f"<dd><bdi>{_text(row['why'])}</bdi></dd>")
  versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
  yield f"<dt>Versions</dt><dd>{_text(versions or 'unknown')}</dd>"
  yield f"<dt>Time</dt><dd>{_text(result['time'])}</dd></dl>"


def _amount(value):
  return f"{value:,}" if isinstance(value, int) else value
