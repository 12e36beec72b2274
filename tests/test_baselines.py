"""Baselines: a proper distribution, equal to a slow one; xz equal to the command; the joins."""

import collections
import gzip
import json
import math
import shutil
import subprocess

import numpy as np
import pytest

from tiny_aya_jax import run
from tiny_aya_jax.evaluate import baselines

random = np.random.default_rng(0)
WORDS = "the cat sat on a mat and ate thin rats; şapka çok güzel; ንጉሥ ናቸው; 我們走吧".split()
PROSE = " ".join(random.choice(WORDS, 3000)).encode()
HELD_OUT = " ".join(random.choice(WORDS, 200)).encode()
TRAIN = {
  "prose": PROSE,
  "one byte": b"a",
  "one byte often": b"a" * 500,
  "text twice": PROSE[:700] * 2,
  "every byte": bytes(range(256)) * 3,
  "noise": random.bytes(5000),
}


@pytest.mark.parametrize("train", TRAIN.values(), ids=TRAIN.keys())
@pytest.mark.parametrize("order", [0, 1, 5, 7])
def test_probabilities_of_the_256_bytes_sum_to_one_in_every_context(train, order):
  orders = baselines.fit(train, order)
  seen = [train[start : start + order] for start in random.integers(0, len(train), 10)]
  for context in seen + [random.bytes(order) for _ in range(10)] + [b"\n" * order]:
    context = context.rjust(order, b"\n")
    keys = [int.from_bytes(context + bytes([byte]), "big") for byte in range(256)]
    probability = baselines.probability(orders, np.array(keys, np.uint64))
    assert probability.min() > 0
    assert probability.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [0, 2, 5])
def test_the_ngram_equals_a_slow_dictionary(order):
  train, validation = PROSE[:4000], HELD_OUT[:500] + bytes([0, 255])
  slow = slow_kneser_ney(train, order)
  text = b"\n" * order + validation
  bits = -sum(
    math.log2(slow(text[at : at + order], text[at + order])) for at in range(len(validation))
  )
  found = baselines.ngram(train, validation, order)
  assert found == pytest.approx(bits / len(validation), rel=1e-12)


def slow_kneser_ney(train, order):
  """p(context, byte) of interpolated modified Kneser-Ney, one dictionary an order."""
  text = b"\n" * order + train
  longest = [text[at : at + order + 1] for at in range(len(train))]
  counts = {order: collections.Counter(longest)}
  for length in reversed(range(order)):
    counts[length] = collections.Counter(gram[1:] for gram in counts[length + 1])
  discounts = {length: slow_discounts(list(count.values())) for length, count in counts.items()}

  def probability(context, byte):
    if context is None:
      return 1 / 256
    shorter = probability(context[1:] if context else None, byte)
    count, discount = counts[len(context)], discounts[len(context)]
    after = [count[context + bytes([other])] for other in range(256)]
    if not sum(after):
      return shorter
    kept = after[byte] - discount[min(after[byte], 3)]
    freed = sum(discount[min(number, 3)] for number in after)
    return (kept + freed * shorter) / sum(after)

  return probability


def slow_discounts(counts):
  n1, n2, n3, n4 = (counts.count(r) for r in (1, 2, 3, 4))
  if 0 in (n1, n2, n3, n4):
    return [0, 0.5, 1, 1.5]
  y = n1 / (n1 + 2 * n2)
  raw = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
  return [0] + [min(max(value, 0.05), r) for r, value in enumerate(raw, 1)]


def test_longer_contexts_predict_better_and_noise_costs_eight_bits():
  bits = [baselines.ngram(PROSE, HELD_OUT, order) for order in range(3)]
  assert bits == sorted(bits, reverse=True) and bits[0] < 6 and bits[2] < 2
  assert baselines.ngram(random.bytes(100_000), random.bytes(5000), 0) == pytest.approx(8, abs=0.05)


def test_a_window_is_the_byte_under_the_bytes_before_it():
  assert [hex(key) for key in baselines.windows(b"\x01\x02\x03\x04", 2)] == [
    "0xa0a01",
    "0xa0102",
    "0x10203",
    "0x20304",
  ]


def test_xz_alone_is_the_file_that_the_command_writes():
  if not shutil.which("xz"):
    pytest.skip("no xz command on this machine")
  command = ["xz", "-9e", "--stdout", "--threads=1"]
  written = subprocess.run(command, input=PROSE, capture_output=True, check=True).stdout
  # The command may choose another integrity check at build time: at most 32 bytes.
  assert baselines.xz_alone(PROSE) == pytest.approx(len(written) * 8 / len(PROSE), rel=0.01)


