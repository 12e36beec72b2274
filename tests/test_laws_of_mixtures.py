"""Laws of loss against mixtures, on trials whose truth is planted: no training, no jax."""

import json

import numpy as np
import pytest

from tiny_aya_jax import run
from tiny_aya_jax.evaluate import rollups
from tiny_aya_jax.sweep import laws

CODES = ("eng_Latn", "deu_Latn", "nld_Latn", "swh_Latn", "tur_Latn", "hin_Deva", "mar_Deva", "tha_Thai",
         "amh_Ethi", "kor_Hang")
SIZE = 10.0 ** np.array([9, 8, 7, 5, 7, 6, 5, 6, 4, 7])
TOKENS = 10_000_000
LANGUAGES = {code: rollups.facts(code) for code in CODES}
MEAN = dict(kind="mean", floor=None)
KIN = [[one != other and all(LANGUAGES[one][name] == LANGUAGES[other][name]
                             for name in ("family", "script")) for other in CODES] for one in CODES]
SEARCH = dict(draws=2000, best=20, seed=0)


def powers(share_S):
  """A power of the language's own tokens and a twentieth of its kin's, with a level of its own."""
  known_I = share_S + 0.05 * np.array(KIN) @ share_S + 1e-5
  power_I = np.linspace(0.1, 0.25, len(share_S))
  return np.linspace(0.6, 1.0, len(share_S)) + 0.4 * known_I**-power_I


def trials_of(truth, arms, seeds=1, noise=0.005, sizes=SIZE, seed=0, spread=0.7):
  """Trials around temperatures 1 to 20, with bits per byte truth(shares) and noise."""
  random, trials = np.random.default_rng(seed), []
  for arm, temperature in enumerate(np.geomspace(1, 20, arms)):
    share_S = sizes ** (1 / temperature) * np.exp(spread * random.standard_normal(len(sizes)))
    token_S = np.round(share_S / share_S.sum() * TOKENS / 256) * 256
    for number in range(seeds):
      loss_S = truth(token_S / token_S.sum()) + noise * random.standard_normal(len(sizes))
      trials.append(dict(trial=f"arm-{arm}_seed-{number}", arm=f"arm {arm}", seed=number, state="done",
                         tokens=dict(zip(CODES, token_S.tolist())),
                         bits_per_byte=dict(zip(CODES, loss_S.tolist()))))
  return trials


def values(column):
  return np.array([column[code] for code in CODES])


@pytest.fixture(scope="module")
def trials():
  return trials_of(powers, arms=14, seeds=2)


@pytest.fixture(scope="module")
def record(trials):
  sizes = dict(zip(CODES, SIZE.tolist()))
  return laws.compared(trials, MEAN, LANGUAGES, sizes, TOKENS, 4, **SEARCH)


@pytest.mark.parametrize("form", ["mixing_law", "regression"])
def test_a_planted_power_law_is_foreseen_on_new_mixtures(trials, form):
  law, constant = laws.fit(trials, form, LANGUAGES), laws.fit(trials, "constant", LANGUAGES)
  errors, levels = [], []
  for trial in trials_of(powers, arms=9, noise=0, seed=5, spread=0.4):
    shares = {code: count / TOKENS for code, count in trial["tokens"].items()}
    truth = values(trial["bits_per_byte"])
    errors.append(np.abs(values(laws.predict(law, shares)) - truth))
    levels.append(np.abs(values(laws.predict(constant, shares)) - truth))
  assert np.mean(errors) < 0.2 * np.mean(levels), (np.mean(errors), np.mean(levels))


@pytest.mark.parametrize("form", ["mixing_law", "regression"])
def test_a_law_knows_that_kin_help_and_strangers_do_not(trials, form):
  law = laws.fit(trials, form, LANGUAGES)
  shares = dict.fromkeys(CODES, 0.05) | dict(mar_Deva=0.001)
  before = laws.predict(law, shares)["mar_Deva"]
  kin = before - laws.predict(law, shares | dict(hin_Deva=0.2))["mar_Deva"]
  stranger = before - laws.predict(law, shares | dict(tha_Thai=0.2))["mar_Deva"]
  assert kin > 0.02 and stranger == 0


def test_a_language_sees_itself_its_kin_its_script_and_the_largest(trials):
  law = laws.fit(trials, "regression", LANGUAGES)
  seen = {code: [[other for other, member in zip(CODES, row) if member] for row in rows]
          for code, rows in zip(CODES, laws._members(law))}
  assert seen["mar_Deva"] == [["mar_Deva"], ["hin_Deva"], [], ["eng_Latn"]]
  assert seen["tur_Latn"] == [
      ["tur_Latn"], [], ["eng_Latn", "deu_Latn", "nld_Latn", "swh_Latn"], ["eng_Latn"]]
  assert seen["eng_Latn"] == [["eng_Latn"], ["deu_Latn", "nld_Latn"], ["swh_Latn", "tur_Latn"], []]


