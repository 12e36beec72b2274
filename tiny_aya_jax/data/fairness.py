"""What a vocabulary costs each language: tokenizers and held-out lines -> numbers, a page, a plot.

Not a verb and not a trainer. Of every tokenizer, by language and script:

  tokens per character   tokens / Unicode code points; the report's measure (its Fig. 3). It differs
                         between scripts by nature, a Han character being a word and a Latin one a
                         sound, so that the ratio of the worst language to the best stands beside
                         the same ratio inside each script. Sentence by sentence it would be fair
                         over all, but that needs translations
  bytes per token        UTF-8 bytes / tokens
  fragments              share of the tokens whose bytes are no valid UTF-8 on their own, only a
                         part of a character: byte fall-back, and its like in byte-level BPE
  round trip             lines that decode(encode(line)) does not give back, by cause
"""

import collections
import html
import importlib.util
import unicodedata

import numpy as np

from tiny_aya_jax import languages, run

SMALL = 10_000  # bytes of text below which a language is marked: too little to rank by
# What a tokenizer may do to a line on purpose, in the order in which it is looked for.
CHANGES = {
    "a literal U+2581 becomes a space": lambda line: line.replace("\u2581", " "),
    "Unicode form NFC": lambda line: unicodedata.normalize("NFC", line),
    "Unicode form NFKC": lambda line: unicodedata.normalize("NFKC", line),
}
FORMS = dict(tokens_per_character=".3f", bytes_per_token=".2f", fragments=".2%", share=".2%")
RATES = dict(
    tokens_per_character="tokens per character",
    bytes_per_token="bytes per token",
    fragments="fragments",
    share="share of the sample",
)


def measure(tokenizers, texts, shares):
  """{name: Tokenizer}, iterable of (code, lines), {name: {code: share of the sample}} -> dict:

  text {code: characters, bytes, lines}, columns {name: languages {code: rates}, scripts {script:
  means and ratio}, all, round_trip {lines, exceptions {cause: lines}}}. A code may come often, and
  `code` is passed over: it is no language. A tokenizer that is given and not trained has no shares.
  """
  meters = {name: _Meter(tokenizer) for name, tokenizer in tokenizers.items()}
  text = {}
  for code, lines in texts:
    if code == languages.CODE:
      continue
    count = text.setdefault(code, collections.Counter())
    count.update(characters=sum(map(len, lines)), lines=len(lines),
                 bytes=sum(len(line.encode()) for line in lines))
    for meter in meters.values():
      meter.add(code, lines)
  text = {code: dict(count) for code, count in text.items() if count["characters"]}
  if not text:
    raise run.Refused("there is no text of any language to measure a vocabulary on")
  columns = {name: meter.column(text, shares.get(name)) for name, meter in meters.items()}
  return dict(text=text, columns=columns)


class _Meter:
  """Counts what one tokenizer makes of the lines."""

  def __init__(self, tokenizer):
    self.tokenizer = tokenizer
    self.fragment_V = _fragment_V(tokenizer)
    self.tokens, self.fragments = collections.Counter(), collections.Counter()
    self.exceptions = collections.Counter()

  def add(self, code, lines):
    for line, ids in zip(lines, self.tokenizer.encode_many(lines)):
      self.tokens[code] += len(ids)
      self.fragments[code] += int(self.fragment_V[ids].sum())
      back = self.tokenizer.decode(ids)
      if back != line:
        self.exceptions[_cause(line, back)] += 1

  def column(self, text, shares):
    rates = {code: self._rates(code, **count) for code, count in text.items()}
    if shares:
      rates = {code: row | dict(share=round(shares.get(code, 0), 6)) for code, row in rates.items()}
    scripts = sorted({script(code) for code in rates})
    return dict(
        size=self.tokenizer.size,
        sha256=self.tokenizer.sha256,
        all=_group(rates),
        scripts={name: _group({code: row for code, row in rates.items() if script(code) == name})
                 for name in scripts},
        languages=rates,
        round_trip=dict(lines=sum(count["lines"] for count in text.values()),
                        exceptions=dict(self.exceptions)),
    )

  def _rates(self, code, characters, bytes, lines):
    del lines
    tokens = self.tokens[code]
    return dict(tokens_per_character=round(tokens / characters, 4),
                bytes_per_token=round(bytes / tokens, 4),
                fragments=round(self.fragments[code] / tokens, 5))


