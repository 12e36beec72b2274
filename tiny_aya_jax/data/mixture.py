"""Which source does global row n come from, and which row of that source? Shares and rows in.

Not a sampler and not I/O: a closed form on integers, so that the answer for any row is the same on
every host, for any batch size, and after any restart. Row n of the run belongs to the source whose
interval holds  u_n = (a n + b) mod 2^64,  a ~ 2^64 / golden ratio  (a Kronecker sequence: realised
counts stay within O(log n) of exact), and it is that source's row number

  #{k < n : u_k < t} = sum_k floor((a k + b) / 2^64) - floor((a k + b - t) / 2^64)

taken at both ends of the interval; the sums are Euclid-like (`_floor_sum`), exact, in O(log n).

Weights (rules.py) are shares of TOKENS, or of BYTES; a plan holds shares of rows, because sources
fill rows differently. A plan is JSON: sources, and an append-only list of segments, each with
thresholds from its start_row on, and each source's counter at that row, so that a cooldown mixture
skips and repeats nothing.

A run that imitates a longer one reads a part of each source (`cut`), so that it repeats as often.
"""

import bisect
import collections
import functools
import math

import numpy as np

from tiny_aya_jax import languages
from tiny_aya_jax import run
from tiny_aya_jax.data import rules

weights = rules.weights  # the frozen name
MODULUS = 1 << 64
STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: no rational approximates it well
OFFSET = 1 << 63  # the first row comes from the middle of the table, not from its first source
# Thresholds are whole numbers of 2^-40: exact in JSON readers that know only doubles, and coarse
# enough that a power function rounding differently on another machine gives the same plan.
UNIT = 1 << 40
WEB_BYTES_A_TOKEN = 4  # of `web`; assumed
MOST_EPOCHS = 4  # up to here repeats are worth almost as much as new text (arXiv 2305.16264)


def plan(sources, rule):
  """Manifests (or dicts with their name, rows, tokens, ...) and a rule -> a JSON-able plan.

  sources: dicts with "name", "language", "path", "rows", "tokens", "bytes", "sha256", "T" and
  "tokenizer_sha256", as `loader.read_manifests` returns them; "bytes" may be absent if the rule's
  unit is tokens.
  """
  if not sources:
    raise run.Refused("a mixture needs at least one source, and there is none")
  made = dict(
      version=1,
      T=_same(sources, "T"),
      tokenizer_sha256=_same(sources, "tokenizer_sha256"),
      sources=[],
      segments=[],
  )
  return append(made, 0, rule, sources)


def append(plan, start_row, rule, sources=None):
  """-> a new plan that follows `rule` from global row `start_row` on; counters go on.

  rule is a mixture rule, or the weights of an explicit one. `sources` (optional) is the source
  list from now on: new ones start at their row 0, ones left out keep their counter, and one whose
  rows changed is refused, because its counter would point at other rows.
  """
  segments = plan["segments"]
  if segments and start_row < segments[-1]["start_row"]:
    raise run.Refused(
        f"a mixture cannot change at row {start_row}: the plan already changes at row "
        f"{segments[-1]['start_row']}; segments are only appended"
    )
  available = plan["sources"] if sources is None else sources
  merged = _merge(plan, available)
  rule = rule if "kind" in rule else dict(kind="explicit", weights=rule)
  unit = rules.checked(rule)["unit"]
  share = weights(_sizes(available, unit), rule)
  offsets = counts(plan, start_row)
  segment = dict(
      start_row=int(start_row),
      rule=rules.words(rule),
      asked=sorted(rules.asked(rule)),
      epochs=rule.get("epochs"),
      unit=unit,
      weights=[round(share.get(source["name"], 0.0), 12) for source in merged],
      thresholds=_thresholds(merged, share, unit),
      offsets=[offsets.get(source["name"], 0) for source in merged],
  )
  return {**plan, "sources": merged, "segments": [*segments, segment]}


def cut(sources, share, sizes):
  """Simulated epoching: the sources with as many rows as `share` of what the imitated run has.

  share: this run's tokens over those of the run it imitates, which reads sizes[name] tokens of a
  source once in an epoch. Rules, caps and epochs then count `size` = share * sizes[name] tokens, a
  fraction of a row too; rows are whole, at least one and at most all there are. Which rows stay is a
  random choice that depends on the source's name alone. Adds "of" (rows there are) and "size".
  """
  found = []
  for source in sources:
    size = share * sizes[source["name"]]
    rows = min(max(round(size * source["rows"] / source["tokens"]), 1), source["rows"])
    part = rows / source["rows"]
    amounts = {unit: max(round(source[unit] * part), 1) for unit in rules.UNITS if unit in source}
    found.append(source | amounts | dict(rows=rows, of=source["rows"], size=size))
  return found


