"""Shares by rule: each kind against its formula, each modifier by its promise, each refusal."""

import math
import pathlib

import ml_collections
import numpy as np
import pytest

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import mixture, rules

ROOT = pathlib.Path(__file__).parents[1]
ALL = dict(kind="temperature", temperature=3.33, languages=("all",))
NATURAL = ALL | dict(temperature=1.0)
SIZES = {"deu_Latn/a": 30, "deu_Latn/b": 10, "fra_Latn/a": 60, "swh_Latn/a": 5, "code/a": 7}
WEB = {f"{language.code}/web": language.fineweb_bytes for language in languages.LANGUAGES}
EVERY = [
    ALL,
    ALL | dict(alpha=0.3),
    dict(kind="unimax", epochs=1.0, budget=3e13, languages=("all",)),
    dict(kind="buckets", alpha=0.3, by="family", reading="A", languages=("all",)),
    dict(kind="buckets", alpha=1.0, by="genus", reading="B", bucket_temperature=2.0,
         languages=("all",)),
    dict(kind="explicit", weights=(("English", 0.3), ("Africa", 0.2), ("Asia Pacific", 0.5))),
]


def by_language(share):
  found = {}
  for name, part in share.items():
    code = name.partition("/")[0]
    found[code] = found.get(code, 0) + part
  return found


def test_a_language_has_its_own_factor_even_if_it_is_all_there_is_of_its_region():
  sizes = {"yor_Latn": 50, "deu_Latn": 50}
  keep = (("Africa", 1.0), ("yor_Latn", 3.0), ("Europe", 1.0))
  assert mixture.weights(sizes, NATURAL | dict(keep=keep)) == {"yor_Latn": 0.75, "deu_Latn": 0.25}


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule["kind"])
def test_a_checked_rule_is_the_same_rule(rule):
  checked = rules.checked(rule)
  assert rules.checked(checked) == checked and rules.words(checked) == rules.words(rule)
  assert rules.words(ALL).count("temperature") == 2 and "alpha" not in rules.words(ALL)


@pytest.mark.parametrize("rule, said", [
    (ALL | dict(within=(("a", 0.0), ("b", 0.0))), "there is nothing else"),
    (dict(kind="explicit", weights=(("deu_Latn/a", 1.0),), within=(("a", 0.0),)),
     "leave it out of within"),
    (NATURAL | dict(temperature=1e-4), "too small for a double"),
    (dict(kind="buckets", alpha=1.0, by="genus", reading="B", bucket_temperature=1e-4,
          languages=("all",)), "too small for a double"),
])
def test_what_would_leave_nothing_is_refused(rule, said):
  sizes = {"deu_Latn/a": 30, "deu_Latn/b": 10, "fra_Latn/a": 60}
  with pytest.raises(run.Refused, match=said):
    mixture.weights(sizes, rule)


def test_temperature_one_is_proportional_and_a_high_one_is_uniform():
  sizes = {"deu_Latn/a": 900, "deu_Latn/b": 100, "fra_Latn/a": 10}
  proportional = mixture.weights(sizes, NATURAL)
  assert proportional == pytest.approx({name: size / 1010 for name, size in sizes.items()})
  for flat in (dict(temperature=1e9), dict(alpha=0)):
    uniform = mixture.weights(sizes, ALL | flat)
    assert uniform == pytest.approx({"deu_Latn/a": 0.45, "deu_Latn/b": 0.05, "fra_Latn/a": 0.5})
  between = mixture.weights(sizes, ALL | dict(temperature=2))
  assert between["fra_Latn/a"] == pytest.approx(10**0.5 / (10**0.5 + 1000**0.5))
  assert mixture.weights(sizes, ALL | dict(alpha=0.5)) == between


def test_sizes_may_be_of_languages_without_sources():
  sizes = {"deu_Latn": 3, "fra_Latn": 1}
  assert mixture.weights(sizes, NATURAL) == {"deu_Latn": 0.75, "fra_Latn": 0.25}


