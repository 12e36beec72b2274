"""The evaluation as a terminal table and as one self-contained HTML page, no library, no network."""

import html

from tiny_aya_jax import languages

SMALL = 10_000  # bytes of validation text below which a figure is marked: too little to rank by


def table(result):
  """Plain text: one line a language, its bits per byte at every checkpoint, baselines beside."""
  columns = _columns(result)
  lines = [f"{'bits per byte':24}{'bytes':>9}" + "".join(f"{name:>14}" for name in columns)]
  for code, size in result["bytes"].items():
    cells = "".join(_cell(columns[name].get(code)) for name in columns)
    lines.append(f"{code + (' *' if size < SMALL else ''):24}{size:>9,}{cells}")
  means = "".join(_cell(_mean(columns[name])) for name in columns)
  lines.append(f"{'mean':24}{sum(result['bytes'].values()):>9,}{means}")
  if any(size < SMALL for size in result["bytes"].values()):
    lines.append(f"* below {SMALL:,} bytes of validation text")
  return "\n".join(lines)


def page(result):
  """HTML: languages grouped by region, a bar per checkpoint, sorted by the last checkpoint."""
  columns = _columns(result)
  longest = max(value for column in columns.values() for value in column.values() if value)
  last = list(result["bits_per_byte"].values())[-1]
  groups = {}
  for code in sorted(result["bytes"], key=last.get):
    groups.setdefault(_place(code), []).append(code)
  head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
  body = []
  for place, codes in sorted(groups.items()):
    body.append(f"<tr><th colspan={len(columns) + 2} class=region>{html.escape(place)}</th></tr>")
    for code in codes:
      mark = " *" if result["bytes"][code] < SMALL else ""
      bars = "".join(_bar(columns[name].get(code), longest) for name in columns)
      body.append(f"<tr><td>{html.escape(_name(code))}{mark}</td>"
                  f"<td class=n>{result['bytes'][code]:,}</td>{bars}</tr>")
  means = "".join(_bar(_mean(columns[name]), longest) for name in columns)
  body.append(f"<tr class=mean><td>mean of {len(result['bytes'])} languages</td><td></td>{means}</tr>")
  return _PAGE.format(head=head, body="\n".join(body), small=f"{SMALL:,}")


def _columns(result):
  """{column: {code: bits per byte or None}}: checkpoints, then what costs nothing."""
  columns = dict(result["bits_per_byte"])
  for name in ("xz_alone", "xz_given", "ngram"):
    if "baselines" in result:
      columns[name] = {code: row[name] for code, row in result["baselines"].items()}
  return columns


def _cell(value):
  return f"{'-' if value is None else f'{value:.3f}':>14}"


def _bar(value, longest):
  if value is None:
    return "<td>-</td>"
  return f"<td><i style='width:{8 * value / longest:.2f}em'></i>{value:.3f}</td>"


def _mean(column):
  values = [value for value in column.values() if value is not None]
  return sum(values) / len(values)


def _place(code):
  return languages.find(code).region if code != "code" else "Code"


def _name(code):
  return f"{languages.find(code).name} ({code})" if code != "code" else "Code"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Bits per byte per language</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: 1px 10px; text-align: left; white-space: nowrap; }}
.n {{ text-align: right; color: #666; }}
.region {{ padding-top: 1em; border-bottom: 1px solid #999; }}
.mean td {{ border-top: 2px solid #333; font-weight: bold; }}
i {{ display: inline-block; height: .7em; background: #4a7fb5; margin-right: .5em; }}
</style>
<h1>Bits per byte per language</h1>
<p>Lower is better; held-out text, every row once, special tokens cost bits and count no bytes.
* below {small} bytes of validation text.</p>
<table><tr><th>language</th><th>bytes</th>{head}</tr>
{body}
</table></html>
"""
