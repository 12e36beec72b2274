"""What a sweep tries, what it runs, and what a kill leaves. Trials that train are a stage of test_pipeline.py."""

import collections
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from conftest import ROOT

from tiny_aya_jax import run
from tiny_aya_jax.sweep import ledger as ledgers, protocol, runner, space, sweep

CODES = ("deu_Latn", "tur_Latn", "hin_Deva", "wol_Latn")


def config(file="sweep.py:tiny", **fields):
  found = run.load_config(f"{ROOT / 'experiments' / file}")
  with found.unlocked():
    found.trunk, found.cooldown = (str(ROOT / "experiments" / f"{name}.py:tiny") for name in ("pretrain", "cooldown"))
    found.keep = False
    if found.search == "grid":
      found.tokens, found.x, found.grid = 40_000, "data.mixture.temperature", (("data.mixture.temperature", (1.0, 100.0)),)
    for name, value in fields.items():
      found[name] = value
  return found


# --- what is tried ------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_arms_and_values_and_first_seeds_come_first():
  asked = config(arms=(("a", (("data.mixture.temperature", 2.0),)), ("b", (("schedule.peak", 1e-3),))),
                 grid=(("data.batch", (4, 8)),), more_seeds=(("a, batch 8", 2),))
  trials = space.trials(asked, space.arms(asked, CODES))
  assert [trial.name for trial in trials] == [
      "a--batch-4_seed-0", "a--batch-8_seed-0", "b--batch-4_seed-0", "b--batch-8_seed-0", "a--batch-8_seed-1"]
  assert trials[1].settings == {"data.mixture.temperature": 2.0, "data.batch": 8}
  assert [trial.x for trial in trials] == [2.0, 2.0, None, None, 2.0]


def test_a_draw_is_a_function_of_the_seed_and_its_number():
  asked = config("sweeps/mixture_law.py:tiny")
  one, other = space.drawn(asked, 7, CODES), space.drawn(asked, 7, CODES[::-1])
  assert one == other != space.drawn(asked, 8, CODES)
  assert {code for code, _ in one["data.mixture.keep"]} == set(CODES)
  drawn = [space.drawn(asked, number, CODES) for number in range(300)]
  temperatures = [draw["data.mixture.temperature"] for draw in drawn]
  assert 1 <= min(temperatures) < 1.1 and 18 < max(temperatures) <= 20
  assert 0.4 < sum(temperature < 20**0.5 for temperature in temperatures) / 300 < 0.6  # even in the logarithm


def test_optuna_goes_on_from_what_was_measured():
  pytest.importorskip("optuna")
  asked = config("sweeps/mixture_search.py:tiny")
  earlier, found = [], []
  for number in range(25):
    settings = space.suggested(asked, earlier)
    assert settings == space.suggested(asked, earlier)
    earlier.append((settings, abs(settings["cooldown_share"] - 0.3) if number != 3 else float("inf")))
    found.append(settings["cooldown_share"])
  late = [abs(share - 0.3) for share in found[15:]]
  early = [abs(share - 0.3) for share in found[:8]]
  assert sum(late) / len(late) < sum(early) / len(early)
  space.suggested(asked, [(earlier[0][0], None), *earlier])  # one is still under way


@pytest.mark.parametrize("fields, said", [
    (dict(search="gird"), "did you mean 'grid'?"),
    (dict(search="optuna"), "config.grid is set, and config.search is 'optuna'"),
    (dict(search="random", grid=()), "config.space is empty"),
    (dict(space=(("schedule.peak", "log", 1.0, 2.0),)), "config.space is set"),
    (dict(search="random", grid=(), space=(("schedule.peak", "log", 0.0, 2.0),)), "'log' from 0.0"),
    (dict(search="random", grid=(), space=(("schedule.peak", "uniform", 3.0, 2.0),)), "a low end first"),
    (dict(search="random", grid=(), space=(("schedule.peak", "normal", 3.0, 2.0),)), "is no distribution"),
    (dict(search="optuna", grid=(), space=(("data.mixture.keep", "factors", 1.0, 1.0),)), "drawn at random"),
    (dict(arms=(("a",),)), "is no arm"), (dict(arms=(("a", ("data.T", 2)),)), "(name, ((field, value),))"),
    (dict(grid=(("data.T", 32),)), "(field, (value,))"), (dict(grid=(("data.mixture.kind", "unimax"),)), "is no axis"),
    (dict(prefix=("no-such-command",)), "is no command here"), (dict(law=dict(fit=True, confirm=0, draws=1, best=1,
    most_epochs=4.0), grid=(("tokens", (1, 2)),)), "`tokens` varies"), (dict(seeds=0), "config.seeds is 0"),
    (dict(objective="median"), "unknown config.objective 'median'"), (dict(floor=3.0), "config.floor is 3.0"),
    (dict(at_once=0), "config.at_once is 0"), (dict(trunk="pretrain.py"), "which is not a file"),
    (dict(topology="v9:1"), "v9"),
])
def test_what_is_no_sweep_is_refused(fields, said):
  with pytest.raises(run.Refused) as refusal:
    sweep._check(config(rows="a", validation="b", tokenizer="c", **fields))
  assert said in str(refusal.value)


