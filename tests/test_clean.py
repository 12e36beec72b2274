"""clean: what it drops and why, that it keeps the rest, and that a killed run ends the same."""

import gzip
import json
import os
import pathlib
import stat
import subprocess
import sys
import time
import unicodedata

import pytest

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import text, toy

pytest.importorskip("datatrove", reason="the data extra; launch/check.sh installs it")

from datatrove.data import Document

from tiny_aya_jax.data import clean, filters, identify

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "experiments" / "clean.py")


def config(**values):
  c = run.load_config(CONFIG)
  values = dict(workers=1) | values
  run.override(c, {name.replace("__", "."): value for name, value in values.items()})
  return c


def some(code, count=30):
  return list(toy.documents(code, "train"))[:count]


def write(path, documents, **fields):
  path.parent.mkdir(parents=True, exist_ok=True)
  records = [json.dumps(dict(fields, text=document), ensure_ascii=False) for document in documents]
  path.write_text("\n".join(records) + "\n", encoding="utf-8")


def cleaned(source, workdir, **values):
  """-> (clean.json, {code: texts})."""
  clean.main(config(text=str(source), **values), workdir)
  record = run.read_json(workdir / "clean.json", "report")
  kept = {}
  for name in record["files"]:
    with gzip.open(workdir / name, "rt", encoding="utf-8") as file:
      kept.setdefault(name.split("/")[0], []).extend(json.loads(line) for line in file)
  return record, kept


def reasons(record, code):
  dropped = record["languages"][code]["dropped"]
  return {reason: found["documents"] for reason, found in dropped.items() if "documents" in found}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  """A folder with everything wrong that text can have, cleaned."""
  source = tmp_path_factory.mktemp("raw")
  french, german = some("fra_Latn", 60), some("deu_Latn")
  german = [" ".join(german[n : n + 5]) for n in range(0, 30, 5)]
  long = french[0] + " " + french[1] + " " + french[2]
  write(source / "fra_Latn" / "web.jsonl", french[3:57], url="https://example.org/a",
        licence="CC0-1.0")
  with open(source / "fra_Latn" / "web.jsonl", "ab") as file:
    file.write(b'{"text": "caf\xe9"}\n')
    file.write(b'{"text": "half a pair: \\ud800"}\n')
    file.write(b'{"text": "cut sh\n')
    file.write(b'{"title": "no text"}\n{"text": ""}\n{"text": " \\n "}\n')
  write(source / "fra_Latn" / "more.jsonl", [
      *(german[:3]), long, long, long.replace("Paris", "Lyon") + ".", french[3],
      french[57] + "\0\ufeff" + french[58] + "\x07", "\x07\0",
      "Écrivez à jean.dupont@exemple.fr. " + french[59]])
  write(source / "fra_Latn" / "blocked.jsonl", some("fra_Latn", 80)[61:63],
        url="https://www.BAD.com/x")
  (source / "tha_Thai").mkdir()
  (source / "tha_Thai" / "a.txt").write_bytes(
      b"\xef\xbb\xbf" + "\r\n\r\n".join([*some("tha_Thai"), *german[3:5]]).encode())
  write(source / "wol_Latn.jsonl", some("wol_Latn")[:20] + german[5:6])
  write(source / "code" / "a.jsonl", ["def f(x):\n  return x  # {[()]}\n" * 3, "0 1 1 2 3 5 8 13"])
  write(source / "cmn_Hani.jsonl", some("cmn_Hans", 20) + some("cmn_Hant", 20))
  lists = tmp_path_factory.mktemp("lists")
  (lists / "domains").write_text("bad.com\n")
  question = unicodedata.normalize("NFD", " ".join(french[7].split()[:40]))
  (lists / "exam.jsonl").write_text(json.dumps(dict(question=question)) + "\n")
  workdir = tmp_path_factory.mktemp("clean")
  record, kept = cleaned(source, workdir, blocked=f"('{lists / 'domains'}',)",
                         test_sets=f"('{lists}/exam.jsonl',)", languages="('all', 'code')")
  return dict(record=record, kept=kept, source=source, workdir=workdir, french=french, long=long)


