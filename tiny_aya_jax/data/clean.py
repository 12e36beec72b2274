"""Verb clean: raw text -> the same documents less what is not the language, not text, or a copy.

WORKDIR/<code>/<source>/00000.jsonl.gz, which vocab and pack read, clean.json and clean.html. Four
stages, each of independent tasks of a datatrove executor, so that a killed run goes on with the
tasks that were not done, and one machine, SLURM and Ray run the same steps:

  filter  a file and language each: read, tidy, URL, script, language, heuristics, classifier,
          test sets -> WORKDIR/.clean/kept and MinHash signatures
  match   a language (and bucket) each: signatures -> pairs of like documents
  choose  a language each: pairs -> all but one document of each cluster
  write   a file and language each: what is left -> WORKDIR

and a report. The steps are in filters.py, the language veto in identify.py. While WORKDIR/.clean is
there, the folder is not whole, and text.py refuses it.

Text keeps its letters: only control characters go, and e-mail and IP addresses are replaced. Code
is a pseudo-language: it is tidied and freed of duplicates, nothing else. It is left as plain text;
fill-in-the-middle is not made of it, because the report never says that its tokens were used.
"""

import collections
import functools
import html
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import threading
import time
from typing import NamedTuple

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import identify, text

EXECUTORS = ("local", "slurm", "ray")
HF = "hf://"
LOGS = ".clean.logs"  # datatrove's, among them which tasks are done
# Settings that change nothing in the output.
FREE = ("text", "overwrite", "executor", "workers", "slurm", "samples")


class Shard(NamedTuple):
  """What one task reads: a file, a part of a stream or an embedded corpus, in one language."""

  code: str
  source: str
  index: int  # of its language and source: the name of the output
  path: str | None
  labels: tuple | None  # of the records that are of this language; None: all are
  split: bool  # only documents whose Han characters are this code's
  options: dict | None  # of a Hugging Face dataset

  @property
  def name(self):
    return f"{self.code}/{self.source}/{self.index:05d}"

  def records(self):
    """Records as text.records gives them."""
    if self.options:
      return _streamed(self.path, self.options)
    if self.path.startswith("embedded/"):
      return (dict(text=document) for document in text.read(self.path, self.code, self.source))
    return text.records(self.path, self.labels)


def main(config, workdir):
  """Cleans `config.text` into workdir; prints a table of what was kept and dropped."""
  os.environ.setdefault("TQDM_DISABLE", "1")  # datatrove's bars, one a language
  _check(config, workdir)
  shards = _shards(config)
  settings = _settings(config, shards)
  inputs = _fingerprint(config, shards, settings)
  if run.up_to_date(workdir / text.CLEANED, inputs, config.overwrite):
    _say(run.read_json(workdir / text.CLEANED, "clean's report"))
    run.say(f"{workdir}: up to date")
    return
  _begin(workdir, inputs, config, settings)
  if _execute(config, workdir, shards, settings, inputs):
    shutil.rmtree(workdir / LOGS, ignore_errors=True)
    _say(run.read_json(workdir / text.CLEANED, "clean's report"))
    run.say(f"cleaned text: {workdir}; report: {workdir / 'clean.html'}")


# --- the door -----------------------------------------------------------------------------------


def _check(config, workdir):
  if not config.text:
    raise run.Refused("config.text is not set: give a folder of raw text, embedded/train or hf://...")
  run.choose("config.executor", config.executor, EXECUTORS)
  run.choose("config.veto", config.veto, ("document", "line"))
  if "://" not in config.text and pathlib.Path(config.text).resolve() == workdir.resolve():
    raise run.Refused(f"config.text and the workdir are both {workdir}: clean writes beside what it "
                      "reads; give another workdir")
  least = {"margin": 0, "script_share": 0, "min_stop_words": 0, "repetition_words": 0, "samples": 0,
           "workers": 1, "test_ngram": 1, "minhash.n_grams": 1, "minhash.buckets": 1,
           "minhash.hashes": 1, "hf.tasks": 1}
  for name, smallest in least.items():
    group, _, field = name.rpartition(".")
    value = (config[group] if group else config)[field]
    if not smallest <= value < float("inf"):
      raise run.Refused(f"config.{name} is {value}, expected at least {smallest}")
  _check_packages(config)
  for path in (*config.blocked, *config.test_sets):
    run.existing("a file of config.blocked or config.test_sets", path)
  if config.thresholds:
    run.existing("config.thresholds", config.thresholds)
  if config.executor == "slurm" and not (shutil.which("sbatch") and config.slurm.partition):
    raise run.Refused("config.executor is 'slurm': that needs sbatch on this machine and "
                      "--config.slurm.partition")


