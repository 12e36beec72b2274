"""The GGUF files of an export: which can be made, making them of the finished folder, and what they cost.

A file's form is gguf.py's, its proof proof.py's, its figures per language quality.py's.
"""

import pathlib
import tempfile

from tiny_aya_jax import run
from tiny_aya_jax.data import loader, tokenizer as tokenizers
from tiny_aya_jax.export import cohere2, gguf, runtimes, vocabulary

UNQUANTISED = dict(bfloat16="BF16", float16="F16", float32="F32")  # what rounds nothing of a folder


def check(config, source):
  """Manifests of config.gguf.rows; refuses files that cannot be made."""
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
  if not run.installed("gguf"):
    raise run.Refused("GGUF files need the gguf package: pip install 'tiny_aya_jax[export]'")
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "tokenizer.json")
    path.write_text(source.tokenizer.json(), encoding="utf-8")
    vocabulary.read(path, source.cfg.V, asked.pre)
  if source.texts:
    gguf.special_ids(run.read_json(source.texts / "config.json", "Hugging Face folder"), source.cfg.V, source.texts)
  for field in ("batch", "chunk"):
    if asked[field] < 1:
      raise run.Refused(f"config.gguf.{field} is {asked[field]}, expected at least 1")
  manifests = loader.read_manifests(run.existing("gguf.rows", asked.rows)) if asked.rows else []
  if manifests and manifests[0]["tokenizer_sha256"] != _packed_with(config, source).sha256:
    raise run.Refused(f"{asked.rows} was packed with tokenizer {manifests[0]['tokenizer_sha256'][:12]}, "
                      f"{_packed_with(config, source).path} is {_packed_with(config, source).sha256[:12]}")
  return manifests


def _packed_with(config, source):
  """The tokenizer as the rows know it: config.tokenizer may be another file of the same ids."""
  return tokenizers.load(config.tokenizer) if config.tokenizer else source.tokenizer


def size(config, cfg):
  """Bytes that all files need at most, the unquantised one that others are made of included."""
  if not config.gguf.kinds:
    return 0
  weights = cohere2.size(cfg, "float32") // 4
  kinds = {*config.gguf.kinds, UNQUANTISED[config.dtype]}
  return sum(int(weights * gguf.BYTES.get(kind, 1)) for kind in kinds)  # a K-quant has less than a byte a weight


def write(folder, source, config, manifests):
  """Writes, proves and measures the files: {"files", "readers", "lines"}."""
  from tiny_aya_jax.export import proof, quality

  paths = {kind: folder / f"{config.name}-{kind}.gguf" for kind in config.gguf.kinds}
  whole = UNQUANTISED[config.dtype]
  base = paths.get(whole, folder / f".{whole}.gguf")  # gone at the end if nobody asked for it
  known = gguf.write(base, folder, whole, pre=config.gguf.pre)["vocabulary"]
  python = runtimes.find("llama_cpp", config.proof.llama_cpp)
  for kind, path in paths.items():
    if kind in runtimes.QUANTIZED:
      runtimes.quantize(python, base, path, kind)
    elif path != base:
      gguf.write(path, folder, kind, pre=config.gguf.pre)
  readers = proof.prove_gguf(
      folder, paths, source.cfg, source.tokenizer, config.proof, python, known["differs"])
  lines = [f"- {path.name}: {path.stat().st_size / 1e6:,.1f} MB" for path in paths.values()]
  if manifests:
    every = {whole: base} | paths
    found = quality.bits_per_byte(every, config.gguf.rows, _packed_with(config, source),
                                  batch=config.gguf.batch, chunk=config.gguf.chunk)
    record = quality.record(found, whole, {kind: gguf.facts(path) for kind, path in every.items()})
    run.write_json(folder / "quantisation.json", record)
    lines = [quality.markdown(record), "", "Bits per byte of held-out text, each kind's weights under our own forward "
             "pass; every language is in `quantisation.json`."]
  if base not in paths.values():
    base.unlink()
  return dict(files=[path.name for path in paths.values()], readers=readers, lines=lines + _said(known))


def _said(known):
  """What is known of llama.cpp's own tokenizer, in lines for the card; said at once too."""
  lines = [f"llama.cpp's own tokenizer ({known['pre']}) differs: {known['differs']}."] if known["differs"] else []
  if known["joined"]:
    lines.append(f"In llama.cpp plain text can spell {len(known['joined'])} reserved tokens of this vocabulary, "
                 f"such as {known['joined'][0]}.")
  for line in lines:
    run.say(line)
  return [part for line in lines for part in ("", line)]
