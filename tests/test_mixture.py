"""The mixture is exact: realised counts, counters, restarts, weights. No files, no jax."""

import json
import re
import time

import numpy as np
import pytest

from tiny_aya_jax import languages
from tiny_aya_jax import run
from tiny_aya_jax.data import mixture

ALL = dict(kind="temperature", temperature=3.33, languages=("all",))


def source(name, rows, fill=500, T=512):
  return dict(
      name=name,
      language=name.partition("/")[0],
      path=f"somewhere/{name}",
      rows=rows,
      tokens=int(rows * fill),
      bytes=int(rows * fill) * (2 + len(name) % 5),
      sha256=f"digest of {name}",
      T=T,
      tokenizer_sha256="a tokenizer",
  )


def seventy(seed=0):
  random = np.random.default_rng(seed)
  return [
      source(f"{language.code}/text", int(10 ** random.uniform(0.5, 6)), random.integers(50, 514))
      for language in languages.LANGUAGES
  ]


@pytest.mark.parametrize("spoil, said", [
    (lambda plan: plan.update(sources=[{}]), "a source is {}"),
    (lambda plan: plan.update(segments=["a"]), "a segment is 'a'"),
    (lambda plan: plan.pop("T"), "T is None"),
    (lambda plan: plan["segments"][0]["thresholds"].reverse(), "thresholds rise to 2^40"),
    (lambda plan: plan["segments"][0]["thresholds"].pop(), "69 thresholds and 70 offsets"),
    (lambda plan: plan["segments"][0].update(start_row=5), "start at rows [5]"),
    (lambda plan: plan["segments"][0].update(thresholds=None), "are no lists"),
    (lambda plan: plan["sources"].__setitem__(1, plan["sources"][0]), "listed twice"),
    (lambda plan: plan["segments"][0]["offsets"].__setitem__(0, -1), "whole numbers"),
])
def test_a_plan_with_wrong_numbers_is_refused(spoil, said):
  plan = mixture.append(mixture.plan(seventy(), ALL), 1000, {**ALL, "temperature": 1.0})
  mixture.check(plan, "it")
  plan["segments"].pop()
  spoil(plan)
  with pytest.raises(run.Refused, match=re.escape(said)):
    mixture.check(plan, "it")


@pytest.mark.parametrize("temperature", [1, 3.33, 100])
def test_realised_counts_stay_within_a_few_rows_of_exact_at_every_moment(temperature):
  plan = mixture.plan(seventy(), {**ALL, "temperature": temperature})
  n = 1_000_000
  source_n, rank_n = mixture.locate_many(plan, 0, n)
  width = np.diff([0, *plan["segments"][0]["thresholds"]]) / mixture.UNIT
  for index in range(70):
    here = source_n == index
    deviation = np.cumsum(here) - width[index] * np.arange(1, n + 1)
    assert np.abs(deviation).max() < 6  # 3.5 to 4.2 when this was written
    np.testing.assert_array_equal(rank_n[here], np.arange(here.sum()))  # 0, 1, 2, ...: a bijection
  assert list(mixture.counts(plan, n).values()) == np.bincount(source_n, minlength=70).tolist()


