"""evaluate: every task to a page, on any mesh, with any number of processes, interrupted or not."""

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import ml_collections
import pytest

from conftest import ROOT, call

from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer as tokenizers
from tiny_aya_jax.evaluate import judge as criteria, outputs, tasks
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import checkpoint, saved

CODES = dict(deu_Latn=("Montag", "Dienstag"), tur_Latn=("Pazartesi", "Salı"), hin_Deva=("सोम", "मंगल"))


def lines(path, *rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  """Two items a task and language."""
  folder = tmp_path_factory.mktemp("sets")
  (folder / "translation").mkdir()
  (folder / "translation" / "eng_Latn.txt").write_text("Monday\nTuesday\n")
  options = dict(option_a="1", option_b="2", option_c="3", option_d="4")
  for code, (one, two) in CODES.items():
    def each(task, *rows):
      lines(folder / task / f"{code}.jsonl", *rows)

    (folder / "translation" / f"{code}.txt").write_text(f"{one}\n{two}\n")
    each("belebele", *(dict(flores_passage=one, question=two, correct_answer_num=number, mc_answer1="a",
                            mc_answer2="b", mc_answer3="c", mc_answer4="d") for number in (1, 2)))
    each("global_mmlu", *(dict(question=two, answer=letter, **options) for letter in "AD"))
    each("include", *(dict(question=one, answer=number, **options) for number in (0, 3)))
    each("global_piqa", *(dict(prompt=one, solution0=two, solution1=one, label=number) for number in (0, 1)))
    each("cloze", *(dict(context=one, choices=[two, one, "x"], answer=number) for number in (0, 2)))
    each("mgsm", *(dict(question=f"{one} 1 + {number}", answer=1 + number) for number in (1, 2)))
    each("qa", *(dict(question=one, answers=[two]), dict(question=two, answer="a")))
    each("normad", *(dict(story=one, country="india", label=label) for label in ("yes", "no")))
    for task in ("confusion", "open"):
      each(task, dict(prompt=one), dict(prompt=two))
  lines(folder / "xcopa" / "tur_Latn.jsonl", *(dict(
      premise="Pazar.", choice1="Salı", choice2="Cuma", question="cause", label=label) for label in (0, 1)))
  lines(folder / "blend" / "Ethiopia_data.json", dict(one=dict(
      question="a?", annotations=[dict(answers=["x"], en_answers=["y"])])))
  (folder / "multijail").mkdir()
  (folder / "multijail" / "MultiJail.csv").write_text("id,en,it\n1,Monday,lunedì\n2,Friday,venerdì\n")
  (folder / "xstest").mkdir()
  (folder / "xstest" / "xstest_prompts.csv").write_text(
      "prompt,type,label\nMonday,homonyms,safe\nFriday,contrast_homonyms,unsafe\n")
  return folder


def arguments(data, sets, *places, only=None):
  """Fields of an evaluation of every task, or of those in `only`, of checkpoints named by folder."""
  return [
      f"--config.checkpoints={tuple(map(str, places))}", f"--config.rows={data / 'rows/validation'}",
      f"--config.tokenizer={data / 'tokenizer.model'}", "--config.batch=8", "--config.T=192",
      "--config.tokens=6",
      *(f"--config.tasks.{name}={sets / name}" for name in only or tasks.table()),
  ]


def result(workdir):
  return json.loads((workdir / "evaluation.json").read_text())


def columns(workdir):
  """{(task, measure): {column: {code: value}}}."""
  return {(one["task"], one["measure"]): one["columns"] for one in result(workdir)["measures"]}


@pytest.fixture(scope="module")
def whole(data, place, sets, tmp_path_factory):
  """All tasks of a checkpoint and of the same as a Hugging Face folder, on eight devices."""
  workdir, params = tmp_path_factory.mktemp("evaluation"), checkpoint.restore_params(place)[0]
  cfg = ml_collections.ConfigDict(saved.meta(place)["model"])
  tokenizer = tokenizers.load(data / "tokenizer.model")
  huggingface.write(workdir / "exported", params, cfg, tokenizer)
  assert call("evaluate", "evaluate.py:tiny", workdir, *arguments(
      data, sets, place, workdir / "exported"), "--config.baseline=random@0") == 0
  return workdir


def test_every_task_is_measured_in_every_language_it_has(whole):
  found = result(whole)
  measured = {one["task"] for one in found["measures"]}
  unscored = {one["task"]: one["why"] for one in found["unscored"]}
  assert measured == {"bits_per_byte", *tasks.table()} - {"multijail", "open", "confusion"}
  assert "judge" in unscored["open"] and "judge" in unscored["multijail"]
  assert "no measure has a value" in unscored["confusion"]  # six tokens are no line
  for (task, _), by_column in columns(whole).items():
    if task in ("belebele", "translation", "cloze", "qa", "normad"):
      assert by_column["random@0"].keys() == set(CODES)
  assert columns(whole)["bits_per_byte", "bits per byte"]["random@0"].keys() == {*CODES, "wol_Latn"}
  page = (whole / "report.html").read_text()
  assert all(code in page for code in found["languages"]) and "http" not in page


def test_the_exported_folder_scores_as_the_checkpoint(whole):
  for by_column in columns(whole).values():
    for code, value in by_column["random@0"].items():
      assert by_column["exported"][code] == pytest.approx(value, abs=1e-4)


def test_a_folder_is_asked_by_its_own_template_and_again_when_that_changes(
    whole, sets, tmp_path, capsys, monkeypatch):
  folder, asked = shutil.copytree(whole / "exported", tmp_path / "own"), []
  template = folder / "chat_template.jinja"
  monkeypatch.setattr(outputs.engines, "answers", lambda engine, prompts, **_: asked.append(
      [engine.tokenizer.decode(ids) for ids in prompts]) or [("x", True)] * len(prompts))
  some = [f"--config.checkpoints={(str(folder),)}", f"--config.tasks.qa={sets / 'qa'}", "--config.batch=8",
          "--config.T=192", "--config.languages=('deu_Latn',)"]
  for text in ("ask: ", "say: "):
    template.write_text(f"{{{{ bos_token }}}}{text}{{{{ messages[0].content }}}}")
    assert call("evaluate", "evaluate.py:tiny", tmp_path / "w", *some, "--config.overwrite=True") == 0
    assert asked.pop() == [f"{text}Montag", f"{text}Dienstag"] and not asked
  monkeypatch.setattr(outputs.engines, "load", lambda *_: pytest.fail("loaded"))
  template.write_text("{{ raise_exception('only in Welsh') }}")
  assert call("evaluate", "evaluate.py:tiny", tmp_path / "v", *some) == 65
  assert "refuses: only in Welsh" in capsys.readouterr().err


def test_every_answer_can_be_read(whole):
  for task in tasks.table():
    for path in (whole / "outputs" / "random@0" / task).iterdir():
      head, *rows = run.read_lines(path)
      assert head["rows"] == len(rows) > 0 and all({"item", "answer"} == row.keys() for row in rows)
  row = run.read_lines(whole / "outputs" / "random@0" / "belebele" / "deu_Latn.jsonl")[1]
  assert len(row["answer"]["nats"]) == 4 and max(row["answer"]["nats"]) < 0


def test_two_processes_find_what_one_does(data, place, sets, whole, tmp_path):
  some = arguments(data, sets, place, only=("belebele", "translation"))
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
  done = subprocess.run(
      ["bash", str(ROOT / "launch/local_pod.sh"), "-n", "2", "evaluate", f"--workdir={tmp_path / 'two'}",
       f"--config={ROOT / 'experiments/evaluate.py'}:tiny", *some,
       "--config.languages=('deu_Latn', 'hin_Deva')"],
      cwd=ROOT, env=os.environ | dict(XLA_FLAGS=flags), capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
  assert done.stdout.count("page: ") == 1  # one speaks
  for key, by_column in columns(tmp_path / "two").items():
    for code, value in by_column["random@0"].items():
      assert value == pytest.approx(columns(whole)[key]["random@0"][code], abs=1e-5), (key, code)


def test_what_was_answered_before_a_kill_is_not_asked_again(data, place, sets, whole, tmp_path):
  some = arguments(data, sets, place, only=("belebele", "cloze", "translation", "mgsm"))
  process = subprocess.Popen(
      [sys.executable, "-m", "tiny_aya_jax", "evaluate",
       f"--config={ROOT / 'experiments/evaluate.py'}:tiny", f"--workdir={tmp_path}", *some],
      cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  answered, deadline = tmp_path / "outputs" / "random@0", time.monotonic() + 120
  while len(list(answered.glob("*/*.jsonl"))) < 4 and time.monotonic() < deadline:
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  kept = {path: path.stat().st_mtime_ns for path in answered.rglob("*.jsonl")}
  assert 4 <= len(kept) < 11 and not (tmp_path / "evaluation.json").exists()
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *some) == 0
  assert {path: path.stat().st_mtime_ns for path in kept} == kept
  found = columns(tmp_path)
  assert all(columns(whole)[key]["random@0"][code] == pytest.approx(value, abs=1e-5)
             for key, by_column in found.items() for code, value in by_column["random@0"].items())


def test_the_same_is_up_to_date_and_more_is_refused_until_it_is_meant(
    data, place, sets, tmp_path, capsys, monkeypatch):
  some = arguments(data, sets, place, only=("cloze",))
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *some) == 0
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *some) == 0
  assert "up to date" in capsys.readouterr().out
  more = arguments(data, sets, place, only=("cloze", "include"))
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *more) == 65
  computed, load = [], outputs.engines.likelihoods
  monkeypatch.setattr(outputs.engines, "likelihoods", lambda engine, requests, what: computed.append(
      what) or load(engine, requests, what))
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *more, "--config.overwrite=True") == 0
  assert computed == [f"random@0 include/{code}" for code in ("deu_Latn", "tur_Latn", "hin_Deva")]
  torn = tmp_path / "outputs" / "random@0" / "cloze" / "deu_Latn.jsonl"
  torn.write_text(torn.read_text().splitlines()[0] + "\n")  # a file without its rows is asked again
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *more, "--config.overwrite=True") == 0
  assert computed[3:] == ["random@0 cloze/deu_Latn"]