def test_xz_given_finds_text_from_nine_megabytes_ago_and_charges_for_what_is_new():
  old = random.bytes(20_000)
  train = old + bytes(9_000_000)  # further back than the 8 MiB of xz's usual preset
  assert baselines.xz_given(train, old) < 0.1
  assert baselines.xz_given(train, random.bytes(20_000)) == pytest.approx(8, abs=0.3)


@pytest.fixture
def folders(tmp_path):
  """Training and validation text of two languages, one of them with two sources; Igbo untrained."""
  english = ["the cat sat on the mat, " * 20 + "or not", "a rat ate the hat"]
  write(tmp_path / "train" / "eng_Latn" / "books.txt.gz", english)
  write(tmp_path / "train" / "fra_Latn" / "a" / "text.txt.gz", ["le chat est là"])
  write(tmp_path / "train" / "fra_Latn" / "b" / "text.txt.gz", ["où est le chien"])
  write(tmp_path / "validation" / "eng_Latn.txt.gz", ["the rat sat", "on a hat"])
  write(tmp_path / "validation" / "fra_Latn.txt.gz", ["où est le chat", "là"])
  write(tmp_path / "validation" / "ibo_Latn.txt.gz", ["nno"])
  return str(tmp_path / "train"), str(tmp_path / "validation")


def write(path, documents):
  path.parent.mkdir(parents=True, exist_ok=True)
  with gzip.open(path, "wt", encoding="utf-8") as file:
    file.write("\n\n".join(documents) + "\n")


def test_the_table_pays_for_joins_and_counts_the_bytes_of_text_only(folders):
  table = baselines.table(*folders, ["fra_Latn", "eng_Latn"])
  assert list(table) == ["fra_Latn", "eng_Latn"]
  row = table["fra_Latn"]
  first, second = "où est le chat".encode(), "là".encode()
  joined = first + b"\n\n" + second
  train = "le chat est là\n\noù est le chien".encode()
  assert row["bytes"] == len(first + second) == 18
  assert row["train_bytes"] == len(train) - 2
  assert row["xz_alone"] * 18 == pytest.approx(baselines.xz_alone(joined) * len(joined))
  assert row["xz_given"] * 18 == pytest.approx(baselines.xz_given(train, joined) * len(joined))
  assert row["ngram"] * 18 == pytest.approx(baselines.ngram(train, joined) * len(joined))
  assert json.loads(json.dumps(table)) == table


def test_a_language_without_training_text_has_no_value_where_one_is_needed(folders):
  row = baselines.table(*folders, ["ibo_Latn"])["ibo_Latn"]
  assert (row["train_bytes"], row["xz_given"], row["ngram"]) == (0, None, None)
  assert row["bytes"] == 3 and row["xz_alone"] > 8


def test_two_processes_make_the_same_table(folders):
  languages = ["eng_Latn", "fra_Latn", "ibo_Latn"]
  assert baselines.table(*folders, languages, 2) == baselines.table(*folders, languages)


def test_a_language_without_validation_text_is_refused_by_name(folders):
  with pytest.raises(run.Refused, match=r"1 of 2 languages .*: deu_Latn"):
    baselines.table(*folders, ["eng_Latn", "deu_Latn"])


def test_more_text_than_xz_looks_back_over_is_refused(folders, monkeypatch):
  monkeypatch.setattr(baselines, "XZ_WINDOW", 100)
  with pytest.raises(run.Refused, match=r"eng_Latn .* more than the 100 bytes"):
    baselines.table(*folders, ["eng_Latn"])
  with pytest.raises(run.Refused, match=r"90 . 20 bytes are more than the 100"):
    baselines.xz_given(b"a" * 90, b"b" * 20)


@pytest.mark.parametrize("order", [-1, 8])
def test_an_order_that_does_not_fit_the_key_is_refused(order):
  with pytest.raises(run.Refused, match="0 to 7"):
    baselines.ngram(b"a", b"a", order)


def test_empty_text_is_refused():
  for baseline in (baselines.xz_given, baselines.ngram):
    with pytest.raises(run.Refused, match="train text has 0 bytes"):
      baseline(b"", b"a")
    with pytest.raises(run.Refused, match="validation text has 0 bytes"):
      baseline(b"a", b"")
  with pytest.raises(run.Refused, match="validation text has 0 bytes"):
    baselines.xz_alone(b"")
