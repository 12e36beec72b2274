"""Flags, configs and refusals: every door error is one sentence, exit 65, before jax is imported."""

import os
import pathlib
import subprocess
import sys
import time

import ml_collections
import pytest

from tiny_aya_jax import __main__, run

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = [path for folder in ("experiments", "experiments/sweeps") for path in sorted((ROOT / folder).glob("*.py"))]
PRETRAIN = f"--config={ROOT / 'experiments' / 'pretrain.py'}"


def refused(capsys, *argv):
  assert __main__.main(list(argv)) == 65
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith("refused: ")
  return lines[0]


@pytest.mark.parametrize("text, said", [
    ("def get_config(variant):\n  return missing", "NameError: name 'missing'"),
    ("x = {}['y']", "KeyError: 'y'"),
    ("def get_config():\n  return {}", "a dict, expected a ConfigDict"),
    ("x = (", "SyntaxError"),
    ("x = 1", "has no get_config(variant)"),
])
def test_a_file_that_is_no_config_is_refused_with_the_reason(capsys, tmp_path, text, said):
  path = tmp_path / "odd.py"
  path.write_text(text)
  variant = ":small" if "(variant)" in text else ""
  assert said in refused(capsys, "pack", f"--config={path}{variant}", f"--workdir={tmp_path}")


@pytest.mark.parametrize("argv", [[], ["--help"], ["train", "--help"]])
def test_help_lists_every_verb(capsys, argv):
  assert __main__.main(argv) == 0
  shown = capsys.readouterr().out
  assert all(f"  {verb} " in shown for verb in __main__.VERBS)


@pytest.mark.parametrize("argv, said", [
    (["trian"], "did you mean 'train'?"),
    (["train"], "needs --config=FILE"),
    (["train", PRETRAIN], "needs --workdir=DIR"),
    (["train", "--config=nowhere.py", "--workdir=w"], "'nowhere.py', which is not a file"),
    (["train", PRETRAIN + ":tinny", "--workdir=w"], "did you mean 'tiny'?"),
    (["train", PRETRAIN, "--workdir=w", "--steps=3"], "unknown flag --steps"),
    (["train", PRETRAIN, "--workdir=w", "--config.step=3"], "did you mean 'steps'?"),
    (["train", PRETRAIN, "--workdir=w", "--config.data.bach=3"], "did you mean 'batch'?"),
    (["train", PRETRAIN, "--workdir=w", "--config.steps.x=3"], "has no fields"),
    (["train", PRETRAIN, "--workdir=w", "--config.data=3"], "is a group of fields"),
    (["train", PRETRAIN, "--workdir=w", "--config.steps=three"], "three"),
    (["train", PRETRAIN, "--workdir=w", "--workdir=v"], "given twice"),
    (["train", PRETRAIN, "--workdir=gs://bucket/run"], "is remote"),
    (["train", "--config=README.md", "--workdir=w"], "expected a Python file"),
    (["train", PRETRAIN, "--workdir=w", "stray"], "not of the form --name=value"),
    (["train", PRETRAIN, "--workdir=setup.py/w"], "setup.py is a file"),
    (["talk", PRETRAIN, "--workdir=w"], "lacks the field 'checkpoint', which talk reads"),
])  # fmt: skip
def test_a_wrong_command_line_is_refused_with_what_was_meant(capsys, argv, said):
  assert said in refused(capsys, *argv)


@pytest.mark.parametrize("field, value, said", [
    ("data.rows", "nowhere", "holds no packed rows"),
    ("model.K", "3", "do not share 3 key heads"),
    ("mesh.tensor", "3", "config.mesh.tensor=3 does not divide K=4"),
    ("model.H", "127", "is odd"),
    ("accumulate", "7", "does not split into 7"),
    ("attention", "chunky", "did you mean 'chunked'?"),
    ("remat", "ful", "did you mean 'full'?"),
    ("dtype", "float16", "unknown config.dtype"),
    ("matmul", "fp16", "did you mean 'fp8'?"),
    ("schedule.shape", "cosin", "did you mean 'cosine'?"),
    ("init_what", "param", "did you mean 'params'?"),
    ("init_what", "state", "config.init_from is not set"),
    ("schedule.peak", "nan", "config.schedule.peak is nan"),
    ("schedule.peak", "inf", "config.schedule.peak is inf"),
    ("optimizer.clip", "0", "config.optimizer.clip is 0.0, expected more than 0"),
    ("optimizer.adamw.b1", "1.5", "expected 0 <= b1 < 1"),
    ("optimizer.adamw.eps", "0", "eps 0.0"),
    ("mesh.tensor", "-1", "at most one size is -1"),
    ("show", "0", "config.show is 0"),
    ("steps", "0", "expected at least 1"),
    ("data.batch", "0", "config.data.batch is 0"),
    ("loss.chunk", "0", "config.loss.chunk is 0"),
    ("mesh.context", "0", "config.mesh.context is 0"),
    ("stop_after", "-1", "config.stop_after is -1"),
    ("profile", "(5,)", "expected () or (start, stop)"),
    ("schedule.decay_steps", "9999999", "do not fit"),
])
def test_a_run_that_cannot_work_is_refused_at_the_door(capsys, tmp_path, field, value, said):
  fields = [f"--config.{field}={value}"]
  if field != "data.rows":
    fields.append("--config.data.rows=somewhere")
  assert said in refused(
      capsys, "train", PRETRAIN, f"--workdir={tmp_path}", "--config.tokenizer=t", *fields
  )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb, fields", [
    ("clean", ("clean.py", "--config.text=nowhere")),
    ("train", ("pretrain.py", "--config.data.rows=nowhere", "--config.tokenizer=t")),
    ("evaluate", ("evaluate.py", "--config.rows=r", "--config.tokenizer=t",
                  "--config.checkpoints=('nowhere',)")),
    ("export", ("export.py", "--config.checkpoint=nowhere")),
    ("synthesize", ("synthesize.py:fuse", "--config.text=.")),
    ("talk", ("talk.py", "--config.dtype=flaot32", "--config.checkpoint=.")),
    ("talk", ("talk.py", "--config.checkpoint=.", "--config.temperature=nan")),
    ("talk", ("talk.py", "--config.checkpoint=.", "--config.port=70000")),
    ("verify", ("verify.py", "--config.checkpoint=.")),
    ("plan", ("pretrain.py", "--config.topology=v5x:4x4")),
    ("plan", ("pretrain.py", "--config.topology=v5e:4x4,v5e")),
    ("plan", ("pretrain.py",)),
    ("plan", ("pretrain.py", "--config.topology=v5e:4x4", "--config.price=0.0")),
    ("plan", ("pretrain.py", "--config.topology=v5e:4x4", "--config.accumulate=7")),
    ("bench", ("bench.py", "--config.remat=ful")),
    ("bench", ("bench.py", "--config.turns=0")),
    ("bench", ("bench.py", "--config.model.K=3")),
])
def test_the_door_does_not_import_jax(tmp_path, verb, fields):
  config, *fields = fields
  command = [sys.executable, "-X", "importtime", "-m", "tiny_aya_jax", verb,
             f"--config={ROOT / 'experiments' / config}", *fields]
  command += [f"--workdir={tmp_path}"] if verb not in __main__.WITHOUT_WORKDIR else []
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 65
  assert "| jax" not in done.stderr.replace("tiny_aya_jax", "")


