import gzip
import json
import pathlib
import random
import shutil

import pytest

from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer, vocab

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
  """A small corpus: four scripts, plain text and conversations, several lines a document."""
  folder = tmp_path_factory.mktemp("raw")
  for code, words in WORDS.items():
    draw, documents, size = random.Random(code), [], 0
    while size < SIZES[code]:
      lines = [" ".join(draw.choices(words.split(), k=12)) for _ in range(4)]
      documents.append("\n".join(lines) + f" {draw.randint(1990, 1999)}")  # pieces, if they could be
      size += len(documents[-1].encode())
    with gzip.open(folder / f"{code}.txt.gz", "wt", encoding="utf-8") as file:
      file.write("\n\n".join(documents) + "\n")
  messages = [dict(role="user", content="only here: zyzzyva"), dict(role="assistant", content="ok")]
  (folder / "cym_Latn").mkdir()
  (folder / "cym_Latn" / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
  return folder


def small(raw, **changes):
  config = run.load_config(f"{EXPERIMENT}:tiny")
  values = dict(text=str(raw), size=600, bytes=40_000) | changes
  run.override(config, {name: str(value) for name, value in values.items()})
  return config


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
  assert all(row["tokens_per_character"] > 0 for row in record["languages"].values())
  assert sorted(path.name for path in trained.iterdir()) == [
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
  with pytest.raises(run.Refused, match="other inputs"):
    vocab.main(small(raw, seed=1), trained)


def test_a_lost_or_changed_file_is_made_again(raw, trained, tmp_path):
  shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
  for name in ("tokenizer.model", "tokenizer.json"):
    (tmp_path / name).unlink()
    vocab.main(small(raw), tmp_path)
    assert run.sha256(tmp_path / name) == run.sha256(trained / name)


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


def test_shares_are_tempered_capped_and_spent():
  have = dict(a=1000, b=100, c=10)
  assert vocab.shares(have, 111, 1.0) == dict(a=100, b=10, c=1)
  assert vocab.shares(have, 10_000, 3.33) == have
  flat = vocab.shares(have, 300, 1e9)  # a third each, but b and c have less
  assert flat == dict(a=190, b=100, c=10)
  tempered = vocab.shares(dict(a=10_000, b=100), 1100, 2.0)
  assert tempered == dict(a=1000, b=100)


def test_the_sample_is_spread_over_the_whole_file_and_of_the_size_wanted(raw):
  config = small(raw)
  sources = [("eng_Latn", "text", [])]
  have, _ = vocab._count(config.text, sources)
  want = {"eng_Latn": 6000}
  slices = {"eng_Latn": []}
  every = list(vocab.sample(config, sources, have, have, {"eng_Latn": []}))
  taken = list(vocab.sample(config, sources, have, want, slices))
  assert abs(sum(len(line.encode()) for line in taken) - 6000) < 600
  where = [every.index(line) / len(every) for line in taken]
  assert all(any(tenth / 10 <= w < (tenth + 1) / 10 for w in where) for tenth in range(10))
  assert slices["eng_Latn"] == taken  # smaller than a slice


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
        (dict(temperature=0.0), "temperature is 0.0, expected a number above 0"),
        (dict(character_coverage=1.5), "at most 1"),
        (dict(languages=("zul_Latn",)), "of none of the 1 in --config.languages"),
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
