"""Test sets as they are published: which language, which records, which items."""

import gzip
import json
import sys
import types

import pytest

from tiny_aya_jax import run
from tiny_aya_jax.evaluate import formats


@pytest.mark.parametrize("name, code, variety", [
    ("deu_Latn.jsonl.gz", "deu_Latn", ""), ("mgsm_bn.tsv", "ben_Beng", ""),
    ("et/test.et.jsonl", "ekk_Latn", ""), ("zho_Hant", "cmn_Hant", ""), ("zho_Hans.jsonl", "cmn_Hans", ""),
    ("mgsm_zh.tsv", "cmn_Hans", ""), ("sw", "swh_Latn", ""), ("eng_latn", "eng_Latn", ""),
    ("de/test.jsonl", "deu_Latn", ""), ("Nigerian Pidgin", "pcm_Latn", ""),
    ("include_base_44_swahili.csv", "swh_Latn", ""), ("devtest/fil_Latn.devtest", "fil_Latn", ""),
    ("yue_Hant.devtest", "yue_Hani", ""), ("amh/test.parquet", "amh_Ethi", ""),
    # a variety is one of its language; another script or region is not the language
    ("por_latn_braz", "por_Latn", "braz"), ("cat_Latn_vale1252", "cat_Latn", "vale1252"),
    ("en-fr_CA", "fra_Latn", "CA"), ("en-pt_BR.jsonl", "por_Latn", "BR"), ("ref.zho-TW.txt", "cmn_Hant", ""),
    ("hin_Latn.jsonl", None, ""), ("arb_Latn", None, ""), ("srp_latn", None, ""), ("npi_Latn", None, ""),
    ("translation-et", None, ""), ("xcopa/ht/test.ht.jsonl", None, ""), ("exemplars.json", None, ""),
    ("DOCUMENT_IDS.tsv", None, ""), ("qa_no_context.jsonl", None, ""), ("blimp_wh_vs_that_no_gap", None, ""),
])
def test_the_language_of_a_file_is_in_its_name_or_its_folders(name, code, variety):
  assert formats.language_of(name) == (code, variety)


def write(folder, name, content):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  content = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
  return path


def lines(*rows):
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_files_of_other_splits_and_other_languages_are_left_out(tmp_path, capsys):
  write(tmp_path, "et/val.et.jsonl", lines(dict(x=1)))
  write(tmp_path, "et/test.et.jsonl", lines(dict(x=2)))
  write(tmp_path, "de/test.de.jsonl.gz", lines(dict(x=3), dict(x=4)))
  write(tmp_path, "ht/test.ht.jsonl", lines(dict(x=5)))
  assert formats.by_language(tmp_path) == dict(
      deu_Latn=[dict(x=3), dict(x=4)], ekk_Latn=[dict(x=2)])
  assert "1 parts are left out" in (said := capsys.readouterr().out) and "ht/test.ht.jsonl" in said
  assert list(formats.by_language(tmp_path, {"ekk_Latn"})) == ["ekk_Latn"]
  with pytest.raises(run.Refused, match="no records in a language that is asked for"):
    formats.by_language(tmp_path, {"fra_Latn"})


def test_numbered_files_are_one_part_and_a_second_variety_is_left_out(tmp_path, capsys):
  for name, value in (("deu_Latn-00000-of-00002.jsonl", 1), ("deu_Latn-00001-of-00002.jsonl", 2),
                      ("por_Latn_braz.jsonl", 3), ("por_Latn_port.jsonl", 4), ("fra_Latn_cana.jsonl", 5),
                      ("fra_Latn.jsonl", 6), ("hin_Latn.jsonl", 7)):
    write(tmp_path, name, lines(dict(x=value)))
  assert formats.by_language(tmp_path) == dict(
      fra_Latn=[dict(x=6)], por_Latn=[dict(x=3)], deu_Latn=[dict(x=1), dict(x=2)])
  said = capsys.readouterr().out
  assert "3 parts are left out" in said and "hin_Latn" in said and "por_Latn_port" in said


def test_a_language_may_be_a_field_of_the_record(tmp_path):
  write(tmp_path, "dolly.jsonl", lines(dict(x=1, language="deu"), dict(x=2, language="arb", script="Latn"),
                                       dict(x=3, language="zho", script="Hant"), dict(x=4, language="xxx")))
  assert {code: [row["x"] for row in rows] for code, rows in formats.by_language(tmp_path).items()} == dict(
      deu_Latn=[1], cmn_Hant=[3])
  write(tmp_path / "one", "set.jsonl", lines(dict(x=1)))
  assert formats.by_language(tmp_path / "one", otherwise="eng_Latn") == dict(eng_Latn=[dict(x=1)])