def _check_packages(config):
  wanted = ["datatrove", "regex", config.identifier == identify.BUILT_IN and "py3langid",
            config.urls and "tldextract", config.urls and "ahocorasick",
            config.text.startswith(HF) and "datasets", config.executor == "ray" and "ray"]
  missing = [name for name in wanted if name and not run.installed(name)]
  if missing:
    raise run.Refused(f"clean needs {', '.join(missing)}: pip install 'tiny_aya_jax[data]'"
                      " (datasets and ray by themselves)")


def _shards(config):
  chosen = languages.select(config.languages)
  shards = _dataset_shards(config, chosen) if config.text.startswith(HF) else _files(config, chosen)
  if not shards:
    raise run.Refused(f"{config.text} has no text of the languages in --config.languages")
  named = {code for name in config.languages for code in languages.expand(name)
           if len(languages.expand(name)) <= 2}
  absent = [code for code in chosen if code not in {shard.code for shard in shards}]
  if lost := named & set(absent):
    raise run.Refused(f"{config.text} has no text of {', '.join(sorted(lost))}")
  if absent:
    run.say(f"no text of {len(absent)} languages: {', '.join(absent)}")
  return shards


def _files(config, chosen):
  if config.text.startswith("embedded/"):
    return [Shard(code, source, 0, config.text, None, False, None)
            for code, sources in text.languages(config.text).items() if code in chosen
            for source in sources]
  found = [(code, source, path, len(codes) > 1)
           for codes, source, path in text.files(config.text) for code in codes]
  left_out = sorted({code for code, *_ in found} - set(chosen))
  if left_out:
    run.say(f"{config.text} also has {', '.join(left_out)}, which --config.languages leaves out")
  index = collections.Counter()
  shards = []
  for code, source, path, split in found:
    if code in chosen:
      place = text.labels(config.text, path, code)
      shards.append(Shard(code, source, index[code, source], str(path), place, split, None))
      index[code, source] += 1
  return shards


def _dataset_shards(config, chosen):
  dataset = config.text.removeprefix(HF)
  source = dataset.rpartition("/")[2]
  shards = []
  for code in chosen:
    han = code.startswith("cmn_")
    iso = code if code == languages.CODE else languages.find(code).iso
    subset = config.hf.subset.format(code="cmn_Hani" if han else code, iso=iso)
    options = dict(config.hf.to_dict(), subset=subset)
    shards += [Shard(code, source, part, dataset, None, han, options | dict(part=part))
               for part in range(config.hf.tasks)]
  return shards


def _streamed(dataset, options):
  from datatrove.pipeline.readers import HuggingFaceDatasetReader

  reader = HuggingFaceDatasetReader(
      dataset, dict(name=options["subset"], split=options["split"], revision=options["revision"]),
      streaming=True, text_key=options["field"],
      limit=-1 if options["limit"] is None else options["limit"],
  )
  for document in reader.run(None, options["part"], options["tasks"]):
    yield dict(document.metadata, text=document.text, id=document.id)


def _settings(config, shards):
  """What the tasks need, as plain values: {"code": thresholds} and the rest of the config."""
  codes = list(dict.fromkeys(shard.code for shard in shards))
  settings = config.to_dict()
  settings["heuristics"] = {code: _thresholds(config, code) for code in codes}
  identifier = identify.identifier(config.identifier)
  settings["unseen"] = [code for code in codes
                        if code != languages.CODE and not identifier.sees(languages.find(code))]
  if settings["unseen"]:
    run.say(f"{config.identifier} has no label for {', '.join(settings['unseen'])}: their text passes "
            "without a language veto")
  if config.classifier:
    from tiny_aya_jax.data import filters

    filters.hook(config.classifier)
  return settings


