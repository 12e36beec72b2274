"""A sweep as one HTML page: no library, no script, no network, and every figure is text.

Judges nothing (verdict.py does). `result` is the record of a sweep, sweep.json. Arms stand side by
side along the axis; a language's row is shaded by how far each arm is above the best one for it.
"""

import html
import shlex
import statistics

from tiny_aya_jax.evaluate import style
from tiny_aya_jax.evaluate.views import signed
from tiny_aya_jax.sweep import plots, sheet, verdict, views

CHANGES = 10  # of shares, from the recommended arm to a law's optimum
DARKEST = 0.95  # the share of the differences in a table that the shades tell apart


def page(result):
  """HTML, complete without scripts."""
  view = views.of(result)
  body = [part for section in (_head, _arms, _plots, _languages, _sensitive, _spent, _laws, _tests,
                               _failures, _colophon) for part in section(result, view)]
  return style.document(f"Sweep: {result['name']}", sheet.css(len(view["shown"])), body)


def _text(value):
  return html.escape(str(value))


def _head(result, view):
  words = view["seen"]["words"]
  yield f"<h1>Sweep: <bdi>{_text(result['name'])}</bdi></h1>"
  yield f"<p class=say><b>{_text(words['recommendation'])}</b></p>"
  if words["warning"]:
    yield f"<p class=warning><b>Careful.</b> {_text(words['warning'])}</p>"
  if words["losses"]:
    yield f"<p>A mean hides who loses. {_text(words['losses'])}</p>"
  if words["unfinished"]:
    yield f"<p class=warning>{_text(words['unfinished'])}</p>"
  yield f"<p class=facts>{' '.join(_facts(result, view))}</p>"


def _facts(result, view):
  """Sentences on what was run."""
  seen = view["seen"]
  goal = verdict.aim(result["objective"], len(seen["languages"]))
  yield f"Objective: {_text(goal)}; lower is better."
  states = ", ".join(f"{count} {state}" for state, count in seen["states"].items()) or "none"
  yield f"{len(result['trials'])} trials of {_count(result['tokens'])} tokens: {_text(states)}."
  yield f"Varied: {_text(', '.join(result['axes']))}."
  if result["target"]:
    yield (f"The data are cut so that a trial repeats them as a run of "
           f"{_count(result['target']['tokens'])} tokens would (sizes: "
           f"{_text(result['target']['sizes'])}).")
  if seen["noise"]:
    yield (f"Noise, the standard deviation between seeds of one arm: objective "
           f"{seen['noise']['objective']:.4f}, mean {seen['noise']['mean']:.4f}, "
           f"{seen['noise']['freedom']} degrees of freedom. Intervals are 95%, of one comparison "
           "each; what is told of single languages holds for all of them together.")


def _count(value):
  return views.count(value).replace("k", " thousand").replace("M", " million").replace(
      "G", " billion").replace("T", " trillion").replace(".0 ", " ")


# --- the arms -----------------------------------------------------------------------------------


def _arms(result, view):
  seen = view["seen"]
  if not seen["arms"]:
    return
  kind = result["objective"]["kind"]
  heads = [name for name, _ in _arm_cells(view, seen["arms"][0], kind)]
  yield "<h2 id=arms>Arms, best first</h2><table class=arms><thead><tr><th scope=col>arm</th>"
  yield "".join(f"<th scope=col>{name}</th>" for name in heads) + "</tr></thead><tbody>"
  for arm in seen["arms"]:
    chosen = arm["arm"] == seen["recommended"]
    cells = "".join(f"<td data-name='{name}'>{cell}</td>" for name, cell in
                    _arm_cells(view, arm, kind))
    yield (f"<tr{' class=chosen' if chosen else ''}><th scope=row><bdi>{_text(arm['arm'])}</bdi>"
           f"{' <small>recommended</small>' if chosen else ''}</th>{cells}</tr>")
  yield "</tbody></table><p class=key>±: standard deviation between an arm's own seeds. Front:"
  yield "of mean against worst language; an arm is beaten by one that is better in both.</p>"


