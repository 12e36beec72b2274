"""The choice among merges, by hand; the predictor on rules that were planted and on noise."""

import json

import numpy as np
import pytest

from tiny_aya_jax import run
from tiny_aya_jax.post import selection

LANGUAGES = ["amh_Ethi", "hau_Latn", "zul_Latn"]
SCORES = {  # mean, minimum: 5, 4; 6, 3; 5, 5; 4, 4
    "linear 0.5": dict(amh_Ethi=4.0, hau_Latn=5.0, zul_Latn=6.0, deu_Latn=0.0),
    "linear 0.75": dict(amh_Ethi=3.0, hau_Latn=7.0, zul_Latn=8.0),
    "slerp 0.5": dict(amh_Ethi=5.0, hau_Latn=5.0, zul_Latn=5.0),
    "ties 0.5": dict(amh_Ethi=4.0, hau_Latn=4.0, zul_Latn=4.0),
}
SAFETY = {"linear 0.5": 0.80, "linear 0.75": 0.85, "slerp 0.5": 0.70, "ties 0.5": 0.90}


def choose(scores=SCORES, languages=LANGUAGES, minimum_weight=0.5, **more):
  return selection.choose(scores, languages, minimum_weight=minimum_weight, **more)


def order(result):
  return [row["candidate"] for row in result["candidates"]]


@pytest.mark.parametrize("weight, expected", [
    (0.0, ["linear 0.75", "slerp 0.5", "linear 0.5", "ties 0.5"]),  # 6, 5, 5, 4: the higher minimum first
    (0.5, ["slerp 0.5", "linear 0.5", "linear 0.75", "ties 0.5"]),  # 5, 4.5, 4.5, 4
    (1.0, ["slerp 0.5", "linear 0.5", "ties 0.5", "linear 0.75"]),  # 5, 4, 4, 3
])
def test_the_objective_weighs_the_mean_and_the_minimum(weight, expected):
  result = choose(minimum_weight=weight)
  assert order(result) == expected and result["choice"] == expected[0]
  assert [row["rank"] for row in result["candidates"]] == [1, 2, 3, 4]
  for row in result["candidates"]:
    values = [SCORES[row["candidate"]][code] for code in LANGUAGES]
    assert row["mean"] == pytest.approx(sum(values) / 3) and row["minimum"] == min(values)
    assert row["objective"] == pytest.approx((1 - weight) * row["mean"] + weight * row["minimum"])


def test_a_better_candidate_that_is_less_safe_is_shown_and_not_chosen():
  result = choose(safety=SAFETY, baseline_safety=0.85, tolerance=0.05)
  assert order(result)[0] == "slerp 0.5" and result["choice"] == "linear 0.5"
  assert [row["refused"] for row in result["candidates"]] == ["safety 0.7 is below 0.8", None, None, None]
  assert "1 with a better one are less safe" in result["why"] and "at least 0.8" in result["why"]
  assert choose(safety=SAFETY, baseline_safety=0.85, tolerance=0.15)["choice"] == "slerp 0.5"
  assert choose(safety=SAFETY, baseline_safety=0.85)["choice"] == "linear 0.75"  # equal is no regression
  assert 0.8 - 0.1 > 0.7 and choose(safety=SAFETY, baseline_safety=0.8, tolerance=0.1)["choice"] == "slerp 0.5"


def test_where_none_is_safe_none_is_chosen_and_it_is_said():
  result = choose(safety=SAFETY, baseline_safety=0.99)
  assert result["choice"] is None and result["null"]["difference"] is None
  assert "keep the baseline" in result["why"]
  assert "choice: none: no candidate of 4 keeps safety at 0.99" in selection.table(result)


def test_without_safety_the_choice_says_so():
  assert "safety was not measured" in choose()["why"]


