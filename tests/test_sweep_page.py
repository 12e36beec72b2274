"""The page and the table of a sweep: no figure is lost, nothing is fetched, nothing runs."""

import re

import numpy as np
import pytest

from test_report import Reader
from test_verdict import ARMS, CODES, FACTS, fail, made, small, trial
from tiny_aya_jax.sweep import page, terminal, verdict, views


def with_laws():
  """A sweep whose laws predicted a mixture; it was run and is the best, 0.01 off everywhere."""
  result = made()
  best = trial(np.random.default_rng(3), result["sizes"], "predicted optimum", None, 0)
  best["bits_per_byte"] = {code: bits - 0.05 for code, bits in best["bits_per_byte"].items()}
  result["trials"].append(best)
  shares = {code: tokens / sum(best["tokens"].values()) for code, tokens in best["tokens"].items()}
  predicted = {code: bits + 0.01 for code, bits in best["bits_per_byte"].items()}
  arms = {arm: dict(predicted=1.1111, measured=1.2222) for arm in ARMS}
  form = lambda *errors: dict(zip(
      ("error", "error_of_means", "error_of_objective", "rank"), errors), arms=arms)
  laws = dict(
      forms=dict(constant=form(0.0412, 0.0123, 0.0321, None),
                 power=form(0.0034, 0.0012, 0.0022, 0.875)),
      noise=dict(pooled=0.0021, of_mean=0.0006), chosen="power", why="mean error",
      optimum=dict(
          shares=shares, predicted=predicted, value=1.1234, deviation=0.0045, draws=4000, best=64,
          spread=[1.1212, 1.1256], capped=["wol_Latn"], floor_kept=1.0,
          gain=dict(value=0.0087, deviation=0.0043, agree=0.95), arm=dict(
              arm="temperature 3.33", predicted=1.1321, measured=1.1333, within_caps=True)))
  return result | dict(verdict=None, laws=laws, tests=[dict(
      arm="predicted optimum", seed=0, predicted=predicted, measured=best["bits_per_byte"])])


def broken():
  """A sweep with every kind of trouble."""
  result = made(noise=0.02, effect=0.3)
  fail(result["trials"][1])
  fail(result["trials"][5], "running", None)
  fail(result["trials"][-1], "refused", None)
  made_by = dict(command=["tiny-aya", "sweep"], versions=dict(jax="0.10.2"), git_revision="abc",
                 git_diff="x", time="2026-11-26T03:00:00Z", config="tokens: 1")
  return result | dict(verdict=None, made=made_by)


def tables(text):
  """The tables of a page, each {first cell: other cells}."""
  return [{cells[0]: cells[1:] for _, cells in Reader(f"<table{part}</table>").rows}
          for part in re.findall(r"<table(.*?)</table>", text, re.S)]


def test_every_language_has_its_figure_under_every_arm():
  result = made()
  rows, columns = tables(page.page(result))[1], verdict.columns(result)
  order = [arm for arm in ARMS]  # along x, and the one without it last
  changes = result["verdict"]["sensitivity"]["languages"]
  for code in CODES:
    size, *figures, spread = rows[f"{FACTS[code]['name']} {code}"]
    assert figures == [f"{columns[arm][code]:.3f}" for arm in order]
    assert spread.split()[0] == f"{changes[code]['spread']:.3f}"
    assert size == f"{views.count(FACTS[code]['fineweb_bytes'])}B"
  means = [f"{np.mean(list(columns[arm].values())):.4f}" for arm in order]
  assert rows["All languages 69"][1:-1] == means
  africa = [code for code in CODES if FACTS[code]["region"] == "Africa"]
  first = np.mean([columns[order[0]][code] for code in africa])
  assert rows[f"Africa {len(africa)}"][1] == f"{first:.4f}"


def test_the_best_arm_of_a_row_is_marked_and_the_shade_grows_with_the_distance():
  rows = [re.findall(r"<td style=--h:(\d+)( class='[^']*')?>([\d.]+)", row)
          for row in page.page(made()).split("<tr")]
  rows = [cells for cells in rows if cells]
  assert len(rows) == 69 + 5 + 1  # languages, regions, all
  for cells in rows:
    best = [(shade, value) for shade, marks, value in cells if "best" in marks]
    assert best == [("0", min(value for *_, value in cells))]
    shades = [shade for _, shade in sorted((value, int(shade)) for shade, _, value in cells)]
    assert shades == sorted(shades) and shades[-1] > 10


def test_languages_stand_the_smallest_first_within_their_region():
  names = [name for name in tables(page.page(made()))[1] if name.split()[-1] in CODES]
  sizes = {}
  for name in names:
    facts = FACTS[name.split()[-1]]
    sizes.setdefault(facts["region"], []).append(facts["fineweb_bytes"])
  assert len(sizes) == 5 and all(row == sorted(row) for row in sizes.values())


