"""What the seconds of a run went to, over all its starts: WORKDIR/ledger.jsonl, one JSON object a line.

A start writes {"start": when its process began, "step": where it goes on} first, then, whenever
metrics are logged, the seconds by kind since the last line, and the newest step that was saved.
Lines are only ever added, so steps that a crash lost stay in it: they are those beyond the step at
which a later start went on. Goodput is the share of the time from the first start to the last line
that was spent in steps which counted.
"""

import collections
import contextlib
import pathlib
import time

import jax

from tiny_aya_jax import run
from tiny_aya_jax.train import metrics

KINDS = ("init", "compile", "restore", "data", "step", "save", "evaluate", "export")
REDONE = ("data", "step", "save", "evaluate", "export")  # what a start does that the next may do again


class Ledger:
  """One start of a run. `with ledger.spent("data"): ...`, then `write(step)`; process 0 writes."""

  def __init__(self, workdir):
    self.seconds = collections.Counter()
    first = jax.process_index() == 0
    self.lines = metrics.Lines(pathlib.Path(workdir) / "ledger.jsonl") if first else None

  @contextlib.contextmanager
  def spent(self, kind):
    """Adds the seconds within to `kind`."""
    began = time.monotonic()
    try:
      yield
    finally:
      self.seconds[kind] += time.monotonic() - began

  def begin(self, step):
    """The first line; what no kind has of the seconds since the process began is `init`."""
    self.seconds["init"] += time.time() - run.BEGAN - sum(self.seconds.values())
    self._append(dict(start=run.BEGAN, step=step))

  def write(self, step, saved):
    """The seconds since the last line, up to `step`; saved: the newest step that was, or None."""
    self._append(dict(step=step, saved=saved))

  def _append(self, row):
    row |= dict(time=time.time(), seconds={kind: round(s, 4) for kind, s in self.seconds.items()})
    self.seconds.clear()
    if self.lines:
      self.lines.write(row)


def summary(workdir):
  """{kind: seconds, "lost", "down", "total", "goodput", "starts"} of a workdir's ledger.

  lost: steps that were done again. down: from a start's last line to the next start, so with what
  it had done and not yet written.
  """
  starts = []
  for row in run.read_lines(pathlib.Path(workdir) / "ledger.jsonl"):
    if "start" in row:
      starts.append([])
    if starts:
      starts[-1].append(row)
  spent = collections.Counter(dict.fromkeys((*KINDS, "lost", "down"), 0.0))
  for number, rows in enumerate(starts):
    later = starts[number + 1 :]
    kept = min((other[0]["step"] for other in later), default=None)
    for row in rows:
      again = kept is not None and row["step"] > kept
      for kind, seconds in row["seconds"].items():
        spent["lost" if again and kind in REDONE else kind] += seconds
    if later:
      spent["down"] += max(later[0][0]["start"] - rows[-1]["time"], 0)
  total = sum(spent.values())
  return dict(spent) | dict(total=total, goodput=spent["step"] / total if total else 0.0,
                            starts=len(starts))


def said(workdir):
  """The summary in a line."""
  found = summary(workdir)
  parts = ", ".join(f"{kind} {found[kind]:.1f}" for kind in (*KINDS, "lost", "down") if found[kind] > 0.05)
  return (f"goodput {found['goodput']:.0%} of {found['total']:.1f} s in {found['starts']} starts "
          f"(seconds: {parts})")