@pytest.mark.parametrize("fields, said", [
    (dict(more_seeds=(("temprature 1.0", 2),)), "did you mean 'temperature 1.0'?"),
    (dict(arms=(("a", (("seed", 1),)),)), "seed is decided by config.seeds"),
    (dict(arms=(("a", (("trunk.steps", 1),)),)), "steps is decided by config.tokens"),
    (dict(arms=(("a", (("cooldown.init_from", "b"),)),)), "init_from is the sweep's own"),
    (dict(arms=(("a", (("trunk.init_tokenizer", "b"),)),)), "init_tokenizer is the sweep's own"),
    (dict(arms=(("a", (("model.V", 599),)),)), "600 ids, config.model.V only 599 rows"),
    (dict(arms=(("a", (("cooldown.data.T", 64),)),)), "rows of T=32, config.data.T is 64"),
    (dict(arms=(("a", (("schedule.peek", 1.0),)),)), "arm 'a, temperature 1.0': unknown field 'schedule.peek'"),
    (dict(arms=(("a", (("cooldown_share", 1.0),)),)), "cooldown_share of 1.0"),
    (dict(arms=(("a", (("trunk.data.batch", 0),)),)), "config.data.batch is 0"),
    (dict(grid=(("data.mixture.temperature", (1.0, 1)),), more_seeds=()), "are the same run"),
])
def test_a_trial_that_train_would_refuse_is_refused_before_any_runs(data, tmp_path, fields, said):
  asked = config(**dict(more_seeds=()) | fields)
  with pytest.raises(run.Refused) as refusal:
    sweep._distinct(plans(asked, data, tmp_path))
  assert said in str(refusal.value)


# --- what a trial is ----------------------------------------------------------------------------


SMALL = (("data.T", 32), ("model.V", 600), ("model.D", 16), ("model.H", 4), ("model.F", 24), ("model.window", 8),
         ("schedule.warmup_steps", 2))


def plans(asked, data, workdir):
  with asked.unlocked():
    asked.rows, asked.validation = str(data / "rows/train"), str(data / "rows/validation")
    asked.tokenizer = str(data / "tokenizer.model")
    asked.arms = tuple((name, (*SMALL, *settings)) for name, settings in asked.arms) or (("", SMALL),)
    if asked.more_seeds:
      asked.more_seeds = tuple(asked.more_seeds)
  found = space.trials(asked, space.arms(asked, CODES))
  return [protocol.planned(asked, workdir, trial, sweep._data(asked)) for trial in found]


def test_tokens_are_split_into_a_trunk_and_its_cooldown(data, tmp_path):
  asked = config(tokens=51_200, cooldown_share=0.25,
                 grid=(("trunk.data.batch", (8,)), ("cooldown.data.mixture.temperature", (2.0,))))
  (planned,) = plans(asked, data, tmp_path)
  trunk, cooldown = planned.stages
  assert (trunk.config.steps, trunk.config.data.batch) == (150, 8)  # 38,400 tokens
  assert (cooldown.config.steps, cooldown.config.data.batch) == (25, 16)  # 12,800
  assert (trunk.config.data.mixture.temperature, cooldown.config.data.mixture.temperature) == (3.33, 2.0)
  assert cooldown.flags["init_from"] == str(trunk.workdir) and cooldown.flags["init_what"] == "state"
  assert trunk.config.data.validation is None and cooldown.config.data.validation
  assert planned.operations > 0 and protocol.tokens(trunk) + protocol.tokens(cooldown) == 51_200