def unimax(budget, epochs=2.0, sizes={"deu_Latn": 10, "fra_Latn": 100, "swh_Latn": 1000}):
  rule = dict(kind="unimax", epochs=epochs, budget=budget, languages=("all",))
  return {name: budget * part for name, part in mixture.weights(sizes, rule).items()}


def test_unimax_is_uniform_until_a_language_reaches_its_cap():
  assert unimax(30) == pytest.approx({"deu_Latn": 10, "fra_Latn": 10, "swh_Latn": 10})
  assert unimax(300) == pytest.approx({"deu_Latn": 20, "fra_Latn": 140, "swh_Latn": 140})
  assert unimax(1000) == pytest.approx({"deu_Latn": 20, "fra_Latn": 200, "swh_Latn": 780})
  everything = unimax(1e6)  # more than 2 epochs of all there is: shares by size
  assert everything["swh_Latn"] / everything["deu_Latn"] == pytest.approx(100)


def test_the_table_has_28_buckets_of_family_and_script():
  families = [rules.BUCKETS["family"](language) for language in languages.LANGUAGES]
  genera = [rules.BUCKETS["genus"](language) for language in languages.LANGUAGES]
  assert len(set(families)) == 28 and len(set(genera)) == 40
  assert families.count(("Indo-European", "Latn")) == 22


BUCKETED = {"deu_Latn": 16, "fra_Latn": 64, "rus_Cyrl": 100, "code": 20}


def buckets(**fields):
  rule = dict(kind="buckets", by="family", alpha=1, languages=("all", "code"))
  return mixture.weights(BUCKETED, rule | fields)


def test_buckets_follow_equation_1_in_both_readings():
  # German and French are one bucket of the languages that are here; code is its own.
  assert buckets(reading="A") == pytest.approx(
      dict(deu_Latn=8 / 160, fra_Latn=32 / 160, rus_Cyrl=100 / 160, code=20 / 160))
  assert buckets(reading="A", alpha=None, temperature=2.0)["deu_Latn"] == pytest.approx(
      2 / (2 + 4 + 10 + 20**0.5))
  same = buckets(reading="B", bucket_temperature=1)
  assert same == pytest.approx(dict(deu_Latn=0.2, fra_Latn=0.2, rus_Cyrl=0.5, code=0.1))
  equal = buckets(reading="B", bucket_temperature=math.inf)
  assert equal == pytest.approx(dict(deu_Latn=1 / 6, fra_Latn=1 / 6, rus_Cyrl=1 / 3, code=1 / 3))
  half = buckets(reading="B", bucket_temperature=2)
  assert half["rus_Cyrl"] / half["deu_Latn"] == pytest.approx(2 * (100 / 80) ** 0.5)
  by_genus = buckets(reading="A", by="genus")  # Germanic and Romance are two
  assert by_genus == pytest.approx({name: size / 200 for name, size in BUCKETED.items()})


def test_explicit_weights_name_sources_languages_and_regions():
  weights = {"de": 0.25, "swh_Latn/a": 0.5, "code": 0.25}
  expected = {"deu_Latn/a": 0.1875, "deu_Latn/b": 0.0625, "swh_Latn/a": 0.5, "code/a": 0.25}
  for given in (weights, tuple(weights.items()), [list(pair) for pair in weights.items()]):
    assert mixture.weights(SIZES, dict(kind="explicit", weights=given)) == pytest.approx(expected)
  regions = dict(kind="explicit", weights=(("Europe", 0.5), ("Africa", 0.5)))
  assert mixture.weights(SIZES, regions)["fra_Latn/a"] == pytest.approx(0.3)
  assert mixture.weights(SIZES, regions | dict(alpha=0))["fra_Latn/a"] == pytest.approx(0.25)
  assert mixture.weights(SIZES, regions | dict(temperature=2.0))["fra_Latn/a"] == pytest.approx(
      0.5 * 60**0.5 / (60**0.5 + 40**0.5))


def test_code_is_in_the_mixture_only_when_it_is_named():
  sizes = {"deu_Latn/a": 30, "code/a": 7}
  assert set(mixture.weights(sizes, ALL)) == {"deu_Latn/a"}
  assert set(mixture.weights(sizes, ALL | dict(languages=("all", "code")))) == set(sizes)
  share = mixture.weights(sizes, ALL | dict(fixed=(("code", 0.15),)))
  assert share["code/a"] == pytest.approx(0.15)


