"""What a run does about its own numbers, clock and machine: guards, signals, watchdog, disk, lock."""

import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

import runs
from tiny_aya_jax.train import checkpoint, saved


def test_one_step_that_is_not_finite_changes_no_parameter_and_is_counted(data, tmp_path):
  more = "--config.log_every=1", "--config.save_every=1", "--config.keep=9"
  code, said = runs.run(data, tmp_path / "run", *more, "--config.steps=4", faults=["not_finite=3"])
  assert code == 0 and "step 4: no update, not finite: loss nan" in said
  assert runs.run(data, tmp_path / "run", *more, "--config.steps=8")[0] == 0
  prints = [saved.meta(saved.path(tmp_path / "run", step))["fingerprints"] for step in (2, 3, 4, 5)]
  assert prints[1]["params"] == prints[2]["params"] != prints[3]["params"] != prints[0]["params"]
  moved = {name for name in prints[1]["optimizer"]
           if prints[1]["optimizer"][name] != prints[2]["optimizer"][name]}
  assert moved and all(name.endswith("count") for name in moved)
  rows, skips = (runs.lines(tmp_path / "run", name) for name in ("metrics", "skipped"))
  assert [(row["step"], row["why"], len(row["rows"])) for row in skips] == [(4, "not finite", 16)]
  assert [row["skipped"] for row in rows if "skipped" in row] == [0, 0, 0, 1, 0, 0, 0, 0]
  assert np.isfinite([row["loss"] for row in rows if "skipped" in row and row["step"] != 4]).all()


def test_steps_in_a_row_that_are_not_finite_end_the_run_and_the_next_start_goes_further_back(
    data, tmp_path):
  workdir, more = tmp_path / "run", ("--config.steps=40", "--config.guard.not_finite=3",
                                     "--config.log_every=100")
  bad = ",".join(map(str, range(9, 30)))
  code, said = runs.run(data, workdir, *more, faults=[f"not_finite={bad}"])
  assert code == 77
  assert "not finite 3 steps in a row" in said and "8 is set aside as suspect" in said
  assert [row["step"] for row in runs.lines(workdir, "skipped")] == [10, 11, 12]
  code, said = runs.run(data, workdir, *more)
  assert code == 0 and runs.starts(workdir) == [0, 4]
  assert len(runs.lines(workdir, "skipped")) == 3  # kept, though the steps were trained again
  assert runs.run(data, tmp_path / "sound", *more)[0] == 0
  assert runs.end(workdir) == runs.end(tmp_path / "sound")


def test_a_save_that_is_due_among_steps_that_are_not_finite_waits_for_one_that_is(data, tmp_path):
  code, _ = runs.run(data, tmp_path / "run", "--config.steps=8", "--config.keep=9",
                     faults=["not_finite=3,4"])
  assert code == 0 and saved.steps(tmp_path / "run") == [6, 8]


def test_a_spike_is_not_applied_and_its_rows_are_named_also_after_a_resume(data, tmp_path):
  workdir = tmp_path / "run"
  more = "--config.guard.window=8", "--config.log_every=1"
  assert runs.run(data, workdir, *more, "--config.steps=40")[0] == 0
  code, said = runs.run(data, workdir, *more, "--config.steps=44", faults=["spike=41"])
  assert code == 0 and "step 42: no update, a spike" in said  # most of the losses are the checkpoint's
  skips = runs.lines(workdir, "skipped")
  assert [row["step"] for row in skips] == [42] and len(skips[0]["rows"]) == 16
  if runs.FULL:
    code, said = runs.run(data, tmp_path / "blind", *more, "--config.steps=44",
                          "--config.guard.sigma=inf", faults=["spike=41"])
    assert code == 0 and "no update" not in said


