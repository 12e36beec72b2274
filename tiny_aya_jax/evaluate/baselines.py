"""What costs nothing: xz and a byte n-gram, per language, to print beside a model's bits per byte.

A model worth its electricity stands well below all three columns. `xz_alone` knows nothing but the
validation text; `xz_given` and `ngram` have read the training text of the same language, and no
other: no parameters are shared over languages and nothing is tuned on the validation text.

Comparable with a model: its bits per byte are nats / ln 2 / bytes of the documents' text, and it
pays for each document's end (EOS has no bytes). So documents are joined by a blank line: the bits
of the join are counted and its two bytes are not.
"""

import concurrent.futures
import functools
import lzma
import multiprocessing
from typing import NamedTuple

import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.data import text

JOIN = b"\n\n"
XZ_WINDOW = 64 * 2**20  # bytes; the dictionary of preset 9 (xz(1)); older text is out of its sight
WIDEST = 7  # preceding bytes; with the byte they predict they fill a 64-bit key


def table(train_text, validation_text, languages, processes=1):
  """Folders (or 'embedded/<split>') and codes -> {code: {"bytes", "train_bytes", "xz_alone", ...}}.

  `bytes` and `train_bytes` are UTF-8 bytes of the documents' text without the joins; `xz_alone`,
  `xz_given` and `ngram` are bits per byte of the validation text. A language without training text
  has train_bytes 0 and None for the two that need it. A conversation counts as the text of all its
  messages, which no model with weights on the answers alone is comparable with.
  Raises Refused, before any work, for a language without validation text.
  """
  train, validation = text.languages(train_text), text.languages(validation_text)
  missing = [code for code in languages if code not in validation]
  if missing:
    raise run.Refused(
      f"{len(missing)} of {len(languages)} languages have no validation text in "
      f"{validation_text}: {', '.join(missing)}; add their text or leave them out"
    )
  jobs = [
    (
      (train_text, code, sorted(train.get(code, ()))),
      (validation_text, code, sorted(validation[code])),
    )
    for code in languages
  ]
  rows = run.progress(_each(_row, jobs, processes), "baselines", total=len(jobs))
  return dict(zip(languages, rows, strict=True))


def _each(function, jobs, processes):
  """`map` over processes. Spawned, not forked: the caller may hold jax and its threads."""
  if processes == 1:
    yield from map(function, jobs)
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
    yield from pool.map(function, jobs)


def _row(job):
  """One language's line of the table."""
  (train, train_bytes), (validation, validation_bytes) = (_read(*where) for where in job)
  if not validation_bytes:
    raise run.Refused(f"{job[1][1]} in {job[1][0]} holds 0 bytes of text; expected a document")
  joined = len(validation) / validation_bytes
  return dict(
    bytes=validation_bytes,
    train_bytes=train_bytes,
    xz_alone=xz_alone(validation) * joined,
    xz_given=xz_given(train, validation) * joined if train_bytes else None,
    ngram=ngram(train, validation) * joined if train_bytes else None,
  )


def _read(source, code, names):
  """One language's documents, every source of it -> (bytes joined by JOIN, bytes without JOIN)."""
  documents, size = [], 0
  for name in names:
    for document in text.read(source, code, name):
      documents.append(_text(document).encode())
      size += len(documents[-1])
      if size > XZ_WINDOW:
        raise run.Refused(
          f"{code} in {source} has more than the {XZ_WINDOW} bytes that xz looks back over; "
          "give the baselines a folder with a sample of it"
        )
  return JOIN.join(documents), size


def _text(document):
  """A document as it is; a conversation as its messages' text, one under the other."""
  if isinstance(document, str):
    return document
  return JOIN.decode().join(message["content"] for message in document)


def xz_alone(validation):
  """bytes -> bits per byte of `xz -9e`, file header included (some 60 bytes)."""
  _refuse_empty(validation=validation)
  return _xz(validation) * 8 / len(validation)


def xz_given(train, validation):
  """bytes, bytes -> bits per byte that `xz -9e` adds for `validation` behind `train`.

  Raises Refused where both together are longer than xz looks back.
  """
  _refuse_empty(train=train, validation=validation)
  if len(train) + len(validation) > XZ_WINDOW:
    raise run.Refused(
      f"{len(train)} + {len(validation)} bytes are more than the {XZ_WINDOW} that xz looks back "
      "over; give less training text"
    )
  return (_xz(train + validation) - _xz(train)) * 8 / len(validation)


