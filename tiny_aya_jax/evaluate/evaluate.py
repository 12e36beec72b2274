"""VERB evaluate: checkpoints in, measures per language out: one JSON, one page, one table.

Checkpoints are ours or Hugging Face folders. Bits per byte are of packed rows, each counted once;
tasks are tasks.py's, and lm-evaluation-harness's. Answers are kept (outputs.py), measured and rolled
up (results.py), and shown (report.py). All processes compute; process 0 does the rest.
"""

import pathlib

from ml_collections import ConfigDict

from tiny_aya_jax import client, languages, run
from tiny_aya_jax.data import loader, template, text as texts, tokenizer as tokenizers
from tiny_aya_jax.evaluate import report, results, terminal
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import saved

# What needs jax, or the packages of the extra `eval`, is imported behind the checks: a wrong field
# is refused in a second.
LEAST = ("chunk", "batch", "baselines.processes", "heartbeat_seconds")


def main(config, workdir):
  """Writes workdir/{evaluation.json, report.html, outputs/} and prints the table."""
  subjects, work, tools, judge = check(config, workdir)
  from tiny_aya_jax import processes

  processes.join(config.heartbeat_seconds)
  from tiny_aya_jax import axes
  from tiny_aya_jax.evaluate import engine, outputs
  from tiny_aya_jax.train import proof

  proof.keep_programs(workdir)
  mesh = axes.mesh(**config.mesh.to_dict())
  # A run that is being evaluated may go on: all take the step that process 0 has seen.
  places, given = [*config.checkpoints, config.divergence_from], [*subjects, *work["reference"]]
  steps = processes.told([-1 if subject["step"] is None else subject["step"] for subject in given])
  given = [subject if subject["step"] in (None, step) else _subject(config, place, step)
           for subject, place, step in zip(given, places, steps)]
  subjects, work["reference"] = given[: len(subjects)], given[len(subjects) :]
  for subject in given:
    engine.refuse_unless_possible(subject["model"], mesh, config)
  inputs = run.fingerprint([
      [(subject["name"], subject["identity"], subject["tokenizer"].sha256, subject["T"],
        *([own] if (own := subject["turns"].identity) else [])) for subject in given],
      work["fingerprint"], _text(config.baselines), config.dtype, config.baseline,
      [config.judge.url, config.judge.model, config.judge.body]])
  done = run.up_to_date(workdir / "evaluation.json", inputs, config.overwrite)
  if not processes.agreed(not done):
    run.say(f"{workdir / 'report.html'}: up to date")
    return
  if judge and processes.first():
    _greet(judge, client.fields_of(config.judge.body, "config.judge.body"))
  found = {subject["name"]: outputs.of(subject, work, workdir, mesh, config) for subject in subjects}
  if processes.first():
    result = dict(inputs=inputs, **results.of(subjects, work, found, tools, judge, config))
    run.write_text(workdir / "report.html", report.page(result))
    run.write_json(workdir / "evaluation.json", result)  # last: its presence says that all is there
  processes.agreed(True)  # nobody ends while process 0 asks the judge
  if processes.first():
    run.say(terminal.table(result))
    run.say(f"page: {workdir / 'report.html'}")


def _greet(judge, more):
  """A first, small question, so that a judge who does not answer is known before hours of work."""
  request = dict(messages=[dict(role="user", content="Say OK.")])
  (answer,) = judge.answers([client.merged(request, more)])
  if answer.why:
    raise run.Refused(f"config.judge does not answer: {answer.why}")


