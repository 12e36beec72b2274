"""One program: resumed is uninterrupted, bit for bit; split batches change nothing; exits are kept."""

import functools
import json
import os
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from conftest import ROOT, call, command, fields, full

from tiny_aya_jax import axes, run
from tiny_aya_jax.data import loader, mixture
from tiny_aya_jax.train import begin, checkpoint, guard, optimizer, saved, step, train
from tiny_aya_jax.train.fields import SHAPES


def pretrain(data, workdir, *more):
  return call("train", "pretrain.py:tiny", workdir, *fields(data, *more))


def prints(workdir):
  return saved.meta(saved.find(workdir))["fingerprints"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
  """Eight steps without interruption, two microbatches a step, evaluated."""
  workdir = tmp_path_factory.mktemp("whole")
  assert pretrain(data, workdir, "--config.steps=8", "--config.accumulate=2",
                  f"--config.data.validation={data / 'rows/validation'}") == 0
  return workdir


def test_resuming_twice_gives_the_same_bits_as_never_stopping(data, whole, tmp_path):
  for steps in (3, 5, 8):  # other prefetch, other intervals, a resume of a resume
    assert pretrain(data, tmp_path, f"--config.steps={steps}", "--config.accumulate=2",
                    f"--config.data.prefetch={steps}", f"--config.data.threads={steps % 3 + 1}",
                    "--config.save_every=2") == 0
  assert prints(tmp_path) == prints(whole)
  steps = [row["step"] for row in run.read_lines(tmp_path / "metrics.jsonl")]
  assert steps == sorted(set(steps)) and steps[-1] == 8


def test_a_run_killed_without_warning_resumes_to_the_same_bits(data, whole, tmp_path):
  arguments = command(data, tmp_path, "--config.steps=8", "--config.accumulate=2", "--config.save_every=1")
  process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while not saved.steps(tmp_path) and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  killed_at = saved.steps(tmp_path)
  assert killed_at and killed_at[-1] < 8
  again = [*arguments, "--config.data.prefetch=1", "--config.data.threads=3"]
  done = subprocess.run(again, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
  assert done.returncode == 0
  assert "(cache hit), attention chunked: XLA\n" in done.stdout  # what the first process compiled
  assert prints(tmp_path) == prints(whole)
  assert saved.data(tmp_path) == saved.data(whole)


def test_sigterm_saves_at_a_step_and_exits_75(data, tmp_path):
  arguments = command(data, tmp_path, "--config.steps=100000", "--config.save_every=100000")
  process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while not (tmp_path / "metrics.jsonl").exists() or not run.read_lines(tmp_path / "metrics.jsonl"):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 75
  step = saved.steps(tmp_path)[-1]
  assert step > 0 and checkpoint.verify(tmp_path) > 20


def test_stop_after_saves_and_exits_75(data, tmp_path):
  assert pretrain(data, tmp_path, "--config.steps=100000", "--config.stop_after=1") == 75
  assert saved.steps(tmp_path)


def test_a_loss_that_stays_not_finite_exits_77_and_no_checkpoint_holds_it(data, tmp_path, capsys):
  assert pretrain(data, tmp_path, "--config.steps=20", "--config.schedule.peak=1e30",
                  "--config.optimizer.clip=1e30", "--config.schedule.warmup_steps=0",
                  "--config.save_every=1", "--config.log_every=100", "--config.guard.not_finite=4") == 77
  assert "not finite 4 steps in a row" in capsys.readouterr().out
  assert saved.steps(tmp_path) == [1] and not saved.aside(tmp_path)  # the last good one stays
  for step in saved.steps(tmp_path):  # the first update comes from a finite gradient
    params, _ = checkpoint.restore_params(tmp_path / "checkpoints" / str(step))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@full
def test_an_evaluation_that_a_stop_skipped_is_made_up_for(data, tmp_path):
  more = (f"--config.data.validation={data / 'rows/validation'}", "--config.evaluate_every=2",
          "--config.schedule.warmup_steps=0")
  arguments = command(data, tmp_path, "--config.steps=100000", "--config.stop_after=1", *more)
  assert subprocess.run(arguments, cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode == 75
  stopped = saved.steps(tmp_path)[-1]
  every = f"--config.evaluate_every={stopped}"  # so that the stop fell on a step that was due
  rows = [row for row in run.read_lines(tmp_path / "metrics.jsonl")
          if "evaluation" not in row or row["step"] != stopped]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for _ in range(2):  # the second start finds it done
    assert pretrain(data, tmp_path, *more, every, f"--config.steps={stopped}") == 0
  found = [row["step"] for row in run.read_lines(tmp_path / "metrics.jsonl") if "evaluation" in row]
  assert found.count(stopped) == 1


def test_a_part_of_a_checkpoint_is_set_aside_and_an_older_one_used(data, whole, tmp_path, capsys):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  newest = saved.find(tmp_path)
  assert (newest.name, saved.steps(tmp_path)) == ("8", [4, 8])
  (tmp_path / "checkpoints" / "99").mkdir()
  assert saved.find(tmp_path) == newest
  assert pretrain(data, tmp_path, "--config.steps=8", "--config.accumulate=2") == 0
  assert "99 is set aside as 99.damaged: a part of it was removed" in capsys.readouterr().out
  shutil.rmtree(newest / "optimizer")
  assert pretrain(data, tmp_path, "--config.steps=8", "--config.accumulate=2") == 0
  said = capsys.readouterr().out
  assert "has no readable optimizer" in said and "steps 5 to 8 are trained again" in said
  assert prints(tmp_path) == prints(whole)
  (newest / "data" / "data.json").write_text("")
  assert pretrain(data, tmp_path, "--config.steps=8", "--config.accumulate=2") == 0
  assert "data.json is not JSON" in capsys.readouterr().out
  assert prints(tmp_path) == prints(whole) and len(saved.aside(tmp_path)) == 3


def test_a_workdir_without_a_sound_checkpoint_is_not_begun_anew(data, whole, tmp_path, capsys):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  for step in saved.steps(tmp_path):
    (tmp_path / "checkpoints" / str(step) / "meta" / "data.json").write_text("{}")
  for _ in range(2):
    assert pretrain(data, tmp_path, "--config.steps=8", "--config.accumulate=2") == 65
    assert "nothing is begun anew behind your back" in capsys.readouterr().err
  (tmp_path / "only" / "checkpoints" / "4").mkdir(parents=True)
  assert pretrain(data, tmp_path / "only", "--config.steps=8") == 65
  assert "has no other" in capsys.readouterr().err


def test_a_falling_rate_is_not_stretched_by_a_resume(data, tmp_path, capsys):
  falling = ("--config.schedule.shape=cosine", "--config.schedule.warmup_steps=2")
  assert pretrain(data, tmp_path, "--config.steps=5", *falling) == 0
  assert pretrain(data, tmp_path, "--config.steps=9", *falling) == 65
  assert "steps 5 (now 9)" in capsys.readouterr().err
  assert pretrain(data, tmp_path, "--config.steps=4", *falling) == 65
  assert "has 5 steps behind it" in capsys.readouterr().err
  assert pretrain(data, tmp_path, "--config.steps=9", "--config.data.accept_change=True", *falling) == 0


def test_a_second_run_of_the_same_workdir_is_refused(data, whole, capsys):
  with train._lock(whole):
    assert pretrain(data, whole, "--config.steps=9") == 65
  assert "another run holds" in capsys.readouterr().err


def test_a_changed_rate_mixture_batch_or_model_is_refused_on_resume(data, whole, capsys):
  same = ["--config.steps=9", "--config.accumulate=2"]
  for changed, said in (
      ("--config.schedule.peak=1e-5", "schedule"), ("--config.data.mixture.temperature=1.0", "mixture"),
      ("--config.data.batch=32", "batch"), ("--config.model.F=32", "F 24 (here 32)"),
      ("--config.data.seed=1", "seed"),
  ):
    assert pretrain(data, whole, *same, changed) == 65
    assert said in capsys.readouterr().err


@full
def test_a_resume_counts_the_budget_of_unimax_as_the_first_start_did(data, tmp_path, capsys):
  rule = ("--config.data.mixture.kind=unimax", "--config.data.mixture.epochs=0.03")
  assert pretrain(data, tmp_path, "--config.steps=4", "--config.save_every=2", *rule) == 0
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  assert pretrain(data, tmp_path, "--config.steps=4", *rule) == 0
  whole = dict(kind="unimax", epochs=0.03, languages=("all",), within=(("instruct", 0.0),))
  budget = mixture.with_budget(
      whole, saved.data(tmp_path)["plan"]["sources"], 4 * 16)["budget"]
  assert pretrain(data, tmp_path, "--config.steps=6", *rule) == 65
  assert "another data.mixture" in capsys.readouterr().err
  pinned = (*rule, f"--config.data.mixture.budget={budget}")
  assert pretrain(data, tmp_path, "--config.steps=6", *pinned) == 0
  more = ("--config.steps=8", "--config.data.accept_change=True")
  assert pretrain(data, tmp_path, *more, *rule) == 0
  assert len(saved.data(tmp_path)["plan"]["segments"]) == 2


def test_a_budget_counts_from_where_the_mixture_begins():
  config = run.load_config(str(ROOT / "experiments" / "pretrain.py") + ":tiny")
  config.data.mixture.update(kind="unimax", epochs=1.0)
  sources = [dict(name=f"{code}/a", rows=rows, tokens=100 * rows)
             for code, rows in (("deu_Latn", 1000), ("fra_Latn", 100))]
  whole = begin.rule(config, sources)["budget"]
  assert whole == config.steps * config.data.batch * 100
  late = begin.rule(config, sources, 10, (10 + config.steps - 2) * config.data.batch)
  assert late["budget"] == 2 * config.data.batch * 100


def test_a_wrong_mixture_is_refused_at_the_door(data, tmp_path, capsys):
  for field, value, said in (
      ("epochs", "2.0", "which a temperature mixture does not read"),
      ("within", "(('instrukt', 0.1),)", "no language has, 'instrukt'"),
      ("kind", "unimax", "needs the field 'epochs'"),
  ):
    assert pretrain(data, tmp_path / "run", f"--config.data.mixture.{field}={value}") == 65
    assert said in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_an_accepted_change_continues_every_counter(data, tmp_path):
  assert pretrain(data, tmp_path, "--config.steps=4") == 0
  before = saved.data(tmp_path)
  assert pretrain(data, tmp_path, "--config.steps=6", "--config.data.batch=32",
                  "--config.data.mixture.temperature=100.0", "--config.data.accept_change=True") == 0
  after = saved.data(tmp_path)
  assert mixture.counts(after["plan"], 4 * 32) == mixture.counts(before["plan"], 4 * 16)
  assert sum(mixture.counts(after["plan"], 6 * 32).values()) == 4 * 16 + 2 * 32


def test_a_fork_takes_moments_step_and_counters_and_sft_starts_over(data, whole, tmp_path):
  fork = tmp_path / "fork"
  assert call("train", "cooldown.py:tiny", fork, *fields(
      data, f"--config.init_from={whole}", "--config.steps=2", "--config.schedule.warmup_steps=0")) == 0
  assert saved.steps(fork)[-1] == 10
  trunk, forked = saved.data(whole), saved.data(fork)
  assert mixture.counts(forked["plan"], 128) == mixture.counts(trunk["plan"], 128)
  assert len(forked["plan"]["segments"]) == 2
  assert {name.partition("/")[2] for name in mixture.drawn(trunk["plan"])} == {"cldr"}
  new = {name: count for name, count in mixture.counts(forked["plan"], 160).items() if count}
  assert sum(count for name, count in new.items() if name.endswith("/instruct")) >= 3  # 15% of 32
  sft = tmp_path / "sft"
  assert call("train", "sft.py:tiny_global", sft, *fields(
      data, f"--config.init_from={fork}", "--config.steps=2", "--config.schedule.warmup_steps=0",
      "--config.schedule.peak=0.0", "--config.schedule.final=0.0")) == 0
  assert saved.steps(sft)[-1] == 2
  assert prints(sft)["params"] == prints(fork)["params"]  # a rate of 0 leaves what it started from


def test_an_init_from_that_is_not_there_is_refused(data, tmp_path, capsys):
  assert pretrain(data, tmp_path / "run", "--config.init_from=nowhere") == 65
  assert "config.init_from: nowhere does not exist" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@full
def test_a_fork_of_a_trunk_that_was_trained_anew_is_refused(data, whole, tmp_path, capsys):
  trunk, fork = tmp_path / "trunk", tmp_path / "fork"
  shutil.copytree(whole, trunk)
  more = fields(data, f"--config.init_from={trunk}", "--config.steps=2", "--config.schedule.warmup_steps=0")
  assert call("train", "cooldown.py:tiny", fork, *more) == 0
  assert call("train", "cooldown.py:tiny", fork, *more) == 0
  shutil.rmtree(trunk)
  assert call("train", "cooldown.py:tiny", fork, *more) == 0  # a trunk that is gone says nothing
  assert pretrain(data, trunk, "--config.steps=8", "--config.accumulate=2", "--config.seed=1") == 0
  assert call("train", "cooldown.py:tiny", fork, *more) == 65
  assert "trained anew since" in capsys.readouterr().err


def test_a_plan_file_is_followed_and_a_changed_one_is_accepted_only_on_purpose(data, tmp_path, capsys):
  rule = dict(kind="temperature", temperature=3.33, languages=("all",))
  plan = mixture.plan(loader.read_manifests(data / "rows" / "train"), rule)
  staged = mixture.append(plan, 64, {"tur_Latn": 1.0})
  run.write_json(tmp_path / "plan.json", staged)
  more = (f"--config.data.plan={tmp_path / 'plan.json'}", "--config.steps=6")
  assert pretrain(data, tmp_path / "run", *more, "--config.stop_after=100000") == 0
  assert saved.data(tmp_path / "run")["plan"]["segments"] == staged["segments"]
  losses = [row for row in run.read_lines(tmp_path / "run" / "metrics.jsonl") if "languages" in row]
  assert list(losses[-1]["languages"]) == ["tur_Latn"] and len(losses[0]["languages"]) == 4
  assert pretrain(data, tmp_path / "run", *more) == 0
  run.write_json(tmp_path / "plan.json", mixture.append(staged, 160, {"wol_Latn": 1.0}))
  assert pretrain(data, tmp_path / "run", *more) == 65
  assert "another data.plan" in capsys.readouterr().err
  assert pretrain(data, tmp_path / "run", *more, "--config.data.accept_change=True") == 0


def test_rows_that_are_not_drawn_may_come_and_go(data, tmp_path):
  rows = tmp_path / "rows"
  shutil.copytree(data / "rows" / "train", rows)
  kept = tmp_path / "kept"
  shutil.move(rows / "wol_Latn", kept)
  two = (f"--config.data.rows={rows}", "--config.data.mixture.languages=('deu_Latn', 'tur_Latn')")
  assert pretrain(data, tmp_path / "run", *two, "--config.steps=2") == 0
  shutil.move(kept, rows / "wol_Latn")
  shutil.rmtree(rows / "hin_Deva")
  assert pretrain(data, tmp_path / "run", *two, "--config.steps=3") == 0


def test_a_run_begins_from_a_hugging_face_folder_of_the_same_ids(data, whole, tmp_path, capsys):
  from tiny_aya_jax.data import tokenizer
  from tiny_aya_jax.export import huggingface
  import ml_collections

  ours = tokenizer.load(data / "tokenizer.model")
  params, meta = checkpoint.restore_params(whole)
  folder = tmp_path / "hf"
  huggingface.write(folder, params, ml_collections.ConfigDict(meta["model"]), ours)
  more = (f"--config.init_from={folder}", "--config.steps=1", "--config.schedule.peak=0.0",
          "--config.schedule.warmup_steps=0")
  assert pretrain(data, tmp_path / "run", *more) == 0
  assert prints(tmp_path / "run")["params"] == prints(whole)["params"]
  text = (folder / "tokenizer.json").read_text()
  one, other = [ours.piece(id) for id in range(300, ours.size) if ours.bytes_V[id] == 1][1:3]
  swapped = json.loads(text)
  vocab = swapped["model"]["vocab"]
  vocab[one], vocab[other] = vocab[other], vocab[one]
  (folder / "tokenizer.json").write_text(json.dumps(swapped))
  assert pretrain(data, tmp_path / "other", *more) == 65
  assert "has another tokenizer" in capsys.readouterr().err
  os.truncate(folder / "model.safetensors", 1000)
  assert pretrain(data, tmp_path / "other", *more) == 65
  assert "is not a whole safetensors file" in capsys.readouterr().err
  assert not (tmp_path / "other").exists()  # no lock, nothing: it was refused at the door


def test_show_prints_what_a_fork_sees_next(data, whole, tmp_path, capsys):
  assert call("train", "cooldown.py:tiny", tmp_path, *fields(
      data, f"--config.init_from={whole}", "--config.show=2", "--config.schedule.warmup_steps=0")) == 0
  assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("row 12")]
  assert not list(tmp_path.iterdir())


def test_a_fork_that_would_read_rows_in_another_order_is_refused(data, whole, tmp_path):
  more = (f"--config.init_from={whole}", "--config.steps=2", "--config.data.seed=9")
  assert call("train", "cooldown.py:tiny", tmp_path, *fields(data, *more)) == 65


def test_bits_per_byte_are_measured_per_language_and_fall(whole):
  rows = [row for row in run.read_lines(whole / "metrics.jsonl") if "evaluation" in row]
  assert [row["step"] for row in rows] == [0, 8]
  assert rows[0]["evaluation"].keys() == {"deu_Latn", "tur_Latn", "hin_Deva", "wol_Latn"}
  assert rows[1]["summary"]["mean"] < rows[0]["summary"]["mean"]
  losses = [row for row in run.read_lines(whole / "metrics.jsonl") if "loss" in row]
  assert sum(entry["tokens"] for entry in losses[0]["languages"].values()) == losses[0]["tokens"]


def test_run_json_and_config_text_say_what_ran(whole):
  record = json.loads((whole / "run.json").read_text())
  assert record["versions"]["jax"] == jax.__version__ and "D: 16" in record["config"]
  assert "D: 16" in (whole / "config.txt").read_text()


@pytest.fixture(scope="module")
def step_inputs(cfg):
  from conftest import random_batch, random_params

  from tiny_aya_jax.model.transformer import TinyAya

  batch = random_batch(cfg.V, ((7, 13), (20,), (1, 2, 9), (11, 6, 3)), 20, seed=3)
  batch["source_B"] = np.array([0, 1, 1, 2], np.int32)
  batch["vote_P"] = np.zeros(1, np.int32)
  loss = functools.partial(step.next_token_loss, model=TinyAya(cfg),
                           config=ml_collections.ConfigDict(dict(chunk=8, z_loss=1e-4)))
  config = run.load_config(str(ROOT / "experiments/pretrain.py")).optimizer
  tx = optimizer.adamw(config, lambda step: 1e-2)
  params = random_params(cfg, seed=1)
  state = dict(step=jnp.int32(0), params=params, optimizer=tx.init(params), guard=guard.fresh(128))
  return state, batch, loss, tx


def test_accumulation_changes_nothing_but_rounding(step_inputs):
  state, batch, loss, tx = step_inputs
  whole, one = step.train_step(state, batch, loss=loss, tx=tx, accumulate=1, sources=3, sigma=6.0)
  parts, two = step.train_step(state, batch, loss=loss, tx=tx, accumulate=2, sources=3, sigma=6.0)
  np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
  np.testing.assert_allclose(one["loss_S"], two["loss_S"], rtol=1e-5)
  np.testing.assert_allclose(one["grad_norm"], two["grad_norm"], rtol=1e-4)
  assert float(one["count"]) == batch["weight_BT"].sum()


def test_a_first_moment_in_bfloat16_stays_within_a_thousandth_of_the_loss(step_inputs):
  state, batch, loss, _ = step_inputs
  config = run.load_config(str(ROOT / "experiments/pretrain.py")).optimizer
  losses = {}
  for dtype in run.CHOICES["dtype"]:
    config.adamw.mu_dtype = dtype
    tx = optimizer.adamw(config, lambda step: 1e-2)
    now = state | dict(optimizer=tx.init(state["params"]))
    advance = jax.jit(functools.partial(step.train_step, loss=loss, tx=tx, accumulate=1, sources=3, sigma=6.0))
    reports = []
    for _ in range(6):
      now, report = advance(now, batch)
      reports.append(float(report["loss"]))
    losses[dtype] = reports
    adam = now["optimizer"][1][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
  assert losses["float32"][-1] < 0.9 * losses["float32"][0] and losses["float32"] != losses["bfloat16"]
  np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=1e-3)


def test_a_run_goes_on_with_another_first_moment_only_if_that_is_accepted(data, whole, tmp_path, capsys):
  more = ("--config.accumulate=2", "--config.optimizer.adamw.mu_dtype=bfloat16")
  assert pretrain(data, whole, "--config.steps=9", *more) == 65
  assert "another optimizer" in capsys.readouterr().err
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  assert pretrain(data, tmp_path, "--config.steps=9", "--config.data.accept_change=True", *more) == 0
  assert pretrain(data, tmp_path, "--config.steps=10", *more) == 0
  assert saved.steps(tmp_path)[-1] == 10 and checkpoint.verify(tmp_path) > 20
  assert pretrain(data, tmp_path, "--config.steps=10", "--config.optimizer.adamw.mu_dtype=float16") == 65
  assert "unknown config.optimizer.adamw.mu_dtype 'float16'" in capsys.readouterr().err


def test_a_checkpoint_older_than_a_field_had_all_that_there_was_before_it():
  facts = begin.facts(run.load_config(f"{ROOT / 'experiments/pretrain.py'}:tiny"))
  older = json.loads(json.dumps(facts))
  del older["matmul"], older["optimizer"]["adamw"]["mu_dtype"]
  assert begin.trained(dict(run=older)) == begin.trained(dict(run=facts)) == facts


def test_weight_decay_spares_the_embedding_and_the_norms(step_inputs):
  mask = optimizer.decay_mask(step_inputs[0]["params"])
  flat = {path[-1].key: decayed for path, decayed in jax.tree_util.tree_leaves_with_path(mask)}
  assert not flat["embedding_VD"] and not flat["norm_D"]
  assert all(flat[name] for name in ("q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "down_FD"))


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_warm_up_reach_their_peak_and_end_at_final(shape):
  config = run.load_config(str(ROOT / "experiments/pretrain.py")).schedule
  config.update(shape=shape, peak=1.0, final=0.1, warmup_steps=10, decay_steps=20)
  rate = optimizer.schedule(config, steps=100, start=1000)
  values = [float(rate(1000 + step)) for step in range(101)]
  np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
  assert values[10] == 1.0 and np.isclose(values[100], 0.1)
  assert all(later <= earlier + 1e-6 for earlier, later in zip(values[9:], values[10:]))
  if shape == "wsd":
    assert values[80] == 1.0 and np.isclose(values[90], 0.55)
  if shape == "cosine":
    assert np.isclose(values[55], 0.55)


def test_a_flipped_bit_is_noticed(whole, tmp_path):
  shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
  path = saved.find(tmp_path)
  files = [file for file in (path / "params").rglob("d/*") if file.is_file()]
  largest = max(files, key=lambda file: file.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1 << 3
  largest.write_bytes(content)
  with pytest.raises(run.Refused):
    checkpoint.verify(tmp_path)
  assert checkpoint.verify(whole) > 20


def test_fingerprints_are_the_same_on_every_mesh(cfg, params):
  expected = checkpoint.fingerprints(params)
  for sizes in (dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=8, fsdp=1)):
    mesh = axes.mesh(**sizes)
    placed = jax.device_put(params, axes.shardings(mesh, params))
    assert checkpoint.fingerprints(placed) == expected


def test_the_same_run_on_another_mesh_gives_the_same_loss(data, whole, tmp_path):
  assert pretrain(data, tmp_path, "--config.steps=4", "--config.accumulate=2",
                  "--config.mesh.fsdp=2", "--config.mesh.data=2", "--config.mesh.tensor=2") == 0
  ours = [row["loss"] for row in run.read_lines(tmp_path / "metrics.jsonl") if "loss" in row]
  theirs = [row["loss"] for row in run.read_lines(whole / "metrics.jsonl") if "loss" in row]
  np.testing.assert_allclose(ours, theirs[: len(ours)], rtol=1e-5)


def test_a_batch_that_does_not_divide_over_devices_is_refused(data, tmp_path, capsys):
  assert pretrain(data, tmp_path, "--config.steps=4", "--config.data.batch=12") == 65
  assert "do not split over 8 devices" in capsys.readouterr().err
  assert not saved.steps(tmp_path)


def test_show_prints_rows_and_trains_nothing(data, tmp_path, capsys):
  assert pretrain(data, tmp_path / "shown", "--config.show=3") == 0
  shown = capsys.readouterr().out
  assert shown.count("/embedded") >= 3 or shown.count("_Latn") + shown.count("_Deva") >= 3
  assert not (tmp_path / "shown").exists()


def test_an_evaluation_within_training_says_what_its_mean_hides(whole):
  first, *_, last = [row for row in run.read_lines(whole / "metrics.jsonl") if "evaluation" in row]
  assert first["step"] == 0 and first["summary"]["improved"] is None
  values = {code: entry["bits_per_byte"] for code, entry in last["evaluation"].items()}
  before = {code: entry["bits_per_byte"] for code, entry in first["evaluation"].items()}
  assert last["summary"]["improved"] == np.mean([values[code] < before[code] for code in values])
  assert list(last["summary"]["worst"])[0] == max(values, key=values.get)
  assert last["summary"]["by"]["region"].keys() == {"Europe", "West Asia", "South Asia", "Africa"}
  assert last["summary"]["deviation"] == pytest.approx(np.std(list(values.values())))


def test_epochs_are_steps_of_the_rows_that_are_drawn_and_steps_win(data, tmp_path, capsys):
  rows = sum(manifest["rows"] for manifest in loader.read_manifests(data / "rows/train")
             if manifest["source"] == "instruct")

  def shown(*more):
    code = call("train", "sft.py:tiny_global", tmp_path, *fields(
        data, "--config.data.mixture.within=(('instruct', 1.0),)", "--config.show=1",
        "--config.init_what=params", "--config.epochs=3.0", *more))
    said = capsys.readouterr()
    return code, said.out + said.err

  code, said = shown("--config.steps=7", "--config.schedule.warmup_steps=0")
  assert code == 0 and "epochs are" not in said
  config = run.load_config(str(ROOT / "experiments/sft.py") + ":global")
  assert config.steps is None and config.epochs == 3.0
  manifests = loader.read_manifests(data / "rows/train")
  config.data.batch, config.data.mixture.within = 16, (("instruct", 1.0),)
  config.steps = 1
  assert begin.steps(config, manifests) == -(-3 * rows // 16)
  config.data.mixture.kind = "unimaxx"
  with pytest.raises(run.Refused, match="did you mean 'unimax'"):
    begin.steps(config, manifests)