def _arm_cells(view, arm, kind):
  """(head, HTML) of a row; a mean that is the objective stands there once."""
  yield "mean" if kind == "mean" else "objective", _objective(arm)
  yield "above the recommended", _apart(arm)
  if kind != "mean":
    yield "mean", f"{arm['mean']:.4f}{_spread_of(arm['mean_deviation'])}"
  yield "worst language", (f"{arm['worst']['value']:.3f} "
                           f"<small>{_text(arm['worst']['language'])}</small>")
  yield "worst region", (f"{arm['region']['value']:.3f} "
                         f"<small>{_text(arm['region']['region'])}</small>")
  lost = f" <small class=worse>{arm['lost']} lost</small>" if arm["lost"] else ""
  yield "seeds", f"{len(arm['seeds'])}{lost}"
  above = views.above(view, arm["arm"])
  yield "most epochs", (f"{views.repeats(above[0])} <small>{above[1]} languages above "
                        f"{views.EPOCHS}</small>" if above else "–")
  beaten = arm["dominated_by"]
  yield "front", ("on it" if arm["front"] else
                  f"<small>beaten by {_text(beaten[0])}"
                  f"{f' and {len(beaten) - 1} more' if beaten[1:] else ''}</small>")


def _spread_of(deviation):
  return "" if deviation is None else f" ± {deviation:.4f}"


def _objective(arm):
  if arm["broken"]:
    most = max(arm["broken"], key=arm["broken"].get)
    return (f"<b class=worse>{len(arm['broken'])} above the floor</b> <small>most: {_text(most)} "
            f"{arm['broken'][most]:.3f}</small>")
  return f"<b>{arm['objective']:.4f}</b>{_spread_of(arm['deviation'])}"


def _apart(arm):
  apart = arm["difference"]
  if not apart:
    return "–"
  if apart["told"] is None:
    return f"{signed(apart['value'], '.4f')} <small>no interval</small>"
  seeds = f"; {apart['seeds']:,} seeds of each would tell" if apart["seeds"] else ""
  words = "" if apart["told"] else f"<br>cannot be told apart{seeds}"
  paired = ", paired by seed" if apart["paired"] else ""
  return (f"{signed(apart['value'], '.4f')} <small>{signed(apart['low'], '.4f')} to "
          f"{signed(apart['high'], '.4f')}{paired}{words}</small>")


def _plots(result, view):
  figures = [*plots.front(result, view), *plots.curves(result, view)]
  if figures:
    yield f"<h2 id=plots>What is traded for what</h2><div class=plots>{''.join(figures)}</div>"


# --- every language under every arm -------------------------------------------------------------


def _languages(result, view):
  """Means of regions, then languages: bits per byte, shaded by the difference from the best."""
  if not view["columns"]:
    return
  yield "<h2 id=languages>Every language under every arm</h2><p class=key>Bits per byte, mean of"
  yield "an arm's seeds; by region, the language with the least text first. The best arm is"
  yield "<b class=best>underlined</b>; the stronger a figure's ground, the further it is above it."
  yield "Spread: worst arm less best, and how many standard deviations of noise that is."
  yield f"{_rest(view)}</p>"
  yield f"<table class=heat>{_heat_head(view, 'text', 'spread')}"
  scale = _scale(view)
  yield f"<tbody>{_mean_row(view, 'All languages', view['seen']['languages'], scale)}</tbody>"
  for region, codes in view["regions"].items():
    yield f"<tbody>{_mean_row(view, region, codes, scale)}"
    yield from (_language_row(result, view, code, scale) for code in codes)
    yield "</tbody>"
  yield "</table>"


def _rest(view):
  left = views.left_out(view)
  return (f"Beside the {len(view['shown'])} best arms there is no room for "
          f"{_text(', '.join(left))}: they are in sweep.json." if left else "")