def cut_sizes(sources, given):
  """{source name: tokens that the imitated run has of it}.

  given: "rows", as many as are packed; "web", FineWeb-2's bytes of the language at the bytes a token
  of its rows, shared by its sources as they are packed; or {language or source: tokens}.
  """
  if given == "rows":
    return {source["name"]: source["tokens"] for source in sources}
  packed = {}
  for source in sources:
    tokens, size = packed.get(source["language"], (0, 0))
    packed[source["language"]] = tokens + source["tokens"], size + source["bytes"]
  found = {}
  for source in sources:
    name, code = source["name"], source["language"]
    part = source["tokens"] / packed[code][0]
    if given == "web":
      if code not in _WEB:
        raise run.Refused(f"FineWeb-2 has no size of {code}: leave it out of the mixture's rows, or give "
                          "config.data.cut.sizes a JSON file of tokens")
      found[name] = _WEB[code] * source["tokens"] / packed[code][1]
      continue
    size, share = (given[name], 1) if name in given else (given.get(code), part)
    if not isinstance(size, (int, float)) or not 0 < size < math.inf:
      raise run.Refused(f"config.data.cut.sizes gives {size!r} tokens for {name}: expected a number above 0 "
                        "for it, or for its language")
    found[name] = size * share
  return found


def web(T):
  """Sources of all languages as large as FineWeb-2 has them, for plans of text that is not packed yet."""
  return [
      dict(name=f"{code}/web", language=code, path="", sha256="", rows=max(1, size // WEB_BYTES_A_TOKEN // T),
           T=T, tokens=size // WEB_BYTES_A_TOKEN, bytes=size, tokenizer_sha256="")
      for code, size in _WEB.items()
  ]


_WEB = {language.code: language.fineweb_bytes for language in languages.LANGUAGES}


def _sizes(sources, unit):
  return {source["name"]: _size(source, unit) for source in sources}


def _size(source, unit):
  """What rules and epochs count: what there is of a source, or of a cut one what it stands for."""
  if unit not in source:
    raise run.Refused(
        f"source {source['name']!r} comes from a plan that counts no {unit}: set the mixture's "
        "unit to tokens"
    )
  return source["size"] * source[unit] / source["tokens"] if "size" in source else source[unit]


def with_budget(rule, sources, rows):
  """The rule with the budget of so many rows, if it reads one and none is set, in its unit.

  How much so many rows hold depends on which languages are drawn, and that on the budget: the
  fixed point, reached in a few rounds, so that an epoch cap holds of the rows that are read.
  """
  if "budget" not in rules.READS.get(rule.get("kind"), ()) or rule.get("budget") is not None:
    return rule
  unit = rules.checked(rule | dict(budget=1))["unit"]
  sizes, rows_per_unit = _sizes(sources, unit), {s["name"]: s["rows"] / s[unit] for s in sources}
  budget = rows * sum(sizes.values()) / sum(source["rows"] for source in sources)
  for _ in range(20):
    share = weights(sizes, rule | dict(budget=budget))
    budget = rows / math.fsum(part * rows_per_unit[name] for name, part in share.items())
  return rule | dict(budget=round(budget))


def _merge(plan, sources):
  merged = {source["name"]: source for source in plan["sources"]}
  seen = set()
  for source in sources:
    name, old = source["name"], merged.get(source["name"])
    if name in seen:
      raise run.Refused(f"source {name!r} is given twice: give one of them another source name")
    seen.add(name)
    for field in ("T", "tokenizer_sha256"):
      if field in source and source[field] != plan[field]:
        raise run.Refused(
            f"source {name!r} has {field} {source[field]}, the plan has {plan[field]}: "
            "pack it again with the plan's"
        )
    if source["rows"] < 1:
      raise run.Refused(f"source {name!r} has {source['rows']} rows: leave it out of the mixture")
    if old and _what(old) != _what(source):
      raise run.Refused(
          f"the rows of source {name!r} changed ({_rows(old)} before, {_rows(source)} now): "
          "its counter would point at other rows; pack the new ones under another source name"
      )
    merged[name] = {field: source[field] for field in (*_SOURCE_FIELDS, *_MORE) if field in source}
  return list(merged.values())


def _what(source):
  """What a source's counter points into."""
  return source["rows"], source["sha256"], source.get("of")


def _rows(source):
  return f"{source['rows']} of {source['of']} rows" if "of" in source else f"{source['rows']} rows"


_SOURCE_FIELDS = ("name", "language", "path", "rows", "tokens", "sha256")
_MORE = ("bytes", "of", "size")  # older plans: no bytes; of what is not cut: neither other


def _thresholds(sources, share, unit):
  """Shares of the unit -> upper ends of each source's interval, in 2^-40, ending at 2^40."""
  rows = [share[s["name"]] * s["rows"] / s[unit] if s["name"] in share else 0.0 for s in sources]
  total = math.fsum(rows)
  widths = [round(row / total * UNIT) for row in rows]
  for source, row, width in zip(sources, rows, widths):
    if row > 0 and not width:
      raise run.Refused(
          f"source {source['name']!r} would be {row / total:.1e} of the rows, less than 2^-40: "
          "leave it out of the mixture"
      )
  widths[widths.index(max(widths))] += UNIT - sum(widths)  # rounding: a few 2^-40 to the largest
  return np.cumsum(widths).tolist()


def _same(sources, field):
  values = {source[field] for source in sources}
  if len(values) > 1:
    named = {source[field]: source["name"] for source in sources}
    raise run.Refused(
        f"sources differ in {field}: "
        + ", ".join(f"{value} ({name})" for value, name in named.items())
        + "; pack them alike"
    )
  return values.pop()


def check(plan, what):
  """Refuses, as `what`, a plan from a file that is not as `plan` and `append` make them."""
  def refuse(reason):
    raise run.Refused(f"{what} is no plan: {reason}")

  for field, kind in dict(T=int, tokenizer_sha256=str, sources=list, segments=list).items():
    if not isinstance(plan.get(field), kind) or not plan[field]:
      refuse(f"{field} is {plan.get(field)!r:.60}, expected a {kind.__name__}")
  if plan.get("version") != 1:
    refuse(f"version is {plan.get('version')!r}, expected 1")
  for source in plan["sources"]:
    if not isinstance(source, dict) or not set(_SOURCE_FIELDS) <= source.keys():
      refuse(f"a source is {source!r:.60}, expected {', '.join(_SOURCE_FIELDS)}")
    amounts = [source[key] for key in ("rows", "tokens", "bytes", "of") if key in source]
    size = source.get("size", 1)
    if not all(isinstance(amount, int) and amount > 0 for amount in amounts) or not (
        isinstance(size, (int, float)) and 0 < size < math.inf) or ("of" in source) != ("size" in source):
      refuse(f"source {source['name']!r} has {amounts} rows, tokens and bytes")
  names = [source["name"] for source in plan["sources"]]
  if len(set(names)) < len(names):
    refuse(f"a source is listed twice among {len(names)}")
  starts = []
  for segment in plan["segments"]:
    needed = {"start_row", "thresholds", "offsets"}
    if not isinstance(segment, dict) or not needed <= segment.keys():
      refuse(f"a segment is {segment!r:.60}, expected start_row, thresholds and offsets")
    ends, offsets = segment["thresholds"], segment["offsets"]
    if not isinstance(ends, list) or not isinstance(offsets, list):
      refuse(f"thresholds {ends!r:.40} and offsets {offsets!r:.40} are no lists")
    if not all(isinstance(x, int) and x >= 0 for x in (segment["start_row"], *ends, *offsets)):
      refuse("start_row, thresholds and offsets are whole numbers of at least 0")
    said = [(segment.get("rule", ""), str), (segment.get("asked", []), list)]
    if not all(isinstance(value, kind) for value, kind in said) or (
        segment.get("unit", "tokens") not in rules.UNITS):
      refuse(f"a segment's rule, asked and unit are {said!r:.60}, {segment.get('unit')!r}")
    if len(ends) != len(offsets) or not 0 < len(ends) <= len(plan["sources"]):
      refuse(f"a segment has {len(ends)} thresholds and {len(offsets)} offsets for "
             f"{len(plan['sources'])} sources")
    if ends != sorted(ends) or ends[-1] != UNIT:
      refuse(f"thresholds rise to 2^40, given {ends[-3:]} at the end")
    starts.append(segment["start_row"])
  if starts[0] != 0 or starts != sorted(starts):
    refuse(f"its segments start at rows {starts[:5]}, expected 0 and never a smaller number")


def plan_sha256(plan):
  """What decides the rows, and nothing else: not where they lie, not how the shares are written."""
  return run.fingerprint(
      dict(
          version=plan["version"],
          T=plan["T"],
          tokenizer_sha256=plan["tokenizer_sha256"],
          sources=[[s["name"], s["rows"], s["sha256"], *([s["of"]] if "of" in s else [])]
                   for s in plan["sources"]],
          segments=[
              [segment["start_row"], segment["thresholds"], segment["offsets"]]
              for segment in plan["segments"]
          ],
      )
  )


def drawn(plan):
  """{source name: width of its interval} of the sources that the plan's last segment draws from."""
  return {name: width for name, width in _widths(plan, plan["segments"][-1]).items() if width}


def _widths(plan, segment):
  """{source name: width of its interval}, 0 for sources that joined later."""
  ends = segment["thresholds"] + [UNIT] * (len(plan["sources"]) - len(segment["thresholds"]))
  return {source["name"]: end - start
          for source, start, end in zip(plan["sources"], [0, *ends], ends)}


def counts(plan, row):
  """{source name: how many of the global rows 0 .. row-1 come from it}: the sources' counters."""
  names = [source["name"] for source in plan["sources"]]
  if not plan["segments"]:
    return dict.fromkeys(names, 0)
  segment = plan["segments"][_segment_at(plan, row)]
  return dict(zip(names, _counters(plan, segment, row)))


def locate(plan, row):
  """Global row -> (index into plan["sources"], row counter of that source, epochs not removed)."""
  source_n, rank_n = locate_many(plan, row, 1)
  return int(source_n[0]), int(rank_n[0])


def locate_many(plan, start, count):
  """Global rows start .. start+count-1 -> (source int32 [count], row counter int64 [count]).

  One floor sum per source at `start`, the rest is NumPy: 3 ms for 70 sources and then 0.1 us a row.
  """
  source_parts, rank_parts = [], []
  while count:
    index = _segment_at(plan, start)
    segment, following = plan["segments"][index], plan["segments"][index + 1 : index + 2]
    here = min([count, *(later["start_row"] - start for later in following)])
    source_n = _sources_at(segment, start, here)
    source_parts.append(source_n)
    rank_parts.append(_ranks(source_n, _counters(plan, segment, start)))
    start, count = start + here, count - here
  return np.concatenate(source_parts), np.concatenate(rank_parts)


def _segment_at(plan, row):
  starts = [segment["start_row"] for segment in plan["segments"]]
  return bisect.bisect_right(starts, row) - 1


def _sources_at(segment, start, count):
  """The source of each row. uint64 arithmetic wraps, which is the modulus."""
  first = (STEP * start + OFFSET) % MODULUS
  u_n = np.uint64(first) + np.uint64(STEP) * np.arange(count, dtype=np.uint64)
  # The ends below 2^40: the source after the last of them goes up to 2^64, which uint64 lacks.
  ends = segment["thresholds"][: bisect.bisect_left(segment["thresholds"], UNIT)]
  ends = np.array(ends, np.uint64) * np.uint64(MODULUS // UNIT)
  return np.searchsorted(ends, u_n, "right").astype(np.int32)


def _counters(plan, segment, row):
  """Each source's counter at `row`, which lies in `segment`: its offset and the rows since."""
  start = segment["start_row"]
  offsets = segment["offsets"] + [0] * (len(plan["sources"]) - len(segment["offsets"]))
  if row == start:
    return list(offsets)
  below = [_below(row, t) - _below(start, t) for t in segment["thresholds"]]
  since = [upper - lower for upper, lower in zip(below, [0, *below])]
  since += [0] * (len(offsets) - len(since))
  return [offset + rows for offset, rows in zip(offsets, since)]


def _below(n, threshold):
  """#{k < n : u_k < threshold}, threshold in units of 2^-40; exact."""
  t = threshold * (MODULUS // UNIT)
  # floor((x - t) / m) = floor((x - t + m) / m) - 1, which keeps the sum's terms positive.
  over = _floor_sum(n, MODULUS, STEP, OFFSET + MODULUS - t) - n
  return _floor_sum(n, MODULUS, STEP, OFFSET) - over


@functools.lru_cache(maxsize=4096)  # one of the two sums is everyone's, and a segment's start too
def _floor_sum(n, m, a, b):
  """sum over k < n of floor((a k + b) / m), by swapping the roles of a and m as Euclid does."""
  total = 0
  while n:
    total += (n - 1) * n // 2 * (a // m) + n * (b // m)
    a, b = a % m, b % m
    n, b = divmod(a * n + b, m)
    a, m = m, a
  return total


def _ranks(source_n, counters):
  """Counter of each row's source just before that row."""
  rank_n = np.empty(len(source_n), np.int64)
  for source in np.unique(source_n):
    here = np.flatnonzero(source_n == source)
    rank_n[here] = counters[source] + np.arange(len(here))
  return rank_n


def table(plan, rows):
  """Text lines: what a run of so many rows sees of each language and region, and what it does not.

  Amounts, shares and epochs are of all rows so far; where the plan has stages, those of the stage
  that row `rows` ends stand beside.
  """
  segment = plan["segments"][_segment_at(plan, max(rows - 1, 0))]
  start, width = segment["start_row"], _widths(plan, segment)
  drawn, before = counts(plan, rows), counts(plan, start)
  columns = [drawn]
  if start:
    columns.append({name: drawn[name] - before[name] for name in drawn})
  taking = [s for s in plan["sources"] if drawn[s["name"]] or width[s["name"]]]
  unit = segment.get("unit", "tokens")
  if not all(unit in source for source in taking):
    unit = "tokens"  # sources of an earlier version's plan, which counted nothing else
  lines = [f"mixture {segment.get('rule', 'of an earlier version, which wrote down no rule')}"]
  stage = f"{' in all':14} {rows - start:>14,} rows of this stage" if start else ""
  lines.append(f"{'':12} {sum(drawn.values()):>12,} rows{stage}")
  lines += _lines("language", taking, columns, unit, lambda code: code)
  lines += _lines("region", taking, columns, unit, _region)
  return lines + _remarks(plan, segment, taking, drawn, columns[-1])


def _region(code):
  return {language.code: language.region for language in languages.LANGUAGES}.get(code, code)


def _lines(title, sources, columns, unit, key):
  """A line for each key(language): amount, share of the whole and epochs, for each column."""
  size, seen = {}, [{} for _ in columns]
  for source in sources:
    name = key(source["language"])
    size[name] = size.get(name, 0) + _size(source, unit)
    for drawn, amounts in zip(columns, seen):
      amount = drawn[source["name"]] * source[unit] / source["rows"]
      amounts[name] = amounts.get(name, 0) + amount
  totals = [math.fsum(amounts.values()) or 1 for amounts in seen]
  yield f"{title:12} " + "   ".join(f"{unit:>10} {'share':>8} {'epochs':>8}" for _ in seen)
  for name in sorted(size, key=seen[0].get, reverse=True):
    cells = [(amounts[name], amounts[name] / total, amounts[name] / size[name])
             for amounts, total in zip(seen, totals)]
    yield f"{name:12} " + "   ".join(
        f"{_short(amount):>10} {share:>8.2%} {epochs:>8.2f}" for amount, share, epochs in cells
    )


def _remarks(plan, segment, taking, drawn, stage):
  """Lines for what a reader would miss in the table."""
  width = _widths(plan, segment)
  have = {source["language"] for source in plan["sources"]}
  takes = {source["language"] for source in taking if width[source["name"]]}
  read = {source["language"] for source in taking if stage[source["name"]]}
  most = min(MOST_EPOCHS, segment.get("epochs") or MOST_EPOCHS)  # a cap holds of a stage alone
  passes = {source["name"]: source["rows"] * _size(source, "tokens") / source["tokens"] for source in taking}
  worn = [
      f"{name} {drawn[name] / rows:.1f}" for name, rows in passes.items()
      if drawn[name] > most * rows + 1  # a row may be rounded up
  ]
  cut = [source for source in taking if "of" in source]
  spared = collections.Counter(
      source["name"].partition("/")[2] for source in plan["sources"]
      if source["language"] in takes and not width[source["name"]])
  remarks = {
      f"warning: more than {most:g} epochs of {len(worn)} sources": worn,
      # What a cut cannot do: a row is not divided, and there are no more rows than there are.
      "warning: cut to one row, which is more than their part, and so repeated less than in the imitated run":
          [f"{s['name']} ({passes[s['name']]:.2g} of a row)" for s in cut if passes[s["name"]] < 0.5],
      "warning: fewer rows than their part, and so repeated more than in the imitated run":
          [f"{s['name']} ({s['of']} rows of {passes[s['name']]:.0f})" for s in cut
           if passes[s["name"]] > s["of"] + 0.5],
      "sources left out": [f"{name} of {count} languages" for name, count in spared.items()],
      "less than one row, although the mixture draws from them": sorted(takes - read),
      "asked for, but without rows": sorted(set(segment.get("asked", ())) - have),
      "with rows, but left out by the mixture": sorted(have - takes),
  }
  return [f"{what}: {', '.join(names)}" for what, names in remarks.items() if names]


def _short(tokens):
  for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if tokens >= size:
      return f"{tokens / size:.2f}{letter}"
  return f"{tokens:.0f}"
