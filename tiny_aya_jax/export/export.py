"""VERB export: a checkpoint of any stage -> a Hugging Face folder that was read back and compared.

The folder appears only when it is whole: weights, tokenizer, chat template, model card and
parity.json, the proof that what was written is what was trained. Of a run with adapters it holds the
model they make of their base; with config.form "adapter", the adapters alone, for PEFT.
"""

import importlib.util
import os
import pathlib
import shutil

import ml_collections
import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer as tokenizers
from tiny_aya_jax.train import saved

# What needs jax is imported behind the checks: a wrong field is refused in a second.
PROBE_TOKENS = 64
PAGE = "evaluation.html"  # in the folder, with config.report


def main(config, workdir):
  """Writes workdir/<config.name> from config.checkpoint; refuses when the proof fails."""
  run.existing("checkpoint", config.checkpoint)
  run.choose("config.dtype", config.dtype, ("bfloat16", "float16", "float32"))
  run.choose("config.form", config.form, ("merged", "adapter"))
  run.plain_name("name", config.name)
  if importlib.util.find_spec("safetensors") is None:
    raise run.Refused("export needs the safetensors package: pip install 'tiny_aya_jax[export]'")
  tokenizer = tokenizers.load(run.existing("tokenizer", config.tokenizer))
  path = saved.find(config.checkpoint)
  meta = saved.meta(path)
  if meta["tokenizer_sha256"] != tokenizer.sha256:
    raise run.Refused(f"{path} was trained with tokenizer {meta['tokenizer_sha256'][:12]}, "
                      f"{config.tokenizer} is {tokenizer.sha256[:12]}")
  apart = config.form == "adapter"
  if apart and not meta.get("adapter"):
    raise run.Refused(f"{path} was trained without adapters: config.form 'adapter' has nothing to export")
  folder = pathlib.Path(workdir) / config.name
  if folder.exists() and not (folder / "parity.json").exists():
    raise run.Refused(f"{folder} exists and is no export: give another config.name")
  evaluated = _evaluated(config.report, path) if config.report else None
  dtype = "float32" if apart else config.dtype
  made_of = [meta["fingerprints"]["params"], tokenizer.sha256, dtype, evaluated]
  inputs = run.fingerprint([*made_of, "adapter"] if apart else made_of)
  if run.up_to_date(folder / "parity.json", inputs, config.overwrite) and _whole(folder):
    run.say(f"{folder}: up to date")
    return
  cfg = ml_collections.ConfigDict(meta["model"])
  staging = folder.with_name(f".{folder.name}.new")  # what a killed export leaves is in here
  shutil.rmtree(staging, ignore_errors=True)
  whole = staging / folder.name
  parity = _adapter(whole, path, cfg) if apart else _merged(whole, path, cfg, tokenizer, config.dtype)
  (whole / "README.md").write_text(_card(cfg, meta, parity, config, evaluated), encoding="utf-8")
  if evaluated:
    shutil.copyfile(pathlib.Path(config.report) / "report.html", whole / PAGE)
  run.write_json(whole / "parity.json", dict(inputs=inputs, **parity, bytes=_sizes(whole)))
  if folder.exists():
    shutil.rmtree(folder)
  os.replace(whole, folder)
  staging.rmdir()
  run.say(f"exported {path} to {folder}: read back, logits differ by "
          f"{parity['largest_logit_difference']:.1e} at most ({parity['dtype']})")


def _merged(folder, path, cfg, tokenizer, dtype):
  from tiny_aya_jax.export import huggingface
  from tiny_aya_jax.train import checkpoint

  params, _ = checkpoint.restore_params(path)
  huggingface.write(folder, params, cfg, tokenizer, dtype=dtype)
  return prove(folder, params, cfg, dtype)


def _adapter(folder, path, cfg):
  """Writes and proves a folder of adapters, and that beside their base they are the merged model."""
  from safetensors.numpy import load_file

  from tiny_aya_jax.export import huggingface
  from tiny_aya_jax.model import adapter as adapters
  from tiny_aya_jax.train import checkpoint

  params, meta = checkpoint.restore_apart(path)
  adapter = adapters.described(meta["adapter"])
  huggingface.write_adapter(folder, params, adapter)
  back, trained = load_file(folder / "adapter_model.safetensors"), huggingface.adapter_tensors(params, adapter)
  if back.keys() != trained.keys() or not all(np.array_equal(back[name], trained[name]) for name in back):
    raise run.Refused(f"{folder}: tensors differ from the checkpoint after reading back")
  beside = _predicted(params, cfg, adapter)
  whole = _predicted(adapters.merged(params, adapter), cfg)
  apart = float(np.abs(beside - whole).max())
  if not apart <= 1e-3 * max(1.0, float(np.abs(whole).max())):
    raise run.Refused(f"{folder}: logits beside the base differ from the merged model's by {apart:.1e}")
  return dict(tensors=len(back), dtype="float32", largest_logit_difference=apart)


