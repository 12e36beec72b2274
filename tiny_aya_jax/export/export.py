"""VERB export: a checkpoint of any stage, or a Hugging Face folder -> a Hugging Face folder, and GGUF.

The folder appears only when it is whole: weights, tokenizer, chat template, model card and
parity.json, the proof that what was written is what was trained (proof.py). Of a run with adapters it
holds the model they make of their base; with config.form "adapter", the adapters alone, for PEFT.
Tensors are read and written one after the other.
"""

import os
import pathlib
import shutil
from typing import Any, Callable, NamedTuple

import ml_collections
import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.data import loader, tokenizer as tokenizers
from tiny_aya_jax.export import card, cohere2, gguf, huggingface, runtimes, tensors as files
from tiny_aya_jax.train import saved

# What needs jax is imported behind the checks: a wrong field is refused in a second.


UNQUANTISED = dict(bfloat16="BF16", float16="F16", float32="F32")  # the GGUF kind that rounds nothing of a folder


class Source(NamedTuple):
  """What is exported, before its parameters are read."""

  path: pathlib.Path
  cfg: Any
  T: int
  tokenizer: Any
  identity: Any  # JSON: equal for equal parameters
  adapter: dict | None
  leaves: Callable  # () -> (path in our tree, leaf) one after the other; read anew at every call
  texts: pathlib.Path | None  # the folder whose tokenizer and template are kept as they are


def main(config, workdir):
  """Writes workdir/<config.name> from config.checkpoint; refuses when the proof fails."""
  source, manifests = check(config, workdir)
  folder, apart = pathlib.Path(workdir) / config.name, config.form == "adapter"
  evaluated = _evaluated(config.report, source.path) if config.report else None
  inputs = run.fingerprint([
      source.identity, source.tokenizer.sha256, config.form, config.dtype, evaluated, config.gguf.to_dict(),
      [manifest["sha256"] for manifest in manifests], config.proof.to_dict()])
  if run.up_to_date(folder / "parity.json", inputs, config.overwrite) and _whole(folder):
    run.say(f"{folder}: up to date")
    return
  staging = folder.with_name(f".{folder.name}.new")  # what a killed export leaves is in here
  shutil.rmtree(staging, ignore_errors=True)
  whole = staging / folder.name
  whole.mkdir(parents=True)
  parity = (_adapter if apart else _merged)(whole, source, config)
  quantised = _quantised(whole, source, config, manifests) if config.gguf.kinds else None
  text = card.card(config, source.cfg, card.lineage(source.path), dict(
      T=source.T, tokenizer_sha256=source.tokenizer.sha256, adapter=source.adapter),
      parity, evaluated, quantised)
  run.write_text(whole / "README.md", text)
  if evaluated:
    shutil.copyfile(pathlib.Path(config.report) / "report.html", whole / card.PAGE)
  run.write_json(whole / "parity.json", dict(
      inputs=inputs, **parity, **(dict(gguf=quantised["readers"]) if quantised else {}), bytes=_sizes(whole)))
  old = staging / "old"  # there is always a whole folder: the earlier one, or this
  if folder.exists():
    os.replace(folder, old)
  os.replace(whole, folder)
  shutil.rmtree(staging)
  run.say(f"exported {source.path} to {folder}: " + _sentence(parity))


def _sentence(parity):
  readers = parity["readers"] if "readers" in parity else {}
  agreed = [name for name, found in readers.items() if isinstance(found, dict)]
  return (f"{parity['tensors']} tensors in {parity['dtype']} read back bit for bit, logits differ by "
          f"{parity['largest_logit_difference']:.1e} at most" + (f" ({', '.join(agreed)})" if agreed else ""))