def test_sigterm_saves_and_what_follows_is_the_uninterrupted_run(data, tmp_path):
  workdir, more = tmp_path / "run", ("--config.save_every=100000", "--config.log_every=1")
  process = runs.start(data, workdir, "--config.steps=100000", *more)
  runs.until(lambda: "step 3/" in runs.said(workdir), process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 75
  stopped = saved.steps(workdir)[-1]
  steps = f"--config.steps={stopped + 5}"
  assert runs.run(data, workdir, steps, *more)[0] == 0
  assert runs.run(data, tmp_path / "whole", steps, *more)[0] == 0
  assert runs.end(workdir) == runs.end(tmp_path / "whole")
  assert runs.losses(workdir) == runs.losses(tmp_path / "whole")


def test_a_second_sigterm_ends_the_process_at_once_and_harms_nothing(data, tmp_path):
  workdir = tmp_path / "run"
  process = runs.start(data, workdir, "--config.steps=100000", "--config.save_every=4",
                       faults=["slow_save=30"])
  runs.until(lambda: "step 2/" in runs.said(workdir), process)
  process.send_signal(signal.SIGTERM)
  time.sleep(1)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=10) == -signal.SIGTERM
  assert all(checkpoint.verify(workdir / "checkpoints" / str(step)) for step in saved.steps(workdir))


@pytest.mark.parametrize("where", ("data:0", "data:5", "step:5") if runs.FULL else ("data:0", "step:5"))
def test_a_step_that_hangs_ends_the_process_with_the_stacks_of_its_threads(data, tmp_path, where):
  workdir = tmp_path / "run"
  code, said = runs.run(data, workdir, "--config.steps=100000", "--config.guard.hang_seconds=3",
                        faults=[f"hang={where}"])
  assert code == 76 and "hang: a step has lasted longer than 3 s" in said
  stacks = (workdir / "stacks-0.txt").read_text()
  assert "inject.py" in stacks and stacks.count("File ") > 10


@pytest.mark.skipif(not runs.FULL, reason="FAULTS=1: 20 seconds")
def test_what_compiles_may_take_its_time(data, tmp_path):
  code, said = runs.run(data, tmp_path / "run", "--config.steps=2", "--config.guard.hang_seconds=3",
                        f"--config.data.validation={data / 'rows/validation'}",
                        faults=["slow_compile=6", "slow_first_evaluation=6"])
  assert code == 0 and said.count("injected: the compiler sleeps") == 2


def test_a_save_that_does_not_end_is_a_hang(data, tmp_path):
  code, said = runs.run(data, tmp_path / "run", "--config.steps=100000", "--config.guard.save_seconds=2",
                        "--config.guard.hang_seconds=3", faults=["slow_save=1000"])
  assert code == 76 and "hang: the save of step 4 has lasted longer than 2 s" in said


def test_a_device_without_memory_is_said_with_a_way_out(data, tmp_path):
  code, said = runs.run(data, tmp_path / "run", "--config.steps=2", faults=["no_memory="])
  assert code == 65 and "123456789 bytes" in said and "config.accumulate" in said


def test_an_error_while_a_save_runs_waits_for_it_and_keeps_its_exit_code(data, tmp_path):
  workdir = tmp_path / "run"
  code, said = runs.run(data, workdir, "--config.steps=100", "--config.data.threads=0",
                        faults=["slow_save=2", "error=4"])
  assert code == 1 and "injected: the reader broke" in said
  assert saved.steps(workdir) == [4] and checkpoint.verify(workdir)


def test_a_full_disk_costs_saves_but_no_step_and_leaves_no_rubbish(data, tmp_path):
  workdir, more = tmp_path / "run", ("--config.steps=24", "--config.log_every=100",
                                     "--config.data.threads=0")
  code, said = runs.run(data, workdir, *more, "--config.guard.failed_saves=9",
                        faults=["full_until=14"])
  assert code == 0 and "the save of step 4 failed, 1 of 9 in a row" in said
  assert said.count("failed, 1 of 9 in a row") == 1  # once, then counted on
  assert saved.steps(workdir) == [20, 24]
  assert not list((workdir / "checkpoints").glob(f"*{checkpoint.TEMPORARY}*"))
  assert runs.run(data, tmp_path / "sound", *more)[0] == 0
  assert runs.end(workdir) == runs.end(tmp_path / "sound")