@pytest.mark.parametrize("rule", EVERY, ids=rules.words)
def test_every_modifier_holds_for_every_kind(rule):
  kept = by_language(mixture.weights(WEB, rule | dict(keep=(("Africa", 1.0), ("Japanese", 2.0)))))
  assert set(kept) <= {*languages.expand("Africa"), "jpn_Jpan"}
  plain = by_language(mixture.weights(WEB, rule))
  ratio = plain["jpn_Jpan"] / plain["zul_Latn"]
  assert kept["jpn_Jpan"] / kept["zul_Latn"] == pytest.approx(2 * ratio)
  fixed = rule | dict(fixed=(("English", 0.3), ("Africa", 0.1)), floor=0.005)
  share = by_language(mixture.weights(WEB, fixed))
  africa = languages.expand("Africa")
  assert share["eng_Latn"] == pytest.approx(0.3, abs=1e-12)
  assert math.fsum(share[code] for code in africa) == pytest.approx(0.1, abs=1e-12)
  inside = plain["zul_Latn"] / plain["wol_Latn"]
  assert share["zul_Latn"] / share["wol_Latn"] == pytest.approx(inside)
  others = [code for code in share if code not in africa]
  assert min(share[code] for code in others) >= 0.005 - 1e-12
  high = [code for code in others if code != "eng_Latn" and share[code] > 0.00501]
  assert len({round(share[code] / plain[code], 9) for code in high}) == 1  # in proportion
  assert math.fsum(share.values()) == pytest.approx(1, abs=1e-12)


def test_a_language_named_by_itself_has_its_own_factor():
  share = mixture.weights(SIZES, NATURAL | dict(keep=(("Europe", 0.5), ("fr", 1.0))))
  assert share["fra_Latn/a"] == pytest.approx(60 / 80)


@pytest.mark.parametrize("name", ["global", "earth", "fire", "water"])
def test_one_pool_under_a_mask_is_each_mix_of_the_report(name, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "experiments"))
  import sft
  column, regions = sft.CLUSTERS.get(name, ("all_regions", ("Europe", "West Asia", "South Asia",
                                                            "Asia Pacific", "Africa")))
  printed = {languages.expand(language)[0]: row[column] for language, row in sft.appendix_a().items()}
  sizes = {code: 7 for code in (*(x.code for x in languages.LANGUAGES), "code")}
  rule = run.load_config(f"{ROOT / 'experiments/sft.py'}:{name}").data.mixture.to_dict()
  share = mixture.weights(sizes, rule)
  chinese = share.pop("cmn_Hant") + share.pop("cmn_Hans")  # one row there
  share["cmn_Hans"] = chinese
  assert "yue_Hani" not in share and "pcm_Latn" not in share  # no row
  total = sum(printed.values())  # 98.8 to 99.8 as printed
  scale = printed["eng_Latn"] / 13.8
  compared = [code for code in printed if code in ("eng_Latn", "urd_Arab", "code")
              or languages.find(code).region in regions]
  assert len(compared) >= 11
  for code in compared:  # both columns are rounded to 0.05
    assert 100 * share[code] == pytest.approx(100 * printed[code] / total, abs=0.05 + 0.05 * scale)
  for region in languages.REGIONS:  # and what is left of the others
    codes = [code for code in printed if code not in ("eng_Latn", "code")
             and languages.find(code).region == region]
    assert 100 * sum(share.get(code, 0) for code in codes) == pytest.approx(
        100 * sum(printed[code] for code in codes) / total, abs=0.6)