def check(config, workdir):
  """Refuses what cannot be; reads tasks and manifests. -> (subjects, work, tools, judge), without jax."""
  if not config.checkpoints:
    raise run.Refused("evaluate needs config.checkpoints, a tuple of workdirs, checkpoint folders or "
                      "Hugging Face folders")
  for field in LEAST:
    if (value := _field(config, field)) < 1:
      raise run.Refused(f"config.{field} is {value}, expected at least 1")
  if config.limit < 0:
    raise run.Refused(f"config.limit is {config.limit}, expected items a language, or 0 for all")
  run.choose_fields(config, "attention", "dtype")
  run.choose("config.choices", config.choices, ("letters", "cloze"))
  run.choose("config.prompts", config.prompts, ("chat", "plain"))
  if bool(config.baselines.train_text) != bool(config.baselines.validation_text):
    raise run.Refused("baselines need both train_text and validation_text, or neither")
  chosen = {name: place for name, place in config.tasks.items() if place}
  if not (config.rows or chosen or config.harness.tasks):
    raise run.Refused("evaluate needs config.rows (packed validation), a set such as "
                      "config.tasks.belebele, or config.harness.tasks")
  manifests = loader.read_manifests(config.rows) if config.rows else []
  subjects = [_subject(config, place) for place in config.checkpoints]
  reference = [_subject(config, config.divergence_from)] if config.divergence_from else []
  names = [subject["name"] for subject in subjects]
  if len(set(names)) < len(names):
    raise run.Refused(f"config.checkpoints are named {names}: two of one name would be one column")
  if config.baseline is not None:
    known = ["untrained"] if manifests and subjects[0]["untrained"] else []
    run.choose("config.baseline", config.baseline, [*known, *names])
  for subject in [*subjects, *reference] if manifests else ():
    same_tokenizer(config.rows, manifests[0]["tokenizer_sha256"], subject["tokenizer"],
                   config.tokenizer)
  _check_reference(subjects, reference, manifests)
  if config.mesh.context > 1 and manifests and manifests[0]["T"] % config.mesh.context:
    raise run.Refused(f"config.mesh.context={config.mesh.context} does not divide T={manifests[0]['T']}")
  if config.mesh.context > 1 and (chosen or config.harness.tasks):
    raise run.Refused("tasks are of rows of any length: config.mesh.context must be 1")
  if config.harness.tasks and config.harness.chat:
    _check_turns(subjects)
  _check_harness(config.harness, min(subject["T"] for subject in subjects))
  _check_baselines(config.baselines, manifests)
  (tools, items), judge = _tools(config, chosen) if chosen else (None, {}), None
  if config.judge.url:
    settings = config.judge.to_dict()
    client.fields_of(settings.pop("body"), "config.judge.body")
    url, model = settings.pop("url"), settings.pop("model")
    judge = client.Client(url, model, workdir / "judge.jsonl", **settings)
  _check_room(config, subjects, items)
  fingerprint = run.fingerprint([
      [manifest["sha256"] for manifest in manifests], items, config.choices, config.prompts,
      config.identifier, config.T, config.tokens, config.limit, config.harness.to_dict(),
      [run.sha256(path) for path in _files(config)]])
  work = dict(manifests=manifests, reference=reference, items=items, fingerprint=fingerprint)
  return subjects, work, tools, judge


def _files(config):
  """The files that measures depend on: a word list, an identifier's model, tasks in YAML."""
  folder = sorted(pathlib.Path(config.harness.folder).rglob("*")) if config.harness.folder else []
  given = [pathlib.Path(path) for path in (config.english, config.identifier) if path]
  return [path for path in (*given, *folder) if path.is_file()]


def _field(config, name):
  for key in name.split("."):
    config = config[key]
  return config


def _subject(config, given, step=None):
  """What is known of a checkpoint before it is loaded; of a workdir, the newest step, or `step`."""
  place = pathlib.Path(run.existing("checkpoints", given)).absolute()
  name = place.resolve().name
  if place.resolve().parent.name == "checkpoints":  # a step of a workdir
    name = f"{place.resolve().parents[1].name}@{name}"
  if huggingface.is_folder(place):
    (model, T), tokenizer = huggingface.describe(place), huggingface.tokenizer_of(place)
    return dict(name=name, path=place, step=None, tokenizer=tokenizer, turns=template.turns(tokenizer, place),
                identity=huggingface.digests(place), untrained=None, model=model, T=config.T or T)
  if not config.tokenizer:
    raise run.Refused(f"{given} needs config.tokenizer; only Hugging Face folders have their own")
  path, tokenizer = saved.find(place), tokenizers.load(config.tokenizer)
  if step is not None and not saved.is_checkpoint(place):
    path = saved.path(place, step)
  meta = saved.meta(path)
  same_tokenizer(path, meta["tokenizer_sha256"], tokenizer, config.tokenizer)
  return dict(name=name, path=path, step=meta["step"], tokenizer=tokenizer, turns=template.turns(tokenizer),
              identity=[meta["model"], meta["fingerprints"]["params"]], untrained=_untrained(place),
              model=ConfigDict(meta["model"]),
              T=config.T or meta["T"])


def same_tokenizer(path, sha256, tokenizer, given):
  """Refuses rows or a checkpoint made with another tokenizer; `given` may be the same as a .model."""
  other = tokenizers.load(given) if given else None
  if sha256 != tokenizer.sha256 and not (
      other and other.sha256 == sha256 and other.same_ids(tokenizer)):
    raise run.Refused(
        f"{path} belongs to tokenizer {sha256[:12]}, and {tokenizer.path} is {tokenizer.sha256[:12]}")


