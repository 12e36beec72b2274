"""A batch as a person reads it: document borders, prompts, and what is trained on.

Not a log and not a metric; for `config.show` of train and for looking at packed rows. Text that
carries no weight as a target is dim on a terminal and stands in ⟦brackets⟧ elsewhere.
"""

import itertools
import sys

import numpy as np

HEAD, TAIL = 200, 100  # tokens of a longer segment that are shown: rows have thousands
DIM, PLAIN = "\033[2m", "\033[0m"


def rows(batch, tokenizer, names, count, first=0):
  """The batch's first `count` rows as text, numbered from `first`. names: of source_B's indices.

  Batch keys and shapes as in Loader. The row's last token is known as a target only; it is shown
  with its segment when it has weight.
  """
  return "\n".join(
      _row({key: value[b] for key, value in batch.items()}, first + b, tokenizer, names)
      for b in range(min(count, len(batch["token_BT"])))
  )


def _row(row, index, tokenizer, names):
  token_T, segment_T, weight_T = _whole(row)
  segments = [s for s in np.unique(segment_T) if s]
  source = int(row["source_B"])
  lines = [
      f"row {index}: {names[source] if source >= 0 else 'padding'}, {len(segments)} segments, "
      f"{int((segment_T > 0).sum())} tokens, {int((weight_T > 0).sum())} trained on"
  ]
  for segment in segments:
    here = np.flatnonzero(segment_T == segment)
    lines.append(f"┌ segment {segment}, {len(here)} tokens")
    lines += ["│ " + line for line in _segment(token_T[here], weight_T[here], tokenizer)]
    lines.append("└")
  return "\n".join(lines)


def _whole(row):
  """Tokens and targets of T positions -> the row's T+1 tokens, their segments and weights."""
  last = row["segment_BT"][-1] if row["weight_BT"][-1] > 0 else 0
  token_T = np.append(row["token_BT"], row["target_BT"][-1])
  segment_T = np.append(row["segment_BT"], last)
  weight_T = np.append(np.float32(0), row["weight_BT"])  # the first token is nothing's target
  return token_T, segment_T, weight_T


def _segment(token_n, weight_n, tokenizer):
  """The lines of one segment, its middle left out when it is long."""
  parts = [(0, len(token_n))]
  if len(token_n) > HEAD + TAIL:
    parts = [(0, HEAD), (len(token_n) - TAIL, len(token_n))]
  shown = [_marked(token_n[start:end], weight_n[start:end], tokenizer) for start, end in parts]
  left_out = len(token_n) - HEAD - TAIL
  return f"\n… {left_out} tokens …\n".join(shown).split("\n")


def _marked(token_n, weight_n, tokenizer):
  """Text of tokens, each run without weight marked, line by line so that borders stay outside."""
  before, after = (DIM, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
  text = ""
  for trained, run_n in itertools.groupby(range(len(token_n)), lambda n: weight_n[n] > 0):
    piece = _text([int(token_n[n]) for n in run_n], tokenizer)
    if not trained:
      piece = "\n".join(before + line + after if line else line for line in piece.split("\n"))
    text += piece
  return text


def _text(ids, tokenizer):
  """Ordinary tokens decoded together (a letter may be several), special ones as their name."""
  text = ""
  for special, run_ids in itertools.groupby(ids, lambda i: tokenizer.bytes_V[i] == 0):
    run_ids = list(run_ids)
    text += "".join(map(tokenizer.piece, run_ids)) if special else tokenizer.decode(run_ids)
  return text
