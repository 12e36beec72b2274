"""What is said of a sweep: the planted arm is found, and noise is not taken for an effect."""

import copy
import functools
import json
import math
import statistics

import numpy as np
import pytest

from tiny_aya_jax import languages
from tiny_aya_jax.evaluate import rollups
from tiny_aya_jax.sweep import verdict

CODES = [language.code for language in languages.LANGUAGES if language.code != "cmn_Hant"]
FACTS = {code: rollups.facts(code) for code in CODES}
MEAN = dict(kind="mean", floor=None)
ARMS = {f"temperature {x:g}": x for x in (1, 1.43, 2, 3.33, 5, 10)} | {"unimax 1": None}
TOKENS, TARGET = 200_000_000, 6e12


def made(objective=MEAN, noise=0.002, effect=1.0, seeds=3):
  """69 languages, 7 arms, more seeds at both ends; temperature 3.33 is the best, by 0.006."""
  return copy.deepcopy(_made(tuple(objective.items()), noise, effect, seeds))


@functools.cache
def _made(objective, noise, effect, seeds):
  draw = np.random.default_rng(0)
  sizes = {code: FACTS[code]["fineweb_bytes"] / 4 * TOKENS / TARGET for code in CODES}
  trials = [trial(draw, sizes, arm, x, seed, noise, effect) for arm, x in ARMS.items()
            for seed in range(seeds if x in (1, 10) else 1)]
  result = dict(
      name="temperature", objective=dict(objective), axes=["mixture"],
      target=dict(tokens=TARGET, sizes="report"), tokens=TOKENS, row=256, languages=FACTS, sizes=sizes,
      trials=trials, laws=None, verdict=None)
  return result | dict(verdict=verdict.of(result))


def trial(draw, sizes, arm, x, seed, noise=0.0, effect=0.0):
  flat = x or 5.5
  logs = np.log10([sizes[code] for code in CODES])
  shares = 10 ** ((logs - logs.max()) / flat)
  drawn = dict(zip(CODES, map(int, TOKENS * shares / shares.sum())))
  planted = 0.03 * (logs - logs.mean()) * np.log(flat) + 0.025 * np.log(flat / 3.33) ** 2
  bits = 1.9 - 0.14 * logs + effect * planted + draw.normal(0, noise) + draw.normal(
      0, noise, len(CODES))
  return dict(
      trial=f"{arm.replace(' ', '-')}_seed-{seed}", arm=arm, seed=seed, x=x,
      settings={"mixture.temperature": x}, state="done", why=None, tokens=drawn,
      epochs={code: drawn[code] / sizes[code] for code in CODES},
      bits_per_byte=dict(zip(CODES, map(float, bits))), bytes=dict.fromkeys(CODES, 200_000),
      seconds=431.5, operations=2.5e17)


def small(arms, objective=MEAN):
  """A sweep from {arm: [bits per byte of two languages a seed]}, seeds 0, 1, ..."""
  trials = [dict(trial=f"{arm}{seed}", arm=arm, seed=seed, x=None, state="done", why=None,
                 bits_per_byte=dict(zip(("deu_Latn", "yor_Latn"), map(float, bits))),
                 bytes=dict(deu_Latn=9000, yor_Latn=700))
            for arm, rows in arms.items() for seed, bits in enumerate(rows)]
  return dict(objective=objective, trials=trials, verdict=None,
              languages={code: FACTS[code] for code in ("deu_Latn", "yor_Latn")})


def fail(row, state="diverged", why="loss not finite at step 70"):
  row.update(state=state, why=why)
  for key in ("tokens", "epochs", "bits_per_byte", "bytes", "seconds", "operations"):
    row.pop(key, None)


def test_an_objective_is_the_mean_the_worst_language_the_worst_region_or_the_mean_on_a_floor():
  bits = dict(deu_Latn=1.0, fra_Latn=2.0, yor_Latn=1.75)
  values = {kind: verdict.value(bits, dict(kind=kind, floor=2.0), FACTS)
            for kind in ("mean", "worst", "region", "floor")}
  assert values == dict(mean=4.75 / 3, worst=2.0, region=1.75, floor=4.75 / 3)
  assert verdict.value(bits, dict(kind="floor", floor=1.99), FACTS) == math.inf


def test_the_planted_arm_is_recommended_and_told_from_those_with_seeds():
  seen = made()["verdict"]
  assert seen["recommended"] == "temperature 3.33" and seen["front"][0] == "temperature 3.33"
  rows = {arm["arm"]: arm for arm in seen["arms"]}
  assert all(rows[f"temperature {x}"]["difference"]["told"] for x in (1, 10))
  assert seen["drowned"] is False
  assert seen["words"]["recommendation"].startswith(
      "temperature 3.33 is recommended: of 7 arms it has the lowest mean over 69 languages")