def _check_reference(subjects, reference, manifests):
  """Refuses a divergence without rows, and one between vocabularies of two sizes."""
  if reference and not manifests:
    raise run.Refused("config.divergence_from is measured on packed rows: give config.rows")
  for subject, other in ((subject, other) for subject in subjects for other in reference):
    if subject["model"].V != other["model"].V:
      raise run.Refused(f"{subject['name']} predicts {subject['model'].V} ids and config.divergence_from "
                        f"{other['model'].V}: expected one vocabulary")


def _tools(config, chosen):
  """(tasks.Tools but the judge, {task: {code: items}})."""
  try:
    from tiny_aya_jax.data import identify
    from tiny_aya_jax.evaluate import confusion, tasks
  except ImportError as error:
    raise run.Refused(f"tasks need {error.name}: pip install 'tiny_aya_jax[eval]'") from None
  codes = languages.select(config.languages)
  items = {}
  for name in (name for name in tasks.table() if name in chosen):
    place = chosen[name]
    if not str(place).startswith("hf://") and place != tasks.EMBEDDED:
      run.existing(f"tasks.{name}", place)
    items[name] = tasks.read(name, place, codes, config.limit, config.choices)
  if "translation" in items and not run.installed("sacrebleu"):
    raise run.Refused("config.tasks.translation needs sacrebleu: pip install 'tiny_aya_jax[eval]'")
  return tasks.Tools(
      identify=identify.identifier(config.identifier), identifier=config.identifier,
      english=confusion.read_english(config.english) if config.english else None), items


def _check_room(config, subjects, items):
  """Refuses answers that leave no room for a prompt."""
  for field in ("T", "tokens"):
    if config[field] is not None and config[field] < 1:
      raise run.Refused(f"config.{field} is {config[field]}, expected at least 1")
  if not items:
    return
  from tiny_aya_jax.evaluate import tasks

  table = tasks.table(config.choices)
  for name, subject in ((name, subject) for name in items for subject in subjects):
    tokens = table[name].tokens and (config.tokens or table[name].tokens)
    if tokens and config.prompts == "chat":
      _check_turns([subject])
    if tokens and tokens > subject["T"] // 2:
      raise run.Refused(f"answers of {tokens} tokens to {name} take more than half of the {subject['T']} "
                        f"tokens of {subject['name']}: set config.tokens, or config.T")


def _check_turns(subjects):
  """Refuses models that nothing can be said to: base models, and a template that fails."""
  for subject in subjects:
    subject["turns"].prompt([dict(role="user", content="a")])


def _check_baselines(settings, manifests):
  """Refuses rows in a language of which there is no text, before a model is loaded for them."""
  if not settings.validation_text or not manifests:
    return
  there = texts.languages(settings.validation_text)
  missing = {manifest["language"] for manifest in manifests} - there.keys()
  if missing:
    raise run.Refused(f"config.baselines.validation_text: {settings.validation_text} has no text in "
                      f"{', '.join(sorted(missing))}, of which there are rows")


def _check_harness(settings, T):
  if settings.shots is not None and settings.shots < 0:
    raise run.Refused(f"config.harness.shots is {settings.shots}, expected examples, 0 or more")
  if settings.folder:
    run.existing("harness.folder", settings.folder)
  if not settings.tasks:
    return
  if not run.installed("lm_eval"):
    raise run.Refused("config.harness needs lm-eval: pip install 'tiny_aya_jax[eval]'")
  from tiny_aya_jax.evaluate import harness

  harness.check(settings.to_dict(), T)


def _text(baselines):
  """What the baselines read: fingerprints of both folders' files, or nothing."""
  folders = [baselines.train_text, baselines.validation_text] if baselines.train_text else []
  return [
      [code, name, texts.fingerprint(folder, paths)]
      for folder in folders
      for code, sources in texts.languages(folder).items()
      for name, paths in sources.items()
  ]


def _untrained(workdir):
  """Bits per byte at step 0, from the training run's own metrics; None for a fork or a bare step."""
  for row in run.read_lines(pathlib.Path(workdir) / "metrics.jsonl"):
    if "evaluation" in row and row.get("from") == "scratch" and row["step"] == 0:
      return {code: entry["bits_per_byte"] for code, entry in row["evaluation"].items()}
  return None