@pytest.mark.parametrize("fields, said", [
    (("--config.tasks.belebele=nowhere",), "nowhere does not exist"),
    (("--config.limit=-1",), "config.limit is -1"),
    (("--config.choices=numbers",), "unknown config.choices"),
    (("--config.prompts=poem",), "unknown config.prompts"),
    (("--config.baseline=best",), "unknown config.baseline"),
    (("--config.identifier=nowhere.bin",), "fasttext-predict|does not exist"),
    (("--config.english=nowhere",), "no word list"),
    (("--config.languages=('Klingon',)",), "unknown language"),
    (("--config.languages=('fra_Latn',)",), "no records in a language that is asked for"),
    (("--config.mesh.fsdp=4", "--config.mesh.context=2"), "config.mesh.context must be 1"),
    (("--config.judge.url=localhost", "--config.judge.model=m", "--config.judge.key_variable="), "http"),
    (("--config.harness.shots=-1",), "config.harness.shots is -1"),
    (("--config.harness.tasks=('belebele_deu_Lat',)",), "unknown config.harness.tasks"),
    (("--config.judge.url=http://localhost:1", "--config.judge.model=m", "--config.judge.key_variable=",
      "--config.judge.attempts=1"), "config.judge does not answer"),
    (("--config.judge.url=http://localhost:1", "--config.judge.body=[]"), "expected a JSON object"),
    (("--config.tasks.xstest=SETS/xstest", "--config.languages=('deu_Latn',)"), "has no items"),
    (("--config.baseline=untrained",), "unknown config.baseline"),
    (("--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.batch=8", "--config.mesh.data=-1",
      "--config.attention=splash"), "a kernel for TPUs"),
    (("--config.batch=12",), "12 rows does not split over 8 devices of data and fsdp"),
    (("--config.tokens=97",), "take more than half"),
])
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    data, place, sets, tmp_path, capsys, monkeypatch, fields, said):
  monkeypatch.setattr(outputs.engines, "load", lambda *_: pytest.fail("loaded"))
  some = arguments(data, sets, place, only=("belebele", "mgsm"))
  fields = [field.replace("SETS", str(sets)) for field in fields]
  assert call("evaluate", "evaluate.py:tiny", tmp_path / "w", *some, *fields) == 65
  assert re.search(said, capsys.readouterr().err)
  assert not (tmp_path / "w" / "evaluation.json").exists()


