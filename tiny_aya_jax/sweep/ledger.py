"""ledger.jsonl of a sweep: appended to, never changed; what a kill leaves of it is enough to go on.

Rows have an event and the key of what it is about, a run (protocol.Stage) or a trial (Planned):

  asked     a suggestion of Optuna's, before it is planned; its key is that of the question
  began     a run, or another attempt at it; accepted: a queue took it; ended: with its exit code
  outcome   of a trial: done with what was measured, diverged, refused or failed
"""

import json
import os
import pathlib
import threading
import time

from tiny_aya_jax import run


class Ledger:
  """append(event=..., key=...) is on the disk when it returns; lanes share one."""

  def __init__(self, path):
    self.path, self._lock = pathlib.Path(path), threading.Lock()
    self.rows = run.read_lines(self.path)

  def append(self, **row):
    row = dict(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())) | row
    with self._lock:
      with open(self.path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"
        text = ("\n" * torn + json.dumps(row, ensure_ascii=False) + "\n").encode()
        while text:
          text = text[file.write(text):]
        os.fsync(file.fileno())
      self.rows.append(row)

  def outcomes(self):
    """{key of a trial: its outcome}: the last one, but done stays done."""
    found = {}
    with self._lock:
      for row in self.rows:
        if row["event"] == "outcome" and found.get(row["key"], {}).get("state") != "done":
          found[row["key"]] = row
    return found

  def settled(self, planned):
    """Whether a trial has its outcome; what was refused or failed is tried again by the next call."""
    return self.outcomes().get(planned.key, {}).get("state") in ("done", "diverged")

  def ended(self, stage):
    """Whether the last attempt at a run came to its end."""
    last = self._of(stage)[-1:]
    return bool(last) and last[0]["event"] == "ended" and last[0]["code"] == run.EXIT["done"]

  def attempts(self, stage):
    """How often a run was begun."""
    return sum(row["event"] == "began" for row in self._of(stage))

  def in_queue(self, stage):
    """Whether a queue has a run, and nobody knows yet how it ended."""
    return [row["event"] for row in self._of(stage)][-1:] == ["accepted"]

  def seconds(self, stage):
    """Wall seconds of the attempts at a run, those that were killed with the sweep not among them."""
    return sum(row["seconds"] for row in self._of(stage) if row["event"] == "ended")

  def _of(self, stage):
    with self._lock:
      return [row for row in self.rows if row["key"] == stage.key]