def _heat_head(view, second, last):
  heads = "".join(f"<th scope=col{_chosen(view, arm)}><bdi>{_text(arm)}</bdi></th>"
                  for arm in view["shown"])
  end = f"<th scope=col class=spread>{last}</th>" if last else ""
  return (f"<thead><tr><th scope=col>language</th><th scope=col>{second}</th>{heads}{end}</tr>"
          "</thead>")


def _chosen(view, arm):
  return " class=chosen" if arm == view["seen"]["recommended"] else ""


def _scale(view):
  """The difference from a row's best that is shaded darkest."""
  apart = sorted(view["columns"][arm][code] - view["bests"][code]
                 for arm in view["shown"] for code in view["seen"]["languages"])
  return apart[int(DARKEST * (len(apart) - 1))] or 1


def _mean_row(view, name, codes, scale):
  means = {arm: views.mean(view["columns"][arm], codes) for arm in view["columns"]}
  best, worst = min(means.values()), max(means.values())
  noise = view["seen"]["noise"]
  deviation = noise and noise["regions"].get(name, noise["mean"])
  cells = "".join(_heat(view, arm, means[arm], best, scale, 4) for arm in view["shown"])
  over = (worst - best) / deviation if deviation else None
  return (f"<tr class=region><th scope=rowgroup>{_text(name)} <i>{len(codes)}</i></th><td></td>"
          f"{cells}{_spread(worst - best, over, 4)}</tr>")


def _heat(view, arm, value, best, scale, digits):
  shade = round(100 * min((value - best) / scale, 1))
  classes = ["best"] * (value == best) + ["chosen"] * (arm == view["seen"]["recommended"])
  return (f"<td style=--h:{shade}{_classes(classes)}>{value:.{digits}f}</td>")


def _classes(names):
  return f" class='{' '.join(names)}'" if names else ""


def _spread(spread, over_noise, digits):
  times = f" <small>{over_noise:.{0 if over_noise >= 10 else 1}f}×</small>" if over_noise else ""
  return f"<td class=spread>{spread:.{digits}f}{times}</td>"


def _language_row(result, view, code, scale):
  row = view["seen"]["sensitivity"]["languages"][code]
  cells = "".join(_heat(view, arm, view["columns"][arm][code], view["bests"][code], scale, 3)
                  for arm in view["shown"])
  return (f"<tr>{_name(result, code)}<td>{_bytes(result, code)}</td>{cells}"
          f"{_spread(row['spread'], row['over_noise'], 3)}</tr>")


def _name(result, code):
  return (f"<th scope=row>{_text(result['languages'][code]['name'])} "
          f"<i>{_text(code)}</i></th>")


def _bytes(result, code):
  return f"{views.count(views.size(result, code))}B" if views.size(result, code) else "–"


def _sensitive(result, view):
  """Who gains and who loses from one end of the axis to the other."""
  seen = view["seen"]["sensitivity"]
  if not seen["ends"]:
    return
  first, last = (f"<bdi>{_text(arm)}</bdi>" for arm in seen["ends"])
  level = len(seen["languages"]) - len(seen["gain"]) - len(seen["lose"])
  told = f", {level} that cannot be told" if view["seen"]["noise"] else ", noise unknown"
  along = seen["size_correlation"]
  along = ("" if along is None else " Rank correlation of the change with the amount of text: "
           f"{signed(along, '.2f')}.")
  yield (f"<h2 id=sensitive>Who gains and who loses</h2><h3>{first} → {last}: <b class=better>"
         f"{len(seen['gain'])} gain</b>, <b class=worse>{len(seen['lose'])} lose</b>{told}</h3>"
         f"<p class=key>Change in bits per byte, most first, and the rank correlation of bits per "
         f"byte with x.{along}</p><div class=plots>")
  for words, codes in (("Gain", seen["gain"]), ("Lose", seen["lose"])):
    rows = "".join(_moved(result, seen["languages"][code], code) for code in codes)
    yield f"<div><h3>{words}</h3><ul class=change>{rows}</ul></div>" if codes else ""
  yield "</div>"


