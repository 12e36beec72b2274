"""Bits flip, files are cut, emptied or gone: nothing else than what was saved is ever loaded."""

import collections
import json
import random
import shutil
import subprocess
import sys

import pytest

import runs
from harm import harm
from tiny_aya_jax.train import saved

FLIPS = 1000 if runs.FULL else 100


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
  """Eight steps, checkpoints 4 and 8."""
  workdir = tmp_path_factory.mktemp("whole")
  assert runs.run(data, workdir, "--config.steps=8", "--config.log_every=1")[0] == 0
  assert saved.steps(workdir) == [4, 8]
  return workdir


def files(path):
  return sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)


def answers(path, orders):
  """What harm.py found for each order, given to one process, or to another where that one died."""
  found, left = [], list(orders)
  while left:
    text = "".join(json.dumps(order) + "\n" for order in left)
    done = subprocess.run([sys.executable, str(runs.HERE / "harm.py"), str(path)], input=text,
                          capture_output=True, text=True, check=False, timeout=600,
                          env=runs.environment(), cwd=runs.ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
      print(f"harm.py ended with {done.returncode}: {done.stderr[-500:]}")
      lines.append(dict(found="died"))
    found += lines
    left = left[len(lines):]
    assert lines, done.stderr[-2000:]
  return list(zip(orders, found))


def test_no_flipped_bit_is_ever_loaded(whole, tmp_path):
  path = tmp_path / "8"
  shutil.copytree(saved.find(whole), path)
  chance, held = random.Random(1), files(path)
  chosen = [*held, *chance.choices(held, k=FLIPS - len(held))]  # every file at least once
  orders = [dict(file=str(file.relative_to(path)), how="flip",
                 at=chance.randrange(8 * file.stat().st_size)) for file in chosen]
  found = answers(path, orders)
  counted = collections.Counter(answer["found"] for _, answer in found)
  print(f"\n{len(found)} bits flipped in {len(held)} files: {dict(counted)}")
  assert not [pair for pair in found if pair[1]["found"] not in ("same", "refused")]
  assert all(answer["damaged"] for _, answer in found if answer["found"] == "refused")
  assert counted["refused"] > FLIPS // 3
  arrays = [answer["found"] for order, answer in found if "/d/" in order["file"]]
  assert arrays and set(arrays) <= {"refused", "same"}  # same: a copy that is not read


def test_a_file_that_is_cut_emptied_or_gone_is_refused_or_was_not_needed(whole, tmp_path):
  path = tmp_path / "8"
  shutil.copytree(saved.find(whole), path)
  orders = [dict(file=str(file.relative_to(path)), how=how, at=file.stat().st_size // 2)
            for file in files(path) for how in ("cut", "empty", "delete")]
  found = answers(path, orders)
  assert not [pair for pair in found if pair[1]["found"] not in ("same", "refused")]
  for order, answer in found:
    if order["file"].endswith(("data.json", "params/_METADATA", "optimizer/_METADATA")):
      assert answer["found"] == "refused", order
  print("\n" + "\n".join(f"{order['file']} {order['how']}: {answer['found']}" for order, answer in found))


HARM = [("params/d/*", "cut"), ("optimizer/**/d/*", "scramble"), ("data/data.json", "flip"),
        ("meta/data.json", "delete"), ("params/_METADATA", "empty")]


@pytest.mark.parametrize("pattern, how", HARM, ids=str)
def test_a_run_falls_back_to_the_older_checkpoint_and_says_what_it_lost(
    data, whole, tmp_path, pattern, how):
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  for file in (workdir / "checkpoints" / "8").glob(pattern):
    content = file.read_bytes()
    harm(file, content, how, 4 * len(content) if how == "flip" else len(content) // 2)  # in the middle
  code, said = runs.run(data, workdir, "--config.steps=8", "--config.log_every=1")
  assert code == 0
  assert f"resumed from {workdir}/checkpoints/4\n" in said and runs.starts(workdir) == [0, 4]
  assert "checkpoints/8 is set aside as 8.damaged" in said and "steps 5 to 8 are trained again" in said
  assert runs.end(workdir) == runs.end(whole) and runs.losses(workdir) == runs.losses(whole)


@pytest.mark.skipif(not runs.FULL, reason="FAULTS=1: three minutes")
@pytest.mark.parametrize("how", ("cut", "delete"))
def test_a_run_ends_the_same_whichever_file_of_its_newest_checkpoint_is_harmed(
    data, whole, tmp_path, how):
  names = [file.relative_to(saved.find(whole)) for file in files(saved.find(whole))]
  at = {}
  for number, name in enumerate(names):
    workdir = tmp_path / str(number)
    shutil.copytree(whole, workdir)
    file = saved.path(workdir, 8) / name
    harm(file, file.read_bytes(), how, file.stat().st_size // 2)
    code, said = runs.run(data, workdir, "--config.steps=8", "--config.log_every=1")
    at[str(name)] = runs.starts(workdir)[-1]
    assert code == 0 and f"resumed from {workdir}/checkpoints/{at[str(name)]}\n" in said
    assert ("8 is set aside as 8.damaged" in said) == (at[str(name)] == 4)
    assert runs.end(workdir) == runs.end(whole)
    assert runs.losses(workdir) == runs.losses(whole)  # later rows are superseded, none is there twice
  print(f"\n{how}: the step restored, by file: {at}")
  assert at["data/data.json"] == at["params/_METADATA"] == 4 and set(at.values()) == {4, 8}


def test_a_run_without_a_sound_checkpoint_is_refused_and_never_begun_anew(data, whole, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  for step in (4, 8):
    for file in (workdir / "checkpoints" / str(step) / "params" / "d").iterdir():
      file.write_bytes(file.read_bytes()[:-100])
  for _ in range(2):
    code, said = runs.run(data, workdir, "--config.steps=8")
    assert code == 65 and "nothing is begun anew behind your back" in said
  assert saved.steps(workdir) == [4, 8]  # the fault may not be theirs: nothing is renamed
  shutil.rmtree(workdir / "checkpoints")
  code, said = runs.run(data, workdir, "--config.steps=8")
  assert code == 65 and "its ledger says that step 8 was saved" in said


def test_a_disk_that_does_not_answer_is_no_damage(data, whole, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  code, said = runs.run(data, workdir, "--config.steps=8", faults=["unreadable=8"])
  assert code == 1 and "Input/output error" in said
  assert runs.run(data, workdir, "--config.steps=8")[0] == 0
  assert saved.steps(workdir) == [4, 8] and runs.starts(workdir)[-1] == 8


def test_a_damaged_trunk_does_not_harm_its_fork(data, whole, tmp_path):
  trunk, fork = tmp_path / "trunk", tmp_path / "fork"
  shutil.copytree(whole, trunk)
  more = f"--config.init_from={trunk}", "--config.init_what=state"
  assert runs.run(data, fork, *more, "--config.steps=4")[0] == 0
  (trunk / "checkpoints" / "8" / "meta" / "data.json").write_text("{")
  code, _ = runs.run(data, fork, *more, "--config.steps=6")
  assert code == 0 and runs.starts(fork) == [8, 12] and not saved.aside(fork)