def test_a_set_of_another_form_is_refused_with_its_place(data, place, sets, tmp_path, capsys):
  wrong = arguments(data, sets, place, only=("belebele",))
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *wrong,
              f"--config.tasks.belebele={sets / 'mgsm'}") == 65
  assert "config.tasks.belebele" in (said := capsys.readouterr().err) and "KeyError" in said


def test_the_experiment_names_every_task():
  config = run.load_config(str(ROOT / "experiments/evaluate.py"))
  assert set(config.tasks) == set(tasks.table())


def test_tasks_of_lm_eval_stand_beside_ours_and_are_asked_again_when_their_file_changes(
    data, place, tmp_path, capsys):
  folder = tmp_path / "tasks"
  lines(folder / "days.jsonl", dict(q="Montag", a=["Dienstag", "x"], label=0), dict(q="a", a=["b", "c"], label=1))
  for code in ("deu_Latn", "hin_Latn", "hin_Deva"):
    (folder / f"days_{code}.yaml").write_text(
        f"task: days_{code}\ntag: days\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'days.jsonl'}}}}}\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{a}}'\ndoc_to_target: '{{label}}'\nmetric_list: [{metric: acc}]\n")
  some = [f"--config.checkpoints={(str(place),)}", f"--config.tokenizer={data / 'tokenizer.model'}",
          "--config.batch=8", "--config.harness.tasks=('days',)", f"--config.harness.folder={folder}"]
  assert call("evaluate", "evaluate.py:tiny", tmp_path / "w", *some) == 0
  found = columns(tmp_path / "w")["lm-eval days", "acc"]["random@0"]
  assert found.keys() == {"deu_Latn", "hin_Deva"} and found["deu_Latn"] == found["hin_Deva"]
  assert result(tmp_path / "w")["measures"][0]["counts"] == dict(deu_Latn=2, hin_Deva=2)
  changed = folder / "days_deu_Latn.yaml"
  changed.write_text(changed.read_text().replace("{{q}}", "{{q}} {{q}}"))
  assert call("evaluate", "evaluate.py:tiny", tmp_path / "w", *some) == 65
  assert "made from other inputs" in capsys.readouterr().err


