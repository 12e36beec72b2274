import gzip
import json
import pathlib
import random
import re
import shutil

import pytest

from tiny_aya_jax import run
from tiny_aya_jax.data import rules, tokenizer, vocab

EXPERIMENT = str(pathlib.Path(__file__).parents[1] / "experiments" / "vocab.py")
WORDS = dict(
    eng_Latn="the capital of Wales is a city on the coast and people live there since long ago",
    ell_Grek="η πρωτεύουσα της Ουαλίας είναι μια πόλη στην ακτή και οι άνθρωποι ζουν εκεί",
    hin_Deva="वेल्स की राजधानी तट पर एक शहर है और लोग वहाँ १२३४५ वर्षों से रहते हैं",
    tha_Thai="เมืองหลวงของเวลส์เป็นเมืองชายฝั่งทะเล และผู้คนอาศัยอยู่ที่นั่น มานาน",
)
SIZES = dict(eng_Latn=60_000, ell_Grek=20_000, hin_Deva=20_000, tha_Thai=5_000)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
  """A small corpus: four scripts, plain text and conversations, several lines a document.

  Held-out text of the four lies beside it.
  """
  folder, held_out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("held_out")
  for code, words in WORDS.items():
    draw, documents, size = random.Random(code), [], 0
    while size < SIZES[code]:
      lines = [" ".join(draw.choices(words.split(), k=12)) for _ in range(4)]
      documents.append("\n".join(lines) + f" {draw.randint(1990, 1999)}")  # pieces, if they could be
      size += len(documents[-1].encode())
    with gzip.open(folder / f"{code}.txt.gz", "wt", encoding="utf-8") as file:
      file.write("\n\n".join(documents[1:]) + "\n")
    (held_out / f"{code}.txt").write_text(documents[0], encoding="utf-8")
  messages = [dict(role="user", content="only here: zyzzyva"), dict(role="assistant", content="ok")]
  (folder / "cym_Latn").mkdir()
  (folder / "cym_Latn" / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
  return folder


@pytest.fixture(scope="module")
def held_out(raw):
  return raw.parent / "held_out0"


def small(raw, **changes):
  """The tiny variant on `raw`; fields of the mixture as mixture_kind=... and so on."""
  config = run.load_config(f"{EXPERIMENT}:tiny")
  config.validation = None
  values = dict(text=str(raw), size=600, bytes=40_000, plot=False) | changes
  names = {name: name.replace("mixture_", "mixture.") for name in values}
  run.override(config, {names[name]: str(value) for name, value in values.items()})
  return config


def read(path):
  return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(raw, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("vocab")
  vocab.main(small(raw), workdir)
  return workdir


def test_training_writes_a_model_its_twin_and_a_record(trained):
  ours = tokenizer.load(trained / "tokenizer.model")
  record = json.loads((trained / "vocab.json").read_text(encoding="utf-8"))
  assert record["size"] == ours.size == 600
  assert record["sha256"] == ours.sha256 == run.sha256(trained / "tokenizer.model")
  assert ours.json() == (trained / "tokenizer.json").read_text(encoding="utf-8")
  assert set(record["languages"]) == {*WORDS, "cym_Latn"}
  assert all(0 < row["sample_bytes"] <= row["text_bytes"] for row in record["languages"].values())
  assert sorted(path.name for path in trained.iterdir()) == [
      "fairness.html",
      "fairness.json",
      "tokenizer.json",
      "tokenizer.model",
      "vocab.json",
  ]


def test_the_specials_have_the_released_ids(trained):
  assert tokenizer.load(trained).specials == tokenizer.SPECIALS


def test_equal_inputs_give_equal_bytes(raw, trained, tmp_path):
  vocab.main(small(raw), tmp_path)
  for name in ("tokenizer.model", "tokenizer.json"):
    assert run.sha256(tmp_path / name) == run.sha256(trained / name), name


def test_a_rerun_is_up_to_date_and_other_inputs_are_refused(raw, trained, capsys):
  before = (trained / "tokenizer.model").stat().st_mtime_ns
  vocab.main(small(raw), trained)
  assert "up to date" in capsys.readouterr().out
  assert (trained / "tokenizer.model").stat().st_mtime_ns == before
  with pytest.raises(run.Refused, match="other inputs"):
    vocab.main(small(raw, size=500), trained)
  for change in (dict(seed=1), dict(mixture_alpha=1.0), dict(repeat=2)):
    with pytest.raises(run.Refused, match="other inputs"):
      vocab.main(small(raw, **change), trained)


def test_a_lost_or_changed_file_is_made_again(raw, trained, tmp_path):
  shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
  for name in ("tokenizer.model", "tokenizer.json"):
    (tmp_path / name).unlink()
    vocab.main(small(raw), tmp_path)
    assert run.sha256(tmp_path / name) == run.sha256(trained / name)
  (tmp_path / "tokenizer.model").write_bytes(b"changed")
  vocab.main(small(raw), tmp_path)
  assert run.sha256(tmp_path / "tokenizer.model") == run.sha256(trained / "tokenizer.model")


def test_a_killed_overwrite_leaves_no_record_of_what_was_there(raw, trained, tmp_path, monkeypatch):
  def killed(path, content):
    raise KeyboardInterrupt

  shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
  monkeypatch.setattr(vocab, "_replace", killed)
  with pytest.raises(KeyboardInterrupt):
    vocab.main(small(raw, overwrite=True), tmp_path)
  assert not (tmp_path / "vocab.json").exists()


def test_overwrite_trains_again(raw, tmp_path):
  vocab.main(small(raw), tmp_path)
  vocab.main(small(raw, size=500, overwrite=True), tmp_path)
  assert tokenizer.load(tmp_path).size == 500


def test_the_seed_chooses_other_lines(raw, trained, tmp_path):
  vocab.main(small(raw, seed=1), tmp_path)
  assert run.sha256(tmp_path / "tokenizer.model") != run.sha256(trained / "tokenizer.model")


def test_the_whole_vocabulary_has_shape(trained):
  """Newlines are ordinary pieces, digits of any script single, no piece crosses scripts."""
  ours = tokenizer.load(trained)
  pieces = [ours.piece(id) for id in range(ours.size)]
  assert len(ours.encode("\n")) == 1 and len(ours.encode(" ")) == 1
  digits = [piece for piece in pieces if sum(letter.isdigit() for letter in piece) > 1]
  assert not digits
  assert not [p for p in pieces if any("a" <= c <= "z" for c in p) and any("α" <= c for c in p)]


def test_space_and_newline_are_pieces_even_where_the_sample_has_none(tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(vocab.train(["ผู้คนอาศัยอยู่ที่นั่น"] * 50, 290, 1.0))
  ours = tokenizer.load(path)
  assert ours.piece(*ours.encode("\n")) == "\n" and ours.piece(*ours.encode(" ")) == " "


def test_conversations_are_trained_on(raw, trained, tmp_path):
  vocab.main(small(raw, languages=("cym_Latn",), size=284), tmp_path)
  ours = tokenizer.load(tmp_path)
  assert ours.bytes_V[ours.encode("zyzzyva")].max() > 1


def test_shares_follow_the_weights_are_capped_and_spent():
  have = dict(a=1000, b=100, c=10)
  assert vocab.shares(have, 111, have) == dict(a=100, b=10, c=1)
  assert vocab.shares(have, 10_000, dict(a=1, b=5, c=9)) == have
  uniform = vocab.shares(have, 300, dict(a=1, b=1, c=1))  # a third each, but c has less
  assert uniform == dict(a=190, b=100, c=10)
  # What c leaves goes to the others in proportion to their weights, not to the largest.
  assert vocab.shares(have, 100, dict(a=1, b=2, c=7)) == dict(a=30, b=60, c=10)
  assert vocab.shares(have, 50, dict(b=1)) == dict(b=50)  # the rule leaves a and c out


def test_the_sample_is_spread_over_the_whole_file_and_of_the_size_wanted(raw):
  config = small(raw)
  sources = [("eng_Latn", "text", []), ("ell_Grek", "text", [])]
  have, _ = vocab._count(config.text, sources)
  every = list(vocab.sample(config, sources, have, {"eng_Latn": have["eng_Latn"]}))
  taken = list(vocab.sample(config, sources, have, {"eng_Latn": 6000}))
  assert abs(sum(len(line.encode()) for line in taken) - 6000) < 600
  where = [every.index(line) / len(every) for line in taken]
  assert all(any(tenth / 10 <= w < (tenth + 1) / 10 for w in where) for tenth in range(10))


def test_text_that_is_short_may_be_repeated(raw, tmp_path):
  config = small(raw)
  sources = [("tha_Thai", "text", [])]
  have, _ = vocab._count(config.text, sources)
  once, more = (list(vocab.sample(config, sources, have, {"tha_Thai": times * have["tha_Thai"]}))
                for times in (1, 2.5))
  counts = {more.count(line) / once.count(line) for line in once}
  assert len(more) == pytest.approx(2.5 * len(once), abs=1) and counts == {2, 3}
  for repeat in (1, 3):
    vocab.main(small(raw, repeat=repeat, mixture_alpha=0.0), tmp_path / str(repeat))
    thai = read(tmp_path / str(repeat) / "vocab.json")["languages"]["tha_Thai"]
    assert repeat - 1 < thai["sample_bytes"] / thai["text_bytes"] <= repeat


RULES = [
    dict(mixture_kind="temperature", mixture_temperature=1.0),
    dict(mixture_kind="temperature", mixture_alpha=0.0),
    dict(mixture_kind="unimax", mixture_epochs=0.5),
    dict(mixture_kind="buckets"),
    dict(mixture_kind="buckets", mixture_alpha=1.0),
    dict(mixture_kind="buckets", mixture_reading="B", mixture_bucket_temperature=1.0),
    dict(mixture_kind="explicit", mixture_weights="(('eng_Latn', 0.8), ('South Asia', 0.2))"),
    dict(mixture_fixed="(('eng_Latn', 0.3),)"),
    dict(mixture_keep="(('Europe', 1.0),)"),
    dict(mixture_floor=0.19),
]


def test_every_rule_gives_another_sample(raw, tmp_path):
  shutil.copy(raw / "eng_Latn.txt.gz", tmp_path / "deu_Latn.txt.gz")  # a bucket of two
  for path in raw.glob("*.gz"):
    shutil.copy(path, tmp_path)
  wants = []
  for rule in RULES:
    config = small(tmp_path, bytes=30_000, **rule)
    have, _ = vocab._count(config.text, vocab._sources(config, config.text))
    wants.append(vocab.shares(have, config.bytes, rules.weights(have, vocab._rule(config))))
    assert sum(wants[-1].values()) == pytest.approx(30_000, abs=6)
  assert len({str(want) for want in wants}) == len(RULES)
  assert set(wants[6]) == {"eng_Latn", "hin_Deva"} and set(wants[8]) == {
      "eng_Latn", "deu_Latn", "ell_Grek"}


def test_realised_shares_are_said_by_bucket(raw, tmp_path, capsys):
  vocab.main(small(raw, bytes=70_000), tmp_path)  # more than Thai has: 5 kB
  line = re.compile(r"^ *([0-9.]+)%  (\S+ \S+) +(\d+)  (.+)$", re.MULTILINE)
  said = line.findall(capsys.readouterr().out)
  assert {bucket: (count, codes) for _, bucket, count, codes in said} == {
      "Indo-European Latn": ("2", "eng cym"), "Indo-European Grek": ("1", "ell"),
      "Indo-European Deva": ("1", "hin"), "Kra-Dai Thai": ("1", "tha"),
  }  # fmt: skip
  assert sum(float(share) for share, *_ in said) == pytest.approx(100, abs=0.1)


def test_lines_keep_their_newlines_and_long_ones_are_cut_without_loss():
  assert vocab.lines("a\n\nb\r\nc\n") == ["a", "\n\nb\r", "\nc"]
  line = "\n" + "word " * 3000 + "x" * 5000
  chunks = vocab.CHUNK.findall(line)
  assert "".join(chunks) == line
  assert max(map(len, chunks)) <= vocab.LONGEST
  assert all(chunk.startswith(" ") for chunk in chunks[1:7])


def test_digits_are_cut_apart_and_nothing_else():
  assert vocab.shape("a१२b 12\0") == "a\x1f१\x1f\x1f२\x1fb 12\x1f"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(size=200), "size is 200, expected at least 270"),
        (dict(size=300), "size 300 is too small: .* are 3[0-9][0-9]; raise"),
        (dict(size=100_000), r"size 100000 is too large: the sample gives at most [0-9]+ pieces"),
        (dict(mixture_temperature=0.0), "mixture temperature is 0.0: expected a positive number"),
        (dict(mixture_kind="bucket"), "did you mean 'buckets'"),
        (dict(mixture_reading="B"), "bucket_temperature is None and reading 'B'"),
        (dict(beside="('C',)"), "unknown rule in config.beside 'C'"),
        (dict(beside="('uniform',)", bytes=10**7), "takes all [0-9]+ bytes there are .* by any rule"),
        (dict(processes=0), "config.processes is 0"),
        (dict(repeat=0), "config.repeat is 0"),
        (dict(validation="nowhere"), "text folder nowhere does not exist"),
        (dict(character_coverage=1.5), "at most 1"),
        (dict(languages=("zul_Latn",)), "of none of the 1 in --config.languages"),
        (dict(languages=("eng_Latn", "zul_Latn")), "no source of 'zul_Latn'"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_numbers(raw, tmp_path, changes, message):
  with pytest.raises(run.Refused, match=message):
    vocab.main(small(raw, **changes), tmp_path / "new")
  assert not list(tmp_path.rglob("*.model"))


def test_the_largest_size_named_in_the_refusal_works(raw, tmp_path):
  with pytest.raises(run.Refused) as refusal:
    vocab.main(small(raw, size=100_000), tmp_path)
  largest = int(str(refusal.value).split("--config.size=")[1].split()[0])
  vocab.main(small(raw, size=largest), tmp_path)
  assert tokenizer.load(tmp_path).size == largest


def test_a_lone_surrogate_in_the_text_is_refused(tmp_path):
  (tmp_path / "eng_Latn.jsonl").write_text('{"text": "ab\\ud83d"}\n')
  with pytest.raises(run.Refused, match="surrogate"):
    vocab.main(small(tmp_path), tmp_path / "new")


def test_without_text_the_full_variant_says_what_to_give(tmp_path):
  with pytest.raises(run.Refused, match="give --config.text=DIR"):
    vocab.main(run.load_config(EXPERIMENT), tmp_path)


def test_every_variant_says_its_size():
  sizes = {v: run.load_config(f"{EXPERIMENT}:{v}").size for v in ("full", "small", "tiny")}
  assert sizes == dict(full=262_144, small=8192, tiny=4096)
  with pytest.raises(run.Refused, match="did you mean 'tiny'"):
    run.load_config(f"{EXPERIMENT}:tin")


def test_the_text_and_its_long_lines_are_counted(tmp_path):
  text = "a" * 2001 + "\n" + "b" * 1999 + "\n\né\n"
  (tmp_path / "eng_Latn.txt").write_text(text, encoding="utf-8")
  have, cut_lines = vocab._count(str(tmp_path), [("eng_Latn", "text", [])])
  assert have == {"eng_Latn": 2001 + 1 + 1999 + 2} and cut_lines == 1


# --- what a folder may hold ---------------------------------------------------------------------


def test_languages_of_a_group_without_text_are_named_in_one_line(raw, tmp_path, capsys):
  vocab.main(small(raw, languages=("Asia Pacific", "eng_Latn")), tmp_path)
  said = [line for line in capsys.readouterr().out.splitlines() if "has no text of" in line]
  assert len(said) == 1 and "jpn_Jpan" in said[0] and "tha_Thai" not in said[0]


def test_files_without_a_line_are_no_text(tmp_path):
  (tmp_path / "eng_Latn.txt").write_text("\n \n")
  with pytest.raises(run.Refused, match="holds no line of text"):
    vocab.main(small(tmp_path), tmp_path / "new")
  (tmp_path / "deu_Latn.txt").write_text("ein Satz\n")
  with pytest.raises(run.Refused, match="no source of 'eng_Latn'"):
    vocab.main(small(tmp_path, languages=("eng_Latn", "deu_Latn")), tmp_path / "new")


def test_an_empty_folder_is_refused(tmp_path):
  (tmp_path / "text").mkdir()
  with pytest.raises(run.Refused, match="holds no text"):
    vocab.main(small(tmp_path / "text"), tmp_path / "new")


def lines_of_words(code="eng_Latn"):
  draw = random.Random(0)
  return [" ".join(draw.choices(WORDS[code].split(), k=12)) for _ in range(200)]


def test_a_bom_and_windows_line_ends_change_nothing(tmp_path):
  made = []
  for name, end, mark in (("plain", "\n", b""), ("windows", "\r\n", b"\xef\xbb\xbf")):
    (tmp_path / name).mkdir()
    text = mark + end.join(lines_of_words()).encode()
    (tmp_path / name / "eng_Latn.txt").write_bytes(text)
    vocab.main(small(tmp_path / name, size=300), tmp_path / f"{name}_out")
    made.append(run.sha256(tmp_path / f"{name}_out" / "tokenizer.model"))
  assert made[0] == made[1]


def test_odd_characters_and_long_lines_neither_stop_nor_enter_the_vocabulary(tmp_path):
  """NUL and U+2585 could make SentencePiece drop a line; U+2581 is how it writes a space.

  Measured is all of the text, since it is smaller than a slice.
  """
  words = [f"{line} \0\u2581\u2585{line}" for line in lines_of_words()]
  text = "\n".join([*words, "x y " * 5_000])
  (tmp_path / "eng_Latn.txt").write_text(text, encoding="utf-8")
  vocab.main(small(tmp_path, size=350), tmp_path / "out")
  ours = tokenizer.load(tmp_path / "out")
  pieces = [ours.piece(id) for id in range(270, ours.size)]
  assert not [piece for piece in pieces if set(piece) & set("\0\u2581\u2585\x1f")]
  assert any("people" in piece for piece in pieces)
  trip = read(tmp_path / "out" / "fairness.json")["columns"]["chosen"]["round_trip"]
  assert trip == dict(lines=201, exceptions={"a literal U+2581 becomes a space": 200})


# --- the report and rules beside the chosen one -------------------------------------------------


@pytest.fixture(scope="module")
def beside(raw, held_out, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("beside")
  vocab.main(compared(raw, held_out), workdir)
  return workdir


def compared(raw, held_out, **changes):
  rules = ("proportional", "uniform", "A", "B")
  return small(raw, validation=str(held_out), beside=rules, size=500, **changes)


def test_rules_stand_beside_the_chosen_one(raw, held_out, beside):
  report = read(beside / "fairness.json")
  assert list(report["columns"]) == ["chosen", "proportional", "uniform", "A", "B"]
  assert report["measured_on"] == f"held-out text, {held_out}"
  assert set(report["text"]) == set(WORDS)  # nothing is held out of Welsh
  english = {name: column["languages"]["eng_Latn"] for name, column in report["columns"].items()}
  assert english["proportional"]["share"] > english["uniform"]["share"]
  assert english["B"]["share"] < english["uniform"]["share"]  # Welsh has its place in the bucket
  proportional, uniform = english["proportional"], english["uniform"]
  assert proportional["tokens_per_character"] <= uniform["tokens_per_character"]
  assert all(column["round_trip"]["exceptions"] == {} for column in report["columns"].values())


def test_the_chosen_rule_is_not_trained_twice(beside):
  columns = read(beside / "fairness.json")["columns"]
  assert columns["A"] == columns["chosen"]
  trained = sorted(path.name for path in (beside / "beside").iterdir())
  assert trained == ["B", "proportional", "uniform"]


def test_a_rule_beside_is_what_it_is_alone(raw, beside, tmp_path):
  config = small(raw, size=500, mixture_kind="temperature", mixture_alpha=1.0)
  vocab.main(config, tmp_path)
  model = beside / "beside" / "proportional" / "tokenizer.model"
  assert run.sha256(tmp_path / "tokenizer.model") == run.sha256(model)


def test_more_processes_give_the_same(raw, held_out, beside, tmp_path):
  vocab.main(compared(raw, held_out, processes=2), tmp_path)
  for path in beside.rglob("tokenizer.*"):
    assert run.sha256(path) == run.sha256(tmp_path / path.relative_to(beside))


def test_a_killed_call_goes_on_with_what_is_missing(raw, held_out, beside, tmp_path, capsys):
  shutil.copytree(beside, tmp_path, dirs_exist_ok=True)
  (tmp_path / "fairness.json").unlink()
  (tmp_path / "beside" / "B" / "vocab.json").unlink()
  (tmp_path / "beside" / "B" / "tokenizer.model").write_bytes(b"half")
  vocab.main(compared(raw, held_out), tmp_path)
  said = [line for line in capsys.readouterr().out.splitlines() if ": V=" in line]
  assert len(said) == 1 and "beside/B: V=500" in said[0]
  for name in ("fairness.json", "fairness.html", "beside/B/tokenizer.model"):
    assert run.sha256(tmp_path / name) == run.sha256(beside / name), name


def test_another_question_makes_the_report_again_and_trains_nothing(raw, beside, tmp_path, capsys):
  shutil.copytree(beside, tmp_path, dirs_exist_ok=True)
  vocab.main(small(raw, size=500, beside=("uniform",)), tmp_path)
  report = read(tmp_path / "fairness.json")
  assert list(report["columns"]) == ["chosen", "uniform"]
  assert report["measured_on"].startswith("a part of the training text")
  assert "V=" not in capsys.readouterr().out
  vocab.main(small(raw, size=500, beside=("uniform",)), tmp_path)
  assert "fairness.json: up to date" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["fairness.html", "fairness.svg"])
def test_a_report_that_lost_a_part_is_made_again(raw, trained, tmp_path, lost):
  pytest.importorskip("matplotlib", reason="the report extra")
  shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
  vocab.main(small(raw, plot=True), tmp_path)
  whole = (tmp_path / lost).read_bytes()
  (tmp_path / lost).unlink()
  vocab.main(small(raw, plot=True), tmp_path)
  assert (tmp_path / lost).read_bytes() == whole


def test_a_vocabulary_trained_anew_by_another_rule_has_a_report_of_its_own(raw, trained, tmp_path):
  shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
  record = read(tmp_path / "vocab.json")  # as a call leaves it that is killed before the report
  run.write_json(tmp_path / "vocab.json", record | dict(rule="temperature: another"))
  vocab.main(small(raw), tmp_path)
  assert read(tmp_path / "fairness.json")["rules"]["chosen"] == "temperature: another"


def test_other_held_out_text_makes_the_report_again(raw, held_out, trained, tmp_path):
  shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
  vocab.main(small(raw, validation=str(held_out)), tmp_path)
  report, before = (read(folder / "fairness.json") for folder in (tmp_path, trained))
  assert report["text"]["eng_Latn"]["lines"] < before["text"]["eng_Latn"]["lines"]


def test_without_held_out_text_a_part_of_every_language_is_measured(raw, tmp_path, monkeypatch):
  monkeypatch.setattr(vocab, "SLICE", 8000)
  vocab.main(small(raw), tmp_path)
  text = read(tmp_path / "fairness.json")["text"]
  assert set(text) == {*WORDS, "cym_Latn"}
  assert text["eng_Latn"]["bytes"] == pytest.approx(8000, rel=0.1)
  assert text["tha_Thai"]["bytes"] < 8000  # all of it


def test_a_given_tokenizer_is_measured_and_nothing_is_trained(raw, held_out, trained, tmp_path):
  found = []
  for name in ("tokenizer.model", "tokenizer.json"):
    config = small(raw, tokenizer=str(trained / name), validation=str(held_out))
    config.text = None
    vocab.main(config, tmp_path / name)
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
        "fairness.html", "fairness.json"]
    found.append(read(tmp_path / name / "fairness.json")["columns"]["given"])
    del found[-1]["sha256"]
  assert found[0] == found[1] and "share" not in found[0]["languages"]["eng_Latn"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(beside=("uniform",)), "only measured"),
        (dict(text="", validation=""), "set --config.validation=DIR"),
        (dict(tokenizer="nowhere.model"), "does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(raw, trained, tmp_path, changes, message):
  with pytest.raises(run.Refused, match=message):
    vocab.main(small(raw, **(dict(tokenizer=str(trained)) | changes)), tmp_path / "new")


def test_the_training_text_is_not_held_out(raw, tmp_path):
  with pytest.raises(run.Refused, match="is the training text"):
    vocab.main(small(raw, validation=f"{raw}/"), tmp_path)


# --- memory -------------------------------------------------------------------------------------


def test_a_sample_larger_than_the_memory_is_refused_with_what_fits(raw, tmp_path, monkeypatch):
  monkeypatch.setattr(vocab, "_memory", lambda: 201_400_000)  # 200 MB, 600 pieces and 20 kB of text
  message = "about 0.2 GB of memory, 1 at a time, and this machine has 0.2 GB: set --config.bytes="
  with pytest.raises(run.Refused, match=message) as no:
    vocab.main(small(raw), tmp_path)
  fits = int(str(no.value).split("--config.bytes=")[1].split()[0])
  assert fits == 20_000
  vocab.main(small(raw, bytes=fits, size=500), tmp_path)


def test_memory_is_counted_for_every_process(raw, held_out, tmp_path, monkeypatch):
  monkeypatch.setattr(vocab, "_memory", lambda: 300_000_000)
  with pytest.raises(run.Refused, match="about 0.4 GB of memory, 2 at a time"):
    vocab.main(compared(raw, held_out, processes=2), tmp_path)
  vocab.main(compared(raw, held_out), tmp_path)
