"""metrics.jsonl, and TensorBoard when tensorboardX is installed: one JSON object a line.

Readers meet each step once: on resume, lines after the restored step are dropped, and a line torn by
a crash with them; a run that begins drops them all. Process 0 writes. NaN and infinity are written as null.
A disk that is full costs no step: lines wait for room.
"""

import json
import math
import os
import pathlib

import jax
import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.train import guard


class Lines:
  """write(row) appends a line of JSON to a file at once, or keeps it until it can."""

  def __init__(self, path):
    self.path = pathlib.Path(path)
    torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
    self.file = open(self.path, "ab", buffering=0)
    self.waiting = b"\n" if torn and self.path.stat().st_size else b""
    self.failed = False

  def write(self, row):
    self.waiting += (json.dumps(_finite(row), ensure_ascii=False) + "\n").encode()
    try:
      while self.waiting:
        self.waiting = self.waiting[self.file.write(self.waiting):]
      self.failed = False
    except OSError as error:
      if not self.failed:
        run.say(f"{self.path} cannot be written to ({error.strerror}): its lines wait")
      self.failed = True

  def close(self):
    """Flushes to disk what it can."""
    try:
      self.waiting = self.waiting[self.file.write(self.waiting):]
      os.fsync(self.file.fileno())
      self.file.close()
    except OSError:
      pass
    if self.waiting:
      run.say(f"{self.path} lacks its last {self.waiting.count(10)} lines: there was no room for them")


class Writer:
  """write({"step": 3, "loss": 2.5, "languages": {...}}): appended at once."""

  def __init__(self, workdir, first_step, resumed):
    self.board = self.lines = None
    if jax.process_index():
      return
    path = pathlib.Path(workdir) / "metrics.jsonl"
    kept = [row for row in run.read_lines(path) if row["step"] <= first_step] if resumed else []
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)
    self.lines, self.skips = Lines(path), Lines(path.with_name("skipped.jsonl"))
    try:
      import tensorboardX

      # Its thread ends when it cannot write; a queue with an end would then stop this one.
      self.board = tensorboardX.SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"),
                                              max_queue=1 << 30,
                                              purge_step=first_step + 1 if kept else first_step)
    except ImportError:
      pass
    run.say(f"metrics: {path}, TensorBoard", "on" if self.board else "off (no tensorboardX)")

  def write(self, row):
    """Appends one row; every number in it, nested or not, goes to TensorBoard too."""
    if self.lines is None:
      return
    self.lines.write(row)
    if self.board and self._board_works():
      for name, value in _scalars(row):
        self.board.add_scalar(name, value, row["step"])

  def skip(self, row):
    """Appends to skipped.jsonl, which keeps what a later start trains again."""
    if self.lines is not None:
      self.skips.write(row)

  def _board_works(self):
    events = self.board.file_writer.event_writer
    if events._worker.is_alive():
      return True
    events._event_queue.cancel_join_thread()  # else the process would wait for it at its end
    self.board = None
    run.say("TensorBoard cannot be written to: off until the next start")
    return False

  def close(self):
    """Flushes to disk."""
    if self.lines is not None:
      self.lines.close()
      self.skips.close()
    if self.board and self._board_works():
      self.board.close()


def evaluated(workdir, step):
  """Whether the metrics of a workdir hold an evaluation at `step`."""
  rows = run.read_lines(pathlib.Path(workdir) / "metrics.jsonl")
  return any("evaluation" in row and row["step"] == step for row in rows)


def first_evaluation(workdir):
  """{language: bits per byte} of the first evaluation in a workdir's metrics; None if there is none."""
  for row in run.read_lines(pathlib.Path(workdir) / "metrics.jsonl"):
    if all("bits_per_byte" in entry for entry in row.get("evaluation", {"": {}}).values()):
      return {code: entry["bits_per_byte"] for code, entry in row["evaluation"].items()}
  return None


def window(sources, *reports):
  """Reports of consecutive steps (step.train_step) -> (what a line says of them, skipped).

  One mean, over tokens or pairs; a step that was not finite is in none. skipped: (index, why, loss, grad_norm)
  of each step whose update was not applied.
  """
  found = jax.tree.map(lambda *values: np.stack(values), *reports)
  skipped = [(index, guard.SAID[verdict], float(found["loss"][index]), float(found["grad_norm"][index]))
             for index, verdict in enumerate(found["verdict"].tolist()) if verdict]
  finite = found["verdict"] != guard.NOT_FINITE
  loss, grad_norm, count = (
      found[name][finite].astype(np.float64) for name in ("loss", "grad_norm", "count"))
  counted = "pairs" if "pairs_S" in found else "tokens"
  sums = {name.removesuffix("_S"): value[finite].astype(np.float64).sum(0)
          for name, value in found.items() if name.endswith("_S")}
  mean = loss @ count / max(count.sum(), 1) if len(loss) else math.nan
  return dict(
      loss=float(mean), grad_norm=float(grad_norm.mean()) if len(loss) else math.nan,
      **{counted: float(count.sum()), "skipped": len(skipped)},
      **({name: float(sums[name].sum() / max(sums["pairs"].sum(), 1)) for name in OF_PAIRS}
         if counted == "pairs" else {}),
      languages=by_language([name.split("/")[0] for name in sources], sums, counted),
  ), skipped


OF_PAIRS = ("margin", "accuracy", "chosen", "rejected")


def by_language(languages, sums, counted):
  """The language of each source, {name: sums per source} -> {language: {name: mean over `counted`}}."""
  order = {language: row for row, language in enumerate(dict.fromkeys(languages))}
  row_S, found = [order[language] for language in languages], {}
  totals = {name: np.bincount(row_S, value, len(order)) for name, value in sums.items()}
  for language, row in order.items():
    count = float(totals[counted][row])
    if count:
      means = {name: float(total[row]) / count for name, total in totals.items() if name != counted}
      found[language] = means | {counted: count}
  return found


def extremes(languages):
  """The best and the worst language, in words."""
  order = sorted(languages, key=lambda language: languages[language]["loss"])
  shown = [order[0], order[-1]] if len(order) > 1 else order
  return "  ".join(f"{language} {languages[language]['loss']:.2f}" for language in shown)


def _finite(value):
  if isinstance(value, dict):
    return {key: _finite(part) for key, part in value.items()}
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(row, prefix=""):
  for key, value in row.items():
    if isinstance(value, dict):
      yield from _scalars(value, f"{prefix}{key}/")
    elif isinstance(value, (int, float)) and key != "step":
      yield f"{prefix}{key}", value
