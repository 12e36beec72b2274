"""The embedded corpus: pure, of the right size and script, and held out by fact."""

import os
import pathlib
import subprocess
import sys
import unicodedata

import pytest

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import toy

CODES = tuple(language.code for language in languages.LANGUAGES)
SMALL = ("fra_Latn", "pcm_Latn", "wol_Latn", "yue_Hani", "hin_Deva", "mlt_Latn")


def test_the_same_bytes_come_from_every_process_whatever_was_read_before():
  # In Babel, a locale can leak words into the next one: so read in both orders, other hash seeds.
  script = (
    "import itertools, hashlib, sys; from tiny_aya_jax.data import toy\n"
    "for code in sys.argv[1:]:\n"
    "  text = list(toy.documents(code, 'validation'))\n"
    "  text += itertools.islice(toy.documents(code, 'instruct'), 2)\n"
    "  print(code, hashlib.sha256(repr(text).encode()).hexdigest())\n"
  )
  root = str(pathlib.Path(toy.__file__).parents[2])
  processes = []
  for seed, codes in (("1", SMALL), ("2", SMALL[::-1])):
    environment = dict(os.environ, PYTHONHASHSEED=seed, PYTHONPATH=root)
    command = [sys.executable, "-c", script, *codes]
    processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
  runs = [set(process.communicate()[0].splitlines()) for process in processes]
  assert len(runs[0]) == len(SMALL)
  assert runs[0] == runs[1]


def test_two_calls_give_the_same_documents_and_two_languages_or_splits_do_not():
  one, two = (list(toy.documents("ga", "validation")) for _ in range(2))
  assert one == two
  assert one != list(toy.documents("cy", "validation"))
  assert one[0] != next(toy.documents("ga", "train"))


def test_train_sizes_follow_the_web_between_20_and_400_kilobytes():
  sizes = {code: toy.size(code, "train") for code in CODES}
  assert sizes["eng_Latn"] == 400_000
  assert min(sizes.values()) == 20_000 == sizes["pcm_Latn"]
  assert sizes["rus_Cyrl"] > sizes["deu_Latn"] > sizes["hin_Deva"] > sizes["pan_Guru"]
  assert 3_000_000 < sum(sizes.values()) < 6_000_000
  for code in ("pcm_Latn", "gle_Latn"):
    written = sum(len(text.encode()) for text in toy.documents(code, "train"))
    assert sizes[code] <= written < sizes[code] + toy.DOCUMENT_BYTES[1]


@pytest.mark.parametrize("code", CODES)
def test_a_validation_document_has_100_to_800_bytes_and_is_there_once(code):
  documents = list(toy.documents(code, "validation"))
  low, high = toy.DOCUMENT_BYTES
  assert all(low <= len(text.encode()) <= high for text in documents)
  assert len(set(documents)) == len(documents) >= 5
  assert sum(len(text.encode()) for text in documents) >= toy.VALIDATION_BYTES


@pytest.mark.parametrize("language", languages.LANGUAGES, ids=lambda language: language.code)
def test_most_letters_are_of_the_languages_own_script(language):
  names = dict(
    Latn="LATIN",
    Cyrl="CYRILLIC",
    Grek="GREEK",
    Arab="ARABIC",
    Hebr="HEBREW",
    Deva="DEVANAGARI",
    Beng="BENGALI",
    Gujr="GUJARATI",
    Guru="GURMUKHI",
    Taml="TAMIL",
    Telu="TELUGU",
    Khmr="KHMER",
    Thai="THAI",
    Laoo="LAO",
    Hani="CJK",
    Mymr="MYANMAR",
    Jpan=("KATAKANA", "HIRAGANA", "CJK"),
    Hang="HANGUL",
    Ethi="ETHIOPIC",
  )
  text = "".join(toy.documents(language.code, "validation"))
  letters = [unicodedata.name(x, "") for x in text if unicodedata.category(x)[0] == "L"]
  own = sum(name.startswith(names[language.script]) for name in letters)
  assert own > 0.8 * len(letters)  # the rest is 'CFA', 'AM' and the like


# CLDR holds less of these: 259, 262 and 296 distinct words with Babel 2.18.
POOR = dict(plt_Latn=250, sna_Latn=250, mlt_Latn=290)