def _moved(result, row, code):
  side = " class=worse" if row["change"] > 0 else ""
  along = "" if row["correlation"] is None else signed(row["correlation"], ".1f")
  return (f"<li{side} title='{_text(result['languages'][code]['name'])}'>{_text(code)}"
          f"<span>{along}</span>{signed(row['change'], '.3f')}</li>")


# --- what was spent -----------------------------------------------------------------------------


def _spent(result, view):
  """Epochs and tokens of every language under every arm."""
  codes = [code for code in result["languages"]
           if any(code in view["epochs"][arm] for arm in view["epochs"])]
  if not codes:
    return
  yield "<details><summary><h2 id=spent>Epochs and tokens of every language</h2></summary>"
  yield f"<p class=key>Epochs, as the imitated run would repeat text (▲ above {views.EPOCHS}),"
  yield "and below them the tokens that a trial drew. Size: tokens of the language's text, cut as"
  yield f"for the imitated run (* below {_row_words(result)}). {_rest(view)}</p>"
  yield f"<table class=heat>{_heat_head(view, 'size', None)}"
  for region, members in views.regions(result, codes).items():
    yield (f"<tbody><tr class=region><th scope=rowgroup>{_text(region)} <i>{len(members)}</i></th>"
           f"<td></td>{'<td></td>' * len(view['shown'])}</tr>")
    yield from (_spent_row(result, view, code) for code in members)
    yield "</tbody>"
  yield "</table></details>"


def _row_words(result):
  return f"a row of {result['row']:,} tokens"


def _spent_row(result, view, code):
  row, size = result["row"], result["sizes"].get(code)
  few = "<b>*</b>" if size is not None and size < row else ""
  cells = "".join(_spent_cell(view, arm, code) for arm in view["shown"])
  return (f"<tr>{_name(result, code)}<td>{'–' if size is None else views.count(size)}{few}</td>"
          f"{cells}</tr>")


def _spent_cell(view, arm, code):
  epochs, tokens = (view[key][arm].get(code, 0) for key in ("epochs", "tokens"))
  classes = ["much"] * (epochs > views.EPOCHS) + ["chosen"] * (arm == view["seen"]["recommended"])
  mark = "▲" if epochs > views.EPOCHS else ""
  return (f"<td{_classes(classes)}>{mark}{views.repeats(epochs)} "
          f"<small>{views.count(tokens) if tokens else 'none'}</small></td>")


# --- laws ---------------------------------------------------------------------------------------


def _laws(result, view):
  """What is predicted of mixtures that were not run, and how far predictions were off."""
  laws = result["laws"]
  if not laws:
    return
  yield "<h2 id=laws>Laws of the mixture</h2><p class=key>Mean absolute errors, in bits per byte,"
  yield "of a law that was fitted without an arm, on that arm. A law that says anything is below"
  yield "<b>constant</b>, which predicts each language's mean; none is much below the noise, the"
  yield f"standard deviation between seeds.</p>{_forms(laws)}"
  yield f"<p>Chosen: <b>{_text(laws['chosen'])}</b>; {_text(laws['why'])}.</p>"
  yield from _foreseen(laws)
  yield from _optimum(result, view, laws)


def _forms(laws):
  keys = dict(error=4, error_of_means=4, error_of_objective=4, rank=2)
  rows = [(name, [_figure(form[key], digits) for key, digits in keys.items()])
          for name, form in laws["forms"].items()]
  if laws["noise"]:
    noise = [_figure(laws["noise"][key], 4) for key in ("pooled", "of_mean")]
    rows.append(("noise", [*noise, "", ""]))
  return _figures(("law", "of languages", "of their mean", "of the objective", "rank correlation"),
                  rows)


def _figures(heads, rows):
  """A table of (name, cells)."""
  body = "".join(f"<tr><th scope=row><bdi>{_text(name)}</bdi></th>"
                 f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, cells in rows)
  heads = "".join(f"<th scope=col>{head}</th>" for head in heads)
  return (f"<table class='law small'><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>")