def test_ties_go_to_the_higher_minimum_then_to_the_null_then_by_name_and_strength():
  level = dict.fromkeys(LANGUAGES, 1.0)
  names = ["ties 0.5", "linear 0.25", "slerp 0.5", "linear 0.5", "linear 0.125"]
  for given in (names, names[::-1]):
    result = choose({name: level for name in given})
    assert order(result) == ["linear 0.5", "linear 0.125", "linear 0.25", "slerp 0.5", "ties 0.5"]
  uneven = dict(amh_Ethi=0.5, hau_Latn=1.25, zul_Latn=1.25)
  assert order(choose({"linear 0.5": uneven, "ties 0.5": level}, minimum_weight=0.0))[0] == "ties 0.5"
  noise = {name: value + 1e-15 for name, value in level.items()}
  assert choose({"linear 0.5": level, "ties 0.5": noise})["choice"] == "linear 0.5"


def test_the_null_stands_beside_with_its_difference():
  null = choose(minimum_weight=0.0)["null"]
  assert null["candidate"] == "linear 0.5" and null["rank"] == 3 and null["over"] == "languages"
  assert null["difference"] == dict(objective=1.0, mean=1.0)
  low, high = null["interval"]  # of differences -1, 2, 2
  assert low == -1.0 and high == 2.0
  alone = choose({"linear 0.5": SCORES["linear 0.5"]})
  assert alone["choice"] == "linear 0.5" and alone["null"]["interval"] == [0.0, 0.0]
  assert alone["null"]["difference"] == dict(objective=0.0, mean=0.0)


def test_the_interval_is_paired_and_shrinks_with_the_square_root_of_the_items():
  random = np.random.default_rng(1)
  spread = {}
  for size in (100, 1600):
    hard = {code: random.normal(0, 10, size) for code in LANGUAGES}  # what both have in common
    gain = {code: random.normal(1, 1, size) for code in LANGUAGES}
    items = {"linear 0.5": {code: hard[code].tolist() for code in LANGUAGES},
             "slerp 0.5": {code: (hard[code] + gain[code]).tolist() for code in LANGUAGES}}
    null = choose(items=items)["null"]
    low, high = null["interval"]
    spread[size] = high - low
    assert null["over"] == "items" and low < np.mean(list(gain.values())) < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(3 * size), rel=0.15)
  assert spread[100] / spread[1600] == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("change, said", [
    (dict(languages=[]), "none were given"),
    (dict(languages=[*LANGUAGES, "yor_Latn"]), "linear 0.5 has no finite score in yor_Latn"),
    (dict(scores=SCORES | {"ties 0.5": dict(amh_Ethi=1.0, hau_Latn=None, zul_Latn=float("nan"))}),
     "ties 0.5 has no finite score in hau_Latn, zul_Latn"),
    (dict(scores={"ties 0.5": SCORES["ties 0.5"]}), "'linear 0.5' among them"),
    (dict(scores=SCORES | {"ties": SCORES["ties 0.5"]}), "candidate 'ties': expected an operator"),
    (dict(minimum_weight=1.5), "minimum_weight is 1.5"),
    (dict(tolerance=-0.1), "tolerance of safety is -0.1"),
    (dict(safety=SAFETY), "give both, or neither"),
    (dict(safety={"linear 0.5": 1.0}, baseline_safety=0.5), "not measured of linear 0.75, slerp 0.5, ties"),
    (dict(items={"linear 0.5": dict(amh_Ethi=[1, 2]), "slerp 0.5": dict(amh_Ethi=[1])}),
     "amh_Ethi has 1 items of slerp 0.5 and 2 of linear 0.5"),
])
def test_what_cannot_be_chosen_by_is_refused(change, said):
  with pytest.raises(run.Refused, match=said):
    choose(**change)


def test_a_name_says_operator_and_strength():
  assert selection.candidate("linear", 0.5) == selection.NULL
  assert selection.parsed(selection.candidate("task slerp", 0.125)) == ("task slerp", 0.125)


# --- the predictor ------------------------------------------------------------------------------

SWEEP = [selection.candidate(operator, strength) for operator in ("linear", "slerp", "ties")
         for strength in (0.25, 0.5, 0.75)]
REGIONS = [f"region {number}" for number in range(6)]