def test_a_named_language_without_rows_is_refused_or_left_out():
  rule = dict(kind="explicit", weights=(("French", 0.5), ("German", 0.3), ("Wolof", 0.2)))
  with pytest.raises(run.Refused, match="no source of 'Wolof'"):
    mixture.weights(dict(fra_Latn=5, deu_Latn=5), rule)
  share = mixture.weights(dict(fra_Latn=5, deu_Latn=5), rule | dict(absent="leave_out"))
  assert share == pytest.approx(dict(fra_Latn=0.625, deu_Latn=0.375))
  rule["absent"] = "leave_out"
  for changed in (dict(), dict(kind="temperature", temperature=1.0, languages=("all",), weights=(),
                               keep=(("Africa", 1.0),))):
    with pytest.raises(run.Refused, match="names no language that has sources: there are sources of tur_Latn"):
      mixture.weights(dict(tur_Latn=5), rule | changed)
  with pytest.raises(run.Refused, match="sum to 0.8, expected 1"):
    mixture.weights(dict(fra_Latn=5), rule | dict(weights=(("French", 0.5), ("German", 0.3))))
  with pytest.raises(run.Refused, match="weight twice"):
    mixture.weights(dict(fra_Latn=5), rule | dict(weights=(("French", 0.5), ("fra_Latn", 0.3), ("Wolof", 0.2))))
  with pytest.raises(run.Refused, match="unknown mixture absent 'leave': did you mean 'leave_out'"):
    mixture.weights(dict(fra_Latn=5), rule | dict(absent="leave"))


def test_within_gives_a_source_its_share_of_every_language_that_has_it():
  sizes = {"deu_Latn/web": 900, "deu_Latn/books": 100, "deu_Latn/instruct": 1, "fra_Latn/web": 50,
           "swh_Latn/instruct": 7}
  plain = by_language(mixture.weights(sizes, ALL))
  share = mixture.weights(sizes, ALL | dict(within=(("instruct", 0.15),)))
  assert by_language(share) == pytest.approx(plain)  # languages keep theirs
  assert share["deu_Latn/instruct"] == pytest.approx(0.15 * plain["deu_Latn"])
  assert share["deu_Latn/web"] == pytest.approx(0.85 * 0.9 * plain["deu_Latn"])
  assert share["fra_Latn/web"] == pytest.approx(plain["fra_Latn"])
  two = mixture.weights(sizes, ALL | dict(within=(("instruct", 0.2), ("books", 0.6))))
  assert two["deu_Latn/books"] == pytest.approx(0.6 * plain["deu_Latn"])
  only = {"deu_Latn/books": 5, "deu_Latn/instruct": 5}
  share = mixture.weights(only, ALL | dict(within=(("instruct", 0.1), ("books", 0.3))))
  assert share == pytest.approx({"deu_Latn/books": 0.75, "deu_Latn/instruct": 0.25})


def test_a_source_of_share_0_is_left_out_with_its_size():
  sizes = {"deu_Latn/web": 10, "deu_Latn/instruct": 90, "fra_Latn/web": 10, "swh_Latn/instruct": 7}
  without = NATURAL | dict(within=(("instruct", 0.0), ("of nobody", 0.0)))
  assert mixture.weights(sizes, without) == {"deu_Latn/web": 0.5, "fra_Latn/web": 0.5}
  with pytest.raises(run.Refused, match="no source of 'Swahili'"):
    mixture.weights(sizes, without | dict(languages=("Swahili",)))


def test_a_rule_may_be_a_config_set_from_the_command_line():
  config = run.load_config(str(ROOT / "experiments" / "pretrain.py"))
  run.override(config, {
      "data.mixture.kind": "explicit",
      "data.mixture.weights": "(('eng_Latn', 0.3), ('Africa', 0.7))",
      "data.mixture.within": "(('web', 1),)",
  })
  share = by_language(mixture.weights(WEB, config.data.mixture.to_dict()))
  assert share["eng_Latn"] == pytest.approx(0.3)
  assert set(share) == {"eng_Latn", *languages.expand("Africa")}
  run.override(config, {"data.mixture.kind": "buckets", "data.mixture.by": "family",
                        "data.mixture.reading": "B", "data.mixture.bucket_temperature": "inf",
                        "data.mixture.weights": "()"})
  assert mixture.weights(WEB, config.data.mixture)["jpn_Jpan/web"] == pytest.approx(1 / 28)


