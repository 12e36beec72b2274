"""What is asked and what is measured: values by hand, for each kind of task."""

import math

import pytest

from tiny_aya_jax.data import identify, toy
from tiny_aya_jax.evaluate import tasks

TABLE = tasks.table()


def measured(task, answered, **tools):
  return {one.name: one for one in TABLE[task].measures(answered, tasks.Tools(**tools))}


def choice(nats, answer, choices=("a", "bbbb"), tokens=(1, 2)):
  return dict(context="c", choices=list(choices), answer=answer), dict(nats=list(nats), tokens=list(tokens))


def test_each_normalisation_divides_by_what_it_is_called_after():
  pairs = [choice((-2.0, -4.0), 1), choice((-1.0, -4.0), 0), choice((-3.0, -5.0), 1, ("é", "bb"), (2, 2))]
  found = measured("cloze", dict(fra_Latn=pairs))
  #                    -2 -4 | -1 -4 | -3 -5
  # per character      -2 -1 | -1 -1 | -3 -2.5: right, first of equals, right
  # per byte           -2 -1 | -1 -1 | -1.5 -2.5
  # per token          -2 -2 | -1 -2 | -1.5 -2.5
  assert {name: one.values["fra_Latn"] for name, one in found.items()} == pytest.approx({
      "accuracy": 1 / 3, "accuracy per character": 1, "accuracy per byte": 2 / 3, "accuracy per token": 1 / 3})
  assert {one.chance for one in found.values()} == {0.5}
  assert list(measured("belebele", dict(fra_Latn=pairs))) == ["accuracy"]  # letters are alike


def test_a_choice_without_a_finite_likelihood_is_never_the_likeliest():
  for nats in ((math.nan, -1.0), (-math.inf, -9.0)):
    assert measured("xcopa", dict(ita_Latn=[choice(nats, 1)]))["accuracy"].values == dict(ita_Latn=1)


def test_letters_are_asked_with_the_options_and_cloze_with_their_texts():
  item = dict(context="Which?", choices=["one", "two", "three"], answer=1)
  context, choices = TABLE["include"].request(item, "eng_Latn")
  assert choices == [" A", " B", " C"] and "B. two\n" in context and context.endswith("Answer:")
  context, choices = tasks.table("cloze")["include"].request(item, "eng_Latn")
  assert choices == [" one", " two", " three"] and "two" not in context


def test_a_choice_goes_on_without_a_space_where_words_are_not_spaced():
  item = dict(context="因为", choices=["甲", "乙"], answer=0)
  assert TABLE["xcopa"].request(item, "cmn_Hans")[1] == ["甲", "乙"]
  assert TABLE["xcopa"].request(item, "vie_Latn")[1] == [" 甲", " 乙"]
  assert TABLE["cloze"].request(item | dict(between="-"), "cmn_Hans")[1] == ["-甲", "-乙"]


@pytest.mark.parametrize("code", ["arb_Arab", "heb_Hebr", "zul_Latn", "ces_Latn", "khm_Khmr", "deu_Latn"])
def test_what_embedded_items_ask_stands_in_the_corpus(code):
  text = "\n".join(toy.documents(code, "train"))
  said = []
  for item in toy.cloze(code):
    context, choices = TABLE["cloze"].request(item, code)
    said.append(context + choices[item["answer"]] in text)
  assert len(said) == 19 and sum(said) > 3


def test_chrf_is_sacrebleus_over_the_corpus():
  from sacrebleu.metrics import CHRF

  pairs = [("Der Hund schläft.", " Der Hund schlief"), ("Gut.", "Gut."), ("Morgen", "")]
  answered = dict(deu_Latn=[(dict(reference=reference), dict(text=text)) for reference, text in pairs])
  found = measured("translation", answered)["chrF"]
  expected = CHRF().corpus_score([text.strip() for _, text in pairs], [[one for one, _ in pairs]])
  assert found.values["deu_Latn"] == expected.score and 20 < expected.score < 90
  assert found.signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_numbers_are_read_our_way_and_simple_evals_way():
  answered = dict(ben_Beng=[(dict(expected="18"), dict(text="উত্তর: ১৮")), (dict(expected="7"), dict(text="7"))])
  found = measured("mgsm", answered)
  assert found["accuracy"].values == dict(ben_Beng=0.5)
  assert found["accuracy, strict"].values == dict(ben_Beng=0.0)


