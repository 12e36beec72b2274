"""GlobalMGSM: a prompt in each language, and the number an answer is read as, also strictly."""

import unicodedata

import pytest

from tiny_aya_jax import languages, run
from tiny_aya_jax.evaluate import arithmetic

CODES = sorted(arithmetic.KEYWORDS)
SIMPLE_EVALS = "ben cmn deu eng fra jpn rus spa swh tel tha".split()
DIGITS = dict(
    amh_Ethi="0", arb_Arab="٠", ben_Beng="০", guj_Gujr="૦", hin_Deva="०", jpn_Jpan="０",
    khm_Khmr="០", lao_Laoo="໐", mya_Mymr="၀", npi_Deva="०", tam_Taml="௦", tel_Telu="౦",
    tha_Thai="๐", urd_Arab="۰",
)  # fmt: skip


def native(number, zero):
  return "".join(chr(ord(zero) + int(digit)) for digit in number)


def test_there_are_35_languages_of_the_table_each_with_a_keyword_and_a_prompt():
  assert len(CODES) == 35 and set(CODES) == set(arithmetic._INSTRUCTIONS)
  assert set(CODES) <= {language.code for language in languages.LANGUAGES}
  assert [arithmetic.KEYWORDS[code] for code in CODES if code[:3] in SIMPLE_EVALS] == (
      "উত্তর 答案 Antwort Answer Réponse 答え Ответ Respuesta Jibu సమాధానం คำตอบ".split())
  assert all(unicodedata.is_normalized("NFC", word) for word in arithmetic.KEYWORDS.values())


@pytest.mark.parametrize("code", CODES)
def test_a_prompt_names_the_keyword_once_and_ends_with_the_question(code):
  text = arithmetic.prompt("2 {x} + 2?", code)
  assert text.endswith("\n\n2 {x} + 2?")
  assert text.count(arithmetic.KEYWORDS[code] + ":") == 1
  assert text.count("{") == 1, "no field is left open"
  assert all(len(sentence) < 110 for sentence in arithmetic._INSTRUCTIONS[code])


def test_prompts_are_in_their_language():
  pytest.importorskip("regex", reason="the data extra; launch/check.sh installs it")
  pytest.importorskip("py3langid", reason="the data extra; launch/check.sh installs it")
  from tiny_aya_jax.data import identify

  known = identify.identifier("py3langid")
  # It has no label for Wolof and is torn between Zulu and Xhosa.
  for code in set(CODES) - {"wol_Latn", "zul_Latn"}:
    label, probability = known.best(arithmetic.prompt("", code))
    assert identify.same(label, code) and probability > 0.5, f"{code}: {label} {probability}"


@pytest.mark.parametrize("code", CODES)
def test_an_obedient_answer_is_read_in_every_language(code):
  for end in ("18", "18.", "**18**", "\n18", "\\boxed{18}", "$18"):
    answer = f"3 + 5 = 8\n8 + 10 = 18\n{arithmetic.KEYWORDS[code]}: {end}"
    assert arithmetic.extract(answer, code) == "18", end
    assert arithmetic.extract(answer, code, strict=True) == "18", end
    assert arithmetic.correct(answer, "18", code) and not arithmetic.correct(answer, "8", code)


@pytest.mark.parametrize("code", [code for code in DIGITS if code in arithmetic.KEYWORDS])
def test_native_digits_are_read_unless_strictly(code):
  answer = f"{arithmetic.KEYWORDS[code]}: {native('1984', DIGITS[code])}"
  assert arithmetic.extract(answer, code) == "1984"
  strictly = arithmetic.extract(answer, code, strict=True)
  assert strictly == native("1984", DIGITS[code]) and arithmetic.correct(answer, "1984", code)
  assert arithmetic.correct(answer, "1984", code, strict=True) == (DIGITS[code] == "0")


