"""Trials as processes, some at once; the ledger says what is left to do.

A lane runs one trial at a time. Its runs are plain `train` commands, which resume by their workdir: a
sweep that was killed goes on where its ledger ends, and a run that was left behind alone is waited
for, never run twice. config.prefix puts a command before the trial's (taskset, srun) or around it (ssh
to slice {lane}); config.detached is for queues that take a command and return, and write on a shared
file system.
"""

import contextlib
import fcntl
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

from tiny_aya_jax import run
from tiny_aya_jax.sweep import protocol
from tiny_aya_jax.train import saved

POLL_SECONDS = 5  # for a run that somebody else holds, and for a queue
PAUSE_SECONDS = 10  # before a crashed run is tried again; doubled each time
STOP_SECONDS = 1800  # to save, as config.guard.save_seconds of train
DETACHED_SECONDS = 7 * 86_400  # ours: longer than any queue; then a run counts as lost
NOT_STARTED = 127  # as a shell says that there is no such command


class Stopped(Exception):
  """The sweep was asked to end: what ran has saved."""


class Runner:
  """run(take, told): lanes call take() for a Planned until it is None, and told(planned, outcome)."""

  def __init__(self, config, workdir, ledger):
    self.config, self.workdir, self.ledger = config, workdir, ledger
    self.stopping = threading.Event()
    self._children, self._locks, self._bad, self._errors = set(), {}, {}, []
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
        _terminate(child)

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
        lock = self._locks.setdefault(stage.key, threading.Lock())
      with lock:  # trials that share a trunk wait for the one that trains it, and share its fate
        if stage.key not in self._bad and self._needed(planned, stage):
          state, why = self._stage(number, planned, stage)
          if state != "done":
            self._bad[stage.key] = dict(state=state, why=f"{stage.name}: {why}")
      if stage.key in self._bad:
        return self._bad[stage.key]
    return measured(planned) | dict(seconds=sum(map(self.ledger.seconds, planned.stages)))

  def _needed(self, planned, stage):
    """Whether a run is still to be made: not if its trial was measured, nor a trunk that is there."""
    last = planned.stages[-1]
    if self.ledger.ended(last) and measured(planned)["state"] != "failed":
      return False
    if stage is last:
      return True
    return not self.ledger.ended(stage) or saved.steps(stage.workdir)[-1:] != [stage.config.steps]

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
        why = _last_line(stage)
        if "another run holds" not in why:
          return "refused", why
        self.stopping.wait(POLL_SECONDS)  # one that no lock of ours could show
      elif code == run.EXIT["not_finite"]:
        return "diverged", "loss or gradients were not finite"
      elif code != run.EXIT["preempted"]:
        crashes += 1
        if crashes > self.config.retries:
          return "failed", f"exit code {code} after {crashes} attempts: {_last_line(stage)}"
        self.stopping.wait(pause)
        pause *= 2

  def _attempt(self, number, planned, stage):
    """Begins a run, or takes up one that a queue has; -> its exit code."""
    if self.stopping.is_set():
      raise Stopped
    protocol.refuse_changed(stage)
    stage.workdir.mkdir(parents=True, exist_ok=True)
    began, names = time.monotonic(), dict(key=stage.key, trial=planned.trial.name, stage=stage.name)
    if self.config.detached and self.ledger.in_queue(stage):
      code = self._waited(_code_file(stage, self.ledger.attempts(stage)))
    else:
      with self._held(stage) as lock:
        code_file = _code_file(stage, self.ledger.attempts(stage) + 1)
        words = self._words(number, stage, code_file)
        self.ledger.append(event="began", lane=number, command=words, **names)
        code = self._call(words, stage, lock)
      if self.config.detached and code == 0:
        self.ledger.append(event="accepted", **names)
        code = self._waited(code_file)
    self.ledger.append(event="ended", code=code, seconds=round(time.monotonic() - began, 1), **names)
    return code

  def _words(self, number, stage, code_file):
    command = [self.config.python or sys.executable, *stage.arguments]
    if self.config.detached:  # each host of a slice writes it; all end alike
      code = shlex.quote(str(code_file))
      command = ["sh", "-c", f"{shlex.join(command)}; code=$?; echo $code > {code}.$$; mv {code}.$$ {code}; "
                             "exit $code"]
    found = {"{lane}": str(number), "{key}": stage.key[:12], "{command}": shlex.join(command)}
    prefix = list(self.config.prefix)
    for name, value in found.items():
      prefix = [word.replace(name, value) for word in prefix]
    return prefix if any("{command}" in word for word in self.config.prefix) else [*prefix, *command]

  def _call(self, words, stage, lock):
    """Runs words to their end; what they start holds the stage's lock, whatever becomes of this process."""
    environment = os.environ | dict(JAX_COMPILATION_CACHE_DIR=os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(self.workdir.absolute() / "compilation_cache")))
    with open(stage.workdir / "log.txt", "ab") as log:
      try:
        child = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=(lock,),
                                 start_new_session=True)  # Ctrl-C comes here first
      except OSError as error:
        log.write(f"{words[0]} was not started: {error.strerror}\n".encode())
        return NOT_STARTED
    self._children.add(child)
    if self.stopping.is_set():  # it came before the child could be told
      _terminate(child)
    try:
      return child.wait()
    finally:
      self._children.discard(child)

  @contextlib.contextmanager
  def _held(self, stage):
    """A descriptor whose lock is free: nothing that an earlier sweep, or this one, began is left."""
    path, said = stage.workdir / "held", False
    while _locked(path) or _locked(stage.workdir / "lock"):  # ours, and train's own on another machine
      if not said:
        run.say(f"{stage.workdir} is still being trained, by a run of an earlier sweep: waiting for it")
        said = True
      if self.stopping.wait(POLL_SECONDS):
        raise Stopped
    with open(path, "a") as file:
      with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      yield file.fileno()
    began = time.monotonic()
    while _locked(path) and time.monotonic() - began < STOP_SECONDS:  # what a shell left behind, saving
      time.sleep(0.2)

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


def _code_file(stage, attempt):
  return stage.workdir / f"exit.{attempt}"


def _terminate(child):
  """SIGTERM to a child and to all that it started in its session."""
  with contextlib.suppress(OSError):
    os.killpg(child.pid, signal.SIGTERM)


def _locked(path):
  """Whether another process holds the lock of a file."""
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
  """The outcome of a trial that was run: dict(state, why, bits_per_byte, bytes), by its last step."""
  last = sum(stage.config.steps for stage in planned.stages)
  rows = [row["evaluation"] for row in run.read_lines(planned.stages[-1].workdir / "metrics.jsonl")
          if "evaluation" in row and row["step"] == last]
  if not rows:
    return dict(state="failed", why=f"{planned.stages[-1].workdir} ended without an evaluation of its last step")
  bits, sizes = ({code: entry[name] for code, entry in rows[-1].items()} for name in ("bits_per_byte", "bytes"))
  if odd := [code for code, value in bits.items() if value is None or not math.isfinite(value)]:
    return dict(state="diverged", why=f"held-out bits per byte of {', '.join(odd[:5])} are not finite")
  return dict(state="done", why=None, bits_per_byte=bits, bytes=sizes)


def _last_line(stage):
  try:
    lines = (stage.workdir / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
  except OSError:
    lines = []
  refusals = [line for line in lines[-50:] if line.startswith("refused: ")]
  return (refusals or lines or ["it wrote nothing"])[-1][:500]
