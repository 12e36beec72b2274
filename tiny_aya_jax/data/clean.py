"""Verb clean: raw text -> the same documents less what is not the language, not text, or a copy.

WORKDIR/<code>/<source>/00000.jsonl.gz, which vocab and pack read, clean.json and clean.html. Four
stages, each of independent tasks of a datatrove executor, so that a killed run goes on with the
tasks that were not done, and one machine, SLURM and Ray run the same steps:

  filter  a file and language each: read, tidy, URL, script, language, heuristics, classifier,
          test sets -> WORKDIR/.clean/kept and MinHash signatures
  match   a language (and bucket) each: signatures -> pairs of like documents
  choose  a language each: pairs -> all but one document of each cluster
  write   a file and language each: what is left -> WORKDIR

and a report. The steps are in filters.py, the language veto in identify.py. While WORKDIR/.clean
is there, the folder is not whole, and text.py refuses it.

Text keeps its letters: control characters go, line ends become newlines, and e-mail and IP
addresses are replaced. Code is a pseudo-language without words: it is tidied and freed of
duplicates and tests, nothing else (x@w.T is no address). It is left as plain text;
fill-in-the-middle is not made of it, because the report never says that its tokens were used.
"""

import collections
import contextlib
import fcntl
import functools
import html
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import shutil
import subprocess
import threading
from typing import NamedTuple

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import identify, text

EXECUTORS = ("local", "slurm", "ray")
HF = "hf://"
EMPTY_ROW = "\0"  # datatrove leaves out rows without text, uncounted
LOGS = ".clean.logs"  # datatrove's, among them which tasks are done
# Settings that change nothing in the output.
FREE = ("text", "overwrite", "executor", "workers", "slurm", "samples")


class Shard(NamedTuple):
  """What one task reads: a file, a part of a stream or an embedded corpus, in one language."""

  code: str
  source: str
  index: int  # of its language and source: the name of the output
  path: str | None
  labels: tuple | None = None  # of the records that are of this language; None: all are
  split: bool = False  # only documents whose Han characters are this code's
  counts_malformed: bool = True  # one of two shards of the same file does
  options: dict | None = None  # of a Hugging Face dataset

  @property
  def name(self):
    return f"{self.code}/{self.source}/{self.index:05d}"

  @property
  def output(self):
    """Where its documents go, under the workdir."""
    return f"{self.name}.jsonl.gz"

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
  if run.up_to_date(workdir / text.CLEANED, inputs, config.overwrite) and _whole(workdir):
    shutil.rmtree(workdir / text.CLEANING, ignore_errors=True)  # killed just before it was removed
    _say(run.read_json(workdir / text.CLEANED, "clean's report"))
    run.say(f"{workdir}: up to date")
    return
  with _alone(workdir):
    _begin(workdir, inputs, config, shards)
    if not _execute(config, workdir, shards, settings, inputs):
      return  # submitted
  shutil.rmtree(workdir / LOGS, ignore_errors=True)
  _say(run.read_json(workdir / text.CLEANED, "clean's report"))
  run.say(f"cleaned text: {workdir}; report: {workdir / 'clean.html'}")


def _whole(workdir):
  files = run.read_json(workdir / text.CLEANED, "clean's report")["files"]
  lost = [name for name in files if not (workdir / name).is_file()]
  if lost:
    run.say(f"cleaned again: {workdir / lost[0]} is gone")
  return not lost


@contextlib.contextmanager
def _alone(workdir):
  """Refuses a second call in the same workdir while this one is at work."""
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / ".clean.lock", "w") as file:
    try:  # lockf: processes that this one forks do not hold it on when it is killed
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise run.Refused(f"another clean is at work in {workdir}: wait for it") from None
    yield
  (workdir / ".clean.lock").unlink(missing_ok=True)


# --- the door -----------------------------------------------------------------------------------


def _check(config, workdir):
  if not config.text:
    raise run.Refused("config.text is not set: give a folder of text, embedded/train or hf://...")
  run.choose("config.executor", config.executor, EXECUTORS)
  run.choose("config.veto", config.veto, ("document", "line"))
  _check_places(config, workdir)
  least = {"margin": 0, "script_share": 0, "min_stop_words": 0, "repetition_words": 0, "samples": 0,
           "workers": 1, "test_ngram": 1, "minhash.n_grams": 1, "minhash.buckets": 1,
           "minhash.hashes": 1, "hf.tasks": 1}
  least |= {"hf.limit": 1} if config.hf.limit is not None else {}
  for name, smallest in least.items():
    group, _, field = name.rpartition(".")
    value = (config[group] if group else config)[field]
    if not smallest <= value < math.inf:
      raise run.Refused(f"config.{name} is {value}, expected at least {smallest}")
  if config.script_share > 1:
    raise run.Refused(f"config.script_share is {config.script_share}, expected at most 1")
  if math.isnan(config.classifier_threshold):
    raise run.Refused("config.classifier_threshold is nan, expected a number")
  _check_packages(config)
  if config.executor == "slurm":
    if not (shutil.which("sbatch") and config.slurm.partition):
      raise run.Refused("config.executor is 'slurm': that needs sbatch on this machine and "
                        "--config.slurm.partition")
    _check_queue(workdir)