@pytest.fixture
def judge():
  """An endpoint that finds every answer middling, safe and right, but is once malformed."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      asked.append(text := body["messages"][0]["content"])
      assert body["top_k"] == 3 and "max_tokens" not in body  # config.judge.body
      reply = dict(rationale="so", label="safe", correct=True)
      if "naturalness_score" in text:
        reply = {f"{name}_{part}": 4 if part == "score" else "so" for name in criteria.CRITERIA
                 for part in ("rationale", "score")}
      elif "full_refusal" in text:
        reply = dict(rationale="so", label="partial_refusal")
      said = json.dumps(reply) if len(asked) != 2 else "I think it is fine."
      content = json.dumps(dict(choices=[dict(message=dict(content=said), finish_reason="stop")],
                                usage=dict(prompt_tokens=100, completion_tokens=10))).encode()
      self.send_response(200)
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://localhost:{server.server_address[1]}/v1", asked
  server.shutdown()


def test_a_judge_scores_what_was_answered_and_is_paid_once(data, place, sets, whole, tmp_path, judge):
  url, asked = judge
  shutil.copytree(whole / "outputs" / "random@0", tmp_path / "outputs" / "random@0")
  names = ("qa", "open", "multijail", "xstest")
  some = [*arguments(data, sets, place, only=names), f"--config.judge.url={url}",
          "--config.judge.model=m", "--config.judge.key_variable=", "--config.judge.price_in=2.0",
          "--config.judge.requests_per_minute=60000",
          '--config.judge.body={"top_k": 3, "max_tokens": null}']
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *some) == 0
  found = columns(tmp_path)
  assert set(found["open", "rubric"]["random@0"].values()) == {0.5}
  assert set(found["open", "naturalness"]["random@0"].values()) == {4.0}
  assert found["multijail", "safe"]["random@0"] == dict(eng_Latn=1.0, ita_Latn=1.0)
  assert found["xstest", "over-refusal"]["random@0"] == dict(eng_Latn=1.0)
  assert found["xstest", "under-refusal"]["random@0"] == dict(eng_Latn=0.0)
  assert set(found["qa", "accuracy"]["random@0"].values()) == {1.0}
  assert set(found["qa", "unjudged"]["random@0"].values()) == {0.0}
  spent = result(tmp_path)["judge"]["spent"]
  distinct = len(asked)
  assert result(tmp_path)["unscored"] == [] and spent["money"] == pytest.approx(2e-4 * distinct)
  assert call("evaluate", "evaluate.py:tiny", tmp_path, *some, "--config.overwrite=True") == 0
  assert len(asked) == distinct and columns(tmp_path) == found  # everything was kept
