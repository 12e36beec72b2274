"""Roll-ups against NumPy and figures by hand."""

import math

import numpy as np
import pytest

from tiny_aya_jax import languages
from tiny_aya_jax.evaluate import rollups

COLUMN = dict(deu_Latn=1.0, fra_Latn=2.0, yor_Latn=4.0, tha_Thai=None, hin_Deva=3.0)


def random_column():
  random = np.random.default_rng(0)
  return {language.code: float(random.normal(1, 0.3)) for language in languages.LANGUAGES}


def test_the_facts_are_those_of_the_table():
  for language in languages.LANGUAGES:
    facts = rollups.facts(language.code)
    for field in ("name", "script", "family", "region", "fineweb_bytes"):
      assert facts[field] == getattr(language, field)
  assert rollups.facts("cmn_Hant")["script"] == "Hani"


def test_a_code_outside_the_table_is_no_error():
  assert rollups.facts("abc_Wxyz") == dict(name="abc_Wxyz", script="Wxyz", family="Other",
                                           region="Other", tier="unknown", fineweb_bytes=None)
  assert rollups.facts("code") == dict(name="code", script="", family="Code", region="Code",
                                       tier="unknown", fineweb_bytes=None)


def test_each_tier_begins_at_its_threshold():
  assert [rollups.tier(size) for size in (100e9, 100e9 - 1, 10e9, 10e9 - 1, 0)] == [
      "high", "middle", "middle", "low", "low"]


def test_the_docstring_of_tier_counts_the_languages_right():
  tiers = [rollups.facts(language.code)["tier"] for language in languages.LANGUAGES]
  assert [tiers.count(tier) for tier in ("high", "middle", "low")] == [30, 18, 22]
  assert all(count in rollups.tier.__doc__ for count in ("30 of the 70", "(18)", "(22)"))


def test_mean_and_deviation_are_numpys():
  column = random_column()
  summary = rollups.summary(column, "lower")
  values = np.array(list(column.values()))
  assert math.isclose(summary["mean"], values.mean(), rel_tol=1e-12)
  assert math.isclose(summary["deviation"], values.std(), rel_tol=1e-12)
  assert summary["languages"] == 70 and summary["missing"] == 0


@pytest.mark.parametrize("group", rollups.GROUPS)
def test_means_of_groups_are_numpys(group):
  column = random_column()
  members = {code: rollups.facts(code)[group] for code in column}
  found = rollups.summary(column, "higher")["by"][group]
  assert set(found) == set(members.values())
  for name, row in found.items():
    values = [column[code] for code in column if members[code] == name]
    assert row["languages"] == len(values)
    assert math.isclose(row["mean"], np.mean(values), rel_tol=1e-12)


def test_the_worst_are_the_highest_where_lower_is_better():
  summary = rollups.summary(COLUMN, "lower")
  assert list(summary["worst"].items()) == [
      ("yor_Latn", 4.0), ("hin_Deva", 3.0), ("fra_Latn", 2.0), ("deu_Latn", 1.0)]
  assert summary["poorest"] == 4.0


def test_the_worst_are_the_lowest_where_higher_is_better():
  summary = rollups.summary(COLUMN, "higher")
  assert list(summary["worst"]) == ["deu_Latn", "fra_Latn", "hin_Deva", "yor_Latn"]
  assert summary["poorest"] == 1.0


def test_the_worst_are_five_and_ties_keep_the_order_of_the_column():
  column = dict.fromkeys(list(random_column())[:9], 1.0)
  for better in ("lower", "higher"):
    assert list(rollups.summary(column, better)["worst"]) == list(column)[:5]


def test_a_missing_value_is_counted_and_is_in_no_figure():
  summary = rollups.summary(COLUMN, "lower", COLUMN)
  assert summary["missing"] == 1 and summary["languages"] == 4 and summary["mean"] == 2.5
  assert "Asia Pacific" not in summary["by"]["region"] and "tha_Thai" not in summary["worst"]
  assert summary["by"]["region"]["Europe"] == dict(mean=1.5, languages=2)


@pytest.mark.parametrize("better, share", [("lower", 1 / 3), ("higher", 1 / 3)])
def test_improved_is_strict_and_over_the_languages_in_both(better, share):
  baseline = dict(deu_Latn=2.0, fra_Latn=2.0, yor_Latn=3.0, tha_Thai=9.0, hin_Deva=None, eng_Latn=0)
  assert rollups.summary(COLUMN, better, baseline)["improved"] == share
  more = COLUMN | dict(yor_Latn=2.5)
  assert rollups.summary(more, "lower", baseline)["improved"] == 2 / 3


def test_without_anything_to_compare_improved_is_none():
  assert rollups.summary(COLUMN, "lower")["improved"] is None
  assert rollups.summary(COLUMN, "lower", dict(eng_Latn=1.0))["improved"] is None


def test_of_nothing_a_figure_is_none():
  summary = rollups.summary(dict(deu_Latn=None), "higher", dict(deu_Latn=1.0))
  assert summary == dict(languages=0, missing=1, mean=None, deviation=None, poorest=None, worst={},
                         improved=None, by={group: {} for group in rollups.GROUPS})


def test_a_direction_that_is_none_is_refused():
  with pytest.raises(ValueError, match="'up', expected 'lower' or 'higher'"):
    rollups.summary(COLUMN, "up")
