"""VERB export: a checkpoint of any stage, or a Hugging Face folder -> a Hugging Face folder, and GGUF.

The folder appears only when it is whole: weights, tokenizer, chat template, model card and
parity.json, the proof that what was written is what was trained (proof.py). Of a run with adapters it
holds the model they make of their base; with config.form "adapter", the adapters alone, for PEFT.
Tensors are read and written one after the other.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
from typing import Any, Callable, NamedTuple

import ml_collections
import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer as tokenizers
from tiny_aya_jax.export import card, cohere2, huggingface, quantised, runtimes, tensors as files
from tiny_aya_jax.train import saved

# What needs jax is imported behind the checks: a wrong field is refused in a second.
RECORD = "parity.json"


class Source(NamedTuple):
  """What is exported, before its parameters are read."""

  path: pathlib.Path
  cfg: Any
  T: int
  tokenizer: Any
  identity: Any  # JSON: equal for equal parameters, and for equal texts of a folder
  evaluated: Any  # what evaluate knows it by
  adapter: dict | None
  leaves: Callable  # () -> (path in our tree, leaf) one after the other; read anew at every call
  texts: pathlib.Path | None  # the folder whose tokenizer and template are kept as they are


def main(config, workdir):
  """Writes workdir/<config.name> from config.checkpoint; refuses when the proof fails."""
  source, manifests, evaluated = check(config, workdir)
  folder = pathlib.Path(workdir) / config.name
  inputs = run.fingerprint([
      source.identity, source.tokenizer.sha256, config.form, config.dtype, evaluated, config.gguf.to_dict(),
      [manifest["sha256"] for manifest in manifests], config.proof.to_dict()])
  with _alone(folder):
    if folder.exists() and not (folder / RECORD).exists():
      raise run.Refused(f"{folder} exists and is no export: give another config.name")
    if run.up_to_date(folder / RECORD, inputs, config.overwrite) and _holds(folder):
      run.say(f"{folder}: up to date")
      return
    with _new(folder) as whole:
      parity = _write(whole, source, config, manifests, evaluated, inputs)
  run.say(f"exported {source.path} to {folder}: " + _sentence(parity))


def _write(folder, source, config, manifests, evaluated, inputs):
  """All files; returns what the proof found."""
  apart = config.form == "adapter"
  if not apart:
    files.refuse_full(folder, cohere2.size(source.cfg, config.dtype) + quantised.size(config, source.cfg))
  parity = (_adapter if apart else _merged)(folder, source, config)
  more = quantised.write(folder, source, config, manifests) if config.gguf.kinds else None
  stages = card.lineage(source.path)
  text = card.card(config, source.cfg, stages, dict(
      T=source.T, tokenizer_sha256=source.tokenizer.sha256, adapter=source.adapter), parity, evaluated, more)
  run.write_text(folder / "README.md", text)
  if evaluated:
    shutil.copyfile(pathlib.Path(config.report) / "report.html", folder / card.PAGE)
  run.write_json(folder / RECORD, dict(
      inputs=inputs, **parity, **(dict(gguf=more["readers"]) if more else {}), made=card.to_json(stages),
      bytes=_sizes(folder)))
  return parity


@contextlib.contextmanager
def _alone(folder):
  """One export of a name at a time; puts right what a kill between two renames left."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  _, old, lock = _beside(folder)
  with open(lock, "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise run.Refused(f"another export writes {folder}: wait for it, or give another config.name") from None
    try:
      if old.exists() and not folder.exists():
        old.rename(folder)
      _drop(old)
      yield
    finally:
      lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _new(folder):
  """A folder to write into, which becomes `folder` at the end, or is gone; there is always a whole one."""
  hidden, old, _ = _beside(folder)
  shutil.rmtree(hidden, ignore_errors=True)  # of a killed export
  hidden.mkdir()
  try:
    yield hidden
    if folder.exists():
      os.replace(folder, old)
    os.replace(hidden, folder)
  finally:
    shutil.rmtree(hidden, ignore_errors=True)
  _drop(old)


def _drop(old):
  """Deletes an earlier folder; sets aside one that holds anything that the verb did not write."""
  if not old.exists():
    return
  if _holds(old, alone=True):
    shutil.rmtree(old)
    return
  name = old.name.removeprefix(".").removesuffix(".old")
  kept = saved.set_aside(old.rename(old.with_name(name + f".{os.getpid()}")), "superseded")
  run.say(f"the earlier {name} held more than was written there, and is kept as {kept}")


def _beside(folder):
  """(what is written, the earlier folder between two renames, the lock), beside a folder."""
  return [folder.with_name(f".{folder.name}.{what}") for what in ("new", "old", "lock")]


def _sentence(parity):
  readers = parity["readers"] if "readers" in parity else {}
  agreed = [name for name, found in readers.items() if isinstance(found, dict)]
  return (f"{parity['tensors']} tensors in {parity['dtype']} read back bit for bit, logits differ by "
          f"{parity['largest_logit_difference']:.1e} at most" + (f" ({', '.join(agreed)})" if agreed else ""))


def check(config, workdir):
  """Refuses what cannot be; -> (Source, manifests of config.gguf.rows, the rows of config.report)."""
  run.existing("checkpoint", config.checkpoint)
  run.choose("config.dtype", config.dtype, files.DTYPES)
  run.choose("config.form", config.form, ("merged", "adapter"))
  run.plain_name("name", config.name)
  if not 0 < config.proof.tokens or config.proof.greedy < 0:
    raise run.Refused(f"config.proof has tokens {config.proof.tokens} and greedy {config.proof.greedy}: "
                      "expected at least 1, and at least 0")
  source = (_of_folder if huggingface.is_folder(config.checkpoint) else _of_checkpoint)(config)
  huggingface.refuse_vocabulary(source.tokenizer, source.cfg)
  source.tokenizer.json()  # refuses what has none that is exact
  apart = config.form == "adapter"
  if apart and not source.adapter:
    raise run.Refused(f"{source.path} was trained without adapters: config.form 'adapter' has nothing to export")
  if apart and config.gguf.kinds:
    raise run.Refused("config.form 'adapter' is for PEFT, and llama.cpp reads the merged model: drop config.gguf.kinds")
  for name in ("transformers", "mlx", "llama_cpp"):
    if config.proof[name]:
      runtimes.find(name, config.proof[name])
  manifests = quantised.check(config, source)
  folder = pathlib.Path(workdir) / config.name
  if folder.resolve() in (source.path.resolve(), *source.path.resolve().parents):
    raise run.Refused(f"{folder} is what is exported, or holds it: give another config.name")
  return source, manifests, _evaluated(config.report, source) if config.report else None


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

  prints = meta["fingerprints"]["params"]
  return Source(path, cfg, meta["T"], tokenizer, prints, [meta["model"], prints], meta.get("adapter"), leaves, None)


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

  digests = huggingface.digests(path)
  texts = {name: run.sha256(path / name) for name in huggingface.TEXTS if (path / name).exists()}
  return Source(path, cfg, T, tokenizer, digests | texts, digests, None, leaves, path)


def _merged(folder, source, config):
  """Writes and proves the folder."""
  from tiny_aya_jax.export import proof

  huggingface.write_leaves(folder, source.leaves(), source.cfg, config.dtype)
  if source.texts:
    huggingface.copy_texts(folder, source.cfg, source.texts, config.dtype)
  else:
    huggingface.write_texts(folder, source.cfg, source.tokenizer, config.dtype, source.T)
  return proof.prove(folder, source.leaves(), source.cfg, config.dtype, source.tokenizer, config.proof)


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
  import jax

  from tiny_aya_jax.model.transformer import TinyAya, logits

  token_BT = np.random.default_rng(0).integers(0, cfg.V, (1, tokens), np.int32)
  rows = (token_BT, np.ones_like(token_BT), np.arange(tokens, dtype=np.int32)[None])
  with jax.default_matmul_precision("highest"):
    hidden_BTD = TinyAya(cfg, adapter=adapter).apply({"params": params}, *rows)
    return np.asarray(logits(params, hidden_BTD, cfg))


def _holds(folder, alone=False):
  """Whether a folder holds what it did when it was proved, each file of its size; and nothing else, if `alone`."""
  expected, found = run.read_json(folder / RECORD, "earlier result").get("bytes") or {}, _sizes(folder)
  return bool(expected) and (found == expected if alone else expected.items() <= found.items())


def _sizes(folder):
  return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != RECORD}


def _evaluated(report, source):
  """[(task, measure, which way is better, its summary)] of this checkpoint, from evaluate's workdir."""
  report = pathlib.Path(run.existing("report", report))
  found = run.read_json(report / "evaluation.json", "config.report")
  subjects = found.get("checkpoints")
  if not isinstance(subjects, dict) or not (report / "report.html").exists():
    raise run.Refused(f"config.report: {report} is no workdir of evaluate")
  names = [name for name, one in subjects.items() if one["path"] == str(source.path)]
  if not names:
    raise run.Refused(f"config.report: {report} is no evaluation of {source.path}, but of "
                      + ", ".join(one["path"] for one in subjects.values()))
  if subjects[names[0]].get("identity") != run.fingerprint(source.evaluated):
    raise run.Refused(f"config.report: {report} evaluated other parameters at {source.path}: evaluate it again")
  return [(one["task"], one["measure"], one["better"], one["summary"][names[0]])
          for one in found["measures"]]