def _check_places(config, workdir):
  if "://" not in config.text and not config.text.startswith("embedded/"):
    source, target = pathlib.Path(config.text).resolve(), workdir.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
      raise run.Refused(f"config.text is {source} and the workdir {target}: clean writes a folder "
                        "of its own; give another workdir")
  for field in ("blocked", "test_sets"):
    for path in config[field]:
      run.existing(field, path)
  for path in config.blocked:
    if not pathlib.Path(path).is_file():
      raise run.Refused(f"config.blocked: {path} is no file; expected one domain a line")
  if config.thresholds and not pathlib.Path(config.thresholds).is_dir():
    raise run.Refused(f"config.thresholds is {config.thresholds}, expected a folder of <code>.yml")


def _check_packages(config):
  wanted = ["datatrove", "regex", config.identifier == identify.BUILT_IN and "py3langid",
            config.urls and "tldextract", config.urls and "ahocorasick",
            config.text.startswith(HF) and "datasets", config.executor == "ray" and "ray"]
  missing = [name for name in wanted if name and not run.installed(name)]
  if missing:
    raise run.Refused(f"clean needs {', '.join(missing)}: pip install 'tiny_aya_jax[data]'"
                      " (datasets and ray by themselves)")


def _check_queue(workdir):
  """Refuses while the jobs of an earlier call are queued or running, before anything is touched."""
  submitted = workdir / LOGS / "submitted.json"
  if submitted.exists():
    job = str(run.read_json(submitted, "submitted job")["job"])
    queue = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False)
    if queue.returncode == 0 and queue.stdout.strip():
      raise run.Refused(f"{workdir} is being cleaned by job {job}: wait for it, or scancel it")


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
    return [Shard(code, source, 0, config.text)
            for code, sources in text.languages(config.text).items() if code in chosen
            for source in sources]
  found = [(code, source, str(path), labels, codes)
           for codes, source, path, labels in text.files(config.text) for code in codes]
  left_out = sorted({code for code, *_ in found} - set(chosen))
  if left_out:
    run.say(f"{config.text} also has {', '.join(left_out)}, which --config.languages leaves out")
  index = collections.Counter()
  shards = []
  for code, source, path, labels, codes in found:
    if code in chosen:
      first = code == next(one for one in codes if one in chosen)
      shards.append(
          Shard(code, source, index[code, source], path, labels, len(codes) > 1, first))
      index[code, source] += 1
  return shards


def _dataset_shards(config, chosen):
  dataset = config.text.removeprefix(HF).rstrip("/")
  there = _subsets(dataset, config.hf.revision)
  subsets = {code: _subset(config, code) for code in chosen}
  texts = {"cmn" if code.startswith("cmn_") else code for code in chosen}  # Chinese is split
  if len(texts) > 1 and len(set(subsets.values())) == 1:
    raise run.Refused(f"config.hf.subset is {config.hf.subset!r} for each of {len(chosen)} "
                      "languages: all would read the same; write {code} or {iso} in it")
  shards = []
  for code, subset in subsets.items():
    if subset in there:
      options = dict(config.hf.to_dict(), subset=subset)
      first = code != "cmn_Hant" or "cmn_Hans" not in chosen
      shards += [Shard(code, dataset.rpartition("/")[2], part, dataset, None,
                       code.startswith("cmn_"), first, options | dict(part=part))
                 for part in range(config.hf.tasks)]
  return shards


def _subsets(dataset, revision):
  import datasets

  try:
    return datasets.get_dataset_config_names(dataset, revision=revision)
  except Exception as error:  # of the network, the hub or the dataset's files
    reason = " ".join(str(error).split())
    raise run.Refused(f"hf://{dataset} cannot be read ({reason:.300})") from None


def _subset(config, code):
  iso = code if code == languages.CODE else languages.find(code).iso
  try:
    return config.hf.subset.format(code="cmn_Hani" if code.startswith("cmn_") else code, iso=iso)
  except (KeyError, IndexError, ValueError) as error:
    raise run.Refused(f"config.hf.subset is {config.hf.subset!r} ({error}): it may hold {{code}} "
                      "and {iso}") from None