def test_languages_of_like_slopes_lean_on_each_other(monkeypatch):
  trials = trials_of(lambda share_S: 2 - 0.05 * np.log(share_S + 1e-4), arms=8, noise=0.02)
  for form in ("mixing_law", "regression"):
    leaning = laws.cross_validated(trials, form, LANGUAGES, MEAN)["error"]
    with monkeypatch.context() as patch:
      patch.setattr(laws, "RIDGES", (1e-9,))
      assert leaning < 0.9 * laws.cross_validated(trials, form, LANGUAGES, MEAN)["error"], form


def test_one_wild_measurement_moves_the_mixing_law_less_than_the_regression(trials):
  wild = trials[12] | dict(bits_per_byte=trials[12]["bits_per_byte"] | dict(tha_Thai=9.0))
  moved, shares = {}, dict.fromkeys(CODES, 0.1)
  for form in ("mixing_law", "regression"):
    some = [laws.predict(laws.fit(rows, form, LANGUAGES), shares)["tha_Thai"]
            for rows in (trials, [*trials[:12], wild, *trials[13:]])]
    moved[form] = abs(some[1] - some[0])
  assert moved["mixing_law"] < 0.1 < moved["regression"], moved


@pytest.mark.parametrize("form", laws.FORMS)
def test_nothing_of_an_arm_that_is_left_out_tells_what_is_foreseen_of_it(trials, form):
  arm, trials = "arm 3", trials[:18]
  spoiled = [trial | dict(bits_per_byte={code: 9.0 for code in CODES}) if trial["arm"] == arm else trial
             for trial in trials]
  one, other = (laws.cross_validated(some, form, LANGUAGES, MEAN)["arms"] for some in (trials, spoiled))
  assert one[arm]["predicted"] == other[arm]["predicted"]
  assert other[arm]["measured"] == pytest.approx(9.0)
  assert one["arm 4"]["predicted"] != other["arm 4"]["predicted"]


def test_the_error_of_a_constant_is_that_of_the_mean_of_the_other_arms(trials):
  loss_AI = np.stack([values(trial["bits_per_byte"]) for trial in trials]).reshape(14, 2, -1).mean(1)
  others_AI = (loss_AI.sum(0) - loss_AI) / 13
  found = laws.cross_validated(trials, "constant", LANGUAGES, dict(kind="worst", floor=None))
  assert found["error"] == pytest.approx(np.abs(loss_AI - others_AI).mean())
  assert found["error_of_means"] == pytest.approx(np.abs((loss_AI - others_AI).mean(1)).mean())
  assert values(found["by_language"]) == pytest.approx(np.abs(loss_AI - others_AI).mean(0))
  assert found["error_of_objective"] == pytest.approx(np.abs(loss_AI.max(1) - others_AI.max(1)).mean())


def test_the_noise_of_seeds_is_pooled_over_arms():
  trials = trials_of(powers, arms=60, seeds=3, noise=0.02) + trials_of(powers, arms=1, seed=9)
  found = laws.seed_noise(trials[:-1])
  assert found["degrees"] == 120
  assert found["pooled"] == pytest.approx(0.02, rel=0.05)
  assert found["of_mean"] == pytest.approx(0.02 / np.sqrt(len(CODES)), rel=0.2)
  assert values(found["by_language"]) == pytest.approx(0.02, rel=0.25)
  assert laws.seed_noise(trials_of(powers, arms=5)) is None and laws.seed_noise([]) is None


def test_a_record_says_which_law_holds_and_is_plain_json(record, trials):
  assert json.loads(json.dumps(record, allow_nan=False)) == record
  assert record["chosen"] != "constant" and record["forms"][record["chosen"]]["rank"] > 0.8
  error = {form: found["error"] for form, found in record["forms"].items()}
  assert error[record["chosen"]] == min(error.values()) < 0.3 * error["constant"]
  assert all(f"{form} {value:.4f}" in record["why"] for form, value in error.items())
  law = json.loads(json.dumps(record["law"]))
  shares = record["optimum"]["shares"]
  assert laws.predict(law, shares) == pytest.approx(record["optimum"]["predicted"], rel=1e-9)
  sizes = dict(zip(CODES, SIZE.tolist()))
  assert laws.compared(trials, MEAN, LANGUAGES, sizes, TOKENS, 4, **SEARCH) == record


