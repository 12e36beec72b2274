"""The embedding of another tokenizer: which rows are kept, and what the others begin with.

A special keeps the row of its name, a piece the row of its bytes, bit for bit. Any other piece begins as
the mean, in fp32, of the rows of what the old tokenizer makes of its text; or of its single bytes, where
these are no text or would come back as others (a literal U+2581, say). Two kinds have nothing of that:
- rows without a piece take the old table's rows without one, which have learnt never to be said;
- what is then left, and specials that the old tokenizer lacks, are the mean of all rows in use. Its logit
  is the mean of theirs, so n such rows cost the others at most log(1 + n / V) nats; a row of zeros or of
  chance may outweigh them all.

Pure NumPy; `rows` looks at the tokenizers alone. Reading the old table and placing the new is start.py's.
"""

import itertools
from typing import NamedTuple

import numpy as np

AT_ONCE = 1024  # pieces that are averaged together: some 5,000 old rows


class Rows(NamedTuple):
  """Of which old rows each row of a new table is made."""

  kept_V: np.ndarray  # the old row that a new one keeps, or -1
  averaged: np.ndarray  # new rows that are means
  starts: np.ndarray  # where the old rows of each begin in
  parts: np.ndarray  # old rows
  used: np.ndarray  # all old rows in use: every other new row is their mean
  counts: dict


def rows(old, new, old_V, new_V):
  """Two Tokenizers and the numbers of rows of their tables -> Rows.

  counts: kept, averaged, new_specials and unused (without a piece) are all new rows; byte_only are means
  in which no old piece holds a character, spaces aside.
  """
  theirs, mine = _keys(old), _keys(new)
  held = _held(theirs)
  kept_V = np.full(new_V, -1)
  kept_V[: len(mine)] = [held.get(key, -1) for key in mine]
  lacking = [id for id, key in enumerate(mine) if isinstance(key, tuple) and kept_V[id] < 0]
  parts = _parts(old, [new.pieces[id] for id in lacking], held)
  spoken = np.array([_text(piece) not in (None, "", " ") for piece in old.pieces])
  unused, spare = _unused(mine, new_V), _unused(theirs, old_V)
  counts = dict(
      kept=int((kept_V >= 0).sum()), averaged=len(lacking),
      byte_only=sum(not spoken[ids].any() for ids in parts),
      new_specials=sum(isinstance(key, str) and key not in held for key in mine), unused=len(unused),
  )
  both = min(len(unused), len(spare))
  kept_V[unused[:both]] = spare[:both]
  return Rows(
      kept_V, np.array(lacking, int), np.cumsum([0, *map(len, parts)])[:-1],
      np.array(list(itertools.chain(*parts)), int), np.array([id for id, key in enumerate(theirs) if key]),
      counts,
  )


def embedding(rows, old_VD):
  """The new table, in the old one's dtype; nothing of its size is held beside the two."""
  new_VD = np.empty((len(rows.kept_V), old_VD.shape[1]), old_VD.dtype)
  np.take(old_VD, np.maximum(rows.kept_V, 0), axis=0, out=new_VD, mode="clip")  # "raise" holds a copy
  new_VD[rows.kept_V < 0] = _mean_of_all(old_VD, rows.used)
  ends = [*rows.starts[AT_ONCE::AT_ONCE], len(rows.parts)]
  for first, end in zip(range(0, len(rows.averaged), AT_ONCE), ends):
    ids, starts = rows.averaged[first : first + AT_ONCE], rows.starts[first : first + AT_ONCE]
    sums = np.add.reduceat(old_VD[rows.parts[starts[0] : end]].astype(np.float32), starts - starts[0])
    new_VD[ids] = sums / np.diff(starts, append=end)[:, None].astype(np.float32)
  return new_VD


def said(counts):
  """One line for people."""
  return (f"the embedding has the rows of another tokenizer: {counts['kept']:,} kept, {counts['averaged']:,} begin "
          f"as means ({counts['byte_only']:,} of bytes alone), {counts['new_specials']} new specials, "
          f"{counts['unused']:,} without a piece")


def _mean_of_all(old_VD, used):
  total = sum(old_VD[used[first : first + AT_ONCE]].sum(axis=0, dtype=np.float64)
              for first in range(0, len(used), AT_ONCE))
  return (total / len(used)).astype(old_VD.dtype)


def _keys(tokenizer):
  """Of each id: a special's name; a piece's bytes, and whether they are read as it; None without a piece.

  A vocabulary with byte fall-back has a byte of ASCII twice, and text is read as one of the two.
  """
  read = {ids[0] for ids in tokenizer.encode_many(map(chr, range(128))) if len(ids) == 1}
  keys = [(piece, len(piece) > 1 or piece >= b"\x80" or id in read) if piece else None
          for id, piece in enumerate(tokenizer.pieces)]
  for name, id in tokenizer.specials.items():
    keys[id] = name
  return keys


def _held(keys):
  """{key: id}, the first of equal ones; a byte that is there once has both its keys."""
  held = {}
  for id, key in enumerate(keys):
    if key:
      held.setdefault(key, id)
  for key, id in list(held.items()):
    if isinstance(key, tuple):
      held.setdefault((key[0], not key[1]), id)
  return held


def _unused(keys, V):
  return [id for id in range(V) if id >= len(keys) or keys[id] is None]


def _parts(old, pieces, held):
  """The old ids that each piece is read as; of its bytes, if the old tokenizer reads it as other bytes."""
  texts = [_text(piece) for piece in pieces]
  coded = iter(old.encode_many(text for text in texts if text is not None))
  found = [next(coded) if text is not None else [] for text in texts]
  return [ids if b"".join(old.pieces[id] for id in ids) == piece else
          [held[bytes([byte]), True] for byte in piece] for ids, piece in zip(found, pieces)]


def _text(piece):
  try:
    return piece.decode("utf-8")
  except UnicodeDecodeError:
    return None