@pytest.mark.parametrize("prefix, said", [
    (("taskset", "-c", "{lane}"), "taskset -c 3 PYTHON -m tiny_aya_jax train"),
    (("sbatch", "--wait", "--wrap={command}"), "sbatch --wait --wrap=PYTHON -m tiny_aya_jax train"),
    (("ssh", "slice-{lane}", "--name={key}", "cd it && {command}"),
     "ssh slice-3 --name=KEY cd it && PYTHON -m tiny_aya_jax train"),
])
@pytest.mark.parametrize("python", [None, "/opt/python"])
def test_a_prefix_puts_a_run_elsewhere(data, tmp_path, prefix, said, python):
  asked = config(prefix=prefix, python=python)
  (stage, *_), *_ = [planned.stages for planned in plans(asked, data, tmp_path)]
  words = " ".join(runner.Runner(asked, tmp_path, None)._words(3, stage, tmp_path / "exit"))
  assert words.startswith(said.replace("PYTHON", python or sys.executable).replace("KEY", stage.key[:12])), words
  assert f"--workdir={stage.workdir}" in words


def test_trials_that_differ_in_their_cooldown_alone_share_a_trunk(data, tmp_path):
  asked = config(grid=(("cooldown.data.mixture.temperature", (1.0, 5.0)),), more_seeds=())
  one, other = plans(asked, data, tmp_path)
  assert one.stages[0] == other.stages[0] and one.stages[1].workdir != other.stages[1].workdir
  asked = config(grid=(("data.mixture.temperature", (1.0, 5.0)),), more_seeds=())
  one, other = plans(asked, data, tmp_path)
  assert one.stages[0].workdir != other.stages[0].workdir


def test_without_a_cooldown_a_trial_is_one_run(data, tmp_path):
  (planned,) = plans(config(cooldown_share=0.0, grid=(), more_seeds=()), data, tmp_path)
  (stage,) = planned.stages
  assert stage.config.data.validation and stage.config.steps == round(40_000 / 16 / 32)


def test_what_changes_no_result_makes_no_other_trial(data, tmp_path):
  keys = [plans(config(grid=(("log_every", (every,)),), more_seeds=()), data, tmp_path)[0].key for every in (5, 6)]
  keys += [plans(config(grid=(), more_seeds=(), seed=seed), data, tmp_path)[0].key for seed in (0, 1)]
  assert keys[0] == keys[1] == keys[2] != keys[3]


def test_what_a_config_only_names_is_part_of_the_trial_by_its_content(data, tmp_path):
  sizes = tmp_path / "sizes.json"
  def key(tokens):
    sizes.write_text(json.dumps(dict.fromkeys(CODES, 1e6) | dict(wol_Latn=tokens)))
    asked = config(grid=(), more_seeds=())
    with asked.unlocked():
      asked.imitate.sizes = str(sizes)
    return plans(asked, data, tmp_path)[0].key

  assert key(1e3) == key(1e3) != key(1e5)


def test_a_config_file_that_changes_under_a_sweep_ends_it(data, tmp_path):
  text = (ROOT / "experiments/pretrain.py").read_text()
  (tmp_path / "mine.py").write_text(text)
  (stage, _), = [planned.stages for planned in plans(
      config(trunk=f"{tmp_path}/mine.py:tiny", grid=(), more_seeds=()), data, tmp_path)]
  protocol.refuse_changed(stage)
  (tmp_path / "mine.py").write_text(text.replace("peak=4e-3", "peak=5e-3"))
  with pytest.raises(run.Refused, match="has changed since this sweep began"):
    protocol.refuse_changed(stage)


def test_weights_sum_to_one_and_leave_out_what_no_row_can_hold():
  shares = dict(zip(CODES, (0.1, 0.2, 0.7, 1e-12)))
  made = sweep.weights(shares)
  assert sum(share for _, share in made) == 1 and [code for code, _ in made] == list(CODES[:3])


# --- what runs it -------------------------------------------------------------------------------

