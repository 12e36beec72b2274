"""Several processes of one run, on one machine: what two do is what one does, and both end together."""

import os
import re
import signal
import time

import numpy as np
import pytest

import runs
from tiny_aya_jax.train import saved

STEPS = "--config.steps=8"
QUICK = "--config.guard.heartbeat_seconds=10"


def pod(count):
  return dict(command=["bash", str(runs.ROOT / "launch" / "local_pod.sh"), "-n", str(count)])


def pids(workdir):
  """The processes that local_pod.sh has named, of its last start."""
  found = re.findall(r"local_pod: process (\d+) is pid (\d+)", runs.said(workdir))
  return {int(process): int(pid) for process, pid in found}


def begun(workdir):
  return lambda: len(runs.starts(workdir)) > 0 and "step " in runs.said(workdir)


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
  """The run on one process with two devices."""
  workdir = tmp_path_factory.mktemp("one")
  more = f"--config.data.validation={data / 'rows/validation'}"
  assert runs.run(data, workdir, STEPS, more, devices=2)[0] == 0
  return workdir


def test_two_processes_do_what_one_does(data, one, tmp_path):
  more = f"--config.data.validation={data / 'rows/validation'}", "--config.export_every=8"
  code, said = runs.run(data, tmp_path / "two", STEPS, *more, **pod(2))
  assert code == 0 and "mesh {'data': 1, 'fsdp': 2" in said
  assert runs.end(tmp_path / "two")[3:] == runs.end(one)[3:]  # plan and position
  ours, theirs = runs.losses(tmp_path / "two"), runs.losses(one)
  assert ours.keys() == theirs.keys()
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-6)
  evaluations = [[row["summary"]["mean"] for row in runs.lines(workdir) if "evaluation" in row]
                 for workdir in (one, tmp_path / "two")]
  assert len(evaluations[0]) == 2
  np.testing.assert_allclose(*evaluations, rtol=1e-6)
  assert runs.end(tmp_path / "two") == runs.end(one)  # on one mesh, the same bits
  assert (tmp_path / "two" / "huggingface" / "8" / "model.safetensors").exists()


def test_a_run_goes_on_with_any_number_of_processes(data, one, tmp_path):
  workdir = tmp_path / "run"
  turns = ((1, 2), (2, 4), (4, 6), (1, 8)) if runs.FULL else ((2, 4), (1, 8))
  for count, steps in turns:
    assert runs.run(data, workdir, f"--config.steps={steps}", "--config.save_every=2",
                    **(pod(count) if count > 1 else {}))[0] == 0
  assert runs.starts(workdir) == [0, *(steps for _, steps in turns[:-1])]
  assert runs.end(workdir)[3:] == runs.end(one)[3:]
  ours, theirs = runs.losses(workdir), runs.losses(one)
  np.testing.assert_allclose([ours[step] for step in (2, 4, 6, 8)],
                             [theirs[step] for step in (2, 4, 6, 8)], rtol=1e-5)


def test_a_run_goes_on_on_any_mesh_from_the_same_bits(data, one, tmp_path):
  workdir, sizes = tmp_path / "run", ("data", "fsdp", "tensor", "context")
  meshes = [(1, 8, 1, 1), (2, 2, 2, 1), (1, 4, 1, 2), (1, 1, 1, 1)]
  meshes = meshes if runs.FULL else [meshes[0], meshes[1], meshes[3]]
  for steps, mesh in zip((2, 4, 6, 8) if runs.FULL else (2, 4, 8), meshes):
    more = [f"--config.mesh.{axis}={size}" for axis, size in zip(sizes, mesh)]
    code, said = runs.run(data, workdir, f"--config.steps={steps}", "--config.save_every=2", *more,
                          devices=int(np.prod(mesh)))
    assert code == 0 and "damaged" not in said  # restore compares fingerprints on the new mesh
  assert len(runs.starts(workdir)) == len(meshes) and runs.end(workdir)[3:] == runs.end(one)[3:]
  ours, theirs = runs.losses(workdir), runs.losses(one)
  np.testing.assert_allclose([ours[step] for step in (2, 4, 6, 8)],
                             [theirs[step] for step in (2, 4, 6, 8)], rtol=1e-5)


# Over context, both processes read the same rows.
@pytest.mark.parametrize("process, axis", (
    (0, "fsdp"), (1, "fsdp"), (0, "context"), (1, "context"), (1, "tensor")) if runs.FULL else (
    (1, "context"),))