def test_words_name_what_is_read_and_nothing_else():
  rule = ALL | dict(kind="unimax", epochs=4.0, budget=1e9, fixed=(("code", 0.15),))
  assert rules.words(rule) == (
      "unimax: languages all, epochs 4, budget 1e+09, fixed code 0.15, unit tokens")
  assert rules.words(ALL | dict(alpha=0.5)) == "temperature: languages all, alpha 0.5, unit tokens"
  masked = ALL | dict(languages=("Africa",), keep=(("Wolof", 1.0), ("zu", 0.0)))
  assert rules.asked(masked) == {"wol_Latn"}


@pytest.mark.parametrize("change, says", [
    (dict(kind="temprature"), "did you mean 'temperature'"),
    (dict(kind=None), "unknown mixture kind None"),
    (dict(temprature=3.0), "unknown mixture field 'temprature': did you mean 'temperature'"),
    (dict(temperature=0), "temperature is 0"),
    (dict(temperature=math.inf), "temperature is inf.*alpha 0"),
    (dict(temperature="3"), "temperature is '3'"),
    (dict(temperature=None), "needs the field 'temperature' or 'alpha'"),
    (dict(alpha=-0.1), "alpha is -0.1"),
    (dict(alpha=math.nan), "alpha is nan"),
    (dict(weights={"deu_Latn": 1}), "temperature mixture does not read.*kind explicit"),
    (dict(epochs=1.0), "epochs is 1.0.*kind unimax"),
    (dict(reading="A"), "kind buckets"),
    (dict(languages=()), "needs the field 'languages'"),
    (dict(languages="all"), "a tuple of names"),
    (dict(languages=("ita_Latn",)), "no source of 'ita_Latn'"),
    (dict(languages=("deu_Latm",)), "deu_Latn"),
    (dict(kind="unimax", budget=5), "needs the field 'epochs'"),
    (dict(kind="unimax", epochs=1), "needs the field 'budget'"),
    (dict(kind="unimax", epochs=0, budget=5), "epochs is 0"),
    (dict(kind="unimax", epochs=1, budget=math.inf), "budget is inf"),
    (dict(kind="unimax", epochs=1, budget=5, alpha=1), "alpha is 1, which a unimax mixture"),
    (dict(kind="buckets"), "needs the field 'by'"),
    (dict(kind="buckets", by="script", reading="A"), "unknown mixture by 'script'"),
    (dict(kind="buckets", by="family", reading="C"), "unknown mixture reading 'C'"),
    (dict(kind="buckets", by="family", reading="B"), "B needs it"),
    (dict(kind="buckets", by="family", reading="A", bucket_temperature=1), "A does not read it"),
    (dict(kind="buckets", by="family", reading="B", bucket_temperature=0), "temperature is 0"),
    (dict(kind="explicit", languages=("Europe",), weights={"de": 1}), "does not read"),
    (dict(kind="explicit"), "needs the field 'weights'"),
    (dict(kind="explicit", weights="de"), "weights is 'de': expected pairs"),
    (dict(kind="explicit", weights=("deu_Latn", 1.0)), "expected pairs.*for one"),
    (dict(kind="explicit", weights=(("deu_Latn", 0.5, 0.5),)), "expected pairs"),
    (dict(kind="explicit", weights={"deu_Latn": "1"}), "of 'deu_Latn' is '1'"),
    (dict(kind="explicit", weights={"deu_Latn": True}), "is True"),
    (dict(kind="explicit", weights={"deu_Latn": -1}), "of 'deu_Latn' is -1"),
    (dict(kind="explicit", weights={"deu_Latn": math.nan}), "is nan"),
    (dict(kind="explicit", weights={"deu_Latn": 1, "fra_Latn": 0}), "of 'fra_Latn' is 0"),
    (dict(kind="explicit", weights={"de": 0.5, "fr": 0.6}), "sum to 1.1.*divide each by 1.1"),
    (dict(kind="explicit", weights={"deu_Latn": 0.5, "deu_Latn/a": 0.5}), "'deu_Latn/a'.*twice"),
    (dict(kind="explicit", weights={"deu_Latn/c": 1}), "did you mean 'deu_Latn/b'"),
    (dict(keep=(("deu_Latn", -1),)), "keep of 'deu_Latn' is -1"),
    (dict(keep=(("Africa", 0),)), "nothing is left"),
    (dict(keep=(("Asia Pacific", 1),)), "no source of 'Asia Pacific'"),
    (dict(keep=(("deu_Latn", 1), ("German", 2))), "keep names deu_Latn twice"),
    (dict(fixed=(("deu_Latn", 0),)), "fixed of 'deu_Latn' is 0"),
    (dict(fixed=(("deu_Latn", 0.5), ("Africa", 0.5))), "sum to 1 and 1 other languages"),
    (dict(fixed=(("Europe", 0.5), ("Africa", 0.4))), "sum to 0.9 and 0 other languages"),
    (dict(fixed=(("Europe", 0.5), ("de", 0.4))), "fixed names deu_Latn twice"),
    (dict(keep=(("Europe", 1),), fixed=(("Africa", 0.4),)), "no source of 'Africa'"),
    (dict(floor=0.4), "floor of 0.4 for 3 languages is 1.2"),
    (dict(floor=0.2, fixed=(("Africa", 0.7),)), "for 2 languages is 0.4.*at most 0.15"),
    (dict(floor=-0.1), "floor is -0.1"),
    (dict(within=(("c", 0.1),)), "unknown source of mixture within, which no language has, 'c'"),
    (dict(within=(("a", 0.7), ("b", 0.6))), "a sum of at most 1"),
    (dict(within=(("a", 0.1), ("a", 0.2))), "each source once"),
    (dict(within=(("a", 2),)), "within of 'a' is 2"),
    (dict(unit="words"), "unknown mixture unit 'words'"),
])
def test_a_wrong_rule_is_refused(change, says):
  with pytest.raises(run.Refused, match=says) as refusal:
    mixture.weights(SIZES, ALL | change)
  assert "\n" not in str(refusal.value)


