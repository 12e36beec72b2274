"""The main job, as a newcomer runs it: every stage of pipeline.sh tiny, and again, and elsewhere."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from tiny_aya_jax import run
from tiny_aya_jax.sweep import protocol
from tiny_aya_jax.train import saved

ROOT = pathlib.Path(__file__).parents[1]


def pipeline(out):
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
  return subprocess.run(
      ["bash", "launch/pipeline.sh", "tiny"], cwd=ROOT, env=environment | dict(OUT=str(out)),
      capture_output=True, text=True, check=False,
  )


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pipeline")
  done = pipeline(folder)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  (folder / "stdout").write_text(done.stdout)
  return folder


def test_it_says_where_everything_is(out):
  last = (out / "stdout").read_text().splitlines()[-5:]
  names = ("clean.html", "fairness.html", "report.html", "checkpoints", "huggingface")
  for line, name in zip(last, names):
    assert line.endswith(name) and pathlib.Path(line.split()[-1]).exists()


def test_clean_keeps_nine_documents_in_ten_of_every_language(out):
  rows = json.loads((out / "text" / "clean.json").read_text())["languages"]
  assert len(rows) == 70
  assert min(row["kept_documents"] / row["documents"] for row in rows.values()) >= 0.9


def test_every_language_is_learned_and_reported(out):
  result = json.loads((out / "report" / "evaluation.json").read_text())
  bits, days, *_ = result["measures"]
  columns = bits["columns"]
  models = ["sft", "global", "earth", "fire", "water"]
  assert list(columns) == ["untrained", "pretrain", "cooldown", *models]
  assert all(len(column) == 70 for column in columns.values())
  assert all(columns["cooldown"][code] < columns["untrained"][code] - 1 for code in columns["cooldown"])
  assert bits["summary"]["cooldown"]["mean"] < bits["summary"]["pretrain"]["mean"]
  assert bits["summary"]["cooldown"]["improved"] > 0.9 and days["task"] == "cloze"
  assert days["chance"] == 0.25 and set(days["counts"].values()) == {10} and len(days["counts"]) == 70
  page = (out / "report" / "report.html").read_text()
  assert all(code in page for code in result["languages"]) and "http" not in page


def test_a_sweep_trains_one_trunk_for_both_cooldowns_and_reads_what_it_planned(out):
  result = json.loads((out / "sweep" / "sweep.json").read_text())
  began = [row for row in run.read_lines(out / "sweep" / "ledger.jsonl") if row["event"] == "began"]
  assert [row["stage"] for row in began] == ["trunk", "cooldown", "cooldown"]
  assert [trial["state"] for trial in result["trials"]] == ["done", "done"]
  folders = {row["trial"]: out / "sweep" / "trials" / row["key"][:12] for row in began if row["stage"] == "cooldown"}
  for trial in result["trials"]:
    plan = saved.data(folders[trial["trial"]] / "checkpoints" / "30")["plan"]
    drawn, sizes = protocol.amounts(plan, 30 * 16)
    assert trial["tokens"] == pytest.approx(drawn) and result["sizes"] == pytest.approx(sizes)
    assert all(source["rows"] < source["of"] for source in plan["sources"] if source["of"] > 20)
    assert len(trial["bits_per_byte"]) == 70
  assert result["trials"][0]["bits_per_byte"] != result["trials"][1]["bits_per_byte"]
  page = (out / "sweep" / "sweep.html").read_text()
  assert all(code in page for code in result["languages"]) and "http" not in page


def test_the_model_card_shows_the_evaluation(out):
  card = (out / "huggingface" / "README.md").read_text()
  assert "| bits_per_byte | bits per byte |" in card and "(evaluation.html)" in card
  page = (out / "huggingface" / "evaluation.html").read_text()
  assert page == (out / "report" / "report.html").read_text()


@pytest.mark.parametrize("name", ["sft", "sft_earth", "sft_fire", "sft_water"])
def test_sft_learns_the_answers(out, name):
  losses = [row["loss"] for row in run.read_lines(out / name / "metrics.jsonl") if "loss" in row]
  assert losses[-1] < losses[0]


def test_preferences_begin_at_log_2_and_the_margin_of_held_out_pairs_grows(out):
  rows = [row for row in run.read_lines(out / "global" / "metrics.jsonl") if "evaluation" in row]
  first, last = rows[0]["summary"], rows[-1]["summary"]
  assert first["loss"] == pytest.approx(np.log(2), abs=1e-4) and abs(first["margin"]) < 1e-3
  assert last["margin"] > 0.02 and last["loss"] < first["loss"] and last["pairs"] > 500


@pytest.mark.parametrize("region", ["earth", "fire", "water"])
def test_a_region_is_merged_with_global_by_what_was_measured(out, region):
  found = json.loads((out / region / "merge.json").read_text())
  assert [pathlib.Path(one["path"]).parents[1].name for one in found["checkpoints"]] == ["global", f"sft_{region}"]
  scores = {row["candidate"]: row["objective"] for row in found["selection"]["candidates"]
            if row["refused"] is None}
  assert set(found["scores"]) == {"linear 0.5", "slerp 0.5", "ties 0.5"}
  assert max(scores, key=scores.get) == found["selection"]["choice"]


def test_running_it_again_trains_nothing_and_changes_nothing(out):
  before = {path: path.stat().st_mtime_ns for path in (out / "huggingface").iterdir()}
  steps = sorted((out / "pretrain" / "checkpoints").iterdir())
  started = time.monotonic()
  done = pipeline(out)
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.count("up to date") >= 5
  assert "step 20/" not in done.stdout
  assert {path: path.stat().st_mtime_ns for path in (out / "huggingface").iterdir()} == before
  assert sorted((out / "pretrain" / "checkpoints").iterdir()) == steps
  assert time.monotonic() - started < 300


def test_an_export_that_lost_a_part_is_made_again(out):
  weights = out / "huggingface" / "model.safetensors"
  whole = weights.read_bytes()
  weights.write_bytes(whole[:1000])
  call = ["-m", "tiny_aya_jax", "export", "--config=experiments/export.py:tiny", f"--workdir={out}",
          f"--config.checkpoint={out / 'global'}", f"--config.tokenizer={out / 'tokenizer.model'}",
          f"--config.report={out / 'report'}", "--config.gguf.kinds=('Q8_0',)"]
  done = subprocess.run([sys.executable, *call], cwd=ROOT, check=False,
                        capture_output=True, text=True)
  assert done.returncode == 0 and "read back" in done.stdout, done.stderr[-2000:]
  assert weights.read_bytes() == whole
  (kept,) = out.glob("huggingface.*.superseded")  # nothing that may be somebody's is deleted
  assert (kept / "model.safetensors").stat().st_size == 1000


def test_transformers_loads_the_folder_and_says_the_same(out):
  torch = pytest.importorskip("torch", reason="the parity extra; launch/check.sh installs it")
  transformers = pytest.importorskip("transformers", reason="the parity extra")
  import jax

  from tiny_aya_jax.data import chat, tokenizer as tokenizers
  from tiny_aya_jax.export import huggingface
  from tiny_aya_jax.model import decode

  folder = out / "huggingface"
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = tokenizers.load(out / "tokenizer.model")
  messages = [dict(role="user", content="Freitag, Samstag,")]
  ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
  assert ids == chat.prompt(ours, messages)
  params, cfg = huggingface.read(folder)
  (reply,) = decode.generate(jax.device_put(params), cfg, [ids], steps=12)
  with torch.no_grad():
    full = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False,
                          eos_token_id=-1, pad_token_id=0)
  np.testing.assert_array_equal(full[0, len(ids):].numpy(), reply)
  parity = json.loads((folder / "parity.json").read_text())
  assert parity["largest_logit_difference"] < 1e-4 and parity["tensors"] == 4 * 8 + 2
  assert {"numpy", "transformers"} <= {name for name, one in parity["readers"].items() if isinstance(one, dict)}
  assert parity["rows"][0] > 2 * cfg.window and parity["tokenizer"]["languages"] == 70
  assert 0 < parity["gguf"]["Q8_0"]["rounding"] < 0.01 and (folder / "huggingface-Q8_0.gguf").exists()
  assert "| Unicode-3.0 | 70 |" in (folder / "README.md").read_text()


def test_a_wrong_call_is_refused():
  for arguments in ([], ["huge"], ["small", "/nowhere/at/all"]):
    done = subprocess.run(["bash", "launch/pipeline.sh", *arguments], cwd=ROOT, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 65 and not done.stdout