def test_every_reason_is_counted_and_every_document_is_kept_or_dropped(result):
  found = reasons(result["record"], "fra_Latn")
  assert found["invalid UTF-8"] == found["lone surrogate"] == found["not JSON"] == 1
  assert found["no text"] == 1 and found["language"] == 3 and found["url: domain"] == 2
  assert found["empty"] == 3
  assert found["exact duplicate"] + found["near duplicate"] == 3 and found["test set"] == 1
  for code, row in result["record"]["languages"].items():
    dropped = sum(reasons(result["record"], code).values())
    assert row["documents"] == row["kept_documents"] + dropped, code
    assert row["kept_documents"] == len(result["kept"][code])


def test_samples_show_what_was_dropped_and_why(result):
  language = result["record"]["languages"]["fra_Latn"]["dropped"]["language"]
  assert all(note.startswith("de by ") for *_, note in language["samples"])
  page = (result["workdir"] / "clean.html").read_text()
  assert "de by" in page and "url: domain" in page and "<script" not in page


def test_control_characters_go_and_addresses_are_replaced(result):
  texts = [record["text"] for record in result["kept"]["fra_Latn"]]
  assert not any(set(kept) & set("\0\x07\ufeff") for kept in texts)
  assert result["french"][57] + result["french"][58] in texts
  (masked,) = [kept for kept in texts if kept.startswith("Écrivez")]
  assert "dupont" not in masked and "@example." in masked


def test_a_byte_order_mark_and_crlf_are_no_text(result):
  texts = [record["text"] for record in result["kept"]["tha_Thai"]]
  assert texts == some("tha_Thai") and reasons(result["record"], "tha_Thai") == {"script": 2}


def test_a_language_the_identifier_cannot_see_passes_and_is_listed(result):
  assert result["record"]["without_veto"] == ["wol_Latn"]
  assert reasons(result["record"], "wol_Latn") == {}


def test_code_is_only_freed_of_copies(result):
  assert len(result["kept"]["code"]) == 2


def test_mixed_chinese_is_split_by_script(result):
  for code in ("cmn_Hans", "cmn_Hant"):
    assert [record["text"] for record in result["kept"][code]] == some(code, 20)


def test_licence_url_and_id_are_carried(result):
  (record,) = [one for one in result["kept"]["fra_Latn"] if one["text"] == result["french"][3]][:1]
  assert result["record"]["licences"]["fra_Latn/text"] == "CC0-1.0" and record["id"]
  assert sum(one.get("url") == "https://example.org/a" for one in result["kept"]["fra_Latn"]) > 40
  assert text.licence(result["workdir"], "fra_Latn", "text") == "CC0-1.0"


def test_the_other_verbs_read_what_is_left(result):
  assert set(text.languages(result["workdir"])) == set(result["kept"])
  kept = [record["text"] for record in result["kept"]["fra_Latn"]]
  assert list(text.read(result["workdir"], "fra_Latn", "text")) == kept


def test_again_it_is_up_to_date_and_other_settings_are_refused(result, capsys):
  before = (result["workdir"] / "clean.json").stat().st_mtime_ns
  record = result["record"]
  with pytest.raises(run.Refused, match="made from other inputs"):
    cleaned(result["source"], result["workdir"], margin=9)
  assert (result["workdir"] / "clean.json").stat().st_mtime_ns == before
  write(result["source"] / "fra_Latn" / "later.jsonl", some("fra_Latn", 90)[85:])
  again, kept = cleaned(result["source"], result["workdir"], overwrite=True, urls=False)
  assert len(kept["fra_Latn"]) > record["languages"]["fra_Latn"]["kept_documents"]
  clean.main(config(text=str(result["source"]), urls=False), result["workdir"])
  assert "up to date" in capsys.readouterr().out
  (result["workdir"] / again["files"][0]).unlink()
  clean.main(config(text=str(result["source"]), urls=False), result["workdir"])
  assert "is gone" in capsys.readouterr().out and (result["workdir"] / again["files"][0]).exists()


def command(source, workdir, *fields):
  return [sys.executable, "-m", "tiny_aya_jax", "clean", f"--config={CONFIG}", f"--workdir={workdir}",
          f"--config.text={source}", "--config.workers=1", *fields]