def test_caps_hold_exactly_and_shares_sum_to_one(record):
  found = record["optimum"]
  share_S, cap_S = values(found["shares"]), np.minimum(1, 4 * SIZE / TOKENS)
  assert (share_S <= cap_S).all() and share_S.sum() == pytest.approx(1, abs=1e-12)
  assert found["capped"] == [code for code, share, cap in zip(CODES, share_S, cap_S) if share == cap]
  assert "amh_Ethi" in found["capped"] and "eng_Latn" not in found["capped"]


def test_the_optimum_stands_beside_the_best_arm_that_keeps_the_caps(record, trials):
  measured = {arm: found["measured"] for arm, found in record["forms"]["constant"]["arms"].items()}
  cap_S, row = np.minimum(1, 4 * SIZE / TOKENS), 256 / TOKENS
  within = {trial["arm"] for trial in trials
            if (values(trial["tokens"]) / TOKENS <= 1.01 * cap_S + row).all()}
  arm, gain = record["optimum"]["arm"], record["optimum"]["gain"]
  assert arm["within_caps"] and 0 < len(within) < len(measured)
  assert arm["arm"] == min(within, key=measured.get) and arm["measured"] == measured[arm["arm"]]
  assert gain["value"] == pytest.approx(arm["predicted"] - record["optimum"]["value"]) and gain["value"] > 0


def test_the_draws_themselves_are_under_the_caps(trials):
  law, sizes = laws.fit(trials, "mixing_law", LANGUAGES), dict(zip(CODES[:-1], SIZE.tolist()))
  found = laws.optimum(law, trials, MEAN, sizes, TOKENS, 4, LANGUAGES, draws=500, best=1, seed=0)
  assert [found["value"]] * 2 == pytest.approx(found["spread"], rel=1e-12)
  assert found["shares"]["kor_Hang"] == 0 and "kor_Hang" not in found["capped"]  # no size, no share
  assert found["arm"]["within_caps"] is False  # each has Korean


def test_what_is_above_a_cap_goes_to_the_others_in_proportion():
  share_NS = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
  capped_NS = laws._capped(share_NS, np.array([0.1, 0.35, 1.0, 1.0]))
  assert capped_NS == pytest.approx(np.array([  # the first caps a second one, which it has lifted
      [0.1, 0.35, 0.55 * 2 / 3, 0.55 / 3], [0.1, 0.2, 0.3, 0.4], [0.1, 0.3, 0.3, 0.3]]))


@pytest.mark.parametrize("form", ["mixing_law", "regression"])
def test_the_optimum_of_a_planted_concave_problem_is_found(form):
  gain_S = np.array([1, 2, 4, 1, 3, 2, 1, 4, 1, 1]) / 20
  truth = lambda share_S: 3 - gain_S * np.log(share_S)  # mean is least where shares are as the gains
  trials = trials_of(truth, arms=24, sizes=SIZE**0.2)
  found = laws.optimum(laws.fit(trials, form, LANGUAGES), trials, MEAN, {}, TOKENS, None, LANGUAGES,
                       draws=5000, best=20, seed=1)
  share_S = values(found["shares"])
  measured = [values(trial["tokens"]) / TOKENS for trial in trials]
  distance = [np.abs(one - gain_S).sum() for one in (share_S, *measured)]
  assert distance[0] < 0.2 and distance[0] < 0.5 * min(distance[1:]), distance[:1] + sorted(distance[1:])
  assert truth(share_S).mean() < min(truth(one).mean() for one in measured)
  assert found["value"] == pytest.approx(truth(share_S).mean(), abs=0.01)
  assert found["gain"]["value"] > 0 and found["gain"]["agree"] > 0.9
  assert 0 < found["deviation"] < 0.02 and found["capped"] == []


def test_noise_alone_leaves_the_constant_and_no_optimum():
  trials = trials_of(lambda share_S: np.full(len(share_S), 1.5), arms=8)
  record = laws.compared(trials, MEAN, LANGUAGES, {}, TOKENS, None, **SEARCH)
  assert record["chosen"] == "constant" and record["optimum"] is None
  assert "neither law beats" in record["why"] and record["no_optimum"]
  with pytest.raises(run.Refused, match="a constant law has no optimum"):
    laws.optimum(record["law"], trials, MEAN, {}, TOKENS, None, LANGUAGES, **SEARCH)


def test_objectives_are_those_of_the_record():
  loss_NI = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 2.5]])
  codes = ("deu_Latn", "nld_Latn", "tha_Thai")  # Europe twice, Asia Pacific
  for kind, expected in dict(mean=[7 / 3, 6.5 / 3], worst=[4, 2.5], region=[4, 2.5],
                             floor=[np.inf, 6.5 / 3]).items():
    found = laws._objective(loss_NI, dict(kind=kind, floor=3.0), codes, LANGUAGES)
    assert found.tolist() == pytest.approx(expected)
  assert laws._objective(loss_NI[:, :2], dict(kind="region"), codes[:2], LANGUAGES).tolist() == [1.5, 2]