def _thresholds(config, code):
  """Keyword arguments of the heuristic filters; a language's own where a .yml gives them."""
  found = dict(
      repetition_words=config.repetition_words, repetition=config.repetition.to_dict(),
      quality=config.quality.to_dict(), lines=config.lines.to_dict(), stop_words=(),
      min_stop_words=config.min_stop_words,
  )
  name = "cmn_Hani" if code.startswith("cmn_") else code
  path = config.thresholds and pathlib.Path(config.thresholds) / f"{name}.yml"
  if not path or not path.is_file():
    return found
  for key, value in _yaml(path).items():
    if key == "stopwords":
      found["stop_words"] = tuple(value)
    elif key != "language_score":  # of GlotLID as a classifier; here it is a veto with a margin
      groups = [group for group in ("repetition", "quality", "lines") if key in found[group]]
      if not groups:
        raise run.Refused(f"{path}: unknown threshold {key!r}; "
                          + run.nearest(key, [k for g in ("repetition", "quality", "lines")
                                              for k in found[g]]))
      found[groups[0]][key] = value
  return found


def _yaml(path):
  import yaml

  try:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise run.Refused(f"{path} is no YAML ({' '.join(str(error).split())})") from None
  if not isinstance(found, dict):
    raise run.Refused(f"{path} holds a {type(found).__name__}, expected thresholds by name")
  return found


def _fingerprint(config, shards, settings):
  """Of the settings, and of every file's name, size and time of change: text may be terabytes."""
  def stamp(path):
    status = pathlib.Path(path).stat()
    return [pathlib.Path(path).name, status.st_size, status.st_mtime_ns]

  def where(shard):
    return shard.path if shard.options or shard.path.startswith("embedded/") else stamp(shard.path)

  fixed = {key: value for key, value in config.to_dict().items() if key not in FREE}
  named = [stamp(path) for path in (*config.blocked, *_test_files(config.test_sets))]
  return run.fingerprint([
      fixed, settings["heuristics"], named,
      [[shard.code, shard.source, where(shard), shard.options] for shard in shards],
  ])


def _begin(workdir, inputs, config, settings):
  """Makes WORKDIR/.clean, or finds that of a killed run with the same inputs."""
  state = workdir / text.CLEANING
  if state.exists() and not (state / "inputs.json").exists():
    shutil.rmtree(state)  # killed before its first task
  if state.exists() and not config.overwrite:
    if run.read_json(state / "inputs.json", "unfinished clean")["inputs"] != inputs:
      raise run.Refused(f"{workdir} holds a killed clean of other inputs or settings: give another "
                        "--workdir, or --config.overwrite=True")
    run.say(f"going on in {state}")
  else:
    _remove(workdir)
  (state / "counts").mkdir(parents=True, exist_ok=True)
  (state / "dropped").mkdir(exist_ok=True)
  if config.test_sets:
    from tiny_aya_jax.data import filters

    short = filters.index(_tests(config.test_sets), state / "tests", config.test_ngram)
    for name, count in short.items():
      if count:
        run.say(f"test set {name}: {count} texts have fewer than {config.test_ngram} words and "
                "cannot be looked for")
  run.write_json(state / "inputs.json", dict(inputs=inputs))


def _remove(workdir):
  """What an earlier clean wrote into workdir, by its report."""
  report = workdir / text.CLEANED
  if report.exists():
    for name in run.read_json(report, "clean's report").get("files", ()):
      (workdir / name).unlink(missing_ok=True)
    report.unlink()
  for name in (text.CLEANING, LOGS):
    shutil.rmtree(workdir / name, ignore_errors=True)


def _test_files(paths):
  for path in map(pathlib.Path, paths):
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    yield from (file for file in found if file.is_file())