def test_arms_are_ranked_with_their_figures_and_intervals():
  result = made()
  rows = tables(page.page(result))[0]
  for arm, (name, cells) in zip(result["verdict"]["arms"], list(rows.items())[1:], strict=True):
    assert name.removesuffix(" recommended") == arm["arm"]
    assert cells[0].startswith(f"{arm['mean']:.4f}")
    if arm["difference"]:
      ends = [f"{arm['difference'][end]:+.4f}" for end in ("low", "high")]
      assert " to ".join(ends) in cells[1].replace("−", "-")
    assert cells[2] == f"{arm['worst']['value']:.3f} {arm['worst']['language']}"
    assert cells[3] == f"{arm['region']['value']:.3f} {arm['region']['region']}"
    above = sum(epochs > 4 for epochs in next(
        trial["epochs"] for trial in result["trials"] if trial["arm"] == arm["arm"]).values())
    assert cells[5].endswith(f"{above} languages above 4")
    assert (cells[6] == "on it") == (arm["arm"] in result["verdict"]["front"])


def test_the_verdict_is_on_the_page_and_in_the_table_in_the_same_words():
  for result in (made(), broken(), small(dict(a=[[1, 2]])) | dict(
      name="one", tokens=7, row=256, axes=["mixture"], target=None, sizes={}, laws=None)):
    for row in result["trials"]:
      if row["state"] == "done":
        row.setdefault("seconds", 1.0), row.setdefault("operations", 1.0)
        row.setdefault("tokens", {}), row.setdefault("epochs", {})
    words = (result["verdict"] or verdict.of(result))["words"]
    text = "".join(Reader(page.page(result)).text)
    said = " ".join(terminal.table(result).split())
    for sentence in filter(None, words.values()):
      assert sentence in text and sentence in said


def test_epochs_above_four_are_marked_and_so_is_text_of_less_than_a_row():
  result = made()
  result["row"] = 8192
  rows = tables(page.page(result))[2]
  for code in CODES:
    size, *cells = rows[f"{FACTS[code]['name']} {code}"]
    assert size.endswith("*") == (result["sizes"][code] < 8192)
    for cell, arm in zip(cells, ARMS):
      one = next(trial for trial in result["trials"] if trial["arm"] == arm)
      assert cell.startswith("▲") == (one["epochs"][code] > 4)
      assert cell.split()[0].lstrip("▲") == views.repeats(one["epochs"][code])
      assert cell.split()[1] == views.count(one["tokens"][code])


def test_plots_have_a_dot_for_every_arm_and_seed_and_for_every_region():
  front, curves = re.findall(r"<svg class='?plot.*?</svg>", page.page(made()))
  assert front.count("<title>") == 7 and front.count("class=seed") == 6
  loud = page.page(made(noise=0.05))
  for x, y in re.findall(r"<circle [^>]*cx=([-.\d]+)% cy=([-\d]+)", loud):
    assert 0 <= float(x) <= 100 and 0 <= int(y) <= 300
  assert front.count("class=front") == len(made()["verdict"]["front"])
  assert curves.count("<title>") == 6 * 6  # five regions and the mean at six temperatures
  for region in ("Europe", "Africa", "mean"):
    assert re.search(rf"<text class=\w+ x=100% y=\d+ dx=8 dy=4>{region}</text>", curves)


def test_laws_are_shown_beside_the_constant_and_the_noise_and_tests_beside_both():
  result = with_laws()
  text = page.page(result)
  laws, foreseen, regions, changes, tests = tables(text)[3:]
  assert laws["constant"] == ["0.0412", "0.0123", "0.0321", "–"]
  assert laws["power"] == ["0.0034", "0.0012", "0.0022", "0.88"]
  assert laws["noise"][:2] == ["0.0021", "0.0006"] and "Chosen: <b>power</b>" in text
  assert foreseen["temperature 1.43"] == ["1.1111", "1.2222"] and len(changes) == 11
  for figure in ("1.1234", "0.0045", "1.1212", "1.1256", "0.0087 ± 0.0043", "95%", "wol_Latn."):
    assert figure in text
  shares = result["laws"]["optimum"]["shares"]
  tokens = next(row["tokens"] for row in result["trials"] if row["arm"] == "temperature 3.33")
  before = {code: amount / sum(tokens.values()) for code, amount in tokens.items()}
  assert list(regions.values())[0][0] == "temperature 3.33"
  europe = [sum(part[code] for code in CODES if FACTS[code]["region"] == "Europe")
            for part in (before, shares)]
  assert regions["Europe"][:2] == [f"{share:.2%}" for share in europe]
  order = sorted(CODES, key=lambda code: -abs(shares[code] - before[code]))
  assert [name.split()[-1] for name in list(changes)[1:]] == order[:10]
  assert tests["predicted optimum"][0] == "0.0100"
  columns = verdict.columns(result)
  apart = [columns["predicted optimum"][code] - np.mean([columns[arm][code] for arm in ARMS])
           for code in CODES]
  assert tests["predicted optimum"][1] == f"{np.mean(np.abs(apart)):.4f}"


def test_a_law_without_an_optimum_says_why():
  result = with_laws() | dict(tests=[])
  result["laws"] |= dict(optimum=None, no_optimum="the caps sum to 0.5", noise=None)
  assert "No mixture is predicted: the caps sum to 0.5." in page.page(result)