def _figure(value, digits):
  return "–" if value is None else f"{value:.{digits}f}"


def _foreseen(laws):
  """Every arm as the chosen law foresaw it from the others."""
  arms = laws["forms"][laws["chosen"]]["arms"]
  rows = [(arm, [_figure(row[key], 4) for key in ("predicted", "measured")])
          for arm, row in arms.items()]
  yield "<details><summary><h2 id=foreseen>Every arm, foreseen from the others</h2></summary>"
  yield "<p class=key>The objective by the chosen law, fitted without the arm.</p>"
  yield f"{_figures(('arm', 'predicted', 'measured'), rows)}</details>"


def _optimum(result, view, laws):
  """Shares of the mixture that the law likes best, beside those of the best arm that was run."""
  optimum = laws["optimum"]
  if not optimum:
    yield f"<p>No mixture is predicted: {_text(laws['no_optimum'])}.</p>"
    return
  arm, before = _before(result, view)
  yield "<h3>The mixture that is predicted to be best</h3>"
  yield f"<p>{_text(' '.join(_promise(result, laws)))}</p>"
  yield f"<div class=groups><div>{_share_head(arm, 'region')}"
  for region, codes in views.regions(result, optimum["shares"]).items():
    yield _share_row(_text(region), *(sum(shares.get(code, 0) for code in codes)
                                      for shares in (before, optimum["shares"])))
  yield f"</tbody></table></div><div>{_share_head(arm, 'largest changes')}"
  moved = {code: abs(share - before.get(code, 0)) for code, share in optimum["shares"].items()}
  for code in sorted(moved, key=moved.get, reverse=True)[:CHANGES]:
    name = f"{_text(result['languages'][code]['name'])} <i>{_text(code)}</i>"
    yield _share_row(name, before.get(code, 0), optimum["shares"][code])
  yield "</tbody></table></div></div>"


def _before(result, view):
  """(the best arm that no law asked for, {code: share of its tokens})"""
  asked = {test["arm"] for test in result.get("tests") or ()}
  arm = next((arm["arm"] for arm in view["seen"]["arms"] if arm["arm"] not in asked), None)
  tokens = view["tokens"].get(arm, {})
  whole = sum(tokens.values()) or 1
  return arm, {code: amount / whole for code, amount in tokens.items()}


def _promise(result, laws):
  """Sentences on what is predicted and how far it can be believed."""
  optimum, error = laws["optimum"], laws["forms"][laws["chosen"]]["error_of_objective"]
  yield (f"Predicted: {optimum['value']:.4f} bits per byte, with a deviation of "
         f"{optimum['deviation']:.4f} over laws of resampled arms; the mean of the best "
         f"{optimum['best']:,} of {optimum['draws']:,} mixtures drawn, which lie from "
         f"{optimum['spread'][0]:.4f} to {optimum['spread'][1]:.4f}.")
  if optimum["gain"]:
    arm, gain = optimum["arm"], optimum["gain"]
    caps = "within the caps" if arm["within_caps"] else "(no arm is within the caps)"
    yield (f"That is {gain['value']:.4f} ± {gain['deviation']:.4f} below what is predicted of the "
           f"best arm {caps}, {arm['arm']}: {arm['predicted']:.4f}, measured "
           f"{arm['measured']:.4f}; {gain['agree']:.0%} of the resampled laws see a gain.")
  if result["objective"]["kind"] == "floor":
    yield f"The floor holds in {optimum['floor_kept']:.0%} of the resampled laws."
  if optimum["capped"]:
    yield f"At their cap of epochs: {', '.join(optimum['capped'])}."
  if error is not None:
    yield f"On arms left out the law was off by {error:.4f}, which is no part of these deviations."


def _share_head(arm, first):
  return (f"<table class='share small'><thead><tr><th scope=col>{first}</th><th scope=col><bdi>"
          f"{_text(arm)}</bdi></th><th scope=col>predicted best</th><th scope=col>change</th></tr>"
          "</thead><tbody>")


