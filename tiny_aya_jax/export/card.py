"""The model card of an export: what the model is, what it was made of and from what, and its proof.

Read from checkpoints, their run.json and the manifests of the rows they drew, as far as these are
still where they were; what is not is said. Names of folders, never paths of this machine.
"""

import pathlib
import re

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import mixture
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import saved

PAGE = "evaluation.html"  # in the folder, with config.report


def lineage(place):
  """The stages that a checkpoint or folder was made in, itself first.

  [{"name", "said", "revision" and "licence" or None, "drawn": {(licence, language): tokens}}, ...]; a run is one
  stage, up to the latest of its steps that anything was made of.
  """
  found, waiting = {}, [(pathlib.Path(place), None)]
  while waiting:
    path, until = waiting.pop(0)
    for key, until, stage, parents in _stages_of(path, until):
      if key not in found or (until or 0) > (found[key][0] or 0):
        found[key] = until, stage
      waiting += parents
  return [stage for _, stage in found.values()]


def _stages_of(path, until):
  """[(what it is one of, its last step, the stage, [(path, step), ...] it was made from)]; a folder may tell several."""
  if huggingface.is_folder(path):
    return _of_folder(path)
  try:
    return [_of_checkpoint(saved.find(path), until)]
  except run.Refused:  # moved, removed, or never one of ours
    return [(path, None, _stage(path.name, "not there any more"), [])]


def _stage(name, said, revision=None, licence=None, drawn=()):
  return dict(name=name, said=said, revision=revision, licence=licence, drawn=dict(drawn))


def _of_folder(path):
  """An export tells what it was made in; of another's folder its own card's licence is known."""
  made = _record(path / "parity.json").get("made")
  if made:
    stages = [one | dict(drawn={(licence, code): tokens for licence, code, tokens in one["drawn"]}) for one in made]
    return [((path, at), None, stage, []) for at, stage in enumerate(stages)]
  text = (path / "README.md").read_text(encoding="utf-8", errors="replace") if (path / "README.md").exists() else ""
  front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
  licence = re.search(r"^license: *(\S.*)$", front.group(1), re.MULTILINE) if front else None
  licence = licence.group(1).strip("'\"") if licence else None
  said = f"a Hugging Face folder, licence {licence or 'not stated'}"
  return [(path, None, _stage(path.name, said, licence=licence), [])]


def to_json(stages):
  """Stages as parity.json keeps them."""
  return [stage | dict(drawn=[[*key, tokens] for key, tokens in stage["drawn"].items()]) for stage in stages]


def _of_checkpoint(path, until):
  meta, workdir = saved.meta(path), path.parents[1]
  if "merge" in meta:
    facts = meta["merge"]
    parents = [pathlib.Path(one["path"]) for one in (*facts["checkpoints"], facts["base"]) if one]
    recipe = [f"{name} {facts[name]}" for name in ("t", "weights", "density", "scale") if name in facts]
    said = ", ".join([f"merge, {facts['operator']}", *recipe, "of " + ", ".join(map(_name, parents))])
    revision = _record(workdir / "merge.json").get("git_revision")
    return workdir, None, _stage(workdir.name, said, revision), [(parent, None) for parent in parents]
  record, data, origin = _record(workdir / "run.json"), saved.data(path), meta.get("origin")
  parent = _init_from(record)
  step = min(meta["step"], until if until is not None else meta["step"])
  said = f"train, steps {meta['start']:,} to {step:,} of {data['batch']} rows of {meta['T']} tokens"
  if parent:
    said += f", from {_name(parent)}"
  elif origin:
    said += f", from a checkpoint at step {origin['step']:,} that its run.json does not name"
  stage = _stage(workdir.name, said, record.get("git_revision"), drawn=_drawn(data, meta["start"], step))
  return workdir, step, stage, [(parent, origin and origin["step"])] if parent else []


def _init_from(record):
  """The path in a run.json's config, which is YAML: a long one goes on in the next line."""
  found = re.search(r"^init_from: (?!null)(\S.*(?:\n  .*)*)$", record.get("config", ""), re.MULTILINE)
  return pathlib.Path(" ".join(found.group(1).split()).strip("'\"")) if found else None


def _name(path):
  """A workdir's name, for a step of it too."""
  return path.parents[1].name if path.parent.name == "checkpoints" else path.name


def _record(path):
  try:
    return run.read_json(path, "record")
  except run.Refused:
    return {}


def _drawn(data, start, step):
  """{(licence, language): tokens} that a run drew."""
  before, after = (mixture.counts(data["plan"], at * data["batch"]) for at in (start, step))
  drawn = {}
  for source in data["plan"]["sources"]:
    tokens = (after[source["name"]] - before.get(source["name"], 0)) * data["plan"]["T"]
    if tokens:
      manifest = _record(pathlib.Path(source["path"]) / "manifest.json")
      licence = manifest.get("licence") or ("not stated" if manifest else "unknown: its rows are gone")
      key = licence, source["language"]
      drawn[key] = drawn.get(key, 0) + tokens
  return drawn