def test_sigterm_to_one_of_two_stops_both_at_one_step(data, tmp_path, process, axis):
  workdir, mesh = tmp_path / "run", dict(fsdp=1) | {axis: 2}
  pair = runs.start(data, workdir, "--config.steps=1000000", "--config.save_every=1000000",
                    *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()), **pod(2))
  runs.until(begun(workdir), pair)
  os.kill(pids(workdir)[process], signal.SIGTERM)
  assert pair.wait(timeout=60) == 75
  assert runs.said(workdir).count("exited with 75") == 2
  step = saved.steps(workdir)
  assert len(step) == 1 and f"stopped at step {step[0]}, saved" in runs.said(workdir)
  assert runs.run(data, workdir, f"--config.steps={step[0] + 1}")[0] == 0  # and one goes on alone


@pytest.mark.parametrize("process", (0, 1) if runs.FULL else (1,))  # 0 is where the others meet
def test_the_survivor_of_a_kill_ends_within_the_heartbeat_and_the_pair_goes_on(data, tmp_path, process):
  workdir, many = tmp_path / "run", ("--config.steps=3000", "--config.save_every=20", QUICK)
  pair = runs.start(data, workdir, *many, **pod(2))
  runs.until(runs.saved_beyond(workdir, 0), pair)
  began = time.monotonic()
  os.kill(pids(workdir)[process], signal.SIGKILL)
  assert pair.wait(timeout=90) == 137
  seconds = time.monotonic() - began
  print(f"\nthe survivor ended after {seconds:.1f} s")
  assert seconds < 40
  left = saved.steps(workdir)[-1]
  code, said = runs.run(data, workdir, f"--config.steps={left + 2}", QUICK, **pod(2))
  assert code == 0 and f"resumed from {workdir}/checkpoints/{left}\n" in said


def test_one_of_two_that_stands_still_ends_both_by_the_watchdog(data, tmp_path):
  workdir = tmp_path / "run"
  pair = runs.start(data, workdir, "--config.steps=1000000", "--config.save_every=1000000",
                    "--config.guard.hang_seconds=5", "--config.guard.heartbeat_seconds=60", **pod(2))
  runs.until(begun(workdir), pair)
  os.kill(pids(workdir)[1], signal.SIGSTOP)
  try:
    runs.until(lambda: "hang: a step has lasted longer" in runs.said(workdir), seconds=60)
    assert (workdir / "stacks-0.txt").read_text().count("Thread 0x") > 1
  finally:
    os.kill(pids(workdir)[1], signal.SIGCONT)
  assert pair.wait(timeout=90) == 76


def test_two_processes_fall_back_together(data, tmp_path):
  workdir = tmp_path / "run"
  assert runs.run(data, workdir, STEPS)[0] == 0
  (workdir / "checkpoints" / "8" / "data" / "data.json").write_text("")
  for file in (workdir / "checkpoints" / "4" / "optimizer" / "d").iterdir():
    file.write_bytes(file.read_bytes()[:-50])
  code, said = runs.run(data, workdir, STEPS, **pod(2))
  assert code == 65 and "none of the checkpoints 4, 8" in said
  sound = tmp_path / "sound"
  assert runs.run(data, sound, STEPS)[0] == 0
  (sound / "checkpoints" / "8" / "data" / "data.json").write_text("")
  code, said = runs.run(data, sound, STEPS, **pod(2))
  assert code == 0 and runs.starts(sound) == [0, 4] and "checkpoints/8 is set aside" in said


@pytest.mark.skipif(not runs.FULL, reason="FAULTS=1: three quarters of a minute")
def test_a_save_that_fails_on_one_of_two_ends_both_in_time_and_the_pair_goes_on(data, tmp_path, monkeypatch):
  workdir, more = tmp_path / "run", ("--config.steps=100", "--config.save_every=50", "--config.log_every=50")
  with monkeypatch.context() as patched:
    patched.setenv("INJECT", "uncommitted=")  # in process 0
    patched.setenv("PYTHONPATH", str(runs.HERE / "site"))
    code, said = runs.run(data, workdir, *more, "--config.guard.save_seconds=8", **pod(2))
  assert code == 76 and "injected: no commit" in said and saved.steps(workdir) == []
  assert runs.run(data, workdir, *more, **pod(2))[0] == 0 and saved.steps(workdir) == [50, 100]