def _fragment_V(tokenizer):
  """bool [V]. Of a part of a character, decode shows U+FFFD; a real U+FFFD encodes to itself."""
  texts = [tokenizer.decode([id]) for id in range(tokenizer.size)]
  return np.array([
      "\ufffd" in text and tokenizer.encode(text) != [id] for id, text in enumerate(texts)
  ])


def _cause(line, back):
  return next((cause for cause, change in CHANGES.items() if change(line) == back), "unknown")


def script(code):
  """'deu_Latn' -> 'Latn'."""
  return languages.find(code).script


def _group(rates):
  """Means over languages, each counted once, and how far the worst is from the best."""
  order = sorted(rates, key=lambda code: rates[code]["tokens_per_character"])
  lowest, highest = (rates[order[end]]["tokens_per_character"] for end in (0, -1))
  means = {rate: round(sum(row[rate] for row in rates.values()) / len(rates), 6)
           for rate in rates[order[0]]}
  if "share" in means:
    means["share"] = round(sum(row["share"] for row in rates.values()), 6)
  return dict(languages=len(rates), **means, worst_to_best=round(highest / lowest, 3),
              best=order[:5], worst=order[:-6:-1])


# --- the terminal -------------------------------------------------------------------------------


def table(result):
  """Text lines: one a tokenizer, after their head."""
  columns = result["columns"]
  lines = [f"{'':14}{'worst/best':>12}{'in Latin':>10}{'tokens/char':>13}{'bytes/token':>13}"
           f"{'fragments':>11}{'changed lines':>15}   worst five"]
  for name, column in columns.items():
    whole, latin = column["all"], column["scripts"].get("Latn")
    inside = f"{latin['worst_to_best']:.2f}" if latin else "-"
    changed = sum(column["round_trip"]["exceptions"].values())
    lines.append(
        f"{name:14}{whole['worst_to_best']:12.2f}{inside:>10}"
        f"{whole['tokens_per_character']:13.3f}{whole['bytes_per_token']:13.2f}"
        f"{whole['fragments']:11.2%}{changed:15}   {', '.join(whole['worst'])}"
    )
  return lines


# --- the page -----------------------------------------------------------------------------------


def page(result, picture=None):
  """HTML, no scripts. result: of `measure`, with rules {column: words} and measured_on, words."""
  columns = result["columns"]
  shown = [rate for rate in RATES if any(rate in row for row in _first_rows(columns))]
  exceptions = [f"{html.escape(name)}: {count} lines, {html.escape(cause)}"
                for name, column in columns.items()
                for cause, count in column["round_trip"]["exceptions"].items()]
  return _PAGE.format(
      text=html.escape(result["measured_on"]),
      small=f"{SMALL:,}",
      rules="\n".join(f"<li><b>{html.escape(name)}</b>: {html.escape(words)}, V = "
                      f"{columns[name]['size']:,}</li>" for name, words in result["rules"].items()),
      names="".join(f"<th>{html.escape(name)}</th>" for name in columns),
      summary="\n".join(_summary(columns)),
      picture=f"<img src={html.escape(picture)!r} alt='tokens per character'>" if picture else "",
      groups="".join(f"<th colspan={len(columns)}>{RATES[rate]}</th>" for rate in shown),
      heads="".join(f"<th>{html.escape(name)}</th>" for _ in shown for name in columns),
      body="\n".join(_body(result, shown)),
      exceptions="; ".join(exceptions) or "none",
      lines=f"{sum(count['lines'] for count in result['text'].values()):,}",
  )


def _first_rows(columns):
  return [next(iter(column["languages"].values())) for column in columns.values()]


def _summary(columns):
  """The lines of the table above: ratios, over all and inside scripts, and means."""
  first = next(iter(columns.values()))
  several = [name for name, group in first["scripts"].items() if group["languages"] > 1]
  yield _line("worst / best tokens per character, all", columns,
              lambda column: f"{column['all']['worst_to_best']:.2f}")
  for name in several:
    yield _line(f"inside {name} ({first['scripts'][name]['languages']} languages)", columns,
                lambda column, name=name: f"{column['scripts'][name]['worst_to_best']:.2f}")
  for rate in list(RATES)[:3]:
    yield _line(f"{RATES[rate]}, mean over languages", columns,
                lambda column, rate=rate: f"{column['all'][rate]:{FORMS[rate]}}")
  yield _line("worst five", columns, lambda column: ", ".join(column["all"]["worst"]))


