"""Ends a process that hangs, so that whatever restarts it can: exit code 76, stacks of all threads.

A kind of work has ten times its median so far, and at least the floor; one that compiles has no limit
the first time (the step is compiled before it is watched). A device that hangs is seen as the host
waits for a step's report. A thread that keeps Python's lock is not seen.
"""

import contextlib
import faulthandler
import os
import pathlib
import statistics
import sys
import threading
import time

import jax

from tiny_aya_jax import run

TIMES = 10  # the median
KEPT = 100  # durations of a kind
REPORT_SECONDS = 10  # at most, before the end


class Watchdog:
  """`with dog.watch("step"): ...`; a thread looks at what is being watched."""

  def __init__(self, workdir, floor_seconds):
    self.stacks = pathlib.Path(workdir) / f"stacks-{jax.process_index()}.txt"
    self.floor, self.took, self.watched, self.ended = floor_seconds, {}, {}, threading.Event()
    threading.Thread(target=self._look, daemon=True, name="watchdog").start()

  @contextlib.contextmanager
  def watch(self, kind, compiles=False):
    """Within: what is of this kind may take as long as it usually does, generously."""
    took = self.took.setdefault(kind, [])
    limit = None if compiles and not took else max(self.floor, TIMES * statistics.median(took or [0]))
    began = time.monotonic()
    end = self.start(kind, limit)
    try:
      yield
    finally:
      end()
    took.append(time.monotonic() - began)
    del took[:-KEPT]

  def start(self, what, seconds):
    """Watches from now on, `seconds` at most, None for ever; returns the function that ends it."""
    key = object()
    if seconds is not None:
      self.watched[key] = (what, seconds, time.monotonic() + seconds)
    return lambda: self.watched.pop(key, None)

  def close(self):
    """Watches no longer."""
    self.ended.set()

  def _look(self):
    while not self.ended.wait(min(1.0, self.floor / 10)):
      for what, seconds, until in list(self.watched.values()):
        if time.monotonic() > until:
          self._bark(what, seconds)

  def _bark(self, what, seconds):
    said = (f"hang: {what} has lasted longer than {seconds:.0f} s; the stacks of process "
            f"{jax.process_index()} are in {self.stacks}")
    try:
      for report in (self._dump, lambda said: print(said, file=sys.stderr, flush=True)):
        # In threads of their own: the disk, or whoever reads stderr, may be what hangs.
        thread = threading.Thread(target=report, args=(said,), daemon=True)
        thread.start()
        thread.join(REPORT_SECONDS)
    finally:  # there may be no thread to be had
      os._exit(run.EXIT["hang"])

  def _dump(self, said):
    with open(self.stacks, "w", encoding="utf-8") as file:
      print(said, file=file, flush=True)
      faulthandler.dump_traceback(file, all_threads=True)