def test_a_disk_that_stays_full_ends_the_run_and_keeps_its_last_checkpoint(data, tmp_path):
  workdir, more = tmp_path / "run", ("--config.log_every=100",)
  assert runs.run(data, workdir, *more, "--config.steps=4")[0] == 0
  code, said = runs.run(data, workdir, *more, "--config.steps=40", faults=["full_until=1000000"])
  assert code == 1 and "3 of 3 in a row, the newest checkpoint is 4" in said
  assert saved.steps(workdir) == [4] and checkpoint.verify(workdir)
  assert runs.run(data, workdir, *more, "--config.steps=8")[0] == 0  # room again
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "8"]


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 8 MB; only root may make one."""
  folder = tmp_path / "disk"
  folder.mkdir()
  done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], check=False,
                        capture_output=True)
  if done.returncode:
    pytest.skip("cannot mount a file system here")
  yield folder
  subprocess.run(["umount", "-l", folder], check=True)


def test_a_checkpoint_without_room_is_not_begun(data, small_disk):
  workdir = small_disk / "run"
  assert runs.run(data, workdir, "--config.steps=8")[0] == 0
  (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 131072))
  code, said = runs.run(data, workdir, "--config.steps=40", "--config.log_every=100")
  assert code == 1 and "a checkpoint is 208," in said and "are free in" in said
  assert max(saved.steps(workdir)) == 8 and checkpoint.verify(workdir)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(data, tmp_path):
  done = subprocess.run(runs.words(data, "/proc/run", "--config.steps=2"), check=False, timeout=120,
                        capture_output=True, text=True, env=runs.environment(), cwd=runs.ROOT)
  assert done.returncode == 65 and "/proc/run cannot be written to" in done.stderr
  assert "step 1" not in done.stdout


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_on_a_full_disk_costs_nothing(data, tmp_path):
  with open("/dev/full", "wb") as full:
    code = runs.start(data, tmp_path / "run", "--config.steps=4", out=full).wait(timeout=120)
  assert code == 0 and saved.steps(tmp_path / "run") == [4]
  with open("/dev/full", "wb") as full:  # a refusal stays one
    code = runs.start(data, tmp_path / "run", "--config.steps=0", out=full).wait(timeout=120)
  assert code == 65


def test_two_runs_in_one_folder_are_one_and_a_killed_one_leaves_no_lock(data, tmp_path):
  workdir, more = tmp_path / "run", ("--config.steps=100000", "--config.save_every=100000")
  first = runs.start(data, workdir, *more)
  runs.until(lambda: "step 2/" in runs.said(workdir), first)
  code, said = runs.run(data, workdir, *more)
  assert code == 65 and "another run holds" in said and first.poll() is None
  first.kill()
  first.wait()
  assert runs.run(data, workdir, "--config.steps=2")[0] == 0


def test_readers_survive_torn_and_empty_files_and_a_clock_that_went_back(data, tmp_path):
  workdir = tmp_path / "run"
  assert runs.run(data, workdir, "--config.steps=4")[0] == 0
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"step": 4, "lo')
  rows = (workdir / "ledger.jsonl").read_text().splitlines()
  (workdir / "ledger.jsonl").write_text(rows[0] + "\n" + rows[1].replace('"time": 1', '"time": 9') + '\n{"st')
  assert runs.run(data, workdir, "--config.steps=6")[0] == 0
  assert list(runs.losses(workdir)) == [2, 4, 6]
  found = runs.goodput(workdir)
  assert found["starts"] == 2 and found["down"] == 0 and 0 < found["goodput"] < 1
  (workdir / "metrics.jsonl").write_text("")
  assert runs.run(data, workdir, "--config.steps=8")[0] == 0
  assert list(runs.losses(workdir)) == [8]


def test_a_run_needs_no_network_and_writes_no_secret(data, tmp_path, monkeypatch):
  alone = ["unshare", "--net"]
  if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
    pytest.skip("cannot take the network away here")
  secrets = {name: f"not-for-{name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "JUDGE_API_KEY")}
  for name, value in secrets.items():
    monkeypatch.setenv(name, value)
  code, said = runs.run(data, tmp_path / "run", "--config.steps=4",
                        command=[*alone, *runs.words(data, "")[:3]])
  assert code == 0
  written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
  assert len(written) > 10
  assert not [value for value in secrets.values() for text in written if value.encode() in text]
  assert "not-for" not in said