def _line(name, columns, cell):
  return f"<tr><td>{name}</td>" + "".join(f"<td>{cell(c)}</td>" for c in columns.values()) + "</tr>"


def _body(result, shown):
  """One line a language, by script, the first column's best first; a script's means above them."""
  columns, first = result["columns"], next(iter(result["columns"].values()))
  rank = {code: row["tokens_per_character"] for code, row in first["languages"].items()}
  longest = max(row["tokens_per_character"] for column in columns.values()
                for row in column["languages"].values())
  for name, group in first["scripts"].items():
    means = [column["scripts"][name] for column in columns.values()]
    yield (f"<tr class=script><th>{name}</th><td class=n>{group['languages']}</td>"
           + _cells(means, shown, longest) + "</tr>")
    for code in sorted((code for code in rank if script(code) == name), key=rank.get):
      size = result["text"][code]["bytes"]
      rows = [column["languages"][code] for column in columns.values()]
      name = f"{html.escape(languages.find(code).name)} ({code}){' *' if size < SMALL else ''}"
      yield (f"<tr><td>{name}</td><td class=n>{size:,}</td>"
             + _cells(rows, shown, longest) + "</tr>")


def _cells(rows, shown, longest):
  return "".join(_cell(rate, row.get(rate), longest) for rate in shown for row in rows)


def _cell(rate, value, longest):
  if value is None:
    return "<td>-</td>"
  if rate == "tokens_per_character":
    return f"<td><i style='width:{5 * value / longest:.2f}em'></i>{value:.3f}</td>"
  return f"<td class=n>{value:{FORMS[rate]}}</td>"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Fairness of the vocabulary</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
td, th {{ padding: 1px 10px; text-align: left; white-space: nowrap; }}
.n {{ text-align: right; color: #666; }}
.script th, .script td {{ padding-top: 1em; border-bottom: 1px solid #999; font-weight: bold; }}
p {{ max-width: 60em; }}
i {{ display: inline-block; height: .7em; background: #4a7fb5; margin-right: .5em; }}
</style>
<h1>Fairness of the vocabulary</h1>
<p>Measured on {text}. * below {small} bytes of it.</p>
<ul>
{rules}
</ul>
<p>Tokens per character: fewer is better. A character is a Unicode code point, and scripts put more
or less into one: a Han character is a word, a Hangul one a syllable, a Latin one a sound. Languages
of different scripts therefore differ by nature, whatever the vocabulary, and the ratio of the worst
language to the best is given over all of them and inside each script. Fragments are tokens whose
bytes are only a part of a character. The figures of a script are means over its languages.</p>
<table><tr><th></th>{names}</tr>
{summary}
</table>
{picture}
<table><tr><th rowspan=2>language</th><th rowspan=2>bytes</th>{groups}</tr><tr>{heads}</tr>
{body}
</table>
<p>Round trip: {lines} lines encoded and decoded; lines that came back changed: {exceptions}.</p>
</html>
"""


# --- the plot -----------------------------------------------------------------------------------


def check_plot():
  """Refuses, before anything long begins, to plot without the package."""
  if not importlib.util.find_spec("matplotlib"):
    raise run.Refused("config.plot needs matplotlib: pip install 'tiny_aya_jax[report]', or set "
                      "--config.plot=False")


def plot(result, path):
  """Writes an SVG: one line a language, by script, best first; a mark for each tokenizer."""
  import matplotlib
  from matplotlib.figure import Figure

  columns, first = result["columns"], next(iter(result["columns"].values()))["languages"]
  order = sorted(first, key=lambda code: (script(code), first[code]["tokens_per_character"]))
  with matplotlib.rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):  # equal bytes each time
    figure = Figure(figsize=(8, 1.5 + 0.17 * len(order)), layout="constrained")
    axes = figure.subplots()
    for (name, column), mark in zip(columns.items(), "os^vDP*X<>" * len(columns)):
      rates = [column["languages"][code]["tokens_per_character"] for code in order]
      axes.plot(rates, range(len(order)), mark, label=name, markersize=4, alpha=0.7)
    for row in range(1, len(order)):
      if script(order[row]) != script(order[row - 1]):
        axes.axhline(row - 0.5, color="0.8", linewidth=0.8)
    axes.set_yticks(range(len(order)), order, fontsize=7)
    axes.set(ylim=(len(order) - 0.5, -0.5), xlim=(0, None), xlabel="tokens per character")
    axes.legend(loc="upper right")
    figure.savefig(path, metadata=dict(Date=None))