def _whole(folder):
  """Whether every file has the size it had when it was proved; else the folder is made again."""
  expected = run.read_json(folder / "parity.json", "earlier result").get("bytes")
  return bool(expected) and expected.items() <= _sizes(folder).items()


def _sizes(folder):
  return {path.name: path.stat().st_size for path in sorted(folder.iterdir())
          if path.name != "parity.json"}


def prove(folder, params, cfg, dtype):
  """Reads the folder back: every tensor must equal the parameter rounded to dtype, bit for bit.

  Returns {"tensors", "largest_logit_difference" (fp32, random tokens)}; refuses what differs.
  """
  import jax

  from tiny_aya_jax.export import huggingface

  back, cfg_back = huggingface.read(folder)
  if cfg_back.to_dict() != cfg.to_dict():
    raise run.Refused(f"{folder}: config.json reads back as {cfg_back.to_dict()}, not {cfg.to_dict()}")
  rounded = jax.tree.map(
      lambda x: np.asarray(x).astype(huggingface.DTYPES[dtype]).astype(np.float32), params
  )
  same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), rounded, back)
  if not all(jax.tree.leaves(same)):
    raise run.Refused(f"{folder}: tensors differ from the checkpoint after reading back")
  return dict(
      tensors=len(huggingface.tensor_names(cfg)), dtype=dtype,
      largest_logit_difference=float(np.abs(_predicted(params, cfg) - _predicted(back, cfg)).max()),
  )


def _predicted(params, cfg, adapter=None):
  """Logits of random tokens, fp32."""
  from tiny_aya_jax.model.transformer import TinyAya, logits

  token_BT = np.random.default_rng(0).integers(0, cfg.V, (1, PROBE_TOKENS), np.int32)
  rows = (token_BT, np.ones_like(token_BT), np.arange(PROBE_TOKENS, dtype=np.int32)[None])
  hidden_BTD = TinyAya(cfg, adapter=adapter).apply({"params": params}, *rows)
  return np.asarray(logits(params, hidden_BTD, cfg))


def _evaluated(report, path):
  """[(task, measure, which way is better, its summary)] of this checkpoint, from evaluate's workdir."""
  report = pathlib.Path(run.existing("report", report))
  found = run.read_json(report / "evaluation.json", "config.report")
  names = [name for name, one in found["checkpoints"].items() if one["path"] == str(path)]
  if not names or not (report / "report.html").exists():
    raise run.Refused(f"config.report: {report} is no evaluation of {path}, but of "
                      + ", ".join(one["path"] for one in found["checkpoints"].values()))
  return [(one["task"], one["measure"], one["better"], one["summary"][names[0]])
          for one in found["measures"]]


def _card(cfg, meta, parity, config, evaluated):
  table = _evaluation(evaluated) if evaluated else ""
  return _adapter_card(meta, parity, config, table) if config.form == "adapter" else f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {config.name}

A Cohere2-shaped multilingual model trained with tiny_aya_jax, step {meta["step"]}: {4 * cfg.L} layers,
width {cfg.D}, vocabulary {cfg.V:,}, context {meta["T"]}. {parity["tensors"]} tensors in {config.dtype}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```

`parity.json` holds the proof made at export: every tensor read back equals the trained one.
Tokenizer {meta["tokenizer_sha256"][:16]}.
{table}"""


def _adapter_card(meta, parity, config, table):
  adapter = meta["adapter"]
  return f"""---
library_name: peft
pipeline_tag: text-generation
---
# {config.name}

Adapters of rank {adapter["rank"]}, alpha {adapter["alpha"]}, for {", ".join(adapter["matrices"])}, trained with
tiny_aya_jax, step {meta["step"]}: {parity["tensors"]} tensors in float32. BASE is an export of the checkpoint
that they were trained on.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)
```

`parity.json` holds the proof made at export: every tensor read back equals the trained one.
Tokenizer {meta["tokenizer_sha256"][:16]}.
{table}"""


def _evaluation(evaluated):
  """The card's table: a mean is never without its spread and its worst language."""
  rows = [f"| {task} | {measure} | {better} | {found['mean']:.3f} | {found['deviation']:.3f} | "
          f"{found['languages']} | {next(iter(found['worst']))} {found['poorest']:.3f} |"
          for task, measure, better, found in evaluated if found["languages"]]
  return "\n".join(["", "## Evaluation", "", f"Every language is on [its page]({PAGE}).", "",
                    "| task | measure | better | mean | deviation | languages | worst |",
                    "|---|---|---|---|---|---|---|", *rows, ""])
