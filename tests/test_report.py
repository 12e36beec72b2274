"""The page and the table of an evaluation: no value is lost, nothing is fetched, nothing runs."""

import collections
import copy
import functools
import html.parser
import random
import re

import pytest

from tiny_aya_jax import languages
from tiny_aya_jax.evaluate import report, rollups, scatters, terminal

CODES = [language.code for language in languages.LANGUAGES]
VOID = {"meta", "link", "br", "img", "hr", "input"}
TASKS = [
    ("bits_per_byte", "bits per byte", "lower", 1), ("belebele", "accuracy", "higher", 1),
    ("belebele", "accuracy per byte", "higher", 1), ("translation", "chrF", "higher", 60),
    ("confusion", "line pass rate", "higher", 1), ("mgsm", "exact match", "higher", 1),
    ("xstest", "over-refusal", "lower", 1), ("include", "accuracy", "higher", 1),
]  # fmt: skip


@functools.cache
def _made(checkpoints, measures):
  names = ("pretrain", "cooldown", "sft", *(f"step-{n}" for n in range(12)))[:checkpoints]
  draw = random.Random(0)
  tasks = [*TASKS, *((f"more{n}", "accuracy", "higher", 1) for n in range(12))][:measures]
  return dict(
      checkpoints={name: dict(path=f"runs/{name}/checkpoints/400", step=400, dtype="float32")
                   for name in names},
      baseline=names[0] if checkpoints > 1 else None,
      languages={code: rollups.facts(code) for code in CODES},
      measures=[measure(names, draw, *task) for task in tasks],
      fertility={code: dict(bytes_per_token=draw.uniform(2, 6), tokens=draw.randrange(9999))
                 for code in CODES},
      judge=dict(model="judge-1", spent=dict(calls=1234, dollars=5.25)),
      unscored=[dict(task="multijail", why="config.judge.url is not set")],
      versions=dict(jax="0.10.2", sacrebleu="2.5.1"),
      time="2026-11-26T03:00:00Z",
  )


def measure(names, draw, task, name, better, scale):
  columns = {column: {code: draw.uniform(0.1, 0.9) * scale for code in CODES} for column in names}
  beside = {}
  if task == "bits_per_byte":
    columns = dict(untrained={code: draw.uniform(7, 8) for code in CODES}) | columns
    beside = {column: {code: draw.uniform(1, 2) for code in CODES}
              for column in ("xz_alone", "xz_given", "ngram")}
  return dict(
      task=task, measure=name, better=better, note="of everything, once",
      signature="nrefs:1|case:mixed" if name == "chrF" else None, unit="items",
      counts={code: draw.randrange(50, 5000) for code in CODES}, few=100,
      chance=0.25 if name.startswith("accuracy") else None, columns=columns, beside=beside,
      summary=summaries(columns, better, names[0]),
  )


def summaries(columns, better, baseline):
  return {name: rollups.summary(column, better, columns[baseline] if name != baseline else None)
          for name, column in columns.items()}


def made(checkpoints=3, measures=8):
  return copy.deepcopy(_made(checkpoints, measures))


class Reader(html.parser.HTMLParser):
  """Tags that balance, the attributes of all, and per section the cells of each row."""

  def __init__(self, text):
    super().__init__()
    self.open, self.attributes, self.text, self.rows = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, f"never closed: {self.open}"

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, name, value or "") for name, value in attrs]
    if tag == "tr":
      self.rows.append([self.open.count("details"), []])
    if tag in ("td", "th") and self.rows:
      self.rows[-1][1].append("")
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.attributes += [(tag, name, value or "") for name, value in attrs]

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
    self.open.pop()

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.text.append(data)
      if {"td", "th"} & set(self.open):
        self.rows[-1][1][-1] += data


def sections(page):
  """One Reader each of the page's measures."""
  return [Reader(part + "</details>") for part in
          (f"<details{rest.partition('</details>')[0]}" for rest in page.split("<details")[1:])]


def shown(value, measure):
  return "–" if value is None else f"{value:.{2 if measure['measure'] == 'chrF' else 3}f}"