def web():
  """The 70 languages as unequal as the web has them, and rows filled with unequal amounts."""
  random, rows = np.random.default_rng(7), []
  for language in languages.LANGUAGES:
    count = max(2, language.fineweb_bytes // 2**25)  # 3.4 MB to 70 TB: 2 rows to 2 million
    rows += [source(f"{language.code}/books", count // 2, random.integers(300, 8194)),
             source(f"{language.code}/web", count - count // 2, random.integers(8000, 8194))]
  return [each | dict(bytes=int(each["tokens"] * random.uniform(1, 9))) for each in rows]


COUNTED = dict(
    temperature_1=dict(kind="temperature", temperature=1.0),
    temperature_3=dict(kind="temperature", temperature=3.33),
    temperature_100=dict(kind="temperature", temperature=100.0),
    unimax_1=dict(kind="unimax", epochs=1.0),
    unimax_4=dict(kind="unimax", epochs=4.0),
    buckets_a=dict(kind="buckets", alpha=0.3, by="family", reading="A"),
    buckets_b=dict(kind="buckets", alpha=1.0, by="genus", reading="B", bucket_temperature=3.0),
    explicit=dict(kind="explicit", weights=(("English", 0.3), ("Africa", 0.1), ("South Asia", 0.6)),
                  alpha=0.5, within=(("books", 0.7),)),
)


@pytest.mark.parametrize("unit", ["tokens", "bytes"])
@pytest.mark.parametrize("rule", COUNTED.values(), ids=COUNTED)
def test_shares_and_epochs_counted_over_a_million_rows_are_the_plans(rule, unit):
  sources, n = web(), 1_000_000
  rule = dict(languages=("all",) if rule["kind"] != "explicit" else None) | rule | dict(unit=unit)
  rule = mixture.with_budget(rule, sources, n)
  plan = mixture.plan(sources, rule)
  drawn = np.bincount(mixture.locate_many(plan, 0, n)[0], minlength=len(sources))
  rows, size = (np.array([each[key] for each in sources]) for key in ("rows", unit))
  read = drawn * size / rows
  weight = mixture.weights({each["name"]: each[unit] for each in sources}, rule)
  weight = np.array([weight.get(each["name"], 0) for each in sources])
  np.testing.assert_allclose(plan["segments"][0]["weights"], weight, atol=1e-9)
  np.testing.assert_allclose(read / read.sum(), weight, atol=1e-4)
  predicted = weight / size / (weight / size * rows).sum() * n  # epochs, from shares alone
  assert (np.abs(drawn / rows - predicted) <= 6 / rows).all()
  if rule["kind"] == "unimax":
    assert (drawn / rows <= rule["epochs"] + 6 / rows).all()
    assert (predicted > 0.999 * rule["epochs"]).sum() > 10


def test_any_row_is_found_without_the_rows_before_it():
  plan = mixture.plan(seventy(), ALL)
  source_n, rank_n = mixture.locate_many(plan, 0, 30_000)
  for row in (0, 1, 2, 69, 4095, 4096, 17_711, 29_999):
    assert mixture.locate(plan, row) == (source_n[row], rank_n[row])
  for start, count in ((5000, 1), (9999, 4097), (0, 3)):
    some = mixture.locate_many(plan, start, count)
    np.testing.assert_array_equal(some[0], source_n[start : start + count])
    np.testing.assert_array_equal(some[1], rank_n[start : start + count])


def test_counts_far_out_agree_with_counting_on_from_there():
  plan = mixture.plan(seventy(), ALL)
  start = 10**12 + 7
  before, after = mixture.counts(plan, start), mixture.counts(plan, start + 5000)
  source_n, _ = mixture.locate_many(plan, start, 5000)
  increase = [after[name] - before[name] for name in before]
  assert increase == np.bincount(source_n, minlength=70).tolist()
  assert sum(before.values()) == start


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17, 400])
def test_the_floor_sum_is_the_sum_of_floors(n):
  random = np.random.default_rng(n)
  for m, a, b in random.integers(1, 1000, (50, 3)).tolist():
    assert mixture._floor_sum(n, m, a, b) == sum((a * k + b) // m for k in range(n))


def test_weights_are_shares_of_tokens_although_rows_are_filled_differently():
  sources = [source("deu_Latn/full", 1000, 500), source("deu_Latn/half", 1000, 250)]
  rule = dict(kind="explicit", weights={"deu_Latn/full": 0.5, "deu_Latn/half": 0.5})
  counts = mixture.counts(mixture.plan(sources, rule), 30_000)
  assert counts["deu_Latn/full"] == pytest.approx(10_000, abs=3)
  assert counts["deu_Latn/half"] == pytest.approx(20_000, abs=3)


def test_shares_of_bytes_are_realised_as_shares_of_bytes():
  sources = [source("deu_Latn/a", 1000), source("fra_Latn/abc", 1000)]  # 4 and 6 bytes a token
  rule = dict(kind="explicit", weights={"deu_Latn": 0.5, "fra_Latn": 0.5}, unit="bytes")
  counts = mixture.counts(mixture.plan(sources, rule), 30_000)
  read = [counts[s["name"]] / s["rows"] * s["bytes"] for s in sources]
  assert read[0] / sum(read) == pytest.approx(0.5, abs=1e-4)
  for each in sources:
    del each["bytes"]
  mixture.plan(sources, rule | dict(unit="tokens"))
  with pytest.raises(run.Refused, match="'deu_Latn/a' comes from a plan that counts no bytes"):
    mixture.plan(sources, rule)


@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_a_budget_that_is_not_set_is_what_the_rows_of_the_run_hold(unit):
  sources, rows = seventy(), 3_000_000
  rule = dict(kind="unimax", epochs=1.0, budget=None, languages=("all",), unit=unit)
  filled = mixture.with_budget(rule, sources, rows)
  drawn = mixture.counts(mixture.plan(sources, filled), rows)
  read = sum(drawn[s["name"]] / s["rows"] * s[unit] for s in sources)
  assert read == pytest.approx(filled["budget"], rel=1e-5)
  epochs = [drawn[s["name"]] / s["rows"] for s in sources]
  assert sum(0.9 < epoch < 1.1 for epoch in epochs) > 20  # capped, but for a row more or less
  assert all(drawn[s["name"]] <= s["rows"] + 6 for s in sources)
  assert mixture.with_budget(filled, sources, 5) == filled
  assert mixture.with_budget(ALL, sources, 5) == ALL


def test_sources_packed_differently_are_refused():
  with pytest.raises(run.Refused, match="differ in T"):
    mixture.plan([source("deu_Latn/a", 5), source("fra_Latn/a", 5, T=256)], ALL)
  with pytest.raises(run.Refused, match="given twice"):
    mixture.plan([source("deu_Latn/a", 5), source("deu_Latn/a", 5)], ALL)
  with pytest.raises(run.Refused, match="at least one source"):
    mixture.plan([], ALL)


def test_a_plan_is_json_and_its_hash_does_not_depend_on_paths():
  plan = mixture.plan(seventy(), ALL)
  again = json.loads(json.dumps(plan))
  assert again == plan
  moved = {**plan, "sources": [{**source, "path": "elsewhere"} for source in plan["sources"]]}
  assert mixture.plan_sha256(moved) == mixture.plan_sha256(again)
  for other in (
      mixture.plan(seventy(), {**ALL, "temperature": 3.34}),
      mixture.plan(seventy(seed=1), ALL),
      mixture.append(plan, 10, ALL),
      {**plan, "T": 8192},
  ):
    assert mixture.plan_sha256(other) != mixture.plan_sha256(plan)


def test_rounding_of_a_power_on_another_machine_does_not_change_the_plan():
  sources, rule = seventy(), dict(kind="explicit")
  share = mixture.weights({source["name"]: source["tokens"] for source in sources}, ALL)
  nudged = {name: np.nextafter(value, 1) for name, value in share.items()}
  plans = [mixture.plan(sources, {**rule, "weights": weights}) for weights in (share, nudged)]
  assert mixture.plan_sha256(plans[0]) == mixture.plan_sha256(plans[1])


def test_appending_the_same_rule_changes_nothing():
  plan = mixture.plan(seventy(), ALL)
  same = mixture.append(plan, 12_345, ALL)
  assert len(plan["segments"]) == 1 and len(same["segments"]) == 2
  np.testing.assert_array_equal(
      mixture.locate_many(plan, 0, 20_000), mixture.locate_many(same, 0, 20_000)
  )


def test_after_a_change_every_source_goes_on_where_it_was():
  sources = seventy()
  plan = mixture.plan(sources, {**ALL, "temperature": 1})
  plan = mixture.append(plan, 7001, {**ALL, "temperature": 100})
  plan = mixture.append(plan, 9000, dict(kind="explicit", weights={"Africa": 1}))
  source_n, rank_n = mixture.locate_many(plan, 0, 15_000)
  for index in range(70):
    ranks = rank_n[source_n == index]
    np.testing.assert_array_equal(ranks, np.arange(len(ranks)))
  assert list(mixture.counts(plan, 15_000).values()) == np.bincount(source_n, minlength=70).tolist()
  africa = set(languages.expand("Africa"))
  assert {sources[index]["language"] for index in np.unique(source_n[9000:])} <= africa
  for row in (7000, 7001, 8999, 9000):
    assert mixture.locate(plan, row) == (source_n[row], rank_n[row])


def test_a_source_may_join_and_another_leave_with_its_counter_kept():
  a, b, c = source("deu_Latn/a", 50), source("fra_Latn/a", 50), source("ita_Latn/a", 50)
  plan = mixture.append(mixture.plan([a, b], ALL), 100, ALL, sources=[b, c])
  source_n, rank_n = mixture.locate_many(plan, 0, 200)
  names = [source["name"] for source in plan["sources"]]
  assert names == ["deu_Latn/a", "fra_Latn/a", "ita_Latn/a"]
  assert set(source_n[100:]) == {1, 2}
  assert rank_n[source_n == 2][0] == 0
  np.testing.assert_array_equal(rank_n[source_n == 1], np.arange((source_n == 1).sum()))
  back = mixture.append(plan, 200, ALL, sources=[a, b, c])
  source_n, rank_n = mixture.locate_many(back, 0, 300)
  np.testing.assert_array_equal(rank_n[source_n == 0], np.arange((source_n == 0).sum()))
  assert mixture.counts(plan, 50)["ita_Latn/a"] == 0


def test_a_change_that_would_break_counters_is_refused():
  plan = mixture.append(mixture.plan([source("deu_Latn/a", 50)], ALL), 100, ALL)
  with pytest.raises(run.Refused, match="row 99.*already changes at row 100"):
    mixture.append(plan, 99, ALL)
  with pytest.raises(run.Refused, match="50 rows before, 51 rows now"):
    mixture.append(plan, 200, ALL, sources=[source("deu_Latn/a", 51)])
  with pytest.raises(run.Refused, match="T 256, the plan has 512"):
    mixture.append(plan, 200, ALL, sources=[source("fra_Latn/a", 50, T=256)])


@pytest.mark.parametrize("width", ["none first", "none last", "one source"])
def test_a_source_of_no_width_is_never_drawn(width):
  a, b = source("deu_Latn/a", 50), source("fra_Latn/a", 50)
  only = {"none first": "fra_Latn", "none last": "deu_Latn", "one source": "deu_Latn"}[width]
  sources = [a] if width == "one source" else [a, b]
  plan = mixture.plan(sources, dict(kind="explicit", weights={only: 1}))
  source_n, rank_n = mixture.locate_many(plan, 0, 10_000)
  assert {plan["sources"][index]["language"] for index in source_n} == {only}
  np.testing.assert_array_equal(rank_n, np.arange(10_000))


def test_the_table_adds_up_and_warns_above_four_epochs():
  sources = [source("deu_Latn/a", 1000), source("fra_Latn/a", 10)]
  plan = mixture.plan(sources, {**ALL, "temperature": 1e9})
  lines = mixture.table(plan, 200)
  assert lines[0] == "mixture temperature: languages all, temperature 1e+09, unit tokens"
  assert "200 rows" in lines[1] and lines[2].split() == ["language", "tokens", "share", "epochs"]
  assert lines[3].split() == ["deu_Latn", "50.50k", "50.50%", "0.10"]  # 101 rows of 500 tokens
  assert lines[4].split() == ["fra_Latn", "49.50k", "49.50%", "9.90"]
  assert lines[6].split() == ["Europe", "100.00k", "100.00%", "0.20"]
  assert lines[7] == "warning: more than 4 epochs of 1 sources: fra_Latn/a 9.9"
  assert not any("warning" in line for line in mixture.table(plan, 60))


def test_epochs_over_stages_add_up_and_a_cap_is_a_stage_s_own():
  sources = [source("deu_Latn/a", 1000), source("fra_Latn/a", 30), source("fra_Latn/instruct", 9)]
  even = {**ALL, "temperature": 1e9, "within": (("instruct", 0.0),)}
  plan = mixture.append(mixture.plan(sources, even), 150, even)
  assert not any("warning" in line for line in mixture.table(plan, 150))
  lines = mixture.table(plan, 300)
  assert "warning: more than 4 epochs of 1 sources: fra_Latn/a 5.0" in lines
  assert "sources left out: instruct of 1 languages" in lines
  capped = mixture.with_budget(dict(kind="unimax", epochs=1.0, languages=("all",),
                                    within=(("instruct", 0.0),)), sources, 100)
  plan = mixture.append(mixture.plan(sources, capped), 100, capped)
  assert not any("warning" in line for line in mixture.table(plan, 100))
  assert "warning: more than 1 epochs of 1 sources: fra_Latn/a 2.0" in mixture.table(plan, 200)


def test_after_another_batch_the_table_counts_the_rows_that_were_read():
  sources = [source("deu_Latn/a", 1000), source("fra_Latn/a", 30)]
  plan = mixture.append(mixture.plan(sources, ALL), 640, ALL)
  moved = plan["segments"][1] | dict(start_row=320)  # 40 steps of 16 rows, from now on of 8
  lines = mixture.table(plan | dict(segments=[plan["segments"][0], moved]), 640)
  assert lines[1].split()[:2] == ["960", "rows"]


def test_the_table_names_what_is_asked_for_without_rows_left_out_or_never_reached():
  sources = [source("deu_Latn/a", 10**6), source("code/a", 50), source("swh_Latn/a", 50),
             source("wol_Latn/a", 50)]
  rule = {**ALL, "temperature": 1.0, "languages": ("de", "Africa")}
  lines = mixture.table(mixture.plan(sources, rule | dict(keep=(("de", 1), ("sw", 1)))), 200)
  assert lines[-2:] == ["less than one row, although the mixture draws from them: swh_Latn",
                        "with rows, but left out by the mixture: code, wol_Latn"]
  lines = mixture.table(mixture.plan(sources, rule), 200)
  missing = [line for line in lines if line.startswith("asked for, but without rows: ")]
  codes = set(missing[0].partition(": ")[2].split(", "))
  assert codes == set(languages.expand("Africa")) - {"swh_Latn", "wol_Latn"}


def test_the_table_of_a_staged_plan_has_all_rows_and_this_stages():
  sources = [source("deu_Latn/a", 100), source("swh_Latn/a", 100)]
  later = {"swh_Latn": 0.75, "de": 0.25}
  plan = mixture.append(mixture.plan(sources, {"deu_Latn": 1.0}), 100, later)
  lines = mixture.table(plan, 300)
  assert lines[1].split() == "300 rows in all 200 rows of this stage".split()
  assert lines[3].split() == "deu_Latn 75.00k 50.00% 1.50 25.00k 25.00% 0.50".split()
  assert lines[4].split() == "swh_Latn 75.00k 50.00% 1.50 75.00k 75.00% 1.50".split()
  assert [line.split()[0] for line in lines[5:8]] == ["region", "Europe", "Africa"]
  assert mixture.table(plan, 100)[-1] == "with rows, but left out by the mixture: swh_Latn"


def test_the_table_counts_bytes_if_the_rule_does_and_every_source_has_them():
  sources = [source("deu_Latn/a", 100), source("swh_Latn/a", 100)]
  rule = {**ALL, "unit": "bytes"}
  assert mixture.table(mixture.plan(sources, rule), 50)[2].split()[1] == "bytes"
  old = mixture.plan(sources[:1], ALL)
  del old["sources"][0]["bytes"], old["segments"][0]["unit"], old["segments"][0]["rule"]
  assert "earlier version" in mixture.table(old, 50)[0]
  plan = mixture.append(old, 50, rule, sources[1:])
  assert mixture.table(plan, 90)[2].split()[1] == "tokens"


def test_epochs_count_only_the_sources_that_take_part():
  sources = [source("deu_Latn/a", 100), source("deu_Latn/instruct", 900)]
  lines = mixture.table(mixture.plan(sources, {**ALL, "within": (("instruct", 0.0),)}), 150)
  assert lines[3].split() == ["deu_Latn", "75.00k", "100.00%", "1.50"]


def test_locating_a_chunk_of_rows_is_cheap():
  plan = mixture.plan(seventy(), ALL)
  start = time.perf_counter()
  mixture.locate_many(plan, 987_654_321, 4096)
  assert time.perf_counter() - start < 0.2  # 3 ms when this was written; the limit is for busy CPUs