def test_a_floor_is_kept_by_the_optimum_or_there_is_none(trials):
  law = laws.fit(trials, "regression", LANGUAGES)
  ask = lambda objective: laws.optimum(law, trials, objective, {}, TOKENS, None, LANGUAGES, **SEARCH)
  free, worst = ask(MEAN), ask(dict(kind="worst", floor=None))
  lowest, floor = worst["value"], (max(free["predicted"].values()) + worst["value"]) / 2
  kept = ask(dict(kind="floor", floor=floor))
  assert max(kept["predicted"].values()) <= floor < max(free["predicted"].values())
  assert kept["value"] >= free["value"] and 0 < kept["floor_kept"] <= 1 and free["floor_kept"] == 1
  with pytest.raises(run.Refused, match="none of 2000 mixtures keeps every language"):
    ask(dict(kind="floor", floor=lowest - 0.1))
  below = dict(kind="floor", floor=lowest - 0.1)
  record = laws.compared(trials, below, LANGUAGES, {}, TOKENS, None, **SEARCH)
  assert record["optimum"] is None and "raise the floor" in record["no_optimum"]
  assert all(found["error_of_objective"] is None for found in record["forms"].values())


def test_a_floor_holds_where_the_mean_of_mixtures_that_keep_it_would_break_it():
  codes, half = ["hin_Deva", "tha_Thai"], np.log(0.5)
  law = dict(  # 1 - log(2 share)^2 bits: too many in the middle alone
      form="regression", epsilon=1e-9, largest="tha_Thai", codes=codes, measured=codes[:1],
      kinds={code: [code, code] for code in codes},
      by_language=dict(hin_Deva=dict.fromkeys(laws.GROUPS, 0) | dict(
          level=1 - half**2, own=2 * half, own_squared=-1)))
  arms_AS = np.array([[0.2, 0.8], [0.8, 0.2]])
  floor = dict(kind="floor", floor=0.9)
  share_S, _ = laws._best_draw(law, arms_AS, np.ones(2), floor, LANGUAGES, 200, 200, 0)
  assert laws.predict(law, dict(zip(codes, share_S)))["hin_Deva"] <= 0.9


@pytest.mark.parametrize("change, said", [
    (lambda trials: trials[:6], "regression needs 7 arms, 6 are done"),
    (lambda trials: [trials[0] | dict(seed=n) for n in range(9)], "regression needs 7 arms, 1 are done"),
    (lambda trials: [trial | dict(state="failed") for trial in trials], "none of 8 trials is done"),
    (lambda trials: [trials[0] | dict(bits_per_byte=dict(deu_Latn=1.0)), *trials[1:]],
     "measured 10 languages, expected the same 1"),
    (lambda trials: [*trials[1:], trials[0] | dict(tokens=dict(xxx_Latn=1))], "drew xxx_Latn"),
    (lambda trials: [*trials[1:], trials[0] | dict(tokens={})], "drew nothing"),
    (lambda trials: [*trials[1:], trials[0] | dict(bits_per_byte=dict.fromkeys(CODES, np.inf))],
     "not finite"),
])
def test_trials_that_teach_nothing_are_refused(change, said):
  with pytest.raises(run.Refused, match=said):
    laws.cross_validated(change(trials_of(powers, arms=8)), "regression", LANGUAGES, MEAN)


def test_other_states_do_not_count_and_need_no_fields(trials):
  others = [dict(trial="x", arm="x", seed=0, state=state) for state in ("waiting", "diverged", "refused")]
  assert laws.fit(others + trials, "regression", LANGUAGES) == laws.fit(trials, "regression", LANGUAGES)
  assert laws.seed_noise(others + trials) == laws.seed_noise(trials)


def test_what_cannot_be_asked_is_refused_with_the_numbers(trials):
  law = laws.fit(trials, "mixing_law", LANGUAGES)
  sizes = dict.fromkeys(CODES, 0.02 * TOKENS)  # together a fifth
  ask = dict(objective=MEAN, sizes=sizes, tokens=TOKENS, most_epochs=4, languages=LANGUAGES, **SEARCH)
  for more, said in (({}, "4 epochs of all languages are 0.8 of the 10,000,000 tokens .* at least 5"),
                     (dict(best=9000), "best 9000 of 2000"),
                     (dict(objective=dict(kind="means"), most_epochs=9), "did you mean 'mean'")):
    with pytest.raises(run.Refused, match=said):
      laws.optimum(law, trials, **(ask | more))
  with pytest.raises(run.Refused, match="unknown law 'linear'"):
    laws.fit(trials, "linear", LANGUAGES)
  with pytest.raises(run.Refused, match="knows nothing of lat_Latn"):
    laws.predict(law, dict(lat_Latn=1.0))