def check_every_value(result):
  """Each language of each measure has a row, with its count and all its figures in column order."""
  found = sections(report.page(result))
  assert len(found) == len(result["measures"])
  for reader, measure in zip(found, result["measures"]):
    rows = {cells[0].split()[-1]: cells[1:] for _, cells in reader.rows if len(cells) > 2}
    for code, count in measure["counts"].items():
      columns = [*measure["columns"].values(), *measure["beside"].values()]
      mark = "*" if count < measure["few"] else ""
      assert rows[code] == [f"{count:,}{mark}", "", *(shown(column.get(code), measure)
                                                      for column in columns)]


def test_every_language_and_every_value_is_text_of_the_page():
  check_every_value(made())


def test_a_missing_value_is_a_dash_and_counts_as_missing():
  result = made()
  for measure in result["measures"]:
    measure["columns"]["sft"]["yor_Latn"] = None
    measure["columns"]["pretrain"]["deu_Latn"] = None
    measure["summary"] = summaries(measure["columns"], measure["better"], "pretrain")
  check_every_value(result)
  page = report.page(result)
  assert page.count("1 missing") == 16
  Reader(page)
  assert re.search(r"  yor_Latn .* - +- ", terminal.table(result))


def test_a_column_without_any_value_is_no_error():
  result = made()
  for measure in result["measures"]:
    measure["columns"]["sft"] = dict.fromkeys(CODES)
    measure["summary"] = summaries(measure["columns"], measure["better"], "pretrain")
  check_every_value(result)
  assert "worst first by <bdi>cooldown" in report.page(result)
  assert "sft" in terminal.table(result)


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 12])
def test_the_page_is_well_formed(checkpoints):
  page = report.page(made(checkpoints))
  assert page.startswith("<!doctype html>\n<html lang=") and page.endswith("</html>\n")
  reader = Reader(page)
  identities = [value for _, name, value in reader.attributes if name == "id"]
  assert len(identities) == len(set(identities))


def test_the_reader_of_these_tests_finds_what_is_not_closed():
  for wrong in ("<p><b></p>", "<p>", "</p>", "<td><div></td></div>"):
    with pytest.raises(AssertionError):
      Reader(wrong)


def test_nothing_is_fetched_and_nothing_runs():
  page = report.page(made())
  assert "http" not in page and "url(" not in page and "@import" not in page
  for tag, name, value in Reader(page).attributes:
    assert tag not in ("script", "img", "iframe", "object", "embed", "video", "audio")
    assert not name.startswith("on") and name not in ("src", "srcset", "action", "xlink:href")
    if name == "href":
      assert value.startswith("#") or (tag == "link" and value == "data:,")


def test_every_link_has_its_target():
  attributes = Reader(report.page(made())).attributes
  identities = {value for _, name, value in attributes if name == "id"}
  links = {value[1:] for _, name, value in attributes if name == "href" and value[0] == "#"}
  assert len(links) == 8 and links <= identities


def test_all_that_is_given_is_escaped():
  evil = "<b onclick=\"x('1')\">&amp;"
  result = made(2, 2)
  text = repr(result)
  for word in ("pretrain", "cooldown", "belebele", "accuracy", "of everything, once", "items",
               "xz_alone", "judge-1", "calls", "config.judge.url is not set", "multijail", "0.10.2",
               "jax", "float32", "2026-11-26T03:00:00Z", "German", "deu_Latn", "Latn", "Uralic",
               "South Asia"):
    assert word in text
    result = _replaced(result, word, word[0] + evil + word)
  page = report.page(result)
  reader = Reader(page)
  assert "<b onclick" not in page and not [name for _, name, _ in reader.attributes
                                           if name.startswith("on")]
  joined = "".join(reader.text)
  for word in ("pretrain", "German", "xz_alone", "judge-1", "multijail", "items"):
    assert word[0] + evil + word in joined
  assert evil in terminal.table(result)


def _replaced(tree, old, new):
  if isinstance(tree, dict):
    return {_replaced(key, old, new) if key == old or "_Latn" in key else key:
            _replaced(value, old, new) for key, value in tree.items()}
  if isinstance(tree, list):
    return [_replaced(value, old, new) for value in tree]
  return new if tree == old else tree