def test_noise_is_pooled_between_seeds_of_one_arm_and_its_freedom_told():
  result = made()
  found = verdict.noise(result["trials"], MEAN, FACTS)
  ends = [[row["bits_per_byte"] for row in result["trials"] if row["x"] == x] for x in (1, 10)]
  for code in ("deu_Latn", "yor_Latn"):
    variances = [statistics.variance(bits[code] for bits in rows) for rows in ends]
    assert math.isclose(found["languages"][code] ** 2, statistics.fmean(variances))
  means = [statistics.variance(statistics.fmean(bits.values()) for bits in rows) for rows in ends]
  assert math.isclose(found["mean"] ** 2, statistics.fmean(means))
  assert found["freedom"] == 4 and found["objective"] == found["mean"]


def test_without_two_seeds_there_is_no_noise_and_no_interval():
  seen = made(seeds=1)["verdict"]
  assert seen["noise"] is None and seen["drowned"] is None
  assert seen["arms"][1]["difference"]["low"] is None and seen["arms"][1]["error"] is None
  assert "no arm has two finished seeds" in seen["words"]["warning"]
  assert seen["recommended"] == "temperature 3.33"


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (5, 2.571), (200, 1.972)])
def test_students_t_is_that_of_the_tables(freedom, t):
  assert abs(verdict.student(freedom) - t) < 1e-3


@pytest.mark.parametrize("common", [0.0, 3.0])
@pytest.mark.parametrize("seeds", [(3, 3), (3, 2)])
def test_an_interval_holds_a_planted_null_95_times_of_100(common, seeds):
  draw, held = np.random.default_rng(1), 0
  for _ in range(300):
    shared = common * draw.normal(size=3) * (seeds[0] == seeds[1])
    arms = {name: [[bits + shared[seed]] * 2 for seed, bits in enumerate(draw.normal(size=count))]
            for name, count in zip("ab", seeds)}
    seen = verdict.of(small(arms))
    apart = seen["arms"][1]["difference"]
    assert apart["paired"] == (seeds[0] == seeds[1])
    held += apart["low"] <= 0 <= apart["high"]
  assert 0.92 <= held / 300 <= 0.98


def test_arms_of_the_same_seeds_are_paired_and_so_told_apart():
  rows = {"a": [[1, 1], [2, 2], [3, 3]], "b": [[1.1, 1.1], [2.12, 2.12], [3.09, 3.09]]}
  apart = verdict.of(small(rows))["arms"][1]["difference"]
  assert apart["paired"] and apart["told"] and math.isclose(apart["value"], 0.31 / 3)
  half = 4.3027 * statistics.stdev([0.1, 0.12, 0.09]) / math.sqrt(3)
  assert math.isclose(apart["high"] - apart["value"], half, rel_tol=1e-4)
  rows["c"] = [[1, 1], [2.3, 2.3]]
  apart = {arm["arm"]: arm["difference"] for arm in verdict.of(small(rows))["arms"]}
  assert apart["a"]["paired"] is False and apart["a"]["told"] is False


def test_noise_that_exceeds_the_effect_is_said_with_the_seeds_that_would_settle_it():
  rows = dict(a=[[1.0, 1.0], [1.4, 1.4]], b=[[1.3, 1.3], [1.2, 1.2], [1.25, 1.25]])
  seen = verdict.of(small(rows))
  assert seen["drowned"] and seen["recommended"] == "a"
  deviation = math.sqrt((0.08 + 0.005) / 3)
  seeds = math.ceil(2 * 2.8**2 * (deviation / 0.05) ** 2)
  assert seen["arms"][1]["difference"]["seeds"] == seeds == 178
  assert "The noise exceeds the effect" in seen["words"]["warning"]
  assert "takes about 178 seeds of each" in seen["words"]["warning"]
  assert "held-out bytes (least: Yoruba, 700 bytes)" in seen["words"]["warning"]
  assert seen["words"]["recommendation"].endswith("It cannot be told from b.")


def test_equal_arms_are_no_division_by_zero():
  seen = verdict.of(small(dict(a=[[1, 1], [1, 1]], b=[[1, 1], [1, 1]])))
  assert seen["arms"][1]["difference"]["told"] is False
  assert "no number of seeds" in seen["words"]["warning"]


def test_an_arm_off_the_front_is_dominated_by_those_better_in_mean_and_worst():
  seen = verdict.of(small(dict(a=[[1, 2]], b=[[1.2, 1.9]], c=[[1.3, 2]], d=[[0, 2.5]])))
  assert {arm["arm"]: arm["dominated_by"] for arm in seen["arms"]} == dict(
      a=[], b=[], c=["a", "b"], d=[])
  assert seen["front"] == ["d", "a", "b"]