# In the place of train: takes so many seconds, holds the lock, writes what a run leaves.
FAKE = textwrap.dedent("""
    import fcntl, json, pathlib, shlex, signal, sys, time
    words = shlex.split(sys.argv[1])
    flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
    workdir, steps = pathlib.Path(flags["workdir"]), int(flags["config.steps"])
    temperature = flags["config.data.mixture.temperature"]
    root, name = pathlib.Path(sys.argv[2]), f"temperature-{temperature}-{workdir.parent.name}-{workdir.name}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(min(float(sys.argv[3]), 0.4))  # train too takes its lock only after its imports
    with open(workdir / "lock", "a") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      tries = len(list(root.glob(f"begun-{name}-*")))
      (root / f"begun-{name}-{tries}").touch()
      time.sleep(float(sys.argv[3]))
      code = (root / f"code-{temperature}-{tries}")
      if code.exists():
        print("refused: because" if code.read_text() == "65" else "it broke")
        sys.exit(int(code.read_text()))
      forked = flags.get("config.init_from")
      if forked:
        steps += json.loads((pathlib.Path(forked) / "steps").read_text())
      (workdir / "checkpoints" / str(steps) / "params").mkdir(parents=True, exist_ok=True)
      (workdir / "checkpoints" / str(steps) / "meta").mkdir(exist_ok=True)
      (workdir / "steps").write_text(str(steps))
      if "config.data.validation" in flags:
        entry = dict(bits_per_byte=None if temperature == "9.0" else float(temperature), bytes=100.0)
        row = dict(step=steps, evaluation=dict.fromkeys(("deu_Latn", "wol_Latn"), entry))
        (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
      (root / f"ended-{name}-{tries}").touch()
""")


@pytest.fixture
def fake(data, tmp_path):
  """(config fields, workdir, folder of what ran) of a sweep whose trials train nothing."""
  root = tmp_path / "ran"
  root.mkdir()
  (tmp_path / "fake.py").write_text(FAKE)

  def made(seconds=0.0, **fields):
    prefix = (sys.executable, str(tmp_path / "fake.py"), "{command}", str(root), str(seconds))
    asked = config(more_seeds=(), prefix=prefix, retries=1,
                   grid=(("data.mixture.temperature", (1.0, 2.0, 3.0)),), **fields)
    plans(asked, data, tmp_path)  # sets rows and sizes
    return asked

  return made, tmp_path / "sweep", root


def outcomes(workdir):
  rows = [row for row in run.read_lines(workdir / "ledger.jsonl") if row["event"] == "outcome"]
  assert len({row["key"] for row in rows}) == len(rows)  # each once
  return {row["trial"]: row["state"] for row in rows}


def test_every_trial_is_run_once_and_a_second_call_runs_nothing(fake):
  made, workdir, ran = fake
  assert sweep.main(made(), workdir) == 0
  first = sorted(path.name for path in ran.iterdir())
  assert len(first) == 12 and set(outcomes(workdir).values()) == {"done"}  # three trunks, three cooldowns
  result = json.loads((workdir / "sweep.json").read_text())
  assert [trial["bits_per_byte"]["wol_Latn"] for trial in result["trials"]] == [1.0, 2.0, 3.0]
  assert result["verdict"]["recommended"] == "temperature 1.0"
  assert (workdir / "sweep.html").read_text().startswith("<!doctype html>")
  assert not list(workdir.glob("*/*/checkpoints"))  # config.keep is off
  assert sweep.main(made(), workdir) == 0 and sorted(path.name for path in ran.iterdir()) == first


def test_a_dry_run_starts_nothing(fake, capsys):
  made, workdir, ran = fake
  assert sweep.main(made(dry_run=True, topology="v5e:2x2"), workdir) == 0
  said = capsys.readouterr().out
  assert not list(ran.iterdir()) and not workdir.exists()
  for words in ("3 trials of 3 arms", "imitates 4e+06 tokens", "6 runs", "most epochs", "one seed an arm", "USD at"):
    assert words in said


def test_a_dry_run_needs_no_rows_and_costs_the_report_s_protocol(tmp_path, capsys):
  asked = run.load_config(f"{ROOT / 'experiments/sweeps/temperature.py'}")
  with asked.unlocked():
    asked.trunk, asked.cooldown = (str(ROOT / "experiments" / f"{name}.py") for name in ("pretrain", "cooldown"))
    asked.dry_run, asked.topology = True, "v5p:4x4x4"
  assert sweep.main(asked, tmp_path / "none") == 0
  said = capsys.readouterr().out
  for words in ("as large as FineWeb-2", "39,998,980,096 tokens", "2200B tokens", "USD at"):
    assert words in said
  (line,) = [line for line in said.splitlines() if line.startswith("unimax 4")]
  assert "pcm_Latn 4" in line  # the cap is kept by both stages together