def test_the_groups_of_a_measure_are_means_of_its_summary():
  result = made()
  by = result["measures"][0]["summary"]["sft"]["by"]
  rows = [cells for _, cells in sections(report.page(result))[0].rows]
  last = {cells[0]: cells[-1] for cells in rows if len(cells) == 4}
  for region, row in by["region"].items():
    assert last[f"{region} {row['languages']}"] == f"{row['mean']:.3f}"
  assert last["low 22"] == f"{by['tier']['low']['mean']:.3f}"
  alone = [row["mean"] for row in by["script"].values() if row["languages"] == 1]
  one_each = [cells for cells in rows if cells[0] == f"one language each {len(alone)}"]
  assert one_each[0][-1] == f"{sum(alone) / len(alone):.3f}"


def test_languages_stand_worst_first_within_their_region():
  for reader, measure in zip(sections(report.page(made())), made()["measures"]):
    order = collections.defaultdict(list)
    for _, cells in reader.rows:
      code = cells[0].split()[-1]
      if code in measure["counts"] and len(cells) > 2:
        order[rollups.facts(code)["region"]].append(measure["columns"]["sft"][code])
    assert len(order) == 5
    for values in order.values():
      assert values == sorted(values, reverse=measure["better"] == "lower")


def test_changes_are_told_better_or_worse_whatever_the_direction():
  result = made()
  page = report.page(result)
  for part, measure in zip(page.split("<details")[1:], result["measures"]):
    lines = re.findall(r"<li( class=\w+)?>(\w+)<i [^>]*></i>([+−.\d]+)</li>", part)
    found = {code: change for _, code, change in lines}
    sides = {code: side for side, code, _ in lines}
    assert set(found) == set(CODES)
    for code in CODES:
      change = measure["columns"]["sft"][code] - measure["columns"]["pretrain"][code]
      assert found[code] == f"{change:+.{2 if measure['measure'] == 'chrF' else 3}f}".replace(
          "-", "−")
      gained = (change < 0) == (measure["better"] == "lower")
      assert sides[code] == ("" if gained else " class=worse")


def test_a_single_checkpoint_is_compared_with_nothing():
  result = made(1)
  page = report.page(result)
  check_every_value(result)
  assert "improved" not in page and "<ul class=change>" not in page
  assert "improved" not in terminal.table(result)


def test_what_improved_is_told_of_checkpoints_other_than_the_baseline():
  result = made()
  for row in result["measures"]:
    for name, summary in row["summary"].items():
      summary["improved"] = dict(cooldown=0.0, sft=0.87).get(name, 0.11)
  assert report.page(result).count("</b> improved") == 16
  assert report.page(result).count("<b>87%</b> improved") == 8
  lines = [line for line in terminal.table(result).splitlines() if "improved" in line]
  assert [line.split()[0] for line in lines] == ["cooldown", "sft"] * 8 and "11%" not in str(lines)


def test_without_bits_per_byte_the_rest_is_whole():
  result = made()
  del result["measures"][0]
  check_every_value(result)
  assert "untrained" not in "".join(Reader(report.page(result)).text)
  assert "belebele" in terminal.table(result).splitlines()[0]


def test_without_any_measure_there_is_still_a_page():
  result = made() | dict(measures=[], fertility=None, judge=None, unscored=[])
  reader = Reader(report.page(result))
  assert "No measure was asked for." in "".join(reader.text)
  assert terminal.table(result) == ""


@pytest.mark.parametrize("code", ["deu_Latn", "code", "abc_Wxyz"])
def test_one_language_is_enough(code):
  result = made()
  result["languages"] = {code: rollups.facts(code)}
  result["fertility"] = {code: dict(bytes_per_token=4.0, tokens=7)}
  for measure in result["measures"]:
    measure["counts"] = {code: 5}
    for part in ("columns", "beside"):
      measure[part] = {name: {code: 0.5} for name in measure[part]}
    measure["summary"] = summaries(measure["columns"], measure["better"], "pretrain")
  check_every_value(result | dict(measures=result["measures"][:3] + result["measures"][4:]))
  Reader(report.page(result))
  assert code in terminal.table(result)


def test_what_a_measure_does_not_cover_is_named():
  result = made()
  measure = result["measures"][1]
  for rows in (measure["counts"], *measure["columns"].values()):
    del rows["wol_Latn"], rows["pcm_Latn"]
  measure["summary"] = summaries(measure["columns"], measure["better"], "pretrain")
  text = "".join(sections(report.page(result))[1].text)
  assert "Nothing to measure 2 of 70 languages with: wol_Latn, pcm_Latn." in text