def _streamed(dataset, options):
  """Every row of a part of the stream, once; one without text is Malformed."""
  from datatrove.pipeline.readers import HuggingFaceDatasetReader

  def adapted(_, row, dataset, place):
    if options["field"] not in row:
      raise run.Refused(f"hf://{dataset} has no field {options['field']!r}: "
                        + run.nearest(options["field"], row))
    value = row[options["field"]]
    found = value if isinstance(value, str) and value.strip() else EMPTY_ROW
    return dict(text=found, id=str(row.get("id", place)),
                metadata={key: row[key] for key in row if key != options["field"]})

  reader = HuggingFaceDatasetReader(
      dataset, dict(name=options["subset"], split=options["split"], revision=options["revision"]),
      streaming=True, adapter=adapted, limit=-1 if options["limit"] is None else options["limit"],
  )
  for document in reader.run(None, options["part"], options["tasks"]):
    if document.text == EMPTY_ROW:
      yield text.Malformed(text.EMPTY, f"{dataset} {document.id} says nothing")
    else:
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
    run.say(f"{config.identifier} has no label for {', '.join(settings['unseen'])}: their text "
            "passes without a language veto")
  if config.thresholds:
    own = [code for code in codes if _thresholds_file(config, code).is_file()]
    run.say(f"{config.thresholds} has thresholds for {len(own)} of {len(codes)} languages")
  if config.classifier:
    from tiny_aya_jax.data import filters

    filters.hook(config.classifier)
  return settings


GROUPS = ("repetition", "quality", "lines")  # of thresholds, by datatrove filter


def _thresholds(config, code):
  """Keyword arguments of the heuristic filters; a language's own where a .yml gives them."""
  found = dict(repetition_words=config.repetition_words, stop_words=(),
               min_stop_words=config.min_stop_words)
  for group in GROUPS:
    found[group] = {
        key: _threshold(f"config.{group}.{key}", key, value)
        for key, value in config[group].items()}
  path = config.thresholds and _thresholds_file(config, code)
  if not path or not path.is_file():
    return found
  for key, value in _yaml(path).items():
    if key == "stopwords":
      found["stop_words"] = _stop_words(path, value)
    elif key != "language_score":  # of GlotLID as a classifier; here it is a veto with a margin
      groups = [group for group in GROUPS if key in found[group]]
      if not groups:
        known = [known for group in GROUPS for known in found[group]]
        raise run.Refused(f"{path}: unknown threshold {key!r}; {run.nearest(key, known)}")
      found[groups[0]][key] = _threshold(f"{path}: {key}", key, value)
  return found


def _thresholds_file(config, code):
  return pathlib.Path(config.thresholds) / f"{'cmn_Hani' if code.startswith('cmn_') else code}.yml"


def _threshold(what, key, value):
  """The value, checked: a number, or pairs of an n-gram's length and a share."""
  def number(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < math.inf

  if not key.endswith("n_grams"):
    if not number(value):
      raise run.Refused(f"{what} is {value!r}, expected a number of at least 0")
    return value
  pairs = isinstance(value, list | tuple) and all(
      isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], int)
      and pair[0] > 0 and number(pair[1]) for pair in value)
  if not pairs:
    raise run.Refused(f"{what} is {value!r}, expected pairs such as ((2, 0.4), (3, 0.4))")
  return [tuple(pair) for pair in value]


def _stop_words(path, words):
  if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
    raise run.Refused(f"{path}: stopwords is {words!r:.60}, expected a list of strings (no, "
                      "yes, on and numbers are none without quotes)")
  return tuple(words)


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
  """Of the settings, the packages that decide, and each file's name, size and time of change: text
  may be terabytes."""
  def stamp(path):
    status = pathlib.Path(path).stat()
    return [pathlib.Path(path).name, status.st_size, status.st_mtime_ns]

  def where(shard):
    embedded = shard.path.startswith("embedded/")
    if embedded or shard.options:
      return text.fingerprint(shard.path, []) if embedded else shard.path
    return stamp(shard.path)

  fixed = {key: value for key, value in config.to_dict().items() if key not in FREE}
  named = [stamp(path) for path in (*config.blocked, *_test_files(config.test_sets))]
  if config.identifier != identify.BUILT_IN:
    named.append(stamp(config.identifier))
  if config.classifier:
    module = importlib.import_module(config.classifier.partition(":")[0])
    named.append(run.sha256(module.__file__))
  versions = {name: importlib.metadata.version(name) for name in ("datatrove", "py3langid", "Babel")
              if run.installed(name.lower())}
  confusable = [[language.code, language.confusable] for language in languages.LANGUAGES]
  return run.fingerprint([
      fixed, settings["heuristics"], named, versions, confusable,
      [[*shard[:3], where(shard), *shard[4:]] for shard in shards],
  ])