def check(config, workdir):
  """Refuses what cannot be; -> (Source, manifests of config.gguf.rows)."""
  run.existing("checkpoint", config.checkpoint)
  run.choose("config.dtype", config.dtype, files.DTYPES)
  run.choose("config.form", config.form, ("merged", "adapter"))
  run.plain_name("name", config.name)
  if not 0 < config.proof.tokens or config.proof.greedy < 0:
    raise run.Refused(f"config.proof has tokens {config.proof.tokens} and greedy {config.proof.greedy}: "
                      "expected at least 1, and at least 0")
  source = (_of_folder if huggingface.is_folder(config.checkpoint) else _of_checkpoint)(config)
  huggingface.refuse_vocabulary(source.tokenizer, source.cfg)
  apart = config.form == "adapter"
  if apart and not source.adapter:
    raise run.Refused(f"{source.path} was trained without adapters: config.form 'adapter' has nothing to export")
  if apart and config.gguf.kinds:
    raise run.Refused("config.form 'adapter' is for PEFT, and llama.cpp reads the merged model: drop config.gguf.kinds")
  for name in ("transformers", "mlx", "llama_cpp"):
    if config.proof[name]:
      runtimes.find(name, config.proof[name])
  manifests = _check_gguf(config, source)
  folder = pathlib.Path(workdir) / config.name
  if folder.exists() and not (folder / "parity.json").exists():
    raise run.Refused(f"{folder} exists and is no export: give another config.name")
  if not apart:
    weights = cohere2.size(source.cfg, "float32") // 4
    kinds = {*config.gguf.kinds, UNQUANTISED[config.dtype]} if config.gguf.kinds else ()
    files.refuse_full(pathlib.Path(workdir), cohere2.size(source.cfg, config.dtype) + sum(
        int(weights * gguf.BYTES.get(kind, 1)) for kind in kinds))  # a K-quant has less than a byte a weight
  return source, manifests


def _of_checkpoint(config):
  tokenizer = tokenizers.load(run.existing("tokenizer", config.tokenizer))
  path = saved.find(config.checkpoint)
  meta = saved.meta(path)
  if meta["tokenizer_sha256"] != tokenizer.sha256:
    raise run.Refused(f"{path} was trained with tokenizer {meta['tokenizer_sha256'][:12]}, "
                      f"{config.tokenizer} is {tokenizer.sha256[:12]}")
  cfg = ml_collections.ConfigDict(meta["model"])

  def leaves():
    from tiny_aya_jax.train import checkpoint

    shapes, read_leaf = checkpoint.leaves(path)
    expected = {"/".join(place): shape for place, shape in cohere2.leaf_shapes(cfg).items()}
    if odd := sorted({name for name, _ in shapes.items() ^ expected.items()}):
      raise saved.Damaged(f"{path}: params differs from its model in {len(odd)} arrays, e.g. {odd[0]}")
    for place in run.progress(cohere2.leaf_shapes(cfg), "export"):
      yield place, read_leaf("/".join(place))

  return Source(path, cfg, meta["T"], tokenizer, meta["fingerprints"]["params"], meta.get("adapter"), leaves, None)


def _of_folder(config):
  path = pathlib.Path(config.checkpoint).absolute()
  cfg, T = huggingface.describe(path)
  tokenizer = tokenizers.load(path / "tokenizer.json")
  if config.tokenizer and (difference := tokenizer.difference(tokenizers.load(config.tokenizer))):
    raise run.Refused(f"{path} has another tokenizer than {config.tokenizer}: {difference}")
  huggingface.open_folder(path)

  def leaves():
    shapes, read_leaf, _ = huggingface.leaves(path)
    for place in run.progress(shapes, "export"):
      yield place, read_leaf(place)

  return Source(path, cfg, T, tokenizer, huggingface.digests(path), None, leaves, path)


def _merged(folder, source, config):
  """Writes and proves the folder."""
  from tiny_aya_jax.export import proof

  huggingface.write_leaves(folder, source.leaves(), source.cfg, config.dtype)
  if source.texts:
    huggingface.copy_texts(folder, source.cfg, source.texts, config.dtype)
  else:
    huggingface.write_texts(folder, source.cfg, source.tokenizer, config.dtype)
  return proof.prove(folder, source.leaves(), source.cfg, config.dtype, source.tokenizer, config.proof)


def _check_gguf(config, source):
  """Manifests of config.gguf.rows; refuses kinds that cannot be made."""
  kinds, asked = tuple(config.gguf.kinds), config.gguf
  if not kinds:
    if odd := [f"config.gguf.{name}" for name in ("rows", "pre") if asked[name]]:
      raise run.Refused(f"{odd[0]} is set and config.gguf.kinds is not: name the kinds of GGUF files")
    return []
  if len(set(kinds)) < len(kinds):
    raise run.Refused(f"config.gguf.kinds {kinds} has one twice")
  for kind in kinds:
    run.choose("config.gguf.kinds", kind, (*gguf.KINDS, *runtimes.QUANTIZED))
    gguf.check(source.cfg, kind if kind in gguf.KINDS else "F32")
    if kind in runtimes.QUANTIZED and not runtimes.find("llama_cpp", config.proof.llama_cpp):
      raise run.Refused(f"{kind} is made by llama.cpp: set config.proof.llama_cpp to a Python with llama-cpp-python, "
                        f"or choose among {', '.join(gguf.KINDS)}")
  manifests = loader.read_manifests(run.existing("gguf.rows", asked.rows)) if asked.rows else []
  if manifests and manifests[0]["tokenizer_sha256"] != source.tokenizer.sha256:
    raise run.Refused(f"{asked.rows} was packed with tokenizer {manifests[0]['tokenizer_sha256'][:12]}, "
                      f"{source.tokenizer.path} is {source.tokenizer.sha256[:12]}")
  return manifests


