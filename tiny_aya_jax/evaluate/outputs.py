"""What a checkpoint answered: a file for each task and language, written when it is whole.

  WORKDIR/outputs/<checkpoint>/<task>/<code>.jsonl     {"inputs", "rows"}, then {"item", "answer"} a line

so an evaluation that was interrupted goes on, one that asks for more asks only that, and anyone can
read the answers. All processes compute; process 0 reads and writes.
"""

import importlib.metadata
import pathlib

import jax

from tiny_aya_jax import axes, processes, run
from tiny_aya_jax.data import loader
from tiny_aya_jax.evaluate import engine as engines
from tiny_aya_jax.model import bits
from tiny_aya_jax.post import similarity


def of(subject, work, workdir, mesh, config):
  """{task: {code: [(item, answer)]}} of one checkpoint; bits per byte and divergence are of code None."""
  units = _units(subject, work, config)
  folder = workdir / "outputs" / subject["name"]
  left = [number for number, unit in enumerate(units)
          if _read(folder / unit["file"], unit["inputs"]) is None]
  engine = None
  for number in processes.told(left):
    engine = engine or engines.load(subject["path"], subject["tokenizer"], mesh, config, subject["T"])
    unit = units[number]
    rows = unit["compute"](engine, f"{subject['name']} {unit['file'].removesuffix('.jsonl')}")
    if processes.first():
      path = folder / unit["file"]
      path.parent.mkdir(parents=True, exist_ok=True)
      run.write_lines(path, [dict(inputs=unit["inputs"], rows=len(rows)), *rows])
  found = {}
  for unit in units if processes.first() else ():
    rows = _read(folder / unit["file"], unit["inputs"])
    found.setdefault(unit["task"], {})[unit["code"]] = [(row["item"], row["answer"]) for row in rows]
  return found


def _read(path, inputs):
  """The rows of a unit that is there whole and made of the same inputs; else None."""
  head, *rows = run.read_lines(path) or [{}]
  return rows if head == dict(inputs=inputs, rows=len(rows)) else None


def _units(subject, work, config):
  """What is asked of a checkpoint, a file each: {"task", "code", "file", "inputs", "compute"}."""
  units = []
  common = [subject["identity"], subject["tokenizer"].sha256, config.dtype]
  rows = [[manifest["language"], manifest["sha256"]] for manifest in work["manifests"]]
  if work["manifests"]:
    units.append(dict(
        task="bits_per_byte", code=None, file="bits_per_byte.jsonl",
        inputs=run.fingerprint([common, rows]),
        compute=lambda engine, what: _bits_per_byte(engine, work["manifests"], config)))
  for reference in work["reference"]:
    units.append(dict(
        task="divergence", code=None, file="divergence.jsonl",
        inputs=run.fingerprint([common, rows, reference["identity"]]),
        compute=lambda engine, what: _divergence(engine, reference, work["manifests"], config)))
  for name in config.harness.tasks:
    units.append(_harness_unit(name, subject, common, config))
  for name, items in work["items"].items():
    for code, rows in items.items():
      units.append(_task_unit(name, code, rows, subject, common, config))
  return units


def _task_unit(name, code, rows, subject, common, config):
  from tiny_aya_jax.evaluate import tasks

  task = tasks.table(config.choices)[name]
  tokens = task.tokens and (config.tokens or task.tokens)
  asked = [task.request(item, code) for item in rows]
  how = [tokens, config.prompts if tokens else None, subject["T"]]
  how += [subject["turns"].identity] if tokens and subject["turns"].identity else []

  def compute(engine, what):
    answers = (_written if tokens else _chosen)(engine, asked, tokens, task.ends, config.prompts, what)
    return [dict(item=item, answer=answer) for item, answer in zip(rows, answers)]

  return dict(task=name, code=code, file=f"{name}/{code}.jsonl", compute=compute,
              inputs=run.fingerprint([common, asked, rows, how]))


def _harness_unit(name, subject, common, config):
  settings = config.harness.to_dict()
  files = [run.sha256(path) for path in sorted(pathlib.Path(settings["folder"]).rglob("*"))
           if path.is_file()] if settings["folder"] else []

  def compute(engine, what):
    from tiny_aya_jax.evaluate import harness

    return harness.measures(engine, name, settings, config.limit)

  return dict(task="harness", code=name, file=f"harness/{name}.jsonl", compute=compute,
              inputs=run.fingerprint([common, name, {**settings, "tasks": None}, files, config.limit,
                                      subject["T"], importlib.metadata.version("lm_eval"),
                                      *([own] if (own := subject["turns"].identity) else [])]))


def _chosen(engine, asked, tokens, ends, prompts, what):
  """(context, choices) of each item -> {"nats", "tokens"} of its choices."""
  pairs = [engines.pair(engine.tokenizer, context, choice)
           for context, choices in asked for choice in choices]
  found = iter(engines.likelihoods(engine, pairs, what))
  answers = []
  for _, choices in asked:
    parts = [next(found) for _ in choices]
    answers.append(dict(nats=[part.nats for part in parts], tokens=[part.tokens for part in parts]))
  return answers


def _written(engine, asked, tokens, ends, prompts, what):
  """Prompts -> {"text", "ended"}; a plain prompt ends with a line break, a chat one with a turn."""
  if prompts == "chat":
    ids, ends = [engine.turns.prompt([dict(role="user", content=text)]) for text in asked], ()
  else:
    bos = engine.tokenizer.special("<BOS_TOKEN>")
    ids = [[bos, *row] for row in engine.tokenizer.encode_many([f"{text}\n" for text in asked])]
  found = engines.answers(engine, ids, tokens=tokens, what=what, ends=ends, strip="\n" if ends else "")
  return [dict(text=text, ended=ended) for text, ended in found]


def _bits_per_byte(engine, manifests, config):
  """Rows {"item": {"language"}, "answer": bits per byte} over all rows of the manifests."""
  with jax.set_mesh(engine.mesh):
    codes = [manifest["language"] for manifest in manifests]
    score = bits.scorer(engine.model, engine.tokenizer.bytes_V, len(codes), chunk=config.chunk)
    batches = loader.every_row_once(manifests, config.batch, axes.process_part(engine.mesh))
    found = bits.evaluate(score, engine.params, batches, engine.mesh, codes)
  return [dict(item=dict(language=code), answer=entry["bits_per_byte"]) for code, entry in found.items()]


def _divergence(engine, reference, manifests, config):
  """Rows {"item": {"language"}, "answer": {"tokens", "kl_ab", "kl_ba"}}, b the reference.

  It is in memory beside the checkpoint for as long as this takes, and no longer.
  """
  other = engines.load(reference["path"], reference["tokenizer"], engine.mesh, config, reference["T"])
  found = similarity.divergence(
      (engine.model, other.model), (engine.params, other.params),
      loader.every_row_once(manifests, config.batch, axes.process_part(engine.mesh)), engine.mesh,
      [manifest["language"] for manifest in manifests], chunk=config.chunk)
  return [dict(item=dict(language=code), answer=entry) for code, entry in found.items()]