def test_a_field_that_is_not_set_is_no_field():
  rule = ml_collections.ConfigDict(NATURAL | dict(weights=(), keep=(), fixed=(), within=()))
  for field in ("alpha", "epochs", "budget", "bucket_temperature", "floor"):
    rule[field] = ml_collections.config_dict.placeholder(float)
  assert mixture.weights({"deu_Latn/a": 3}, rule) == {"deu_Latn/a": 1.0}


def test_a_source_without_tokens_is_refused_by_name():
  with pytest.raises(run.Refused, match="fra_Latn/empty.*0 tokens"):
    mixture.weights({"deu_Latn/a": 3, "fra_Latn/empty": 0}, ALL)


def test_every_line_of_the_table_of_readers_is_read():
  # A field that READS lists changes the shares of its kind: no dead options.
  changes = dict(
      languages=("Africa",), temperature=7.0, alpha=0.7, epochs=3.0, budget=9e13, by="genus",
      reading="A", bucket_temperature=5.0, weights=(("English", 0.4), ("Africa", 0.6)),
      keep=(("Europe", 1.0),), fixed=(("English", 0.5),), floor=0.004, within=(("web", 0.0),),
  )
  sizes = WEB | {name.replace("web", "extra"): 10 for name in WEB}
  base = {rule["kind"]: rule for rule in EVERY[2:]} | dict(temperature=ALL)
  base["buckets"] = ALL | EVERY[4] | dict(by="family", alpha=None)
  for kind, fields in rules.READS.items():
    for field in (*fields, *rules.EVERY_KIND):
      if field not in ("unit", "absent"):  # of plans; of languages without sources, a test above
        change = {field: changes[field]}
        if field == "reading":
          change["bucket_temperature"] = None
        other = mixture.weights(sizes, base[kind] | change)
        assert other != mixture.weights(sizes, base[kind]), (kind, field)


def test_numbers_may_be_numpys():
  rule = EVERY[4] | dict(bucket_temperature=np.float64("inf"), alpha=np.float32(1))
  assert "bucket_temperature inf" in rules.words(rule)
  assert mixture.weights(WEB, rule)["jpn_Jpan/web"] == pytest.approx(1 / 40)