def _quantised(folder, source, config, manifests):
  """Writes, proves and measures the GGUF files: {"files", "readers", "lines"}."""
  from tiny_aya_jax.export import proof, quality

  paths = {kind: folder / f"{config.name}-{kind}.gguf" for kind in config.gguf.kinds}
  whole = UNQUANTISED[config.dtype]
  base = paths.get(whole, folder.parent / f"{whole}.gguf")  # not in the folder if nobody asked for it
  vocabulary = gguf.write(base, folder, whole, pre=config.gguf.pre)["vocabulary"]
  if vocabulary["differs"]:
    run.say(f"llama.cpp's tokenizer {vocabulary['pre']} differs from this one: {vocabulary['differs']}")
  python = runtimes.find("llama_cpp", config.proof.llama_cpp)
  for kind, path in paths.items():
    if kind in runtimes.QUANTIZED:
      runtimes.quantize(python, base, path, kind)
    elif path != base:
      gguf.write(path, folder, kind, pre=config.gguf.pre)
  readers = proof.prove_gguf(folder, whole, {whole: base} | paths, source.cfg, source.tokenizer, config.proof, python,
                             vocabulary["differs"])
  lines = [f"- {path.name}: {path.stat().st_size / 1e6:,.1f} MB" for path in paths.values()]
  differs = ["", f"llama.cpp's own tokenizer differs: {vocabulary['differs']}."] if vocabulary["differs"] else []
  if manifests:
    found = quality.bits_per_byte({whole: base} | paths, config.gguf.rows, source.tokenizer,
                                  batch=config.gguf.batch, chunk=config.gguf.chunk)
    record = quality.record(found, whole, {kind: gguf.facts(path) for kind, path in ({whole: base} | paths).items()})
    run.write_json(folder / "quantisation.json", record)
    lines = [quality.markdown(record), "", "Bits per byte of held-out text, each kind's weights under our own forward "
             "pass; every language is in `quantisation.json`."]
  if base not in paths.values():
    base.unlink()
  return dict(files=[path.name for path in paths.values()], readers=readers, lines=lines + differs)


def _adapter(folder, source, config):
  """Writes and proves a folder of adapters, and that beside their base they are the merged model."""
  from tiny_aya_jax.export import peft
  from tiny_aya_jax.model import adapter as adapters
  from tiny_aya_jax.train import checkpoint

  params, meta = checkpoint.restore_apart(source.path)
  adapter = adapters.described(meta["adapter"])
  peft.write(folder, params, adapter)
  back, trained = peft.read(folder), peft.tensors(params, adapter)
  if back.keys() != trained.keys() or not all(np.array_equal(back[name], trained[name]) for name in back):
    raise run.Refused(f"{folder}: tensors differ from the checkpoint after reading back")
  beside = _predicted(params, source.cfg, config.proof.tokens, adapter)
  whole = _predicted(adapters.merged(params, adapter), source.cfg, config.proof.tokens)
  apart, most = float(np.abs(beside - whole).max()), float(np.abs(whole).max())
  if not apart <= 1e-3 * max(1.0, most):
    raise run.Refused(f"{folder}: logits beside the base differ from the merged model's by {apart:.1e}")
  return dict(tensors=len(back), dtype="float32", largest_logit_difference=apart,
              readers={"beside the base": dict(largest_logit_difference=apart, largest_logit=most)})


def _predicted(params, cfg, tokens, adapter=None):
  """Logits of random tokens, fp32."""
  from tiny_aya_jax.model.transformer import TinyAya, logits

  token_BT = np.random.default_rng(0).integers(0, cfg.V, (1, tokens), np.int32)
  rows = (token_BT, np.ones_like(token_BT), np.arange(tokens, dtype=np.int32)[None])
  hidden_BTD = TinyAya(cfg, adapter=adapter).apply({"params": params}, *rows)
  return np.asarray(logits(params, hidden_BTD, cfg))


def _whole(folder):
  """Whether every file has the size it had when it was proved; else the folder is made again."""
  expected = run.read_json(folder / "parity.json", "earlier result").get("bytes")
  return bool(expected) and expected.items() <= _sizes(folder).items()


def _sizes(folder):
  return {path.name: path.stat().st_size for path in sorted(folder.iterdir())
          if path.name != "parity.json"}


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