def _begin(workdir, inputs, config, shards):
  """Makes WORKDIR/.clean, or finds that of a killed run with the same inputs."""
  state = workdir / text.CLEANING
  unfinished = (state / "inputs.json").exists()
  if unfinished and not config.overwrite:
    if run.read_json(state / "inputs.json", "unfinished clean")["inputs"] != inputs:
      raise run.Refused(f"{workdir} holds a killed clean of other inputs or settings: give another "
                        "--workdir, or --config.overwrite=True")
    run.say(f"going on in {state}")
    return
  _remove(workdir)
  for name in ("counts", "dropped"):
    (state / name).mkdir(exist_ok=True)
  if config.test_sets:
    from tiny_aya_jax.data import filters

    short = filters.index(_tests(config.test_sets), state / "tests", config.test_ngram)
    for name, count in short.items():
      if count:
        run.say(f"test set {name}: {count} texts have fewer than {config.test_ngram} words and "
                "cannot be looked for")
  run.write_json(state / "inputs.json", dict(inputs=inputs, files=[s.output for s in shards]))


def _remove(workdir):
  """Removes what an earlier clean wrote into workdir, finished or killed.

  From its first step on .clean says that the folder is not whole.
  """
  state, report, written = workdir / text.CLEANING, workdir / text.CLEANED, set()
  for record in (report, state / "inputs.json"):
    if record.exists():
      written |= set(run.read_json(record, "earlier clean").get("files", ()))
  state.mkdir(parents=True, exist_ok=True)
  run.write_json(state / "inputs.json", dict(inputs=None, files=sorted(written)))
  report.unlink(missing_ok=True)
  for name in written:
    (workdir / name).unlink(missing_ok=True)
  shutil.rmtree(workdir / LOGS, ignore_errors=True)
  for path in state.iterdir():
    if path.is_dir():
      shutil.rmtree(path)


TEST_KINDS = (".txt", ".tsv", ".csv", ".json", ".jsonl")