@pytest.mark.parametrize("codes, state, tries", [
    ({0: 65}, "refused", 1), ({0: 77}, "diverged", 1), ({0: 1, 1: 1}, "failed", 2), ({0: 1}, "done", 2),
    ({0: 75}, "done", 2), ({0: 137, 1: 76}, "failed", 2),
])
def test_a_trial_that_fails_is_tried_again_or_marked_and_the_others_go_on(fake, monkeypatch, codes, state, tries):
  made, workdir, ran = fake
  monkeypatch.setattr(runner, "PAUSE_SECONDS", 0)
  for number, code in codes.items():
    (ran / f"code-2.0-{number}").write_text(str(code))
  assert sweep.main(made(cooldown_share=0.0), workdir) == 0
  assert outcomes(workdir) == {"temperature-1.0_seed-0": "done", "temperature-2.0_seed-0": state,
                               "temperature-3.0_seed-0": "done"}
  assert len(list(ran.glob("begun-temperature-2.0*"))) == tries
  if state == "refused":
    assert "refused: because" in (workdir / "sweep.html").read_text()


def test_a_sweep_that_was_killed_goes_on_and_what_ran_alone_is_waited_for(fake, monkeypatch):
  made, workdir, ran = fake
  monkeypatch.setattr(runner, "POLL_SECONDS", 0.1)
  asked = made(seconds=0.6, at_once=2)
  child = os.fork()
  if not child:
    sweep.main(asked, workdir)
    os._exit(0)
  while not list(ran.glob("ended-*")):
    time.sleep(0.05)
  while len(list(ran.glob("begun-*"))) == len(list(ran.glob("ended-*"))):
    time.sleep(0.01)
  os.kill(child, signal.SIGKILL)
  os.waitpid(child, 0)
  assert sweep.main(asked, workdir) == 0
  assert len(outcomes(workdir)) == 3 and set(outcomes(workdir).values()) == {"done"}
  begun, ended = (collections.Counter(path.name.rpartition("-")[0] for path in ran.glob(f"{what}-*"))
                  for what in ("begun", "ended"))
  assert sum(begun.values()) == sum(ended.values())  # nothing was begun beside one that still ran
  assert len(ended) == 6 and sum(ended.values()) <= 8  # the two under way were asked again, to see that they are done


def test_a_trunk_that_was_removed_and_is_half_made_again_is_not_forked(fake, data):
  made, workdir, ran = fake
  asked = made()
  workdir.mkdir()
  (one, *_), ledger = plans(asked, data, workdir), ledgers.Ledger(workdir / "ledger.jsonl")
  trunk, cooldown = one.stages
  work = runner.Runner(asked, workdir, ledger)
  ledger.append(event="ended", key=trunk.key, code=0, seconds=1.0)
  (trunk.workdir / f"checkpoints/{trunk.config.steps - 1}/params").mkdir(parents=True)
  (trunk.workdir / f"checkpoints/{trunk.config.steps - 1}/meta").mkdir()
  assert work._needed(one, trunk) and work._needed(one, cooldown)
  (trunk.workdir / f"checkpoints/{trunk.config.steps - 1}").rename(trunk.workdir / f"checkpoints/{trunk.config.steps}")
  assert not work._needed(one, trunk)
  ledger.append(event="began", key=trunk.key)
  assert work._needed(one, trunk)


def test_what_is_not_finite_at_the_end_has_diverged(fake):
  made, workdir, _ = fake
  asked = made(cooldown_share=0.0)
  with asked.unlocked():
    asked.grid = (("data.mixture.temperature", (1.0, 9.0)),)
  assert sweep.main(asked, workdir) == 0
  assert outcomes(workdir) == {"temperature-1.0_seed-0": "done", "temperature-9.0_seed-0": "diverged"}


def test_optuna_s_trials_share_a_trunk_and_what_train_refuses_is_one_of_them(fake):
  pytest.importorskip("optuna")
  made, workdir, ran = fake
  asked = made(at_once=2)
  with asked.unlocked():
    asked.search, asked.grid, asked.draws = "optuna", (), 6
    asked.space = (*((field, "choice", (value,)) for field, value in (*SMALL, ("data.mixture.temperature", 2.0))),
                   ("cooldown.schedule.peak", "log", 1e-4, 1e-2), ("cooldown.log_every", "whole", 0, 1))
    asked.arms = ()
  assert sweep.main(asked, workdir) == 0
  found = outcomes(workdir)
  assert 0 < list(found.values()).count("refused") < 6  # log_every 0
  assert len(list(ran.glob("begun-*-trunks-*"))) == 1 and not list(workdir.glob("*/*/checkpoints"))
  before = sorted(path.name for path in ran.iterdir())
  assert sweep.main(asked, workdir) == 0 and sorted(path.name for path in ran.iterdir()) == before