def test_trials_that_came_to_nothing_and_how_it_was_made_end_the_page():
  text = "".join(Reader(page.page(broken())).text)
  for words in ("temperature-1_seed-1", "diverged loss not finite at step 70",
                "1 lost", "refused no reason is known", "tiny-aya sweep", "jax 0.10.2",
                "abc, with changes that are not committed", "tokens: 1"):
    assert words in text
  assert "temperature-1_seed-1 diverged: loss not finite at step 70" in terminal.table(broken())


@pytest.mark.parametrize("result", [made, with_laws, broken])
def test_nothing_is_fetched_and_nothing_runs(result):
  text = page.page(result())
  assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
  assert "http" not in text and "url(" not in text and "@import" not in text
  reader = Reader(text)
  identities = [value for _, name, value in reader.attributes if name == "id"]
  assert len(identities) == len(set(identities))
  for tag, name, value in reader.attributes:
    assert tag not in ("script", "img", "iframe", "object", "embed") and not name.startswith("on")
    assert name not in ("src", "srcset", "action") and (name != "href" or value == "data:,")


def test_all_that_is_given_is_escaped():
  evil = "<b onclick=\"x('1')\">&amp;<!--body-->/*style*/"
  result = with_laws() | dict(made=dict(command="deu_Latn", config="Africa"))
  fail(result["trials"][3], "failed", "it")
  words = ("temperature", "temperature 3.33", "predicted optimum", "mixture", "deu_Latn",
           "German", "Africa", "power", "failed", "it", "report", "temperature-1.43_seed-0")
  for word in words:
    result = _replaced(result, word, word[0] + evil + word)
  text = page.page(result)
  reader = Reader(text)
  assert "<b onclick" not in text and not [name for _, name, _ in reader.attributes
                                           if name.startswith("on")]
  joined = "".join(reader.text)
  for word in words:
    assert word[0] + evil + word in joined, word
  assert evil in terminal.table(result)


def _replaced(tree, old, new):
  if isinstance(tree, dict):
    return {new if key == old and old != "temperature" else key: _replaced(value, old, new)
            for key, value in tree.items()}
  if isinstance(tree, list):
    return [_replaced(value, old, new) for value in tree]
  return new if tree == old else tree


def test_none_finished_or_one_arm_is_still_a_page_and_a_table():
  result = made() | dict(verdict=None)
  result["trials"] = [row for row in result["trials"] if row["arm"] == "temperature 1"]
  Reader(page.page(result))
  assert "Only one arm is finished" in terminal.table(result)
  for row in result["trials"]:
    fail(row, "waiting", None)
  for none in (result, result | dict(trials=[])):
    assert "No trial is finished" in "".join(Reader(page.page(none)).text)
    assert terminal.table(none).startswith("No trial is finished")


def test_more_arms_than_fit_are_named_and_the_table_is_no_wider_than_a_terminal():
  result, draw = made() | dict(verdict=None), np.random.default_rng(1)
  result["trials"] += [trial(draw, result["sizes"], f"temperature {x}", x, 0, 0.002, 1)
                       for x in range(11, 40)]
  text = terminal.table(result)
  assert max(map(len, text.splitlines())) <= terminal.WIDE
  left = " ".join(text.split()).partition("no room here for")[2]
  assert "temperature 39" in left and "temperature 3.33" not in left
  words = "".join(Reader(page.page(result)).text)
  assert "temperature 39" in words.partition("there is no room for")[2].partition("sweep.json")[0]


def test_the_table_has_the_figures_of_arms_of_regions_and_of_both_ends():
  result = made()
  text, columns = terminal.table(result), verdict.columns(result)
  for arm in result["verdict"]["arms"]:
    line = next(line for line in text.splitlines() if line.startswith(f"{arm['arm']} "))
    assert f" {arm['objective']:.4f} +- {arm['error']:.4f}" in line
    if arm["difference"]:
      assert f"{arm['difference']['low']:+.4f} to {arm['difference']['high']:+.4f}" in line
  order = sorted(CODES, key=lambda code: FACTS[code]["fineweb_bytes"])
  lines = [line.split() for line in text.splitlines() if line.startswith("  ") and "_" in line]
  assert [line[0] for line in lines] == order[:10] + order[-10:]
  for code, _, *figures in lines:
    assert figures == [f"{columns[arm][code]:.3f}" for arm in ARMS]


@pytest.mark.parametrize("kind", ["worst", "floor"])
def test_other_objectives_stand_beside_the_mean(kind):
  result = made(dict(kind=kind, floor=1.6))
  rows = tables(page.page(result))[0]
  assert list(rows.values())[0][:3] == ["objective", "above the recommended", "mean"]
  for arm, cells in zip(result["verdict"]["arms"], list(rows.values())[1:], strict=True):
    assert cells[2].startswith(f"{arm['mean']:.4f}")
    shown = f"{len(arm['broken'])} above the floor" if arm["broken"] else f"{arm['objective']:.4f}"
    assert cells[0].startswith(shown)