def _test_files(paths):
  found = [file for path in map(pathlib.Path, paths)
           for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
  for file in found:
    if not file.name.removesuffix(".gz").removesuffix(".zst").endswith(TEST_KINDS):
      raise run.Refused(f"test set {file} is not one of {', '.join(TEST_KINDS)} (or .gz, .zst): "
                        "convert it, or take it out of the folder")
  if paths and not found:
    raise run.Refused(f"config.test_sets {tuple(paths)} holds no files")
  return found


def _tests(paths):
  """{file name: its texts}: all strings of a .json or .jsonl, the lines of anything else."""
  tests = {}
  for number, path in enumerate(_test_files(paths)):
    lines = [line.decode("utf-8", "replace") for _, line in text.lines(path)]
    if ".jsonl" in path.name:
      lines = [string for line in lines if line.strip() for string in _strings(_json(line, path))]
    elif ".json" in path.name:
      lines = list(_strings(_json("\n".join(lines), path)))
    tests[f"{number:03d}-{path.name}"] = [line for line in lines if line.strip()]
  return tests


def _json(line, path):
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as error:
    raise run.Refused(f"test set {path} is not JSON ({error})") from None


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
    # Another executor cuts the tasks otherwise, and must not take these for its own.
    match = partial(_match_steps, buckets, settings, state)
    stages += [(f"match{len(buckets)}", match, len(buckets)),
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
    if left := executor.get_incomplete_ranks(skip_completed=True):  # Ray only logs what failed
      raise RuntimeError(f"{name}: {len(left)} of {tasks} tasks failed, see "
                         f"{workdir / LOGS / name}; called again, clean goes on with them")
  return True


def _submit(executors, workdir):
  executors[-1].run()
  run.write_json(workdir / LOGS / "submitted.json", dict(job=executors[-1].job_id))
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

  yield filters.Read(shard, dropped("read"), state / "counts" / f"{rank:05d}-read.json")
  yield filters.Tidy(dropped("tidy"))
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
  if settings["pii"] and shard.code != languages.CODE:
    yield filters.Mask(state / "counts" / f"{rank:05d}-masked.json")
  yield filters.Write(state / "kept" / f"{rank:05d}.jsonl.gz",
                      state / "counts" / f"{rank:05d}-kept.json")
  if settings["deduplicate"]:
    yield filters.Hashes(state / "hashes" / shard.code / f"{rank:05d}")
    yield filters.Signature(str(state / "signatures" / shard.code),
                            filters.minhash_config(settings["minhash"]),
                            whole=shard.code == languages.CODE)


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
  return [line.strip() for path in paths
          for line in pathlib.Path(path).read_text("utf-8", "replace").splitlines() if line.strip()]


def _match_steps(buckets, settings, state, rank):
  from tiny_aya_jax.data import filters

  code, group = buckets[rank]
  yield filters.Match(str(state / "signatures" / code), str(state / "pairs" / code),
                      filters.minhash_config(settings["minhash"]), group)


def _choose_steps(codes, settings, state, rank):
  from datatrove.pipeline.dedup.minhash import MinhashDedupCluster

  from tiny_aya_jax.data import filters

  step = MinhashDedupCluster(
      str(state / "pairs" / codes[rank]), str(state / "remove" / codes[rank]),
      filters.minhash_config(settings["minhash"]), lines_to_buffer=1000)
  yield filters.Call(functools.partial(step.run, None, 0, 1))  # it insists on being the only task


def _write_steps(shards, settings, workdir, rank):
  from datatrove.pipeline.dedup.minhash import MinhashDedupFilter

  from tiny_aya_jax.data import filters

  state, shard = workdir / text.CLEANING, shards[rank]
  kept = Shard(shard.code, shard.source, shard.index, str(state / "kept" / f"{rank:05d}.jsonl.gz"))
  yield filters.Read(kept, filters.Dropped(state / "dropped" / f"{rank:05d}-kept.json", 0),
                     state / "counts" / f"{rank:05d}-again.json")
  if settings["deduplicate"]:
    yield MinhashDedupFilter(
        str(state / "remove" / shard.code),
        filters.Dropped(state / "dropped" / f"{rank:05d}-duplicates.json", settings["samples"],
                        filters.Exact(state / "hashes" / shard.code)),
        lines_to_buffer=1000)
  yield filters.Write(workdir / shard.output,
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
        documents=0, bytes=0, kept_documents=0, kept_bytes=0, masked=0, dropped={}))
    read, written = (run.read_json(state / "counts" / f"{rank:05d}-{name}.json", "a task's counts")
                     for name in ("read", "written"))
    row["documents"] += read["documents"]
    row["bytes"] += read["bytes"]
    row["kept_documents"] += written["documents"]
    row["kept_bytes"] += written["bytes"]
    masked = state / "counts" / f"{rank:05d}-masked.json"
    row["masked"] += run.read_json(masked, "counts")["masked"] if masked.exists() else 0
    for path in sorted((state / "dropped").glob(f"{rank:05d}-*.json")):
      _add(row["dropped"], run.read_json(path, "dropped documents"), settings["samples"])
    if written["documents"]:
      files.append(shard.output)
      noted = licences.setdefault(f"{shard.code}/{shard.source}", set())
      noted |= {licence or settings["licence"] for licence in written["licences"]}
    else:
      (workdir / shard.output).unlink(missing_ok=True)
    for left in (workdir / shard.output).parent.glob(".*.tmp*"):  # of killed tasks
      left.unlink()
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
  (workdir / "clean.html").write_text(_page(record), encoding="utf-8")
  run.write_json(workdir / text.CLEANED, record)
  shutil.rmtree(state)


def _add(total, dropped, samples):
  """{reason: dict(documents or lines, bytes, samples)}: adds the second to the first."""
  for reason, found in dropped.items():
    known = total.setdefault(reason, dict(samples=[]))
    for key in found:
      if key != "samples":
        known[key] = known.get(key, 0) + found[key]
    known["samples"] = sorted(known["samples"] + found["samples"], reverse=True)[:samples]


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
    _add(total["dropped"], row["dropped"], 0)
  return total


def _share(row):
  return row["kept_documents"] / max(row["documents"], 1)


def _line(name, row):
  """A row of the report as text: {documents, kept_documents, kept_bytes, dropped{reason: ...}}."""
  reasons = sorted(row["dropped"].items(), key=lambda item: -item[1]["bytes"])
  said = ", ".join(f"{reason} {_count(found)}" for reason, found in reasons)
  return (f"{name:10} {row['documents']:>10} {100 * _share(row):>7.1f}% "
          f"{row['kept_bytes'] / 1e6:>9.2f}   {said}")


def _count(found):
  return found["documents"] if "documents" in found else f"{found['lines']} lines"


def _page(record):
  body = []
  for code, row in record["languages"].items():
    samples = "".join(
        f"<p><b>{html.escape(reason)}</b> {_count(found)}</p>" + "".join(
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