def _xz(content):
  return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def ngram(train, validation, order=5):
  """bytes, bytes -> bits per byte of an n-gram with contexts of up to `order` preceding bytes.

  Interpolated modified Kneser-Ney (Chen and Goodman 1999, section 4.1.6), from train alone:

    p(c|h) = (count(hc) - D(count(hc))) / count(h.) + backoff(h) p(c|h'),   p(c|) backs off to 1/256
    backoff(h) = sum over c of D(count(hc)) / count(h.);   1 for a context never seen

  where h' is h without its oldest byte, count is the number of occurrences for the longest h and of
  different preceding bytes for shorter ones, and D is fit (see `_discounts`) to each order.
  Chosen over Witten-Bell on the last 2% of the training text, in bits per byte: English (6 MB) 2.27
  against 2.49, Turkish 2.15 : 2.36, Japanese 2.05 : 2.22, Amharic 1.79 : 1.87, Thai 1.46 : 1.47,
  Xhosa 2.49 : 2.84, Igbo (50 KB) 1.49 : 1.63, Lao (800 bytes) 2.09 : 2.22.
  """
  _refuse_empty(train=train, validation=validation)
  probability_T = probability(fit(train, order), windows(validation, order))
  return float(-np.log2(probability_T).mean())


class Order(NamedTuple):
  """One context length: grams (context and byte) and contexts, sorted keys with a value each."""

  gram: np.ndarray  # uint64, the predicted byte lowest
  share: np.ndarray  # float64, (count - discount) / count of the context
  context: np.ndarray  # uint64, gram without its lowest byte
  backoff: np.ndarray  # float64, what the context leaves to the shorter one


def fit(train, order):
  """bytes -> tuple of `Order`, contexts of 0 bytes first. 6 MB of English take half a second."""
  gram, count = np.unique(windows(train, order), return_counts=True)
  orders = [_order(gram, count)]
  for length in range(order, 0, -1):
    # Each gram is seen once with each byte before it: counting them is Kneser-Ney's count.
    gram, count = np.unique(_newest(gram, length), return_counts=True)
    orders.append(_order(gram, count))
  return tuple(reversed(orders))


def probability(orders, window_T):
  """tuple of `Order`, uint64 [T] (see `windows`) -> float64 [T], p(last byte | bytes before it)."""
  probability_T = np.full(len(window_T), 1 / 256)
  for length, (gram, share, context, backoff) in enumerate(orders):
    key_T = _newest(window_T, length + 1)
    share_T = _look_up(gram, share, key_T, absent=0.0)
    backoff_T = _look_up(context, backoff, key_T >> np.uint64(8), absent=1.0)
    probability_T = share_T + backoff_T * probability_T
  return probability_T


def windows(content, order):
  """bytes -> uint64 [T]: each byte lowest, the `order` bytes before it above, the oldest highest.

  The text stands behind `order` line feeds, so that its first bytes have contexts too.
  """
  if not 0 <= order <= WIDEST:
    raise run.Refused(f"order {order}: expected 0 to {WIDEST} preceding bytes (64-bit keys)")
  byte = np.frombuffer(b"\n" * order + content, np.uint8).astype(np.uint64)
  shifted = (byte[order - age :][: len(content)] << np.uint64(8 * age) for age in range(order + 1))
  return functools.reduce(np.bitwise_or, shifted)


def _order(gram, count):
  """Sorted grams and counts -> `Order`. Grams of one context are neighbours."""
  context, first, kinds = np.unique(gram >> np.uint64(8), return_index=True, return_counts=True)
  discount = _discounts(count)[np.minimum(count, 3)]
  total = np.add.reduceat(count, first)
  share = (count - discount) / np.repeat(total, kinds)
  return Order(gram, share, context, np.add.reduceat(discount, first) / total)


def _discounts(count):
  """Counts of one order -> [0, D(1), D(2), D(3 and more)], by how many grams have counts 1 to 4.

  D(r) = r - (r + 1) Y n[r + 1] / n[r] with Y = n[1] / (n[1] + 2 n[2]). One of them is 0 in short
  texts, in the 256 single bytes and in repeated text: then 1/2 of each count up to 3 is taken.
  D stays above 0, since a byte never seen must cost a finite number of bits.
  """
  r = np.arange(1, 4)
  n = np.bincount(np.minimum(count, 5), minlength=6)[1:5]
  if n.all():
    discount = r - (r + 1) * n[0] / (n[0] + 2 * n[1]) * n[1:] / n[:-1]
  else:
    discount = r / 2
  return np.concatenate([[0.0], np.clip(discount, 0.05, r)])  # 0.05: ours, seldom reached


def _newest(window, length):
  """uint64 keys without all but the `length` newest bytes."""
  return window & np.uint64(256**length - 1)


def _look_up(keys, values, wanted_T, absent):
  """values at wanted_T in the sorted keys; `absent` where a key is not there."""
  place_T = np.minimum(np.searchsorted(keys, wanted_T), len(keys) - 1)
  return np.where(keys[place_T] == wanted_T, values[place_T], absent)


def _refuse_empty(**texts):
  for name, content in texts.items():
    if not content:
      raise run.Refused(f"the {name} text has 0 bytes; expected at least 1")