def similarity(random, base=True):
  """Features of a pair as similarity.features gives them."""
  def one():
    return dict(kl_ab=dict(mean=random.uniform(0.1, 1), p90=random.uniform(1, 2)), agreement=random.uniform(0.3, 1),
                kl_ba=dict(mean=random.uniform(0.1, 1), p90=random.uniform(1, 2)), cosine=[random.uniform(0.8, 1)] * 4)

  task = dict(task_cosine=random.uniform(0, 1), task_norm_ratio=1.0, sign_agreement=random.uniform(0.5, 1))
  return dict(functional=dict(languages={code: one() for code in LANGUAGES}),
              structural=dict(whole=dict(cosine=0.9, distance=random.uniform(0.1, 1), norm_ratio=1.0)
                              | (task if base else {})))


def merges(gain, seed=0):
  """Rows of six merges of which each language gains gain(features, operator, strength)."""
  random, rows = np.random.default_rng(seed), []
  for region in REGIONS:
    pair = similarity(random)
    scores = {name: {code: 50 + gain(selection.features(pair, code), *selection.parsed(name), random)
                     for code in LANGUAGES} for name in SWEEP}
    scores["linear 0.5"] = dict.fromkeys(LANGUAGES, 50.0)
    rows += selection.rows_of(region, pair, scores)
  return rows


def planted(features, operator, strength, _):
  """Far models like less of the other; ties is better the more their tokens agree."""
  far, agree = features[0], features[4]
  return -3 * far * (strength - 0.5) + (2 * agree - 1 if operator == "ties" else 0)


def test_a_rule_of_the_predictors_own_form_is_recovered():
  rows = merges(planted)
  assert len(rows) == 6 * 3 * 8
  predictor = selection.fit(rows, 1e-3)
  error = predictor["error"]
  assert error["better"] and error["ours"] < 0.1 * error["nothing"] and error["regions"] == 6
  pair = similarity(np.random.default_rng(9))
  found = selection.predict(predictor, pair, SWEEP, LANGUAGES)
  for name in SWEEP:
    for code in LANGUAGES:
      expected = planted(selection.features(pair, code), *selection.parsed(name), None)
      assert found[name][code] == pytest.approx(expected, abs=0.2)
  assert set(found["linear 0.5"].values()) == {0.0}
  measured = {name: {code: planted(selection.features(pair, code), *selection.parsed(name), None)
                     for code in LANGUAGES} for name in SWEEP}
  compared = selection.agreement(choose(found, source="predicted"), choose(measured))
  assert compared["candidates"] == 9 and compared["spearman"] > 0.9 and compared["kendall"] > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_on_noise_the_predictor_says_that_it_is_no_better(seed):
  predictor = selection.fit(merges(lambda *_: _[-1].normal(), seed), 1.0)
  error = predictor["error"]
  assert not error["better"] and error["ours"] > error["nothing"]
  assert "NOT better" in selection.table(choose(), predictor)


def test_more_ridge_predicts_less():
  rows, pair = merges(planted), similarity(np.random.default_rng(9))
  sizes = [np.abs([list(column.values()) for column in selection.predict(
      selection.fit(rows, ridge), pair, SWEEP, LANGUAGES).values()]).mean() for ridge in (0.1, 100, 1e5)]
  assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 0.05 * sizes[0]


def test_the_left_out_region_is_predicted_by_the_others_alone():
  rows = merges(planted)
  changed = [row | dict(gain=row["gain"] + 100) if row["region"] == "region 0" else row for row in rows]
  one, other = (selection.fit([row for row in some if row["region"] != "region 0"], 1.0) for some in (rows, changed))
  assert one == other
  left = selection.fit(changed, 1.0)["error"]["ours"]
  assert left > 100 * (1 / 6) ** 0.5 * 0.95  # nobody foresaw it


def test_merges_without_a_base_are_rows_too():
  random = np.random.default_rng(3)
  rows = merges(planted)
  pair = similarity(random, base=False)
  assert np.isnan(selection.features(pair, "hau_Latn")[-3:]).all()
  rows += selection.rows_of("plain", pair, {name: dict.fromkeys(LANGUAGES, 50.0) for name in SWEEP})
  predictor = selection.fit(rows, 1.0)
  assert json.loads(json.dumps(predictor, allow_nan=False)) == predictor
  gains = selection.predict(predictor, pair, SWEEP, LANGUAGES)
  assert np.isfinite([list(column.values()) for column in gains.values()]).all()