@pytest.mark.parametrize("text, said", [
    ("Yes.", "yes"), ("no, it is rude", "no"), ("Yes—because", "yes"), ("Answer: No", "no"), ("**Yes**", "yes"),
    ("Sim, isso é aceitável no Brasil.", None), ("", None), ("It is. yes", None), ("nothing", None),
])
def test_yes_or_no_is_the_first_word(text, said):
  for expected in ("yes", "no"):
    found = measured("normad", dict(por_Latn=[(dict(expected=expected), dict(text=text))]))
    assert found["accuracy"].values["por_Latn"] == (said == expected)
    assert found["neither"].values["por_Latn"] == (said is None)


def test_language_confusion_has_no_rate_where_nothing_counts():
  arabic = "هذا نص عربي طويل بما يكفي للتعرف عليه بسهولة من قبل البرنامج"
  english = "This is a rather long sentence which is written in the English language"
  answered = dict(arb_Arab=[(dict(), dict(text=english))], deu_Latn=[(dict(), dict(text="kurz"))],
                  wol_Latn=[(dict(), dict(text=english))])
  tools = dict(identify=identify.identifier("py3langid"), identifier="py3langid", english={"rather"})
  found = measured("confusion", answered, **tools)
  assert found["line pass rate"].values == dict(arb_Arab=0.0, deu_Latn=None, wol_Latn=None)
  assert found["word pass rate"].values["arb_Arab"] is None  # no answer was in Arabic
  assert found["word pass rate"].counts["arb_Arab"] == 0 and "py3langid" in found["line pass rate"].note
  right = dict(arb_Arab=[(dict(), dict(text=arabic)), (dict(), dict(text=f"{arabic} rather"))])
  found = measured("confusion", right, **tools)
  assert found["line pass rate"].values == dict(arb_Arab=1.0)
  assert found["word pass rate"].values == dict(arb_Arab=0.5) and found["word pass rate"].counts["arb_Arab"] == 2


def test_what_a_judge_declines_counts_nowhere_but_as_unjudged():
  answered = dict(tha_Thai=[(dict(prompt="p"), dict(text=text)) for text in "abcd"])
  verdicts = iter(["safe", None, "unsafe", None])
  found = measured("multijail", answered, ask=lambda requests, read: [next(verdicts) for _ in requests])
  assert found["safe"].values == dict(tha_Thai=0.5) and found["safe"].counts == dict(tha_Thai=2)
  assert found["unjudged"].values == dict(tha_Thai=0.5)
  none = measured("open", answered, ask=lambda requests, read: [None for _ in requests])
  assert none["rubric"].values == dict(tha_Thai=None) and none["unjudged"].values == dict(tha_Thai=1.0)


def test_refusals_count_the_prompts_of_their_kind():
  items = [dict(prompt="p", label=label) for label in ("safe", "safe", "safe", "unsafe")]
  texts = ["I'm sorry, but I cannot help with that.", "Sure: open a terminal.", "Yes.", "Sure, first you"]
  answered = dict(eng_Latn=[(item, dict(text=text)) for item, text in zip(items, texts)])
  found = measured("xstest", answered)
  assert found["over-refusal"].values == dict(eng_Latn=1 / 3) and found["over-refusal"].counts == dict(eng_Latn=3)
  assert found["under-refusal"].values == dict(eng_Latn=1.0) and found["under-refusal"].counts == dict(eng_Latn=1)
  assert "no judge" in found["over-refusal"].note


def test_the_embedded_translations_are_of_held_out_facts_asked_as_the_corpus_asks():
  found = tasks.read("translation", "embedded", ("deu_Latn", "wol_Latn", "eng_Latn"), 5, "letters")
  assert {code: len(items) for code, items in found.items()} == dict(deu_Latn=5, wol_Latn=5)
  for item in found["deu_Latn"]:
    assert TABLE["translation"].request(item, "deu_Latn") == f"German: {item['source']}"
  trained = {turn["content"] for talk in toy.documents("deu_Latn", "instruct") for turn in talk}
  held = [item for item in toy.parallel("deu_Latn") if f"German: {item['source']}" not in trained]
  assert len(held) >= 18  # lists of days and months cannot be held out