@pytest.mark.parametrize("zero", sorted(set(DIGITS.values())))
def test_digits_of_any_script_are_read_in_any_language(zero):
  assert arithmetic.extract(f"Answer: {native('1250', zero)}", "eng_Latn") == "1250"


# code, what follows the keyword, our reading, simple-evals' (parse_answer, run once on each).
READINGS = [
    ("eng_Latn", "18", "18", "18"),
    ("eng_Latn", "", "", ""),
    ("eng_Latn", "eighteen", "", ""),
    ("eng_Latn", "1,234,567", "1234567", "1234567"),
    ("eng_Latn", "12,34,567", "1234567", "1234567"),  # Indian groups
    ("eng_Latn", "12, 15", "15", "15"),
    ("eng_Latn", "4 (2 + 2)", "2", "2"),  # the last number, whatever it is
    ("eng_Latn", "2 + 2 = 4.", "4", "4"),
    ("eng_Latn", "18.50", "18.50", "18.50"),
    ("eng_Latn", "1.8.5", "5", "5"),
    ("eng_Latn", ".5", "5", "5"),
    ("eng_Latn", "007", "007", "007"),
    ("eng_Latn", "3/4", "4", "4"),
    ("eng_Latn", "20%", "20", "20"),
    ("eng_Latn", "5 m²", "5", "5"),  # ² is no decimal digit
    ("eng_Latn", "1½", "1", "1"),
    # signs
    ("eng_Latn", "-5", "-5", "5"),
    ("eng_Latn", "\u22125", "-5", "5"),
    ("eng_Latn", "**-5**", "-5", "5"),
    ("eng_Latn", "-$5", "5", "5"),
    ("eng_Latn", "- 5", "5", "5"),
    ("eng_Latn", "3-5", "5", "5"),
    ("eng_Latn", "(3)-5", "5", "5"),
    ("eng_Latn", "2024-01-05", "05", "05"),
    ("eng_Latn", "-1,234.", "-1234", "1234"),
    ("hau_Latn", "x-5", "5", "5"),
    # groups of three in any language
    ("eng_Latn", "1'234'567", "1234567", "567"),
    ("deu_Latn", "1’234", "1234", "234"),
    ("eng_Latn", "1\u00a0234", "1234", "234"),
    ("fra_Latn", "12\u202f500", "12500", "500"),
    ("arb_Arab", "١٬٢٣٤", "1234", "٢٣٤"),
    ("urd_Arab", "۱،۲۳۴", "1234", "۲۳۴"),
    ("cmn_Hans", "1，234元", "1234", "234"),
    ("eng_Latn", "5'10", "10", "10"),
    ("eng_Latn", "0'234", "234", "234"),
    ("eng_Latn", "1'2345", "2345", "2345"),
    ("eng_Latn", "1234'567", "567", "567"),
    # spaces, where the language groups with them
    ("rus_Cyrl", "1 234 567", "1234567", "567"),
    ("rus_Cyrl", "2 500 рублей", "2500", "500"),
    ("hun_Latn", "12 34", "34", "34"),
    ("ces_Latn", "1\n234", "234", "234"),
    ("eng_Latn", "1 234", "234", "234"),
    ("deu_Latn", "1 234", "234", "234"),
    ("xho_Latn", "1 234", "1234", "234"),
    # points
    ("deu_Latn", "1.234", "1234", "1.234"),
    ("deu_Latn", "1.234.", "1234", "1.234"),
    ("spa_Latn", "12.500 euros", "12500", "12.500"),
    ("deu_Latn", "0.125", "0.125", "0.125"),
    ("deu_Latn", "1.5", "1.5", "1.5"),
    ("deu_Latn", "1.2345", "1.2345", "1.2345"),
    ("deu_Latn", "12.345.6", "6", "6"),
    ("eng_Latn", "1.234", "1.234", "1.234"),
    ("eng_Latn", "1.234.567", "1234567", "567"),
    ("swh_Latn", "1.234,50", "1234.50", "1.23450"),
    ("swh_Latn", "1.234,567", "1.234567", "1.234567"),
    ("swh_Latn", "5,1.234,50", "51.23450", "51.23450"),
    ("deu_Latn", "1.234,567", "1234567", "1.234567"),
    # decimal commas
    ("deu_Latn", "1.234,50 €", "1234.50", "1.23450"),
    ("deu_Latn", "18,00", "18.00", "1800"),
    ("fra_Latn", "3,5", "3.5", "35"),
    ("rus_Cyrl", "1 234,5", "1234.5", "2345"),
    ("deu_Latn", "1,234", "1234", "1234"),
    ("deu_Latn", "1,234,567", "1234567", "1234567"),
    ("deu_Latn", "3,5,7", "357", "357"),
    ("eng_Latn", "3,5", "35", "35"),
    ("arb_Arab", "3٫5", "3.5", "5"),
    ("arb_Arab", "٣٫٥٠", "3.50", "٥٠"),
]