def test_a_run_that_was_killed_ends_with_the_same_bytes(tmp_path):
  for code in ("fra_Latn", "deu_Latn", "swh_Latn", "tha_Thai", "hin_Deva", "kor_Hang"):
    write(tmp_path / "raw" / f"{code}.jsonl", some(code) + some(code)[:3])
  subprocess.run(command(tmp_path / "raw", tmp_path / "whole"), cwd=ROOT, check=True,
                 capture_output=True)
  for stage, done in (("filter", 2), ("write", 1)):
    process = subprocess.Popen(command(tmp_path / "raw", tmp_path / "killed"), cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    completions = tmp_path / "killed" / ".clean.logs" / stage / "completions"
    while not completions.is_dir() or len(list(completions.iterdir())) < done:
      assert process.poll() is None, "it was over before it could be killed"
      time.sleep(0.002)
    process.kill()  # alone: what it started ends by itself
    process.wait()
    deadline = time.monotonic() + 20
    while any(str(tmp_path / "killed") in command for command in commands()):
      assert time.monotonic() < deadline, "a process outlived its call"
      time.sleep(0.1)
    with pytest.raises(run.Refused, match="is not whole"):
      text.languages(tmp_path / "killed")
  with pytest.raises(run.Refused, match="killed clean of other inputs"):
    cleaned(tmp_path / "raw", tmp_path / "killed", margin=9)
  subprocess.run(command(tmp_path / "raw", tmp_path / "killed"), cwd=ROOT, check=True,
                 capture_output=True)
  assert files(tmp_path / "killed") == files(tmp_path / "whole")


def commands():
  """The command lines of all processes."""
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      yield path.read_bytes().decode("utf-8", "replace").replace("\0", " ")
    except OSError:  # it ended
      pass


def test_two_calls_in_one_workdir_do_not_work_at_once(tmp_path):
  write(tmp_path / "raw" / "fra_Latn.jsonl", some("fra_Latn", 3))
  (tmp_path / "w").mkdir()
  holder = subprocess.Popen([sys.executable, "-c", f"""
import fcntl, time
with open({str(tmp_path / "w" / ".clean.lock")!r}, "w") as file:
  fcntl.lockf(file, fcntl.LOCK_EX)
  print("held", flush=True)
  time.sleep(60)
"""], stdout=subprocess.PIPE, text=True)
  assert holder.stdout.readline() == "held\n"
  with pytest.raises(run.Refused, match="another clean is at work"):
    cleaned(tmp_path / "raw", tmp_path / "w")
  holder.kill()
  holder.wait()
  cleaned(tmp_path / "raw", tmp_path / "w")


def files(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
          if path.is_file()}


FAKE_SBATCH = """#!/bin/bash
# Runs an array job at once, one task after the other, as SLURM would on one node.
for argument; do script=$argument; done
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export RUN_OFFSET=0
for ((i = 0; i <= ${tasks:-0}; i++)); do SLURM_ARRAY_TASK_ID=$i bash "$script" >> "$FAKE_LOG" 2>&1; done
echo "Submitted batch job 7"
"""


def test_slurm_runs_the_same_stages(tmp_path):
  for name, script in dict(
      sbatch=FAKE_SBATCH, squeue="#!/bin/bash\n", scontrol="#!/bin/bash\necho one\n", srun='#!/bin/bash\nshift 3\nexec "$@"\n').items():
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
  for code in ("fra_Latn", "tha_Thai"):
    write(tmp_path / "raw" / f"{code}.jsonl", some(code) + some(code)[:3])
  environment = os.environ | dict(
      PATH=f"{tmp_path / 'bin'}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
      FAKE_LOG=str(tmp_path / "log"), SLURM_NODELIST="one", SLURM_CPUS_PER_TASK="1",
      SLURM_MEM_PER_CPU="1000")
  slurm = ["--config.executor=slurm", "--config.slurm.partition=any", "--config.minhash.buckets=2"]
  call = command(tmp_path / "raw", tmp_path / "slurm", *slurm)
  first = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert "submitted" in first.stdout, first.stderr[-2000:] + (tmp_path / "log").read_text()[-2000:]
  again = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert "up to date" in again.stdout, again.stderr[-2000:] + (tmp_path / "log").read_text()[-2000:]
  local, _ = cleaned(tmp_path / "raw", tmp_path / "local", minhash__buckets=2)
  for name in local["files"]:
    assert (tmp_path / "slurm" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_slurm_without_sbatch_is_refused(tmp_path, monkeypatch):
  write(tmp_path / "raw" / "fra_Latn.jsonl", some("fra_Latn", 3))
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(run.Refused, match="needs sbatch"):
    cleaned(tmp_path / "raw", tmp_path / "w", executor="slurm", slurm__partition="any")


def test_lines_of_another_language_are_cut_out_if_asked(tmp_path):
  french = ["Le parlement a voté hier une nouvelle loi sur l'assurance maladie.",
            "Elle entre en vigueur au printemps."]
  german = ["Der Bundestag hat gestern ein neues Gesetz beschlossen.",
            "Es gilt vom kommenden Frühjahr an für alle Versicherten."]
  mixed = "\n".join([french[0], german[0], french[1]])
  write(tmp_path / "raw" / "fra_Latn.jsonl", [mixed, german[1]])
  record, kept = cleaned(tmp_path / "raw", tmp_path / "w", veto="line")
  assert [one["text"] for one in kept["fra_Latn"]] == ["\n".join(french)]
  assert reasons(record, "fra_Latn") == {"language": 1}
  assert record["languages"]["fra_Latn"]["dropped"]["lines in another language"]["lines"] == 2


def test_a_language_s_own_thresholds_are_used(tmp_path):
  write(tmp_path / "raw" / "fra_Latn.jsonl", some("fra_Latn"))
  write(tmp_path / "raw" / "deu_Latn.jsonl", some("deu_Latn"))
  (tmp_path / "t").mkdir()
  (tmp_path / "t" / "fra_Latn.yml").write_text("stopwords: [kaum, jedoch]\nlanguage_score: 0.8\n")
  record, kept = cleaned(tmp_path / "raw", tmp_path / "w", thresholds=str(tmp_path / "t"))
  assert "fra_Latn" not in kept and reasons(record, "fra_Latn") == {"stop words": 30}
  assert len(kept["deu_Latn"]) == 30
  (tmp_path / "t" / "fra_Latn.yml").write_text("dup_line_frak: 0.3\n")
  with pytest.raises(run.Refused, match="did you mean 'dup_line_frac'"):
    cleaned(tmp_path / "raw", tmp_path / "w2", thresholds=str(tmp_path / "t"))


def test_a_classifier_of_the_user_s_decides(tmp_path, monkeypatch):
  (tmp_path / "judge.py").write_text(
      "def length(texts, code):\n  return [len(text) / 1e3 for text in texts]\n"
      "def lost(texts, code):\n  return [float('nan')] * len(texts)\n")
  monkeypatch.syspath_prepend(tmp_path)
  documents = some("fra_Latn")
  write(tmp_path / "raw" / "fra_Latn.jsonl", documents)
  _, kept = cleaned(tmp_path / "raw", tmp_path / "w", classifier="judge:length",
                    classifier_threshold=0.4)
  assert [record["text"] for record in kept["fra_Latn"]] == [d for d in documents if len(d) >= 400]
  with pytest.raises(run.Refused, match="is no 'package.module:function'"):
    cleaned(tmp_path / "raw", tmp_path / "w2", classifier="judge:size")
  with pytest.raises(run.Refused, match="expected numbers"):
    cleaned(tmp_path / "raw", tmp_path / "w3", classifier="judge:lost")


def test_a_document_of_ten_megabytes_passes(tmp_path):
  documents = some("swh_Latn", 1000)
  line = " ".join(f"{number} {document}" for number in range(400) for document in documents)
  write(tmp_path / "raw" / "swh_Latn.jsonl", [line[:3_000_000], "\u2581 " + documents[0]])
  _, kept = cleaned(tmp_path / "raw", tmp_path / "w", repetition_words=10_000_000)
  assert [len(record["text"]) for record in kept["swh_Latn"]] == [3_000_000, len(documents[0]) + 2]


def dataset(folder, **subsets):
  """A dataset as the Hub has them: a folder of parquet files with a subset a language."""
  from pyarrow import Table, parquet

  folder.mkdir()
  card = ["---", "configs:"]
  for subset, (field, documents) in subsets.items():
    (folder / subset).mkdir()
    for part in range(3):
      rows = Table.from_pydict({field: documents[part::3]})
      parquet.write_table(rows, folder / subset / f"{part}.parquet")
    card += [f"- config_name: {subset}", f'  data_files: "{subset}/*.parquet"']
  (folder / "README.md").write_text("\n".join([*card, "---", ""]))
  return f"hf://{folder}"


def test_a_hugging_face_dataset_is_streamed_by_subset(tmp_path, capsys):
  pytest.importorskip("datasets", reason="pip install datasets")
  french, chinese = some("fra_Latn", 31), some("cmn_Hans", 20) + some("cmn_Hant", 20)
  name = dataset(tmp_path / "set", fra_Latn=("text", [*french, "", None]),
                 cmn_Hani=("text", chinese))
  record, kept = cleaned(name, tmp_path / "w", hf__tasks=2, deduplicate=False)
  assert sorted(one["text"] for one in kept["fra_Latn"]) == sorted(french)
  assert reasons(record, "fra_Latn") == {"empty": 2} and "fra_Latn/set" in record["licences"]
  assert sorted(one["text"] for one in kept["cmn_Hant"]) == sorted(chinese[20:])
  assert "no text of 67 languages" in capsys.readouterr().out
  for fields, said in ((dict(hf__field="txt"), "has no field 'txt'.*'text'"),
                       (dict(hf__subset="fra_Latn"), "all would read the same"),
                       (dict(hf__subset="{lang}"), "may hold {code} and {iso}"),
                       (dict(hf__limit=0), "config.hf.limit is 0")):
    with pytest.raises(run.Refused, match=said):
      cleaned(name, tmp_path / "w2", overwrite=True, **fields)
  with pytest.raises(run.Refused, match="cannot be read"):
    cleaned(f"hf://{tmp_path}/nothing", tmp_path / "w3")


@pytest.mark.parametrize("fields, said", [
    (dict(text="nowhere"), "does not exist"),
    (dict(languages="('Klingon',)"), "unknown language"),
    (dict(languages="('deu_Latn',)"), "no text of"),
    (dict(languages="('fra_Latn', 'deu_Latn')"), "has no text of deu_Latn"),
    (dict(identifier="nowhere.bin"), "fasttext-predict|does not exist"),
    (dict(margin="nan"), "config.margin is nan"),
    (dict(veto="word"), "unknown config.veto"),
    (dict(executor="lsf"), "unknown config.executor"),
    (dict(test_sets="('nowhere',)"), "nowhere"),
    (dict(test_sets="('setup.py',)"), "is not one of .txt"),
    (dict(script_share=2), "expected at most 1"),
    (dict(thresholds="setup.py"), "expected a folder"),
    (dict(blocked="('tests',)"), "is no file"),
    (dict(repetition__dup_line_frac="nan"), "dup_line_frac is nan"),
    (dict(repetition__top_n_grams="(2, 0.4)"), "expected pairs"),
    (dict(minhash__buckets=0), "config.minhash.buckets is 0"),
    (dict(text="hf://a/b"), "datasets|cannot be read"),
])
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, fields, said):
  write(tmp_path / "raw" / "fra_Latn.jsonl", some("fra_Latn", 3))
  with pytest.raises(run.Refused, match=said):
    cleaned(**(dict(source=tmp_path / "raw", workdir=tmp_path / "w") | _source(fields)))
  assert not (tmp_path / "w").exists()


def _source(fields):
  return {("source" if name == "text" else name): value for name, value in fields.items()}


def test_the_workdir_may_not_be_the_text_or_inside_it(tmp_path):
  write(tmp_path / "raw" / "fra_Latn.jsonl", some("fra_Latn", 3))
  for workdir in (tmp_path / "raw", tmp_path / "raw" / "clean", tmp_path):
    with pytest.raises(run.Refused, match="give another workdir"):
      cleaned(tmp_path / "raw", workdir)


def test_a_kill_while_the_report_is_written_or_cleared_away_costs_nothing(tmp_path, monkeypatch):
  write(tmp_path / "raw" / "fra_Latn.jsonl", some("fra_Latn", 5))
  write(tmp_path / "raw" / "deu_Latn.jsonl", ["***"])
  def die(*_, **__):
    raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(clean, "_page", die)  # after the empty output was removed
    with pytest.raises(KeyboardInterrupt):
      cleaned(tmp_path / "raw", tmp_path / "w")
  record, kept = cleaned(tmp_path / "raw", tmp_path / "w")
  assert list(kept) == ["fra_Latn"] and record["languages"]["deu_Latn"]["kept_documents"] == 0
  (tmp_path / "w" / text.CLEANING).mkdir()  # clean.json was written, .clean was still there
  cleaned(tmp_path / "raw", tmp_path / "w")
  assert "fra_Latn" in text.languages(tmp_path / "w")


def test_overwriting_leaves_nothing_of_an_earlier_or_killed_run(tmp_path, monkeypatch):
  for code in ("fra_Latn", "deu_Latn"):
    write(tmp_path / "raw" / f"{code}.jsonl", some(code, 5))
  def die(*_, **__):
    raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(clean, "_report", die)  # all is written, the report is not
    with pytest.raises(KeyboardInterrupt):
      cleaned(tmp_path / "raw", tmp_path / "w")
  with monkeypatch.context() as patch:
    patch.setattr(clean.shutil, "rmtree", die)  # in the middle of removing it
    with pytest.raises(KeyboardInterrupt):
      cleaned(tmp_path / "raw", tmp_path / "w", overwrite=True, languages="('fra_Latn',)")
  with pytest.raises(run.Refused, match="is not whole"):
    text.languages(tmp_path / "w")
  cleaned(tmp_path / "raw", tmp_path / "w", overwrite=True, languages="('fra_Latn',)")
  assert list(text.languages(tmp_path / "w")) == ["fra_Latn"]


def test_labels_of_each_script_and_of_both_are_each_read_once(tmp_path):
  simplified, traditional = some("cmn_Hans", 6), some("cmn_Hant", 6)
  labelled = [("cmn_Hans", simplified[0]), ("cmn_Hant", traditional[0]),
              *(("cmn_Hani", one) for one in simplified[1:] + traditional[1:])]
  (tmp_path / "raw").mkdir()
  (tmp_path / "raw" / "web.jsonl").write_text("\n".join(
      json.dumps(dict(lang=label, text=one)) for label, one in labelled))
  _, kept = cleaned(tmp_path / "raw", tmp_path / "w")
  assert sorted(one["text"] for one in kept["cmn_Hans"]) == sorted(simplified)
  assert sorted(one["text"] for one in kept["cmn_Hant"]) == sorted(traditional)
  assert len(list(text.read(tmp_path / "raw", "cmn_Hans", "web"))) == 11  # unsplit: the first of two
  assert list(text.read(tmp_path / "raw", "cmn_Hant", "web")) == traditional[:1]


def test_addresses_are_looked_for_in_no_time_and_not_in_code(tmp_path):
  image = "data:image/png;base64," + "QUJD" * 100_000 + "@" + "x" * 100_000
  write(tmp_path / "raw" / "fra_Latn.jsonl", [
      "Le schéma suivant montre la maison : " + image + " et rien d'autre que cela.",
      "Version v1.22.33.44.55 du 11.22.33.4444, mais le serveur 8.8.8.8 et a.b@c.fr."])
  write(tmp_path / "raw" / "code" / "a.jsonl", ["h = x@w.T\nping 8.8.8.8"])
  started = time.monotonic()
  _, kept = cleaned(tmp_path / "raw", tmp_path / "w", languages="('all', 'code')",
                    quality__max_avg_word_length=1e9)
  assert time.monotonic() - started < 60
  (masked,) = [one["text"] for one in kept["fra_Latn"] if one["text"].startswith("Version")]
  assert masked.startswith("Version v1.22.33.44.55 du 11.22.33.4444,")
  assert "8.8.8.8" not in masked and "a.b@c.fr" not in masked
  assert kept["code"][0]["text"] == "h = x@w.T\nping 8.8.8.8"


def test_ends_of_lines_and_pages_do_not_glue_words():
  pages = "un\fdeux\r\ntrois\rquatre\x85cinq\0\ufeff"
  assert filters.tidy(pages) == "un\ndeux\ntrois\nquatre\ncinq"


def test_code_that_differs_in_its_signs_is_no_copy(tmp_path):
  write(tmp_path / "raw" / "code" / "a.jsonl", [
      "a[i] += b[i] * (c[i] - d[i]);", "a<i> |= b<i> & {c<i> ^ d<i>}:", "{}[]();"])
  _, kept = cleaned(tmp_path / "raw", tmp_path / "w", languages="('code',)")
  assert len(kept["code"]) == 3


def test_parquet_is_read_row_by_row(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  (tmp_path / "raw" / "fra_Latn").mkdir(parents=True)
  documents = some("fra_Latn", 250)
  parquet.write_table(pyarrow.table(dict(text=[*documents, None, "  "], url=["u"] * 252)),
                      tmp_path / "raw" / "fra_Latn" / "a.parquet")
  record, kept = cleaned(tmp_path / "raw", tmp_path / "w", deduplicate=False, urls=False)
  assert [one["text"] for one in kept["fra_Latn"]] == documents
  assert reasons(record, "fra_Latn") == {"no text": 1, "empty": 1}
  with pytest.raises(text.Malformed, match="a.parquet, row 251"):
    list(text.read(tmp_path / "raw", "fra_Latn", "text"))
  with open(tmp_path / "raw" / "fra_Latn" / "a.parquet", "r+b") as file:
    file.truncate(900)
  with pytest.raises(run.Refused, match="is damaged or no parquet"):
    cleaned(tmp_path / "raw", tmp_path / "w2")


def test_like_documents_have_like_signatures_of_any_length():
  step = filters.Signature("/tmp", filters.minhash_config(dict(n_grams=5, buckets=14, hashes=8)),
                           whole=False)
  one, other = " ".join(some("fra_Latn", 40)), " ".join(some("fra_Latn", 80)[40:])
  def signature(content):
    return [value for bucket in step.get_signature(step.get_shingles(content)) for value in bucket]
  def alike(a, b):
    return sum(x == y for x, y in zip(signature(a), signature(b))) / 112
  mixed = one + " " + other
  a, b = set(step.get_shingles(one).tolist()), set(step.get_shingles(mixed).tolist())
  assert abs(alike(one, mixed) - len(a & b) / len(a | b)) < 0.15
  assert alike(one, one.upper()) == 1 and alike(one, other) < len(a) / len(b)
  assert len(step.get_shingles("ab")) == 1 and signature("ab") != signature("abc")
  assert max(signature(mixed)) < 2**61


@pytest.mark.parametrize("code", ["fra_Latn", "tha_Thai"])
@pytest.mark.parametrize("scale", [1, 0.3, 0.05])
def test_what_spares_counting_n_grams_never_changes_the_answer(code, scale):
  script = languages.find(code).script
  options = dict(top_n_grams=[(n, 0.4 * scale) for n in (2, 3, 4)],
                 dup_n_grams=[(n, 0.7 * scale) for n in range(5, 11)],
                 language=filters.Words(script))
  theirs = filters.GopherRepetitionFilter(**options)
  ours = filters.Repetition(0, **options)
  documents = some(code, 20)
  documents += [one[:150] * 5 for one in documents] + [" ".join(documents)]
  answers = [(theirs.filter(Document(one, "")), ours.filter(Document(one, "")))
             for one in documents]
  assert all(one == other for one, other in answers)
  assert len({str(one) for one, _ in answers}) > 1


# --- identify -----------------------------------------------------------------------------------


def test_confusable_languages_are_never_vetoed():
  known = identify.identifier("py3langid")
  indonesian = " ".join(some("ind_Latn", 3))
  assert known.margin(indonesian, languages.find("zsm_Latn"))[0] < 3
  assert known.margin(indonesian, languages.find("fra_Latn"))[0] > 3


@pytest.mark.parametrize("label, code", [
    ("fra_Latn", "fra_Latn"), ("fr", "fra_Latn"), ("arb_Arab", "arb_Arab"), ("ar", "arb_Arab"),
    ("no", "nob_Latn"), ("nb", "nob_Latn"), ("cmn_Hani", "cmn_Hant"), ("zh", "cmn_Hans"),
    ("tl", "fil_Latn"), ("lvs_Latn", "lvs_Latn"), ("plt_Latn", "plt_Latn"), ("swh", "swh_Latn"),
])
def test_labels_of_every_style_are_understood(label, code):
  assert identify._key(label) == identify._key(code)


def test_words_are_words_with_their_marks():
  assert identify.words("L'été, c'est 12h !", "Latn") == ["L'été", "c'est", "12h"]
  assert identify.words("नमस्ते दुनिया।", "Deva") == ["नमस्ते", "दुनिया"]
  assert identify.words("北京 2008。", "Hani") == ["北", "京", "2008"]
  assert identify.words("ที่นี่", "Thai") == ["ที่", "นี่"]
  assert identify.words("***", "Latn") == ["***"]


def test_scripts_are_shares_of_letters():
  assert identify.script_share("Привет, мир и все остальные! 123 abc", "Cyrl") > 0.8
  assert identify.script_share("日本語の文章はこのように書きますね、そうですよ。", "Jpan") == 1
  assert identify.script_share("only Latin letters here, more than twenty", "Thai") == 0
  assert identify.script_share("README", "Thai") == 1  # too short to say