def _tests(paths):
  """{file name: its texts}: a .jsonl's strings, the lines of anything else."""
  tests = {}
  for number, path in enumerate(_test_files(paths)):
    lines = [line.decode("utf-8", "replace") for _, line in text.lines(path)]
    if ".jsonl" in path.name:
      lines = [string for line in lines if line.strip() for string in _strings(_json(line, path))]
    tests[f"{number:03d}-{path.name}"] = [line for line in lines if line.strip()]
  return tests


def _json(line, path):
  try:
    return json.loads(line)
  except ValueError as error:
    raise run.Refused(f"test set {path} has a line that is not JSON ({error})") from None


def _strings(value):
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict | list):
    for inside in value.values() if isinstance(value, dict) else value:
      yield from _strings(inside)


# --- stages -------------------------------------------------------------------------------------


def _execute(config, workdir, shards, settings, inputs):
  """Runs the stages; False if they were only submitted."""
  from tiny_aya_jax.data import filters

  state = workdir / text.CLEANING
  codes = list(dict.fromkeys(shard.code for shard in shards))
  # A local task goes through a language's buckets by itself: hundreds of tasks cost seconds.
  buckets = [(code, group) for code in codes for group in (
      [range(config.minhash.buckets)] if config.executor == "local"
      else [[bucket] for bucket in range(config.minhash.buckets)])]
  partial = functools.partial
  stages = [("filter", partial(_filter_steps, shards, settings, state), len(shards))]
  if config.deduplicate:
    stages += [("match", partial(_match_steps, buckets, settings, state), len(buckets)),
               ("choose", partial(_choose_steps, codes, settings, state), len(codes))]
  stages += [("write", partial(_write_steps, shards, settings, workdir), len(shards)),
             ("report", partial(_report_steps, shards, settings, workdir, inputs), 1)]
  executors = []
  for name, build, tasks in stages:
    executors.append(filters.executor(
        config.executor, settings, name, [filters.Shards(build)], tasks, str(workdir / LOGS / name),
        executors[-1] if executors else None))
  if config.executor == "slurm":
    return _submit(executors, workdir)
  for (name, _, tasks), executor in zip(stages, executors):
    executor.depends = None  # run one after the other
    with _progress(name, workdir / LOGS / name / "completions", tasks):
      executor.run()
  return True


def _submit(executors, workdir):
  submitted = workdir / LOGS / "submitted.json"
  if submitted.exists():
    job = str(run.read_json(submitted, "submitted job")["job"])
    queue = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False)
    if queue.returncode == 0 and queue.stdout.strip():
      raise run.Refused(f"{workdir} is being cleaned by job {job}: wait for it, or scancel it first")
  executors[-1].run()
  run.write_json(submitted, dict(job=executors[-1].job_id))
  run.say(f"submitted; the last job is {executors[-1].job_id}. Call clean again for the report, or "
          "to go on if a job was killed")
  return False


class _progress:
  """Says every ten seconds how many tasks are done."""

  def __init__(self, name, folder, tasks):
    self.name, self.folder, self.tasks = name, folder, tasks
    self.over = threading.Event()

  def __enter__(self):
    threading.Thread(target=self._watch, daemon=True).start()

  def __exit__(self, *_):
    self.over.set()

  def _watch(self):
    while not self.over.wait(10):
      done = sum(1 for _ in self.folder.glob("*")) if self.folder.is_dir() else 0
      run.say(f"{self.name}: {done} of {self.tasks} tasks")