def _share_row(name, before, after):
  change = signed(100 * (after - before), ".2f")
  return (f"<tr><th scope=row>{name}</th><td>{before:.2%}</td><td>{after:.2%}</td>"
          f"<td>{change}</td></tr>")


def _tests(result, view):
  """What was predicted of arms, and what came out when they were run."""
  rows = [_tested(result, view, arm) for arm in
          dict.fromkeys(test["arm"] for test in result.get("tests") or ())]
  rows = [row for row in rows if row["measured"]]
  if not rows:
    return
  noise = view["seen"]["noise"]
  noise = views.mean(noise["languages"], noise["languages"]) if noise else None
  yield "<h3 id=tests>Predicted and measured</h3><p class=key>Mean absolute error over languages;"
  yield "constant: of predicting each language's mean over the other arms; noise: of one language"
  yield "between seeds.</p>" + _figures(("arm", "error", "constant", "noise"), [
      (row["arm"], [_figure(value, 4) for value in (row["error"], row["constant"], noise)])
      for row in rows]) + "<div class=plots>"
  yield from (figure for row in rows for figure in plots.predicted(result, row))
  yield "</div>"


def _tested(result, view, arm):
  """dict(arm, predicted, measured, error, constant), less each language's mean over other arms."""
  tests = [test for test in result["tests"] if test["arm"] == arm]
  others = [column for name, column in view["columns"].items() if name != arm]
  codes = [code for code in view["seen"]["languages"] if others
           and all(code in test["predicted"] and code in test["measured"] for test in tests)]
  base = {code: statistics.fmean(column[code] for column in others) for code in codes}
  predicted, measured = ({code: statistics.fmean(test[key][code] for test in tests) - base[code]
                          for code in codes} for key in ("predicted", "measured"))
  error, constant = (codes and statistics.fmean(abs(measured[code] - guess.get(code, 0))
                                                for code in codes) for guess in (predicted, {}))
  return dict(arm=arm, predicted=predicted, measured=measured, error=error, constant=constant)


# --- the end of the page ------------------------------------------------------------------------


def _failures(result, view):
  del result
  rows = view["seen"]["failures"]
  if not rows:
    return
  yield "<h2 id=failed>Trials that came to nothing</h2><dl>"
  for row in rows:
    yield (f"<dt><bdi>{_text(row['trial'])}</bdi></dt><dd><b class=worse>{_text(row['state'])}</b> "
           f"<bdi>{_text(row['why'] or 'no reason is known')}</bdi></dd>")
  yield "</dl>"


def _colophon(result, view):
  del view
  done = [trial for trial in result["trials"] if trial["state"] == "done"]
  seconds = sum(trial["seconds"] for trial in done)
  operations = sum(trial["operations"] for trial in done)
  yield "<h2 id=end>How it was made</h2><dl>"
  yield (f"<dt>Spent</dt><dd>{len(done)} finished trials, {seconds / 3600:,.1f} hours of them one "
         f"after another, {operations:.3g} operations</dd>")
  made = result.get("made") or {}
  yield from (f"<dt>{name}</dt><dd><code><bdi>{_text(value)}</bdi></code></dd>"
              for name, value in _made(made) if value)
  yield "</dl>"
  if made.get("config"):
    yield "<details><summary><h2 id=config>Config</h2></summary>"
    yield f"<pre>{_text(made['config'])}</pre></details>"


def _made(made):
  """(name, words) of run.provenance."""
  command = made.get("command")
  yield "Command", shlex.join(command) if isinstance(command, list) else command
  changed = ", with changes that are not committed" if made.get("git_diff") else ""
  yield "Revision", f"{made['git_revision']}{changed}" if made.get("git_revision") else None
  yield "Versions", ", ".join(f"{name} {version}" for name, version in
                              (made.get("versions") or {}).items())
  yield "Time", made.get("time")
