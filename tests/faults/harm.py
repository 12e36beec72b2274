"""Harms a checkpoint in one way after another and restores it: python harm.py CHECKPOINT.

Reads JSON lines {"file", "how", "at"} and answers each with {"found"}: "same", everything as it was;
"refused", with the sentence; or "WRONG", something else was loaded. In a process of its own, since
what reads damaged files may take it down.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.train import checkpoint, saved


def main(path):
  path = pathlib.Path(path)
  checkpoint.RETRY_SECONDS = 0  # what is harmed stays so
  here = checkpoint._here()
  abstract = {
      name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                         checkpoint._described(path, name))
      for name in checkpoint.TREES
  }

  def load():
    items = checkpoint.restore(path, abstract)
    leaves = {name: [np.asarray(leaf) for leaf in jax.tree.leaves(items[name])]
              for name in checkpoint.TREES}
    return leaves, items["meta"], saved.data(path)

  expected = load()
  for line in sys.stdin:
    order = json.loads(line)
    file = path / order["file"]
    content = file.read_bytes()
    harm(file, content, order["how"], order["at"])
    try:
      found = load()
      same = found[1:] == expected[1:] and all(
          len(found[0][name]) == len(expected[0][name])
          and all(np.array_equal(x, y) and x.dtype == y.dtype
                  for x, y in zip(found[0][name], expected[0][name]))
          for name in checkpoint.TREES)
      answer = dict(found="same" if same else "WRONG")
    except run.Refused as refusal:
      answer = dict(found="refused", said=str(refusal), damaged=isinstance(refusal, saved.Damaged))
    file.write_bytes(content)
    print(json.dumps(answer), flush=True)


def harm(file, content, how, at):
  """how: flip (bit `at`), scramble (a bit in 97 bytes), cut (to `at` bytes), empty, delete."""
  if how == "flip":
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    file.write_bytes(changed)
  elif how == "scramble":
    file.write_bytes(bytes(byte ^ (index % 97 == 0) for index, byte in enumerate(content)))
  elif how == "delete":
    file.unlink()
  else:
    file.write_bytes(content[: at if how == "cut" else 0])


if __name__ == "__main__":
  main(sys.argv[1])