def test_who_loses_under_the_recommended_arm_is_told_with_the_arm_best_for_them():
  seen = verdict.of(small(dict(a=[[1, 2.0], [1, 2.1]], b=[[1.5, 1.8], [1.5, 1.9]])))
  assert [(row["language"], row["best"], row["told"]) for row in seen["losers"]] == [
      ("yor_Latn", "b", False)]
  assert math.isclose(seen["losers"][0]["difference"], 0.2)
  assert "Yoruba 0.2000 (b, within noise)" in seen["words"]["losses"]


def test_a_broken_floor_rules_an_arm_out_and_names_its_languages():
  floor = dict(kind="floor", floor=1.9)
  seen = verdict.of(small(dict(a=[[1, 2.0], [1, 1.9]], b=[[1.5, 1.8], [1.5, 1.85]]), floor))
  assert seen["recommended"] == "b" and seen["arms"][1]["broken"] == dict(yor_Latn=1.95)
  assert seen["arms"][1]["objective"] is None and seen["arms"][1]["difference"] is None
  assert "all other arms break the floor" in seen["words"]["recommendation"]
  none = verdict.of(small(dict(a=[[1, 2]], b=[[2, 2]]), floor))
  assert none["recommended"] is None and "Nearest is a, with 1 language" in none["words"][
      "recommendation"]


def test_one_arm_or_none_finished_is_said_plainly():
  seen = verdict.of(small(dict(a=[[1, 2], [1, 2]])))
  assert seen["recommended"] is None
  assert "Only one arm is finished, a (mean over 2 languages: 1.5000" in seen["words"][
      "recommendation"]
  result = made()
  for row in result["trials"]:
    fail(row, "waiting", None)
  for none in (result, result | dict(trials=[])):
    seen = verdict.of(none)
    assert seen["recommended"] is None and seen["arms"] == []
    assert seen["words"]["recommendation"].startswith("No trial is finished")


def test_trials_that_came_to_nothing_are_listed_with_their_reason():
  result = made()
  fail(result["trials"][1])
  fail(result["trials"][3], "running", None)
  result["trials"][4]["bits_per_byte"]["deu_Latn"] = math.nan
  seen = verdict.of(result)
  assert [(row["trial"], row["why"]) for row in seen["failures"]] == [
      ("temperature-1_seed-1", "loss not finite at step 70"),
      ("temperature-2_seed-0", "its bits per byte are missing or not finite")]
  assert seen["states"] == dict(done=9, diverged=1, running=1)
  assert [arm["lost"] for arm in seen["arms"] if arm["arm"] == "temperature 1"] == [1]
  assert "1 running" in seen["words"]["unfinished"]
  assert "figures of temperature 1 are of the seeds that survived" in seen["words"]["unfinished"]


def test_a_language_that_only_some_trials_measured_is_left_out_by_name():
  result = made()
  del result["trials"][0]["bits_per_byte"]["yor_Latn"]
  seen = verdict.of(result)
  assert seen["partial"] == ["yor_Latn"] and len(seen["languages"]) == 68
  assert "yor_Latn" in seen["words"]["unfinished"] and "over 68" in seen["words"]["recommendation"]


def test_small_languages_gain_from_flattening_and_large_ones_lose():
  seen = verdict.sensitivity(made())
  assert seen["ends"] == ["temperature 1", "temperature 10"]
  assert seen["size_correlation"] > 0.95
  assert {"deu_Latn", "eng_Latn"} <= set(seen["lose"]) and "wol_Latn" in seen["gain"]
  row = seen["languages"]["eng_Latn"]
  assert row["best"] == "temperature 1" and row["correlation"] == 1.0 and row["over_noise"] > 10
  assert verdict.sensitivity(made(effect=0.0, noise=0.01))["gain"] == []


def test_ranks_share_their_mean_and_no_correlation_is_of_nothing():
  assert verdict.rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
  assert verdict.rank_correlation([1, 2, 3, 4], [5, 5, 7, 9]) == pytest.approx(math.sqrt(0.9))
  assert verdict.rank_correlation([1, 2], [1, 2]) is None
  assert verdict.rank_correlation([1, 2, 3], [1, 1, 1]) is None


@pytest.mark.parametrize("kind", ["mean", "worst", "region", "floor"])
def test_the_verdict_is_plain_json_under_every_objective(kind):
  seen = made(dict(kind=kind, floor=1.9))["verdict"]
  assert json.loads(json.dumps(seen, allow_nan=False)) == seen
