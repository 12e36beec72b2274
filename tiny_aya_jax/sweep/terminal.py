"""A sweep as text for a terminal: arms ranked, what is recommended, regions, and the languages
with least and most text. What does not fit is named."""

import textwrap

from tiny_aya_jax.sweep import verdict, views

WIDE = 132  # characters of a terminal's line
NAME, HEAD = 24, 11  # characters of a row's name and of a line of a column's
END = 10  # languages with the least text, and with the most


def table(result):
  """Plain text, no line longer than WIDE."""
  view = views.of(result)
  parts = [_ranking(result, view), _sentences(view), _regions(view), _ends(result, view),
           _failures(view)]
  return "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines)


def _ranking(result, view):
  seen = view["seen"]
  if not seen["arms"]:
    return
  goal = verdict.aim(result["objective"], len(seen["languages"]))
  yield from _wrapped(f"{result['name']}: bits per byte, {goal}; lower is better")
  yield (f"{'arm':{NAME}}{'objective':>10} {'+- error':10}{'from best':>9} {'95% interval':20}"
         f"{'mean':>7} {'worst language':17}{'worst region':20}{'seeds':>5} >{views.EPOCHS}")
  for arm in seen["arms"]:
    yield _line_of(view, arm)
  yield (f"* on the front of mean against worst language; >{views.EPOCHS}: languages above "
         f"{views.EPOCHS} epochs")


def _line_of(view, arm):
  error = "" if arm["error"] is None else f"+- {arm['error']:.4f}"
  apart, above = arm["difference"], views.above(view, arm["arm"])
  ahead = f"{apart['value']:+.4f}" if apart else ""
  bounds = (f"{apart['low']:+.4f} to {apart['high']:+.4f}"
            if apart and apart["told"] is not None else "")
  objective = f"{len(arm['broken'])} above" if arm["broken"] else f"{arm['objective']:.4f}"
  worst = f"{arm['worst']['value']:.3f} {arm['worst']['language']}"
  region = f"{arm['region']['value']:.3f} {arm['region']['region']}"
  return (f"{_cut(arm['arm'], NAME - 2):{NAME - 2}}{'*' if arm['front'] else ' '} {objective:>10} "
          f"{error:10}{ahead:>9} {bounds:20}{arm['mean']:7.4f} "
          f"{_cut(worst, 16):17}{_cut(region, 19):20}{len(arm['seeds']):>5} "
          f"{above[1] if above else '-':>2}").rstrip()


def _cut(text, width):
  return text if len(text) <= width else text[:width - 1] + "…"


def _wrapped(text):
  return textwrap.wrap(text, WIDE) if text else []


def _sentences(view):
  for words in ("recommendation", "warning", "losses", "unfinished"):
    yield from _wrapped(view["seen"]["words"][words])


def _regions(view):
  arms, left = _fitting(view)
  if not arms:
    return
  yield from _heads("region", arms)
  for region, codes in view["regions"].items():
    yield _row(f"{region} ({len(codes)})",
               [_right(f"{views.mean(view['columns'][arm], codes):.4f}", arm) for arm in arms])
  codes = view["seen"]["languages"]
  yield _row(f"mean ({len(codes)})",
             [_right(f"{views.mean(view['columns'][arm], codes):.4f}", arm) for arm in arms])
  if left:
    yield from _wrapped(f"no room here for {', '.join(left)}: see the page")


def _fitting(view):
  """(arms that fit beside a name, in the order of the page; the others), the best ones first."""
  room, fitting = WIDE - NAME, []
  for arm in view["seen"]["arms"]:
    room -= _width(arm["arm"])
    if room >= 0 and arm["arm"] in view["shown"]:
      fitting.append(arm["arm"])
  arms = [arm for arm in view["shown"] if arm in fitting]
  return arms, [arm["arm"] for arm in view["seen"]["arms"] if arm["arm"] not in arms]


def _head(arm):
  """The lines of a column's name."""
  return textwrap.wrap(arm, HEAD) or [""]


def _width(arm):
  return max(7, *map(len, _head(arm))) + 2


def _heads(name, arms):
  """The names of columns, their last lines level."""
  lines = max(len(_head(arm)) for arm in arms)
  for line in range(-lines, 0):
    words = ["" if line < -len(_head(arm)) else _head(arm)[line] for arm in arms]
    yield _row(name if line == -1 else "", map(_right, words, arms))


def _right(text, arm):
  return f"{text:>{_width(arm)}}"


def _row(name, cells):
  return f"{_cut(name, NAME):{NAME}}{''.join(cells)}"


def _ends(result, view):
  """The languages with least text and with most, under each arm."""
  arms = _fitting(view)[0]
  if not arms:
    return
  order = sorted(view["seen"]["languages"], key=lambda code: views.size(result, code))
  least = order[:END]
  most = [code for code in order[-END:] if code not in least]
  for words, codes in (("least text", least), ("most text", most)):
    if codes:
      yield from _heads(words, arms)
      for code in codes:
        yield _row(f"  {code:10}{views.count(views.size(result, code)):>8}B",
                   [_right(f"{view['columns'][arm][code]:.3f}", arm) for arm in arms])


def _failures(view):
  for row in view["seen"]["failures"]:
    yield from _wrapped(f"{row['trial']} {row['state']}: {row['why']}")