def card(config, cfg, stages, facts, parity, evaluated, quantised):
  """The text of README.md. facts: {"T", "tokenizer_sha256", "adapter"}; parity: of proof.py."""
  drawn = {}
  for stage in stages:
    for key, tokens in stage["drawn"].items():
      drawn[key] = drawn.get(key, 0) + tokens
  codes = {code for _, code in drawn}
  spoken = [language.iso for language in languages.LANGUAGES if language.code in codes]
  adapter = facts["adapter"] if config.form == "adapter" else None
  licences = sorted({stage["licence"] for stage in stages if stage["licence"]})
  parts = [
      _front(adapter, spoken, licences), f"# {config.name}\n", _what(config, cfg, facts, parity, adapter),
      _adapter_use() if adapter else _use(cfg, quantised), _proof(parity, facts),
      _quantised(quantised) if quantised else "", _evaluation(evaluated) if evaluated else "",
      _stages(stages), _licences(drawn) if drawn else "",
  ]
  return "\n".join(part for part in parts if part)


def _front(adapter, spoken, licences):
  listed = "".join(f"\n- {iso}" for iso in dict.fromkeys(spoken))
  return f"""---
library_name: {"peft" if adapter else "transformers"}
pipeline_tag: text-generation
license: {licences[0] if len(licences) == 1 else "other"}{f"{chr(10)}language:{listed}" if listed else ""}
---"""


def _what(config, cfg, facts, parity, adapter):
  if adapter:
    return f"""Adapters of rank {adapter["rank"]}, alpha {adapter["alpha"]}, for {", ".join(adapter["matrices"])}, made
with tiny_aya_jax: {parity["tensors"]} tensors in float32. BASE is an export of the checkpoint that they were
trained on.
"""
  return f"""A Cohere2-shaped multilingual model made with tiny_aya_jax: {4 * cfg.L} layers, width {cfg.D}, vocabulary
{cfg.V:,}, context {facts["T"]}, window {cfg.window}. {parity["tensors"]} tensors in {config.dtype}.
"""


def _use(cfg, quantised):
  text = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```
"""
  text += (f"\nA token of a sliding layer sees {cfg.window} tokens, itself included. Runtimes that let it see one more "
           f"(vLLM 0.30 to 0.33) differ beyond {cfg.window} tokens.\n")
  return text + (f"\n`llama-cli -m {quantised['files'][-1]}` for llama.cpp.\n" if quantised else "")


def _adapter_use():
  return """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)
```
"""


def _proof(parity, facts):
  readers = [f"- {name}: {_found(one)}" for name, one in parity.get("readers", {}).items()]
  return "\n".join([
      "## Proof", "",
      "`parity.json` was made at export: every tensor in the files equals the trained one, rounded to their "
      "dtype; logits against the trainer's own forward pass:", "", *readers, "",
      f"Tokenizer {facts['tokenizer_sha256'][:16]}.", ""])


def _found(one):
  if isinstance(one, str):
    return one
  return f"differ by {one['largest_logit_difference']:.1e} at most, of logits up to {one['largest_logit']:.1f}"


def _evaluation(evaluated):
  """A mean is never without its spread and its worst language."""
  rows = [f"| {task} | {measure} | {better} | {found['mean']:.3f} | {found['deviation']:.3f} | "
          f"{found['languages']} | {next(iter(found['worst']))} {found['poorest']:.3f} |"
          for task, measure, better, found in evaluated if found["languages"]]
  return "\n".join(["## Evaluation", "", f"Every language is on [its page]({PAGE}).", "",
                    "| task | measure | better | mean | deviation | languages | worst |",
                    "|---|---|---|---|---|---|---|", *rows, ""])


def _quantised(quantised):
  return "\n".join(["## Quantised", "", *quantised["lines"], ""])


def _stages(stages):
  return "\n".join(["## How it was made", "", *(
      f"- **{stage['name']}**: {stage['said']}"
      + (f" (tiny_aya_jax {stage['revision'][:12]})" if stage["revision"] else "") for stage in stages), ""])


def _licences(drawn):
  """What was drawn to train it, by licence of the source."""
  rows = []
  for licence in sorted({licence for licence, _ in drawn}):
    tokens = {code: count for (found, code), count in drawn.items() if found == licence}
    rows.append(f"| {licence} | {len(tokens)} | {sum(tokens.values()):,} |")
  return "\n".join(["## Data", "", "| licence of the sources | languages | tokens drawn |", "|---|---|---|",
                    *rows, ""])