def test_an_outcome_that_is_done_stays_and_a_torn_line_costs_no_other(tmp_path):
  ledger = ledgers.Ledger(tmp_path / "ledger.jsonl")
  for state in ("failed", "done", "failed"):
    ledger.append(event="outcome", key="a", state=state)
  with open(tmp_path / "ledger.jsonl", "a") as file:
    file.write('{"event": "outco')
  again = ledgers.Ledger(tmp_path / "ledger.jsonl")
  again.append(event="outcome", key="b", state="done")
  found = ledgers.Ledger(tmp_path / "ledger.jsonl").outcomes()
  assert {key: row["state"] for key, row in found.items()} == dict(a="done", b="done")


def test_a_stop_ends_what_runs_saved_and_goes_on_later(fake):
  made, workdir, ran = fake
  asked = made(seconds=30, at_once=3)
  child = os.fork()
  if not child:
    os._exit(sweep.main(asked, workdir))
  while len(list(ran.glob("begun-*"))) < 3:
    time.sleep(0.05)
  os.kill(child, signal.SIGTERM)
  assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
  assert not outcomes(workdir)
  assert not any(runner._locked(path / "held") for path in workdir.glob("trunks/*"))


def test_a_queue_that_takes_a_command_and_returns_is_waited_for(fake, monkeypatch, tmp_path):
  made, workdir, ran = fake
  monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
  asked = made(detached=True, cooldown_share=0.0)
  inner = asked.prefix
  (tmp_path / "queue.py").write_text(textwrap.dedent("""
      import shlex, subprocess, sys
      *fake, command, root, seconds = sys.argv[1:]
      shell, dash, script = shlex.split(command)
      head, semicolon, tail = script.partition("; code=$?")
      script = shlex.join([*fake, head, root, seconds]) + semicolon + tail
      subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  """))
  with asked.unlocked():
    asked.prefix = (sys.executable, str(tmp_path / "queue.py"), *inner)
  (ran / "code-2.0-0").write_text("65")
  assert sweep.main(asked, workdir) == 0
  assert sorted(outcomes(workdir).values()) == ["done", "done", "refused"]


@pytest.mark.parametrize("backend, detached", [("slurm", False), ("xpk", True)])
def test_a_run_is_a_job_by_a_spec_of_launch(data, tmp_path, backend, detached):
  place = tmp_path / "bin"
  place.mkdir()
  for name in ("sbatch", "xpk"):  # in the place of theirs: says what it was asked
    (place / name).write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/asked\ncat > {tmp_path}/script\nexit 3\n")
    (place / name).chmod(0o755)
  spec = (ROOT / "launch/example.toml").read_text().replace('["WANDB_API_KEY"]', "[]")
  (tmp_path / "mine.toml").write_text(spec)
  asked = config(detached=detached, python="python", prefix=(
      sys.executable, str(ROOT / "launch/trial.py"), backend, str(tmp_path / "mine.toml"), "{key}", "{command}"))
  (stage, *_), *_ = [planned.stages for planned in plans(asked, data, tmp_path)]
  words = runner.Runner(asked, tmp_path, None)._words(0, stage, tmp_path / "exit")
  environment = os.environ | dict(PATH=f"{place}:{os.environ['PATH']}")
  done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
  assert done.returncode == 3, done.stderr
  said, script = (tmp_path / "asked").read_text(), (tmp_path / "script").read_text()
  run_line = script if backend == "slurm" else said
  assert f"train --config={stage.file} --workdir={stage.workdir}" in run_line.replace("'", "")
  assert f"aya-pretrain-{stage.key[:8]}-" in run_line and ("--wait" in said) == (backend == "slurm")
  assert backend == "xpk" or f"--output={stage.workdir}/log.txt" in said and "seq 0 0" in script
  assert backend == "slurm" or f"echo $code > {tmp_path}/exit.$$" in said and "--max-restarts\n0\n" in said
  words[words.index(backend)] = dict(slurm="xpk", xpk="slurm")[backend]  # each refuses the other's waiting
  assert subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 65


def test_what_was_refused_is_tried_again_by_the_next_call(fake):
  made, workdir, ran = fake
  (ran / "code-2.0-0").write_text("65")
  assert sweep.main(made(cooldown_share=0.0), workdir) == 0
  assert sweep.main(made(cooldown_share=0.0), workdir) == 0
  states = [(row["trial"], row["state"]) for row in run.read_lines(workdir / "ledger.jsonl")
            if row["event"] == "outcome"]
  assert states[-1] == ("temperature-2.0_seed-0", "done") and len(states) == 4
