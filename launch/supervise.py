"""Runs a command until its exit code says that it should not run again (tiny_aya_jax/run.py, EXIT).

  python launch/supervise.py -- python -m tiny_aya_jax train --config=... --workdir=...

  0 done · 65 bad config or data: never again · 75 saved: again at once · 76 hang: again, waiting longer
  each time · 77 loss not finite: again at most 3 times · anything else, 137 and -9 among them, is a
  crash: again at most 5 times an hour of running, waiting longer each time

One a host; standard library only, so that it runs before anything is installed. SIGTERM and SIGINT go
to the command, and end this program with the command's code. A resume needs the same command and
nothing else.
"""

import signal
import subprocess
import sys
import time

DONE, REFUSED, PREEMPTED, HANG, NOT_FINITE = 0, 65, 75, 76, 77
MOST = {HANG: 5, NOT_FINITE: 3}  # restarts; of all other codes together:
MOST_CRASHES = 5
HEALTHY_SECONDS = 3600  # a run that lived so long had left its earlier trouble behind
BRIEF_SECONDS = 60  # a run that "saved" sooner than this is not getting anywhere
FIRST_PAUSE, LONGEST_PAUSE = 10, 600  # seconds; doubled each time


class Policy:
  """pause(code, lived) -> seconds to wait before the next attempt, or None: do not run again."""

  def __init__(self):
    self.restarts = {}  # code, or "crash" -> how often it was restarted

  def pause(self, code, lived):
    """code: as subprocess gives it, -9 for SIGKILL; lived: seconds."""
    if code in (DONE, REFUSED):
      return None
    if lived >= HEALTHY_SECONDS:
      self.restarts = {NOT_FINITE: self.restarts.get(NOT_FINITE, 0)}  # these never heal by time
    if code == PREEMPTED and lived >= BRIEF_SECONDS:
      return 0
    kind = code if code in MOST else "crash"
    used = self.restarts[kind] = self.restarts.get(kind, 0) + 1
    if used > MOST.get(kind, MOST_CRASHES):
      return None
    return min(FIRST_PAUSE * 2 ** (used - 1), LONGEST_PAUSE)


def supervise(command, sleep=None, say=lambda words: print(words, file=sys.stderr, flush=True)):
  """Runs `command` (a list of words) under the policy; returns the last exit code, 128 + n for a signal.

  sleep: waits so many seconds, at most until a signal comes; None: really.
  """
  policy, stopped, child = Policy(), [], []

  def stop(number, _):
    stopped.append(number)
    for process in child:
      process.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
  while True:
    began = time.monotonic()
    child[:] = [subprocess.Popen(command)]
    if stopped:  # it came before the child could be told
      child[0].send_signal(stopped[-1])
    code = child[0].wait()
    child.clear()
    pause = None if stopped else policy.pause(code, time.monotonic() - began)
    if pause is None:
      say(f"supervise: exit {code}: {'asked to stop' if stopped else 'not run again'}")
      return code if code >= 0 else 128 - code
    say(f"supervise: exit {code}: again in {pause} s")
    (sleep or _sleep)(pause, stopped)
    if stopped:
      return PREEMPTED


def _sleep(seconds, stopped):
  until = time.monotonic() + seconds
  while not stopped and time.monotonic() < until:
    time.sleep(min(0.5, max(until - time.monotonic(), 0)))


def main(argv):
  """['--', 'COMMAND', ...] -> exit code."""
  if argv[:1] != ["--"] or len(argv) < 2:
    print("usage: python launch/supervise.py -- COMMAND ...", file=sys.stderr)
    return REFUSED
  return supervise(argv[1:])


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