@pytest.mark.parametrize("name, content, rows", [
    ("a.csv", '\ufeffq,a\n"one, ""two""\nthree",4\n', [dict(q='one, "two"\nthree', a="4")]),
    ("a.tsv", 'a "quoted\t7\nb\t8\n', [{"0": 'a "quoted', "1": "7"}, {"0": "b", "1": "8"}]),
    ("a.tsv", "question\tanswer\nb\t8\n", [dict(question="b", answer="8")]),
    ("a.txt", "one\n\ntwo\n", [dict(text="one"), dict(text=""), dict(text="two")]),
    ("a.json", '[{"x": 1}, {"x": 2}]', [dict(x=1), dict(x=2)]),
    ("a.jsonl", '{"x": "\u2028"}\n\n{"x": 2}\n', [dict(x="\u2028"), dict(x=2)]),
])
def test_records_are_read_whatever_the_kind_of_file(tmp_path, name, content, rows):
  assert list(formats.records(write(tmp_path, name, content))) == rows


@pytest.mark.parametrize("name, content, said", [
    ("a.jsonl", "{", "a.jsonl, line 1 is not JSON"), ("a.jsonl", "3\n", "holds a JSON int"),
    ("a.csv", "a,b\n1\n", "row 2 has 1 cells, expected 2"), ("a.txt", b"\xff\n", "is not UTF-8"),
    ("a.jsonl.gz", None, "damaged or cut short"), ("a.parquet", "no", "damaged or no parquet"),
])
def test_a_broken_file_is_refused_with_its_place(tmp_path, name, content, said):
  path = write(tmp_path, name, content or "{}\n" * 1000)
  if content is None:
    path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(run.Refused, match=said):
    list(formats.records(path))


def test_parquet_is_read(tmp_path):
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.table(dict(x=[1, 2])), tmp_path / "deu_Latn.parquet")
  assert formats.by_language(tmp_path) == dict(deu_Latn=[dict(x=1), dict(x=2)])


def test_a_set_on_the_hub_is_read_by_its_subsets(monkeypatch):
  asked = []

  def load(name, subset, split):
    if subset != "ht":
      asked.append((name, subset, split))
    return [dict(x=subset)]

  hub = types.SimpleNamespace(get_dataset_config_names=lambda name: ["deu_Latn", "ht"], load_dataset=load)
  monkeypatch.setitem(sys.modules, "datasets", hub)
  assert formats.by_language("hf://facebook/belebele") == dict(deu_Latn=[dict(x="deu_Latn")])
  assert formats.by_language("hf://facebook/belebele@dev", {"deu_Latn"})
  assert formats.by_language("hf://facebook/belebele/deu_*@dev", {"deu_Latn"})
  assert asked[:2] == [("facebook/belebele", "deu_Latn", "test"), ("facebook/belebele", "deu_Latn", "dev")]
  assert asked[2] == asked[1] and len(asked) == 3
  with pytest.raises(run.Refused, match="has no subset fra_"):
    formats.by_language("hf://facebook/belebele/fra_*")


def test_a_hub_that_cannot_be_read_is_refused(monkeypatch):
  def fail(name):
    raise ConnectionError("no\nnetwork")

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(get_dataset_config_names=fail))
  with pytest.raises(run.Refused, match="hf://a/b cannot be read \\(no network\\)"):
    formats.by_language("hf://a/b")


def test_choices_of_every_published_form():
  row = dict(flores_passage="P", question=" Q ", correct_answer_num="3",
             **{f"mc_answer{number}": f"a{number}" for number in range(1, 5)})
  nested = dict(text="P", items=[dict(question="Q", answers=[
      dict(text=f"a{number}", correct=number == 3) for number in range(1, 5)])])
  item = dict(context="P\n\nQ", choices=["a1", "a2", "a3", "a4"], answer=2)
  assert list(formats.belebele([row])) == list(formats.belebele([nested])) == [item]
  options = {f"option_{letter}": letter for letter in "abcd"}
  expected = dict(context="Q", choices=list("abcd"), answer=1)
  assert list(formats.global_mmlu([dict(question="Q", answer="B", **options)])) == [expected]
  for answer in (1, "B"):
    assert list(formats.include([dict(question="Q", answer=answer, **options)])) == [expected]
  assert list(formats.global_piqa([dict(prompt="P", solution0="a", solution1="b", label=1)])) == [
      dict(context="P", choices=["a", "b"], answer=1)]
  row = dict(premise="Es regnete.", choice1="Sie ging.", choice2="Er kam.", label=0)
  assert list(formats.xcopa([row | dict(question="cause")], "eng_Latn")) == [
      dict(context="Es regnete because", choices=["sie ging.", "er kam."], answer=0)]
  assert next(formats.xcopa([row | dict(question="effect")], "tur_Latn"))["context"].endswith("bu yüzden")
  row = dict(premise="Yağdı。", choice1=" Insan", choice2="İyi", question="cause", label=1)
  assert next(formats.xcopa([row], "tur_Latn"))["choices"] == ["ınsan", "iyi"]
  assert next(formats.xcopa([row], "cmn_Hans"))["context"] == "Yağdı因为"
  for wrong in (dict(choices=["a", "b"], answer=2), dict(choices=["a", ""], answer=0),
                dict(choices=["a"], answer=0), dict(choices=list("abcdefghi"), answer=0)):
    with pytest.raises(run.Refused, match="expected 2 to 8 that say something"):
      list(formats.cloze([dict(context="c", **wrong)]))