def _filter_steps(shards, settings, state, rank):
  from tiny_aya_jax.data import filters

  shard = shards[rank]
  numbers = itertools.count()

  def dropped(step):
    path = state / "dropped" / f"{rank:05d}-{next(numbers):02d}-{step}.json"
    return filters.Dropped(path, settings["samples"])

  yield filters.Read(shard, dropped("read"))
  yield filters.Tidy(settings["pii"], state / "counts" / f"{rank:05d}-read.json")
  if settings["urls"]:
    yield filters.urls(_domains(settings["blocked"]), dropped("url"))
  if shard.code != languages.CODE:
    yield from _language_steps(shard, settings, dropped)
  if settings["classifier"]:
    yield filters.Classify(settings["classifier"], settings["classifier_threshold"], shard.code,
                           dropped("classifier"))
  if settings["test_sets"]:
    yield filters.Decontaminate(state / "tests", settings["test_ngram"], _script(shard.code),
                                dropped("tests"))
  yield filters.Write(state / "kept" / f"{rank:05d}.jsonl.gz",
                      state / "counts" / f"{rank:05d}-kept.json")
  if settings["deduplicate"]:
    yield filters.Hashes(state / "hashes" / shard.code / f"{rank:05d}")
    yield filters.Signature(str(state / "signatures" / shard.code),
                            filters.minhash_config(settings["minhash"]), filters.Words("Latn"))


def _language_steps(shard, settings, dropped):
  from tiny_aya_jax.data import filters

  language = languages.find(shard.code)
  yield filters.Script(language.script, settings["script_share"], dropped("script"))
  if shard.code not in settings["unseen"]:
    yield filters.Veto(language, settings["identifier"], settings["margin"],
                       settings["veto"] == "line", dropped("language"))
  yield from filters.heuristics(language.script, settings["heuristics"][shard.code], dropped)


def _script(code):
  return "Latn" if code == languages.CODE else languages.find(code).script