@pytest.mark.parametrize(
  "code", ["wol_Latn", "pcm_Latn", "yue_Hani", "jav_Latn", "khm_Khmr", *POOR]
)
def test_even_the_poorest_languages_have_300_words_or_are_known_to_have_less(code):
  text = " ".join(toy.documents(code, "train")).casefold()
  kept = "".join(x if unicodedata.category(x)[0] in "LM" else " " for x in text)
  words = {word for word in kept.split() if len(word) > 1}
  assert len(words) >= POOR.get(code, 300)


def test_about_one_territory_in_ten_is_held_out():
  held = sum(toy.held_out(territory) for territory in toy.TERRITORIES)
  assert 0.05 < held / len(toy.TERRITORIES) < 0.15


@pytest.mark.parametrize("code", ["fra_Latn", "arb_Arab", "cmn_Hant"])
def test_no_sentence_about_a_held_out_territory_is_in_train_and_the_other_way_round(code):
  # Every territory sentence names its territory next to a colon or comma: look for whole headings.
  words = toy._words(code)
  names = {t: words.territories[t] for t in toy.TERRITORIES}
  stops = (words.stop, "\n")

  def headings(split):
    for text in toy.documents(code, split):
      for line in text.replace(stops[0], "\n").splitlines():
        head, colon, _ = line.partition(words.colon)
        yield head if colon else None

  def known(split):
    return {t for t, name in names.items() if name in said[split]}

  said = {split: set(headings(split)) for split in ("train", "validation")}
  assert len(known("train")) > 100
  assert len(known("validation")) > 3
  assert not any(toy.held_out(territory) for territory in known("train"))
  assert all(toy.held_out(territory) for territory in known("validation"))


def test_other_facts_are_held_out_too():
  import random

  for held in (False, True):
    source = random.Random("a test")
    for draw in (toy._draw_quantity, toy._draw_price, toy._draw_relative, toy._draw_clock):
      assert all(toy.held_out(*draw(source, held, "FR")) == held for _ in range(50))


@pytest.mark.parametrize("code", CODES)
def test_instruct_holds_conversations_about_ten_kilobytes_of_train_facts(code):
  conversations = list(toy.documents(code, "instruct"))
  for turns in conversations:
    assert all(set(turn) == {"role", "content"} and turn["content"] for turn in turns)
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
  written = sum(len(turn["content"].encode()) for turns in conversations for turn in turns)
  assert 10_000 <= written < 12_000


def test_instruct_has_translations_and_multiple_choice_in_every_language_and_sums_in_most():
  sums = 0
  for language in languages.LANGUAGES:
    words = toy._words(language.code)
    names = {toy._words(other).languages.get(words.tag.partition("_")[0]) for other in CODES}
    turns = [turn["content"] for x in toy.documents(language.code, "instruct") for turn in x]
    assert any("\nD) " in turn for turn in turns), language.code
    assert any(name and turn.startswith(name) for turn in turns for name in names), language.code
    sums += any(turn.endswith(" =") for turn in turns)
  assert sums >= 65


def test_a_held_out_territory_is_in_no_conversation():
  held = {toy._words("eng_Latn").territories[t] for t in toy.TERRITORIES if toy.held_out(t)}
  for conversation in toy.documents("eng_Latn", "instruct"):
    for turn in conversation:
      for line in turn["content"].splitlines():
        assert line.partition(":")[0] not in held


def test_no_word_of_another_language_stands_for_a_missing_one():
  assert toy.render(toy._words("sna_Latn"), ("quantity", "length-kilometer", 3)) is None
  assert toy.render(toy._words("plt_Latn"), ("relative", "day", 3)) is None
  assert toy.render(toy._words("plt_Latn"), ("either", ("fr", "en"))) is None
  assert toy.render(toy._words("fra_Latn"), ("either", ("fr", "en"))) == "français ou anglais"


def test_a_fact_reads_as_the_language_says_it():
  fact = ("money", "BR")
  assert toy.render(toy._words("eng_Latn"), fact) == "Brazil: Brazilian Real"
  assert toy.render(toy._words("deu_Latn"), fact) == "Brasilien: Brasilianischer Real"
  assert toy.render(toy._words("fra_Latn"), ("days", 0, 2)) == "lundi et mardi"
  assert toy.render(toy._words("pcm_Latn"), ("days", 0, 2)) == "Mọ́ndè an Tiúzdè"


def test_an_unknown_split_or_language_is_refused():
  with pytest.raises(run.Refused, match="did you mean 'train'"):
    next(toy.documents("fra_Latn", "trian"))
  with pytest.raises(run.Refused, match="did you mean 'fra_Latn'"):
    next(toy.documents("fra_Latin", "train"))