def test_scatters_have_every_language_and_labels_apart():
  page = report.page(made())
  plots = re.findall(r"<svg class=plot.*?</svg>", page)
  assert len(plots) == 6  # of 7 tasks, over-refusal is no quality
  for plot in plots:
    assert plot.count("<circle") == plot.count("<title>") == 70
    boxes = []
    for group, texts in re.findall(r"<g class='([\w ]+)'>(.*?)</g>", plot):
      for x, y, word in re.findall(r"<text x=([\d.]+)% y=(\d+)>(\w+)<", texts):
        boxes.append(scatters._box((float(x), int(y)), word, group.split()[0], scatters.BROAD))
    assert 20 < len(boxes) <= 70
    shrunk = [(a + 0.5, b + 0.5, c - 0.5, d - 0.5) for a, b, c, d in boxes]
    assert not any(scatters._touch(one, other) for index, one in enumerate(shrunk)
                   for other in shrunk[:index])


def test_fertility_is_tokens_per_hundred_bytes_the_dearest_first():
  result = made()
  found = re.findall(r"<li title='([\d,]+) tokens'>(\w+)<i [^>]*></i>([\d.]+)</li>",
                     report.page(result))
  rates = {code: 100 / row["bytes_per_token"] for code, row in result["fertility"].items()}
  assert [code for _, code, _ in found] == sorted(CODES, key=rates.get, reverse=True)
  assert all(rate == f"{rates[code]:.1f}" for _, code, rate in found)


def test_the_end_says_how_it_was_made():
  text = "".join(Reader(report.page(made())).text)
  for word in ("nrefs:1|case:mixed", "judge-1", "calls 1,234, dollars 5.25", "multijail",
               "config.judge.url is not set", "jax 0.10.2", "2026-11-26T03:00:00Z"):
    assert word in text


def test_seventy_languages_four_checkpoints_and_twelve_measures_stay_below_400_kilobytes():
  assert len(report.page(made(4, 12)).encode()) < 400_000


def test_the_table_has_a_line_a_language_and_its_bits_per_byte_at_every_checkpoint():
  result = made()
  lines = {line.split()[0]: line for line in terminal.table(result).splitlines()
           if line.startswith("  ") and line.split()[0] in CODES}
  assert set(lines) == set(CODES)
  measure, main = result["measures"][:2]
  for code, line in lines.items():
    figures = line.replace("*", " ").split()[1:]
    assert figures[0] == f"{measure['counts'][code]:,}"
    assert figures[1:5] == [f"{column[code]:.3f}" for column in measure["columns"].values()]
    last, first = main["columns"]["sft"][code], main["columns"]["pretrain"][code]
    assert figures[5:7] == [f"{last:.3f}", f"{last - first:+.3f}"]


def test_the_table_marks_only_figures_that_rest_on_too_little():
  result = made()
  for measure in result["measures"]:
    measure["counts"] = dict.fromkeys(CODES, 100)
  result["measures"][1]["counts"]["wol_Latn"] = 99
  marked = [line for line in terminal.table(result).splitlines() if "*" in line]
  assert [line.split()[0] for line in marked] == ["wol_Latn", "*"]
  assert re.search(r"\d\* +[+-][.\d]+\*", marked[0]) and marked[0].count("*") == 2


def test_the_table_is_no_wider_than_a_terminal_and_names_what_did_not_fit():
  for checkpoints in (1, 3):
    text = terminal.table(made(checkpoints))
    assert max(map(len, text.splitlines())) <= terminal.WIDE
  assert "no room here for" in text and "xstest" in text.partition("no room here for")[2]


def test_the_table_ends_with_a_line_a_measure_and_column():
  result = made()
  text = terminal.table(result)
  for measure in result["measures"]:
    part = text.partition(f"{measure['task'].replace('_', ' ')}")[2]
    for name, summary in measure["summary"].items():
      worst = next(iter(summary["worst"]))
      form = ".2f" if measure["measure"] == "chrF" else ".3f"
      words = (f"{summary['mean']:{form}} +- {summary['deviation']:{form}} over 70   "
               f"worst {worst} {summary['poorest']:{form}}")
      assert words in part, (measure["task"], name)