def variants(path):
  """Every (file, variant) of an experiment, read from the refusal of an unknown one."""
  try:
    run.load_config(f"{path}:?")
  except run.Refused as refusal:
    return str(refusal).rpartition("expected one of ")[2].split(", ")
  raise AssertionError(f"{path} accepts any variant")


CASES = [(path, variant) for path in EXPERIMENTS for variant in variants(path)]


@pytest.mark.parametrize("path, variant", CASES, ids=lambda x: getattr(x, "stem", x))
def test_every_field_of_every_experiment_can_be_set_from_the_command_line(path, variant):
  config = run.load_config(f"{path}:{variant}")
  values = {}
  for name, value in leaves(config):
    kind = type(value) if value is not None else _placeholder_type(config, name)
    values[name] = {
        bool: "True", int: "7", float: "0.5", str: "word", tuple: "('a', 'b')",
    }[kind]
  run.override(config, values)
  found = dict(leaves(config))
  assert {name: str(found[name]) for name in values if found[name] is not None} == values


def leaves(config, prefix=""):
  for name in config.keys():
    if isinstance(config[name], ml_collections.ConfigDict):
      yield from leaves(config[name], f"{prefix}{name}.")
    else:
      yield prefix + name, config[name]


def _placeholder_type(config, name):
  *parents, last = name.split(".")
  for parent in parents:
    config = config[parent]
  return config.get_type(last)


def test_every_experiment_says_its_command_and_what_to_expect():
  for path in EXPERIMENTS:
    text = path.read_text(encoding="utf-8")
    assert f"--config={path.relative_to(ROOT)}" in text.split('"""')[1], path


def test_a_worker_ends_with_its_parent():
  worker = "from tiny_aya_jax import run; run.end_with(); import time; time.sleep(60)"
  parent = (f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {worker!r}]);"
            "print(child.pid, flush=True); time.sleep(2); import os; os.kill(os.getpid(), 9)")
  done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True,
                        check=False, timeout=30)
  child = pathlib.Path("/proc", done.stdout.strip())
  deadline = time.monotonic() + 10
  while child.exists() and "Z" not in (child / "stat").read_text().split()[2]:
    assert time.monotonic() < deadline, "it outlived its parent"
    time.sleep(0.1)


def test_json_is_written_whole_or_not_at_all(tmp_path):
  run.write_json(tmp_path / "x.json", {"a": 1})
  with pytest.raises(TypeError):
    run.write_json(tmp_path / "x.json", {"a": object()})
  assert run.read_json(tmp_path / "x.json", "x") == {"a": 1}


def test_a_rerun_is_up_to_date_refused_or_allowed_to_overwrite(tmp_path):
  record = tmp_path / "done.json"
  assert not run.up_to_date(record, "a", overwrite=False)
  run.write_json(record, {"inputs": "a"})
  assert run.up_to_date(record, "a", overwrite=False)
  assert not run.up_to_date(record, "a", overwrite=True)
  assert not run.up_to_date(record, "b", overwrite=True)
  with pytest.raises(run.Refused, match="made from other inputs"):
    run.up_to_date(record, "b", overwrite=False)


def test_a_line_is_one_write_so_that_other_threads_cannot_write_into_it():
  reads, writes = os.pipe2(os.O_DIRECT)  # a pipe of packets: a read gives what one write gave
  say = "from tiny_aya_jax import run; run.say('resumed', 4)"
  subprocess.run([sys.executable, "-u", "-c", say], stdout=writes, check=True)
  os.close(writes)
  assert os.read(reads, 4096) == b"resumed 4\n"
  os.close(reads)
