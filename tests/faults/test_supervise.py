"""Exit codes are a contract: what runs again, how often, after how long; and what a run cost."""

import os
import signal
import subprocess
import sys
import time

import pytest

import runs
from tiny_aya_jax import run
from tiny_aya_jax.train import saved

sys.path.insert(0, str(runs.ROOT / "launch"))
import supervise  # noqa: E402


def test_the_supervisor_and_the_runs_mean_the_same_codes():
  ours = (supervise.DONE, supervise.REFUSED, supervise.PREEMPTED, supervise.HANG, supervise.NOT_FINITE)
  assert ours == tuple(run.EXIT.values())


@pytest.mark.parametrize("codes, pauses, last", [
    ([0], [], 0),
    ([65], [], 65),
    ([75, 75, 0], [10, 20], 0),  # brief ones: going in circles is bounded
    ([76] * 9, [10, 20, 40, 80, 160], 76),
    ([77] * 9, [10, 20, 40], 77),
    ([-9] * 9, [10, 20, 40, 80, 160], 137),
    ([1, 137, -6, 3, 1, 1, 1], [10, 20, 40, 80, 160], 1),
    ([76, 77, 1, 76, 0], [10, 10, 10, 20], 0),
], ids=str)
def test_what_is_run_again_and_when(tmp_path, codes, pauses, last):
  script = tmp_path / "command.py"
  script.write_text(f"""
import os, pathlib, sys
count = pathlib.Path({str(tmp_path / "count")!r})
done = int(count.read_text()) if count.exists() else 0
count.write_text(str(done + 1))
code = {codes}[done]
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
""")
  waited = []
  found = supervise.supervise([sys.executable, str(script)], sleep=lambda seconds, _: waited.append(seconds),
                              say=lambda words: None)
  assert (waited, found) == (pauses, last)


def test_a_run_that_lived_for_long_has_its_restarts_back_but_not_those_of_77():
  policy = supervise.Policy()
  assert [policy.pause(1, 5) for _ in range(6)] == [10, 20, 40, 80, 160, None]
  assert policy.pause(1, supervise.HEALTHY_SECONDS) == 10
  assert [policy.pause(77, supervise.HEALTHY_SECONDS) for _ in range(4)] == [10, 20, 40, None]
  assert policy.pause(75, supervise.BRIEF_SECONDS) == 0


def supervised(data, workdir, *more):
  """A run under launch/supervise.py, whose first pause is a second."""
  quick = (f"import sys; sys.path.insert(0, {str(runs.ROOT / 'launch')!r}); import supervise; "
           "supervise.FIRST_PAUSE = 1; sys.exit(supervise.main(sys.argv[1:]))")
  words = [sys.executable, "-c", quick, "--", sys.executable, str(runs.HERE / "inject.py"), "--"]
  return runs.start(data, workdir, *more, command=words)


def child(parent):
  found = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=False)
  return [int(line) for line in found.stdout.split()]


def test_sigterm_to_the_supervisor_saves_the_run_and_ends_both(data, tmp_path):
  process = supervised(data, tmp_path / "run", "--config.steps=1000000", "--config.save_every=1000000")
  runs.until(lambda: "step 2/" in runs.said(tmp_path / "run"), process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 75
  assert saved.steps(tmp_path / "run") and "asked to stop" in runs.said(tmp_path / "run")


def test_a_run_that_is_killed_thrice_is_done_and_its_ledger_says_what_that_cost(data, tmp_path):
  workdir, more = tmp_path / "run", ("--config.steps=300", "--config.save_every=10", "--config.log_every=10")
  process = supervised(data, workdir, *more)
  for _ in range(3):
    before = (saved.steps(workdir) or [0])[-1]
    runs.until(runs.saved_beyond(workdir, before + 20), process)
    os.kill(child(process)[0], signal.SIGKILL)
    time.sleep(0.5)
  assert process.wait(timeout=240) == 0
  assert runs.said(workdir).count("supervise: exit -9: again in") == 3
  found = runs.goodput(workdir)
  assert found["starts"] == 4 and found["down"] > 1 + 2 + 4  # the pauses
  total = sum(value for key, value in found.items() if key not in ("total", "goodput", "starts"))
  assert abs(total - found["total"]) < 1e-6 and 0 < found["goodput"] < 1
  print(f"\n{found}")
  assert runs.run(data, tmp_path / "whole", *more)[0] == 0
  assert runs.end(workdir) == runs.end(tmp_path / "whole")
  assert runs.losses(workdir) == runs.losses(tmp_path / "whole")