def _domains(paths):
  return [line for path in paths
          for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _match_steps(buckets, settings, state, rank):
  from tiny_aya_jax.data import filters

  code, group = buckets[rank]
  yield filters.Match(str(state / "signatures" / code), str(state / "pairs" / code),
                      filters.minhash_config(settings["minhash"]), group)


def _choose_steps(codes, settings, state, rank):
  from datatrove.pipeline.dedup.minhash import MinhashDedupCluster

  from tiny_aya_jax.data import filters

  step = MinhashDedupCluster(str(state / "pairs" / codes[rank]), str(state / "remove" / codes[rank]),
                             filters.minhash_config(settings["minhash"]), lines_to_buffer=1000)
  yield filters.Call(functools.partial(step.run, None, 0, 1))  # it insists on being the only task


def _write_steps(shards, settings, workdir, rank):
  from datatrove.pipeline.dedup.minhash import MinhashDedupFilter

  from tiny_aya_jax.data import filters

  state, shard = workdir / text.CLEANING, shards[rank]
  yield filters.Read(shard._replace(path=str(state / "kept" / f"{rank:05d}.jsonl.gz"), labels=None,
                                    split=False, options=None),
                     filters.Dropped(state / "dropped" / f"{rank:05d}-kept.json", 0))
  if settings["deduplicate"]:
    yield MinhashDedupFilter(
        str(state / "remove" / shard.code),
        filters.Dropped(state / "dropped" / f"{rank:05d}-duplicates.json", settings["samples"],
                        filters.Exact(state / "hashes" / shard.code)),
        lines_to_buffer=1000)
  yield filters.Write(workdir / shard.code / shard.source / f"{shard.index:05d}.jsonl.gz",
                      state / "counts" / f"{rank:05d}-written.json")


def _report_steps(shards, settings, workdir, inputs, rank):
  from tiny_aya_jax.data import filters

  del rank
  yield filters.Call(functools.partial(_report, shards, settings, workdir, inputs))


# --- the report ---------------------------------------------------------------------------------


def _report(shards, settings, workdir, inputs):
  """Adds up what the tasks wrote -> clean.json and clean.html; removes WORKDIR/.clean."""
  state = workdir / text.CLEANING
  rows, licences, files = {}, {}, []
  for rank, shard in enumerate(shards):
    row = rows.setdefault(shard.code, dict(
        documents=0, bytes=0, kept_documents=0, kept_bytes=0, control_characters=0, pii=0,
        dropped={}))
    read, written = (run.read_json(state / "counts" / f"{rank:05d}-{name}.json", "a task's counts")
                     for name in ("read", "written"))
    for key in ("documents", "bytes", "control_characters", "pii"):
      row[key] += read[key]
    row["kept_documents"] += written["documents"]
    row["kept_bytes"] += written["bytes"]
    for path in sorted((state / "dropped").glob(f"{rank:05d}-*.json")):
      _add(row, run.read_json(path, "dropped documents"), settings["samples"])
    name = f"{shard.code}/{shard.source}/{shard.index:05d}.jsonl.gz"
    if not written["documents"]:
      (workdir / name).unlink()
    else:
      files.append(name)
      noted = licences.setdefault(f"{shard.code}/{shard.source}", set())
      noted |= {licence or settings["licence"] for licence in written["licences"]}
  record = dict(
      inputs=inputs,
      text=settings["text"],
      identifier=settings["identifier"],
      without_veto=settings["unseen"],
      languages=rows,
      licences={name: "; ".join(sorted(filter(None, noted))) or None
                for name, noted in licences.items()},
      files=files,
  )
  temporary = workdir / f".{text.CLEANED}.tmp"
  (workdir / "clean.html").write_text(_page(record), encoding="utf-8")
  run.write_json(temporary, record)
  temporary.replace(workdir / text.CLEANED)
  shutil.rmtree(state)


def _add(row, dropped, samples):
  for reason, found in dropped.items():
    known = row["dropped"].setdefault(reason, dict(documents=0, bytes=0, samples=[]))
    known["documents"] += found["documents"]
    known["bytes"] += found["bytes"]
    known["samples"] = sorted(known["samples"] + found["samples"], reverse=True)[:samples]
    if reason in text.MALFORMED or reason == "conversation":  # never reached the counter of Tidy
      row["documents"] += found["documents"]


def _say(record):
  rows = record["languages"]
  run.say(f"{'language':10} {'documents':>10} {'kept':>8} {'MB kept':>9}   dropped")
  order = sorted(rows, key=lambda code: _share(rows[code]))
  for code in order if len(order) <= 12 else [*order[:9], None, *order[-2:]]:
    run.say(_line(code, rows[code]) if code else "...")
  run.say(_line("all", _total(rows)))


def _total(rows):
  total = dict(dropped={})
  for row in rows.values():
    for key in ("documents", "kept_documents", "kept_bytes"):
      total[key] = total.get(key, 0) + row[key]
    for reason, found in row["dropped"].items():
      known = total["dropped"].setdefault(reason, dict(documents=0))
      known["documents"] += found["documents"]
  return total


def _share(row):
  return row["kept_documents"] / max(row["documents"], 1)


def _line(name, row):
  reasons = sorted(row["dropped"].items(), key=lambda item: -item[1]["documents"])
  said = ", ".join(f"{reason} {found['documents']}" for reason, found in reasons)
  return (f"{name:10} {row['documents']:>10} {100 * _share(row):>7.1f}% "
          f"{row['kept_bytes'] / 1e6:>9.2f}   {said}")


def _page(record):
  body = []
  for code, row in record["languages"].items():
    samples = "".join(
        f"<p><b>{html.escape(reason)}</b> {found['documents']}</p>" + "".join(
            f"<pre>{html.escape(content)}\n<i>{html.escape(f'{name} {note}')}</i></pre>"
            for _, name, content, note in found["samples"])
        for reason, found in row["dropped"].items())
    mark = " (no language veto)" if code in record["without_veto"] else ""
    body.append(
        f"<details><summary>{html.escape(_line(code, row) + mark)}</summary>{samples}</details>")
  return _PAGE.format(body="\n".join(body), text=html.escape(str(record["text"])),
                      identifier=html.escape(record["identifier"]))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What clean kept and dropped</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; }}
summary {{ font-family: monospace; white-space: pre; }}
pre {{ white-space: pre-wrap; border-left: 3px solid #ccc; padding-left: 1em; margin-left: 2em; }}
</style>
<h1>What clean kept and dropped</h1>
<p>{text}; languages by {identifier}. Per language: documents, share kept, megabytes kept, documents
dropped by reason; open one for samples.</p>
{body}
</html>
"""