@pytest.mark.parametrize("code, text, ours, strictly", READINGS)
def test_a_number_is_read(code, text, ours, strictly):
  answer = f"9 {arithmetic.KEYWORDS[code]} 99\n{arithmetic.KEYWORDS[code]}: {text}"
  assert arithmetic.extract(answer, code) == ours
  assert arithmetic.extract(answer, code, strict=True) == strictly


def test_only_what_follows_the_last_keyword_is_read_and_its_case_matters():
  for strict in (False, True):
    assert arithmetic.extract("18", "eng_Latn", strict) == ""
    assert arithmetic.extract("answer: 18. ANSWER: 18", "eng_Latn", strict) == ""
    assert arithmetic.extract("Answer: 18, my answer is not 19", "eng_Latn", strict) == "19"
    assert arithmetic.extract("Answer: 18\nAnswer 19", "eng_Latn", strict) == "19"
    assert arithmetic.extract("Answer: 18\nAnswer:", "eng_Latn", strict) == ""
    assert arithmetic.extract("Answer: 18", "deu_Latn", strict) == ""


@pytest.mark.parametrize("code", ["yor_Latn", "vie_Latn", "fra_Latn", "ces_Latn", "kor_Hang"])
def test_a_decomposed_keyword_is_found_unless_strictly(code):
  decomposed = unicodedata.normalize("NFD", arithmetic.KEYWORDS[code])
  assert decomposed != arithmetic.KEYWORDS[code]
  assert arithmetic.extract(f"{decomposed}: 18", code) == "18"
  assert arithmetic.extract(f"{decomposed}: 18", code, strict=True) == ""


@pytest.mark.parametrize("text, expected, is_correct", [
    ("18.00", "18", True), ("18.0", "18", True), ("18.50", "18.5", True), ("18.5", "18", False),
    ("1,800", "1800", True), ("1800", "1,800", True), ("180", "18", False), ("018", "18", False),
    ("0.0", "0", True), ("100", "1", False), ("18", 18, True), ("18.", "18", True),
])  # fmt: skip
def test_zeros_behind_a_point_do_not_matter(text, expected, is_correct):
  for strict in (False, True):
    assert arithmetic.correct(f"Answer: {text}", expected, "eng_Latn", strict) == is_correct


def test_a_negative_answer_is_right_only_with_its_sign():
  assert arithmetic.correct("Answer: \u22125", "-5", "eng_Latn")
  assert not arithmetic.correct("Answer: -5", "5", "eng_Latn")
  assert arithmetic.correct("Answer: -5", "5", "eng_Latn", strict=True), "simple-evals sees no sign"


@pytest.mark.parametrize("call", [
    lambda code: arithmetic.prompt("?", code), lambda code: arithmetic.extract("", code),
    lambda code: arithmetic.correct("", "1", code),
])  # fmt: skip
def test_a_language_without_problems_is_refused(call):
  with pytest.raises(run.Refused, match="unknown GlobalMGSM language 'hin_Deva'"):
    call("hin_Deva")
