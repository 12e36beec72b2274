"""SIGKILL at any time: every restart goes on from a sound checkpoint and ends with the same bits."""

import random
import shutil
import signal
import time

import jax
import ml_dtypes
import numpy as np
import pytest

import runs
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import checkpoint, saved

KILLS = 100 if runs.FULL else 5
EVERY = ("--config.log_every=1", "--config.accumulate=2", "--config.evaluate_every=1000000")


def test_random_kills_lose_nothing_and_change_no_bit(data, tmp_path):
  steps = f"--config.steps={60 * KILLS}"
  assert runs.run(data, tmp_path / "whole", *EVERY, steps, "--config.save_every=1000")[0] == 0
  workdir, chance = tmp_path / "killed", random.Random(0)
  for kill in range(KILLS):
    other = f"--config.data.prefetch={kill % 4 + 1}", f"--config.data.threads={kill % 3}"
    process = runs.start(data, workdir, *EVERY, steps, *other, "--config.save_every=2")
    if kill % 3:  # among steps; else anywhere, the imports among them
      before = (saved.steps(workdir) or [0])[-1]
      runs.until(runs.saved_beyond(workdir, before), process)
    time.sleep(chance.uniform(0, 1) if kill % 3 else chance.uniform(0, 6))
    assert process.poll() is None, "it ended before it was killed: more steps"
    process.send_signal(signal.SIGKILL)
    process.wait()
  code, said = runs.run(data, workdir, *EVERY, steps, "--config.save_every=1000")
  assert code == 0 and "damaged" not in said
  assert runs.end(workdir) == runs.end(tmp_path / "whole")
  assert runs.losses(workdir) == runs.losses(tmp_path / "whole")
  assert len(runs.starts(workdir)) > KILLS // 2  # a start killed early has written nothing
  assert not list((workdir / "checkpoints").glob(f"*{checkpoint.TEMPORARY}*"))
  assert len(list((workdir / "checkpoints").iterdir())) == 2  # config.keep
  print(f"\n{KILLS} kills, starts at {runs.starts(workdir)}, {runs.goodput(workdir)}")


STAGES = dict(before=4, started=4, written=4, committed=8, pruning=8)


@pytest.mark.parametrize("stage, left", [
    pair for pair in STAGES.items() if runs.FULL or pair[0] in ("started", "written", "pruning")])
def test_a_kill_in_any_stage_of_a_save_leaves_a_checkpoint(data, twelve, tmp_path, stage, left):
  more = "--config.steps=12", "--config.keep=1"
  code, said = runs.run(data, tmp_path / "run", *more, faults=[f"die={stage}:8"])
  assert code == 9 and f"injected: {stage}:8" in said
  assert max(saved.steps(tmp_path / "run")) == left
  code, said = runs.run(data, tmp_path / "run", *more)
  assert code == 0 and f"resumed from {tmp_path}/run/checkpoints/{left}\n" in said
  assert runs.end(tmp_path / "run") == runs.end(twelve)
  assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["12"]


@pytest.fixture(scope="module")
def twelve(data, tmp_path_factory):
  """Twelve steps without a fault."""
  workdir = tmp_path_factory.mktemp("twelve")
  assert runs.run(data, workdir, "--config.steps=12")[0] == 0
  return workdir


def test_an_evaluation_that_was_killed_runs_again_once(data, tmp_path):
  more = ("--config.steps=8", "--config.evaluate_every=4",
          f"--config.data.validation={data / 'rows/validation'}")
  code, _ = runs.run(data, tmp_path / "run", *more, faults=["dies_evaluating=2"])
  assert code == 9 and saved.steps(tmp_path / "run") == [4]  # the save had begun before it
  assert runs.run(data, tmp_path / "run", *more)[0] == 0
  rows = [row["step"] for row in runs.lines(tmp_path / "run") if "evaluation" in row]
  assert rows == [0, 4, 8]


def test_an_export_that_was_killed_runs_again_and_leaves_no_half(data, tmp_path):
  more = "--config.steps=8", "--config.export_every=4"
  folder = tmp_path / "run" / "huggingface"
  assert runs.run(data, tmp_path / "run", *more, faults=["dies_exporting="])[0] == 9
  assert saved.steps(tmp_path / "run") == [4] and not (folder / "4").exists()
  code, said = runs.run(data, tmp_path / "run", *more)
  assert code == 0 and said.count("exported step 4") == said.count("exported step 8") == 1
  assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "8" / "params" / "d")
  code, said = runs.run(data, tmp_path / "run", *more, "--config.export_every=1000")
  assert code == 0 and sorted(path.name for path in folder.iterdir()) == ["4", "8.superseded"]
  params, _ = huggingface.read(folder / "8.superseded")
  trained, _ = checkpoint.restore_params(tmp_path / "run")
  for ours, theirs in zip(jax.tree.leaves(trained), jax.tree.leaves(params)):
    np.testing.assert_array_equal(np.asarray(ours).astype(ml_dtypes.bfloat16).astype(np.float32), theirs)
