"""The table of the 70 languages, and the names people call them by."""

import collections

import pytest

from tiny_aya_jax import languages, run


def test_there_are_70_languages_with_unique_codes_in_five_regions():
  assert len({language.code for language in languages.LANGUAGES}) == 70
  sizes = collections.Counter(language.region for language in languages.LANGUAGES)
  assert sizes == {
    "Europe": 31,
    "West Asia": 5,
    "South Asia": 9,
    "Asia Pacific": 14,
    "Africa": 11,
  }


def test_family_and_script_give_the_28_buckets_of_the_report():
  buckets = collections.Counter((x.family, x.script) for x in languages.LANGUAGES)
  assert len(buckets) == 28
  assert buckets["Indo-European", "Latn"] == 22
  assert buckets["Niger-Congo", "Latn"] == 7
  assert buckets["Sino-Tibetan", "Hani"] == 3
  assert buckets["Indo-European", "Deva"] == 3
  assert len({(x.family, x.genus, x.script) for x in languages.LANGUAGES}) == 40


def test_released_models_follow_the_region_and_english_is_in_all():
  assert set(languages.find("en").released) == {"global", "earth", "fire", "water"}
  assert languages.find("hin_Deva").released == ("global", "fire")
  assert languages.find("swh_Latn").released == ("global", "earth")
  assert languages.find("jpn_Jpan").released == ("global", "water")
  assert languages.find("tur_Latn").released == ("global", "earth", "water")


def test_chinese_is_counted_once_and_every_size_is_positive():
  hans, hant = (languages.find(code).fineweb_bytes for code in ("cmn_Hans", "cmn_Hant"))
  assert hans + hant == 2_665_362_545_414
  assert hans > hant > 0
  assert min(language.fineweb_bytes for language in languages.LANGUAGES) == 3_416_999
  largest = max(languages.LANGUAGES, key=lambda language: language.fineweb_bytes)
  assert largest.code == "eng_Latn"


@pytest.mark.parametrize(
  ("name", "code"),
  [
    ("fra_Latn", "fra_Latn"),
    ("fr", "fra_Latn"),
    ("fra", "fra_Latn"),
    ("French", "fra_Latn"),
    ("FRENCH", "fra_Latn"),
    ("est_Latn", "ekk_Latn"),
    ("est", "ekk_Latn"),
    ("yue_Hant", "yue_Hani"),
    ("zho_Hant", "cmn_Hant"),
    ("zh-Hans", "cmn_Hans"),
    ("msa_Latn", "zsm_Latn"),
    ("nb", "nob_Latn"),
    ("no", "nob_Latn"),
    ("Filipino", "fil_Latn"),
    ("tl", "fil_Latn"),
    ("swa", "swh_Latn"),
    ("lav", "lvs_Latn"),
    ("nep", "npi_Deva"),
    ("Nigerian Pidgin", "pcm_Latn"),
    ("id", "ind_Latn"),
    ("ig", "ibo_Latn"),
  ],
)
def test_a_language_is_found_by_code_alias_iso_code_and_name(name, code):
  assert languages.find(name).code == code


def test_every_code_and_name_finds_its_own_language():
  for language in languages.LANGUAGES:
    for name in (language.code, language.name, *language.aliases):
      assert languages.find(name) is language, name


def test_no_name_but_the_ambiguous_ones_means_two_languages():
  owner = {}
  for language in languages.LANGUAGES:
    for name in {language.code, language.iso, language.name, *language.aliases}:
      if name not in languages.AMBIGUOUS:
        assert owner.setdefault(name.casefold(), language.code) == language.code


@pytest.mark.parametrize("name", ["zh", "cmn_Hani", "Chinese", "zho"])
def test_an_ambiguous_name_is_refused_with_both_codes_but_expands_to_both(name):
  with pytest.raises(run.Refused, match="cmn_Hans and cmn_Hant"):
    languages.find(name)
  assert languages.expand(name) == ("cmn_Hans", "cmn_Hant")


@pytest.mark.parametrize(
  ("name", "near"),
  [("fra_Latin", "'fra_Latn'"), ("Frensh", "'French'"), ("Sout Asia", "'South Asia'")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, near):
  with pytest.raises(run.Refused, match=near):
    languages.expand(name)


def test_neighbours_that_are_other_languages_are_no_aliases():
  for name in ("srp_Latn", "nno_Latn", "nno", "jav_Java", "code"):
    with pytest.raises(run.Refused):
      languages.find(name)


def test_regions_all_and_code_expand():
  assert len(languages.expand("all")) == 70
  assert len(languages.expand("west asia")) == 5
  assert sum(len(languages.expand(region)) for region in languages.REGIONS) == 70
  assert languages.expand("code") == ("code",)


def test_select_has_no_repeats_and_keeps_the_order_of_the_table():
  chosen = languages.select(("code", "Africa", "wo", "zh", "eng_Latn", "cmn_Hant"))
  assert chosen[:3] == ("eng_Latn", "cmn_Hans", "cmn_Hant")
  assert len(chosen) == 3 + 11 + 1
  assert chosen[-1] == "code"
  assert "code" not in languages.select(("all",))


def test_a_bare_string_is_refused_where_a_tuple_of_names_is_expected():
  with pytest.raises(run.Refused, match="tuple"):
    languages.select("all")


def test_confusable_labels_leave_out_the_language_itself():
  for language in languages.LANGUAGES:
    assert language.iso not in language.confusable
  assert "id" in languages.find("Malay").confusable
  assert "en" in languages.find("pcm").confusable