def test_too_little_to_learn_from_is_refused(tmp_path):
  rows = merges(planted)
  with pytest.raises(run.Refused, match="from 29 rows of 2 regions"):
    selection.fit(rows[:29], 1.0)
  with pytest.raises(run.Refused, match="from 48 rows of 2 regions, expected at least 30 of 3"):
    selection.fit(rows[:48], 1.0)
  with pytest.raises(run.Refused, match="ridge is 0"):
    selection.fit(rows, 0)
  predictor, pair = selection.fit(rows, 1.0), similarity(np.random.default_rng(9))
  with pytest.raises(run.Refused, match="no earlier merge used dare"):
    selection.predict(predictor, pair, ["dare 0.5"], LANGUAGES)
  with pytest.raises(run.Refused, match="no rows in yor_Latn"):
    selection.predict(predictor, pair, SWEEP, ["yor_Latn"])
  (tmp_path / "merge.json").write_text(json.dumps(dict(region="Africa", scores=SCORES)))
  with pytest.raises(run.Refused, match="lacks similarity"):
    selection.read_rows([tmp_path / "merge.json"])


def test_rows_come_from_what_earlier_merges_wrote(tmp_path):
  pair = similarity(np.random.default_rng(4))
  scores = SCORES | {"ties 0.5": SCORES["ties 0.5"] | dict(deu_Latn=1.0)}  # of which there is no probe
  (tmp_path / "merge.json").write_text(json.dumps(dict(region="Africa", similarity=pair, scores=scores)))
  rows = selection.read_rows([tmp_path / "merge.json"])
  assert len(rows) == 9 and {row["region"] for row in rows} == {"Africa"}
  found = {(row["candidate"], row["code"]): row for row in rows}
  assert found["linear 0.75", "zul_Latn"]["gain"] == 2.0
  assert found["ties 0.5", "hau_Latn"]["features"] == selection.features(pair, "hau_Latn")


# --- ranks, and text ----------------------------------------------------------------------------


def ranked(**objectives):
  return dict(candidates=[dict(candidate=name, objective=value) for name, value in objectives.items()])


def test_agreement_of_ranks_by_hand():
  one = ranked(a=1.0, b=2.0, c=3.0, d=4.0)
  assert selection.agreement(one, one) == dict(candidates=4, spearman=1.0, kendall=1.0)
  assert selection.agreement(one, ranked(a=4.0, b=3.0, c=2.0, d=1.0))["kendall"] == -1.0
  swapped = selection.agreement(one, ranked(a=10.0, b=30.0, c=20.0, d=40.0, e=50.0))
  assert swapped["candidates"] == 4  # one pair of six is turned round; d^2 is 2 of 4 (4^2 - 1) / 6
  assert swapped["spearman"] == pytest.approx(0.8) and swapped["kendall"] == pytest.approx(4 / 6)
  tied = selection.agreement(one, ranked(a=1.0, b=1.0, c=2.0, d=3.0))
  assert tied["kendall"] == pytest.approx(5 / np.sqrt(30)) and tied["spearman"] == pytest.approx(
      np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3, 4])[0, 1])
  assert selection.agreement(one, ranked(a=1.0, b=1.0, c=1.0, d=1.0)) == dict(
      candidates=4, spearman=None, kendall=None)


def test_a_result_is_json_and_a_table():
  result = choose(safety=SAFETY, baseline_safety=0.85, tolerance=0.05)
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  text = selection.table(result, compared=dict(candidates=4, spearman=0.5, kendall=-0.25))
  lines = {line[6:17].strip(): line for line in text.splitlines() if line[:3].strip().isdigit()}
  assert lines.keys() == SCORES.keys() and "safety 0.7 is below 0.8" in lines["slerp 0.5"]
  assert "choice: linear 0.5" in text and "beside linear 0.5: objective +0.0000" in text
  assert "Spearman +0.50, Kendall -0.25" in text and " 2*  linear 0.5 " in text
