"""Rates against counts by hand, in one stub a rule: what a vocabulary costs each language."""

import hashlib
import importlib.util
import pathlib
import unicodedata

import pytest

from tiny_aya_jax import run
from tiny_aya_jax.data import fairness, tokenizer, vocab

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiments" / "vocab.py"

class Bytes:
  """Each byte a token, and U+FFFD one of its own; `change` is done to a text before."""

  size, sha256 = 257, hashlib.sha256().hexdigest()

  def __init__(self, change=lambda text: text):
    self.change = change

  def encode(self, text):
    parts = self.change(text).split("\ufffd")
    return [id for part in parts for id in (256, *part.encode())][1:]

  def encode_many(self, texts):
    return [self.encode(text) for text in texts]

  def decode(self, ids):
    pieces = ("\ufffd".encode() if id == 256 else bytes([id]) for id in ids)
    return b"".join(pieces).decode(errors="replace")


TEXTS = [
    ("eng_Latn", ["abcd", "\n\nef"]), ("deu_Latn", ["äa"]), ("rus_Cyrl", ["да"]),
    ("ell_Grek", ["η"]), ("tha_Thai", ["ไทย"]), ("eng_Latn", ["g"]), ("code", ["é = 1"]),
]  # fmt: skip


def measured(texts=TEXTS, shares=None, **tokenizers):
  return fairness.measure(tokenizers or dict(bytes=Bytes()), texts, shares or {})


def test_rates_are_what_counting_by_hand_gives():
  result = measured()
  assert result["text"]["eng_Latn"] == dict(characters=9, bytes=9, lines=3)
  assert result["text"]["deu_Latn"] == dict(characters=2, bytes=3, lines=1)
  rows = result["columns"]["bytes"]["languages"]
  assert rows["eng_Latn"] == dict(tokens_per_character=1.0, bytes_per_token=1.0, fragments=0.0)
  assert rows["deu_Latn"] == dict(tokens_per_character=1.5, bytes_per_token=1.0, fragments=0.66667)
  assert rows["tha_Thai"]["fragments"] == 1.0
  assert "code" not in rows  # program text is no language


def test_the_worst_is_compared_with_the_best_over_all_and_inside_a_script():
  column = measured()["columns"]["bytes"]
  assert column["all"]["worst_to_best"] == 3.0
  assert column["all"]["worst"][0] == "tha_Thai" and column["all"]["best"][0] == "eng_Latn"
  assert column["scripts"]["Latn"]["worst_to_best"] == 1.5
  assert column["scripts"]["Latn"]["tokens_per_character"] == 1.25  # each language once
  assert column["scripts"]["Thai"]["worst_to_best"] == 1.0


def test_shares_of_the_sample_are_shown_and_summed_by_script():
  shares = dict(bytes=dict(eng_Latn=0.5, deu_Latn=0.25, lao_Laoo=0.25))
  column = measured(shares=shares)["columns"]["bytes"]
  assert column["languages"]["eng_Latn"]["share"] == 0.5
  assert column["languages"]["tha_Thai"]["share"] == 0
  assert column["scripts"]["Latn"]["share"] == 0.75


def test_a_replacement_character_of_the_text_is_no_fragment():
  rows = measured([("eng_Latn", ["\ufffdé"])])["columns"]["bytes"]["languages"]
  assert rows["eng_Latn"]["fragments"] == round(2 / 3, 5)


