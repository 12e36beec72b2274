"""Small training runs as processes of their own, what they left behind, and how to hurt them."""

import os
import pathlib
import subprocess
import sys
import time

from conftest import ROOT, arguments

from tiny_aya_jax import run as shared
from tiny_aya_jax.train import ledger, saved

HERE = pathlib.Path(__file__).parent
FULL = bool(os.environ.get("FAULTS"))  # check.sh full: as often as the figures ask for


def environment(devices=1):
  """This process's, with so many simulated devices a process."""
  flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  return os.environ | dict(
      XLA_FLAGS=" ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]))


def start(data, workdir, *more, faults=(), devices=1, command=None, out=None):
  """A run in another process; its output goes to WORKDIR.log, added to what is there."""
  out = out or open(f"{workdir}.log", "a", encoding="utf-8")
  return subprocess.Popen(words(data, workdir, *more, faults=faults, command=command), cwd=ROOT,
                          stdout=out, stderr=subprocess.STDOUT, env=environment(devices))


def words(data, workdir, *more, faults=(), command=None):
  """The command line of a run."""
  injected = [sys.executable, str(HERE / "inject.py"), *faults, "--"]
  return [*(command or injected), *arguments(data, workdir, *more)]


def run(data, workdir, *more, timeout=240, **options):
  """The exit code of a run, and all that runs of this workdir have said."""
  process = start(data, workdir, *more, out=subprocess.PIPE, **options)  # a full disk takes no log
  output, _ = process.communicate(timeout=timeout)
  with open(f"{workdir}.log", "ab") as log:
    log.write(output)
  return process.returncode, said(workdir)


def said(workdir):
  return pathlib.Path(f"{workdir}.log").read_text(encoding="utf-8", errors="replace")


def end(workdir):
  """All that two runs which are one must share, bit for bit: arrays, guard, plan and position."""
  meta, data = saved.meta(saved.find(workdir)), saved.data(saved.find(workdir))
  return meta["step"], meta["fingerprints"], meta["guard"], data["plan_sha256"], data["step"]


def losses(workdir):
  """{step: loss}; each step must be there once."""
  rows = [row for row in lines(workdir) if "languages" in row]
  steps = [row["step"] for row in rows]
  assert len(steps) == len(set(steps)), steps
  return {row["step"]: row["loss"] for row in rows}


def lines(workdir, name="metrics"):
  return shared.read_lines(workdir / f"{name}.jsonl")


def until(what, process=None, seconds=120):
  """Waits until what() is true; fails when the process ends first."""
  deadline = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < deadline
    assert process is None or process.poll() is None or what(), process.poll()
    time.sleep(0.02)


def saved_beyond(workdir, step):
  """() -> whether a checkpoint of a later step is there."""
  return lambda: any(at > step for at in saved.steps(workdir))


def starts(workdir):
  """The steps at which the starts of a workdir went on."""
  return [row["step"] for row in lines(workdir, "ledger") if "start" in row]


def goodput(workdir):
  return ledger.summary(workdir)
