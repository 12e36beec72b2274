"""Trials as processes, some at once, and a ledger that is only appended to: what a kill leaves is enough.

A lane runs one trial at a time. Its runs are plain `train` commands, which resume by their workdir: a
sweep that was killed goes on where its ledger ends, and a run that was left behind alone is waited
for, never run twice. config.prefix puts a command before the trial's (taskset, srun, ssh to slice
{lane}); config.detached is for queues that take a command and return.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

from tiny_aya_jax import run
from tiny_aya_jax.train import saved

POLL_SECONDS = 5  # for a run that somebody else holds, and for a queue
PAUSE_SECONDS = 10  # before a crashed run is tried again; doubled each time
DETACHED_SECONDS = 7 * 86_400  # ours: longer than any queue; then it counts as lost


class Stopped(Exception):
  """The sweep was asked to end: what ran has saved."""


class Ledger:
  """ledger.jsonl of a sweep: append(event=..., ...) is on the disk when it returns."""

  def __init__(self, path):
    self.path, self._lock = pathlib.Path(path), threading.Lock()
    self.rows = run.read_lines(self.path)
    torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
    if torn and self.path.stat().st_size:
      self._write("\n")

  def append(self, **row):
    with self._lock:
      row = dict(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())) | row
      self._write(json.dumps(row, ensure_ascii=False) + "\n")
      self.rows.append(row)

  def _write(self, text):
    with open(self.path, "ab", buffering=0) as file:
      file.write(text.encode())
      os.fsync(file.fileno())

  def outcomes(self):
    """{key of a trial: its last outcome}"""
    with self._lock:
      return {row["key"]: row for row in self.rows if row["event"] == "outcome"}

  def ended(self, stage):
    """Whether a run of this key came to its end."""
    with self._lock:
      return any(row["event"] == "ended" and row["key"] == stage.key and row["code"] == 0 for row in self.rows)

  def seconds(self, stage):
    """Wall seconds of all attempts of a run, the ones that were killed not among them."""
    with self._lock:
      return sum(row["seconds"] for row in self.rows if row["event"] == "ended" and row["key"] == stage.key)

  def under_way(self, stage):
    """Whether a run of this key began and nobody knows how it ended."""
    with self._lock:
      mine = [row["event"] for row in self.rows if row.get("key") == stage.key]
    return mine[-1:] == ["began"]


class Runner:
  """run(take, told): lanes call take() -> a Planned or None until there is none, told(planned, outcome) after each."""

  def __init__(self, config, workdir, ledger):
    self.config, self.workdir, self.ledger = config, workdir, ledger
    self.stopping = threading.Event()
    self._children, self._trunks, self._errors = set(), {}, []
    self._guard = threading.Lock()

  def run(self, take, told):
    """Raises Stopped after SIGTERM or SIGINT, and whatever a lane raised."""
    lanes = [threading.Thread(target=self._lane, args=(number, take, told), daemon=True)
             for number in range(self.config.at_once)]
    with self._signals():
      for lane in lanes:
        lane.start()
      while any(lane.is_alive() for lane in lanes):
        for lane in lanes:
          lane.join(0.2)
    if self._errors:
      raise self._errors[0]
    if self.stopping.is_set():
      raise Stopped

  @contextlib.contextmanager
  def _signals(self):
    """SIGTERM and SIGINT go to what runs, which saves, and no further trial is begun."""
    def stop(*_):
      self.stopping.set()
      for child in list(self._children):
        with contextlib.suppress(OSError):
          child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _lane(self, number, take, told):
    try:
      while not self.stopping.is_set() and (planned := take()):
        outcome = self._trial(number, planned)
        self.ledger.append(event="outcome", key=planned.key, trial=planned.trial.name, **outcome)
        told(planned, outcome)
    except Stopped:
      pass
    except BaseException as error:  # the other lanes end their trials; the sweep ends with it
      self._errors.append(error)
      self.stopping.set()

  def _trial(self, number, planned):
    """Runs what is left of a trial -> dict(state, why, and of one that is done what was measured)."""
    for stage in planned.stages:
      with self._guard:
        lock = self._trunks.setdefault(stage.key, threading.Lock())
      with lock:  # trials that share a trunk wait for the one that trains it
        state, why = self._stage(number, planned, stage) if self._needed(planned, stage) else ("done", None)
      if state != "done":
        return dict(state=state, why=f"{stage.name}: {why}")
    found = measured(planned)
    if not found:
      return dict(state="failed", why=f"{planned.stages[-1].workdir} ended without an evaluation of its last step")
    return dict(state="done", why=None, seconds=sum(map(self.ledger.seconds, planned.stages))) | found

  def _needed(self, planned, stage):
    """Whether a run is still to be made: not if it, or one forked from it, came to its end."""
    later = planned.stages[planned.stages.index(stage) + 1:]
    if any(map(self.ledger.ended, later)):
      return False
    return not self.ledger.ended(stage) or bool(later) and not saved.steps(stage.workdir)

  def _stage(self, number, planned, stage):
    """Runs a stage until its exit code says that it should not run again -> (state, why)."""
    pause, crashes = PAUSE_SECONDS, 0
    while True:
      code = self._attempt(number, planned, stage)
      if code == run.EXIT["done"]:
        return "done", None
      if self.stopping.is_set():
        raise Stopped
      if code == run.EXIT["refused"]:
        return "refused", _last_line(stage)
      if code == run.EXIT["not_finite"]:
        return "diverged", "loss or gradients were not finite"
      if code != run.EXIT["preempted"]:
        crashes += 1
        if crashes > self.config.retries:
          return "failed", f"exit code {code} after {crashes} attempts: {_last_line(stage)}"
        self.stopping.wait(pause)
        pause *= 2

  def _attempt(self, number, planned, stage):
    stage.workdir.mkdir(parents=True, exist_ok=True)
    code_file = stage.workdir / "exit"
    self._wait_for_holder(stage)
    words, left = self._words(number, stage, code_file), self.config.detached and self.ledger.under_way(stage)
    if not left:
      code_file.unlink(missing_ok=True)
      self.ledger.append(event="began", key=stage.key, trial=planned.trial.name, stage=stage.name, lane=number,
                         command=words)
    began = time.monotonic()
    code = 0 if left else self._call(words, stage)
    if self.config.detached and code == 0:
      code = self._waited(code_file)
    self.ledger.append(event="ended", key=stage.key, trial=planned.trial.name, stage=stage.name, code=code,
                       seconds=round(time.monotonic() - began, 1))
    return code

  def _words(self, number, stage, code_file):
    command = [self.config.python or sys.executable, *stage.arguments]
    if self.config.detached:
      code = shlex.quote(str(code_file))
      command = ["sh", "-c", f"{shlex.join(command)}; code=$?; echo $code > {code}.tmp; mv {code}.tmp {code}; "
                             "exit $code"]
    found = {"{lane}": str(number), "{key}": stage.key[:12], "{command}": shlex.join(command)}
    prefix = list(self.config.prefix)
    for name, value in found.items():
      prefix = [word.replace(name, value) for word in prefix]
    return prefix if any("{command}" in word for word in self.config.prefix) else [*prefix, *command]

  def _call(self, words, stage):
    environment = os.environ | dict(JAX_COMPILATION_CACHE_DIR=os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(self.workdir.absolute() / "compilation_cache")))
    with open(stage.workdir / "log.txt", "ab") as log:
      child = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment,
                               start_new_session=True)  # Ctrl-C comes here first
    self._children.add(child)
    if self.stopping.is_set():  # it came before the child could be told
      child.send_signal(signal.SIGTERM)
    try:
      return child.wait()
    finally:
      self._children.discard(child)

  def _waited(self, code_file):
    """The exit code that a run in a queue wrote; 1 if none came in a week."""
    if not code_file.exists():
      run.say(f"waiting for {code_file}; if the job is gone, write an exit code there: 1 asks the queue again")
    began = time.monotonic()
    while not code_file.exists():
      if self.stopping.wait(POLL_SECONDS):
        raise Stopped
      if time.monotonic() - began > DETACHED_SECONDS:
        return 1
    return int(code_file.read_text().strip() or 1)

  def _wait_for_holder(self, stage):
    """Until no other process trains in the stage's workdir: one that outlived an earlier sweep."""
    said = False
    while _held(stage.workdir / "lock"):
      if not said:
        run.say(f"{stage.workdir} is still being trained, by a run of an earlier sweep: waiting for it")
        said = True
      if self.stopping.wait(POLL_SECONDS if said else 0):
        raise Stopped


def _held(path):
  if not path.exists():
    return False
  with open(path, "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
    except OSError:  # a file system without locks
      return False
  return False


def measured(planned):
  """{"bits_per_byte", "bytes"} per language at a trial's last step; None if it was not evaluated."""
  last = sum(stage.config.steps for stage in planned.stages)
  rows = [row for row in run.read_lines(planned.stages[-1].workdir / "metrics.jsonl")
          if "evaluation" in row and row["step"] == last]
  if not rows:
    return None
  return {name: {code: entry[name] for code, entry in rows[-1]["evaluation"].items()}
          for name in ("bits_per_byte", "bytes")}


def _last_line(stage):
  try:
    lines = (stage.workdir / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
  except OSError:
    lines = []
  refusals = [line for line in lines if line.startswith("refused: ")]
  return (refusals or lines or ["it wrote nothing"])[-1][:500]