def test_lines_that_do_not_come_back_are_counted_by_cause():
  decomposed = unicodedata.normalize("NFD", "é")
  lines = ["a", "b\u2581", decomposed, "ﬁ", decomposed + "\u2581"]
  found = measured(
      [("eng_Latn", lines)],
      model=Bytes(lambda text: text.replace("\u2581", " ")),
      nfc=Bytes(lambda text: unicodedata.normalize("NFC", text)),
      nfkc=Bytes(lambda text: unicodedata.normalize("NFKC", text)),
      lower=Bytes(lambda text: text.replace("b", "a")),
  )["columns"]
  trips = {name: column["round_trip"] for name, column in found.items()}
  assert all(trip["lines"] == 5 for trip in trips.values())
  assert trips["model"]["exceptions"] == {"a literal U+2581 becomes a space": 2}
  assert trips["nfc"]["exceptions"] == {"Unicode form NFC": 2}
  assert trips["nfkc"]["exceptions"] == {"Unicode form NFC": 2, "Unicode form NFKC": 1}
  assert trips["lower"]["exceptions"] == {"unknown": 1}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """One vocabulary of ours as tokenizer.model and as tokenizer.json."""
  path = tmp_path_factory.mktemp("pair") / "tokenizer.model"
  path.write_bytes(vocab.train(["the coast is near here"] * 50, 290, 1.0))
  model = tokenizer.load(path)
  path.with_suffix(".json").write_text(model.json(), encoding="utf-8")
  return model, tokenizer.load(path.with_suffix(".json"))


def test_byte_fall_back_is_fragments_in_both_of_our_files(pair):
  result = measured([("eng_Latn", ["the coast é", "ไ"])], model=pair[0], json=pair[1])
  rows = [column["languages"]["eng_Latn"] for column in result["columns"].values()]
  ids = pair[0].encode("the coast é") + pair[0].encode("ไ")
  assert rows[0] == rows[1] and rows[0]["fragments"] == round(5 / len(ids), 5)


def test_parts_of_a_character_are_fragments_in_a_byte_level_vocabulary(tmp_path):
  tokenizers = pytest.importorskip("tokenizers")
  engine = tokenizers.Tokenizer(tokenizers.models.BPE())
  engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  engine.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  engine.train_from_iterator(["ééé ไไไ the coast"] * 5, trainer)
  engine.save(str(tmp_path / "tokenizer.json"))
  level = tokenizer.load(tmp_path)
  for text, broken in (("é", 0), ("ไ", 0), ("the coast", 0), ("ñ", 2), ("😀", 4)):
    row = measured([("eng_Latn", [text])], level=level)["columns"]["level"]["languages"]["eng_Latn"]
    assert row["fragments"] == round(broken / len(level.encode(text)), 5), text


def test_nothing_to_measure_is_refused():
  with pytest.raises(run.Refused, match="no text of any language"):
    measured([("code", ["x = 1"]), ("eng_Latn", [])])


def described():
  result = measured(one=Bytes(), **{"<two>": Bytes(lambda text: text.replace("a", "aa"))})
  rules = {"one": "temperature: alpha 1", "<two>": "buckets: by <family>"}
  return result | dict(rules=rules, measured_on="held-out text, a&b")


def test_the_page_has_every_language_and_says_what_it_measured():
  page = fairness.page(described())
  for words in ("English (eng_Latn)", "Thai (tha_Thai)", "held-out text, a&amp;b", "&lt;two&gt;",
                "buckets: by &lt;family&gt;", "inside Latn (2 languages)", "differ by nature",
                "7 lines encoded and decoded", "&lt;two&gt;: 2 lines, unknown"):
    assert words in page, words
  assert "<two>" not in page and "http" not in page and "<img" not in page
  assert "<img src='fairness.svg'" in fairness.page(described(), "fairness.svg")


def test_the_table_has_a_line_a_tokenizer():
  head, one, two = fairness.table(described())
  assert "worst/best" in head and two.startswith("<two>")
  assert one.split()[:3] == ["one", "3.00", "1.50"]
  greek = measured([("ell_Grek", ["η"])])
  assert fairness.table(greek)[1].split()[:3] == ["bytes", "1.00", "-"]


def test_the_plot_is_the_same_each_time(tmp_path):
  pytest.importorskip("matplotlib")
  for name in ("a.svg", "b.svg"):
    fairness.plot(described(), tmp_path / name)
  drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
  assert drawn == (tmp_path / "b.svg").read_text(encoding="utf-8")
  assert "tha_Thai" in drawn and "tokens per character" in drawn


def test_a_plot_without_matplotlib_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  config = run.load_config(f"{EXPERIMENT}:tiny")
  config.plot = True
  with pytest.raises(run.Refused, match=r"pip install 'tiny_aya_jax\[report\]'"):
    vocab.main(config, tmp_path / "new")
  assert not list(tmp_path.iterdir())