def test_questions_of_every_published_form(tmp_path):
  rows = [{"0": "Q", "1": "18"}, dict(question="Q", answer_number=18.0), dict(question="Q", answer="18 ")]
  assert list(formats.mgsm(rows)) == 3 * [dict(question="Q", expected="18")]
  with pytest.raises(KeyError):
    list(formats.mgsm([dict(query="Q", target=1)]))
  with pytest.raises(run.Refused, match="expected texts"):
    list(formats.qa([dict(question="Q", answers=dict(text=["x"], answer_start=[3]))]))
  assert list(formats.qa([dict(question="Q", answers=[1990])])) == [dict(prompt="Q", accepted=["1990"])]
  said = [dict(answers=["x"], en_answers=["y"])]
  blend = dict(a=dict(question="Q", annotations=said, idks={"idk": 1}),
               b=dict(question="R", annotations=[]),
               c=dict(question="S", annotations=said, idks={"no-answer": 2, "not-applicable": 1}))
  write(tmp_path, "Ethiopia_data.json", json.dumps(blend))
  write(tmp_path, "Assam_data.json", json.dumps(blend))
  found = formats.blend(tmp_path)
  assert list(found) == ["amh_Ethi"]
  assert list(formats.qa(found["amh_Ethi"])) == [dict(prompt="Q", accepted=["x", "y"])]
  rows = [dict(prompt="p", type="homonyms"), dict(prompt="q", type="contrast_homonyms"),
          dict(prompt="r", type="x", label="unsafe")]
  assert [item["label"] for item in formats.xstest(rows)] == ["safe", "unsafe", "unsafe"]
  rows = [{"Story": "s", "Country": "new_zealand", "Gold Label": label} for label in ("yes", "neutral")]
  assert list(formats.normad(rows)) == [dict(story="s", country="new zealand", expected="yes")]
  path = write(tmp_path, "MultiJail.csv", "id,source,tags,en,jv,xx\n1,s,t,e1,j1,x\n2,s,t,e2,,x\n")
  assert formats.multijail(path) == dict(
      eng_Latn=[dict(prompt="e1"), dict(prompt="e2")], jav_Latn=[dict(prompt="j1")])
  assert list(formats.prompts([dict(inputs="i", targets="t"), dict(prompt="p")])) == [
      dict(prompt="i"), dict(prompt="p")]


def test_aligned_lines_are_pairs_and_others_are_refused(tmp_path):
  write(tmp_path, "eng_Latn.txt.gz", "one\ntwo\n")
  write(tmp_path, "deu_Latn.txt", "eins\nzwei\n")
  assert formats.parallel(tmp_path, "eng_Latn") == dict(deu_Latn=[
      dict(source="one", reference="eins"), dict(source="two", reference="zwei")])
  write(tmp_path, "fra_Latn.txt", "un\n")
  assert list(formats.parallel(tmp_path, "eng_Latn", {"deu_Latn"})) == ["deu_Latn"]
  with pytest.raises(run.Refused, match="fra_Latn has 1 lines and eng_Latn 2"):
    formats.parallel(tmp_path, "eng_Latn")
  with pytest.raises(KeyError):
    formats.parallel(write(tmp_path / "x", "deu_Latn.jsonl", lines(dict(query="x"))).parent, "deu_Latn")
  write(tmp_path / "wmt", "en-de_DE.jsonl", lines(dict(source="one", target="eins", is_bad_source=False),
                                                  dict(source="?", target="?", is_bad_source=True)))
  assert formats.parallel(tmp_path / "wmt", "eng_Latn") == dict(deu_Latn=[dict(source="one", reference="eins")])
  with pytest.raises(run.Refused, match="no file in tur_Latn"):
    formats.parallel(tmp_path, "tur_Latn", {"deu_Latn"})
