"""VERB evaluate: checkpoints in, bits per byte per language out: one JSON, one page, one table.

Reads a checkpoint's params and meta; bits per byte before training come from the first workdir's
metrics, if it began from scratch. Every validation row is counted once. Averages hide the
languages this project exists for, so the page has one line a language, grouped by region.
"""

import pathlib

import ml_collections

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import loader, text as texts, tokenizer as tokenizers
from tiny_aya_jax.evaluate import baselines, report
from tiny_aya_jax.train import saved

# What needs jax is imported behind the checks: a wrong field is refused in a second.


def main(config, workdir):
  """Writes workdir/{evaluation.json, report.html} for config.checkpoints, and prints the table."""
  if not config.rows or not config.tokenizer or not config.checkpoints:
    raise run.Refused("evaluate needs config.rows (packed validation), config.tokenizer and "
                      "config.checkpoints, a tuple of workdirs or checkpoint folders")
  names = [pathlib.Path(given).resolve().name for given in config.checkpoints]
  if len(set(names)) < len(names):
    raise run.Refused(f"config.checkpoints are named {names}: two of one name would be one column")
  if bool(config.baselines.train_text) != bool(config.baselines.validation_text):
    raise run.Refused("baselines need both train_text and validation_text, or neither")
  run.choose_fields(config, "attention", "dtype")
  least = dict(chunk=config.chunk, batch=config.batch)
  for name, value in (least | {"baselines.processes": config.baselines.processes}).items():
    if value < 1:
      raise run.Refused(f"config.{name} is {value}, expected at least 1")
  for path in config.checkpoints:
    run.existing("checkpoints", path)
  manifests = loader.read_manifests(config.rows)
  tokenizer = tokenizers.load(config.tokenizer)
  paths = [saved.find(path) for path in config.checkpoints]
  for path in paths:
    same_tokenizer(path, saved.meta(path)["tokenizer_sha256"], tokenizer)
  same_tokenizer(config.rows, manifests[0]["tokenizer_sha256"], tokenizer)
  if config.mesh.context > 1 and manifests[0]["T"] % config.mesh.context:
    raise run.Refused(f"config.mesh.context={config.mesh.context} does not divide T={manifests[0]['T']}")
  from tiny_aya_jax import axes

  mesh = axes.mesh(**config.mesh.to_dict())
  if config.batch % (mesh.shape["data"] * mesh.shape["fsdp"]):
    raise run.Refused(f"a batch of {config.batch} rows does not split over {mesh.size} devices")

  inputs = run.fingerprint([
      names, [saved.meta(path)["fingerprints"]["params"] for path in paths],
      [manifest["sha256"] for manifest in manifests], _text(config.baselines), config.dtype,
  ])
  if run.up_to_date(workdir / "evaluation.json", inputs, config.overwrite):
    run.say(f"{workdir / 'report.html'}: up to date")
    return
  beside = {}
  if config.baselines.train_text:
    beside["baselines"] = baselines.table(
        config.baselines.train_text, config.baselines.validation_text, list(_bytes(manifests)),
        config.baselines.processes,
    )
  columns = {}
  for given, name, path in zip(config.checkpoints, names, paths):
    before = _untrained(given)
    if before and not columns:
      columns["untrained"] = before
    columns[name] = bits_per_byte(path, manifests, tokenizer, mesh, config)
  result = dict(
      inputs=inputs,
      checkpoints={name: str(path) for name, path in zip(names, paths)},
      rows=config.rows, tokenizer_sha256=tokenizer.sha256, bytes=_bytes(manifests),
      bits_per_byte=columns,
      summary={name: _summary(column) for name, column in columns.items()},
      **beside,
  )
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "report.html").write_text(report.page(result), encoding="utf-8")
  run.write_json(workdir / "evaluation.json", result)  # last: its presence says that all is there
  run.say(report.table(result))
  run.say(f"page: {workdir / 'report.html'}")


def _text(baselines):
  """What the baselines read: fingerprints of both folders' files, or nothing."""
  folders = [baselines.train_text, baselines.validation_text] if baselines.train_text else []
  return [
      [code, name, texts.fingerprint(folder, paths)]
      for folder in folders
      for code, sources in texts.languages(folder).items()
      for name, paths in sources.items()
  ]


def same_tokenizer(path, sha256, tokenizer):
  """Refuses rows or a checkpoint made with another tokenizer."""
  if sha256 != tokenizer.sha256:
    raise run.Refused(
        f"{path} belongs to tokenizer {sha256[:12]}, config.tokenizer is {tokenizer.sha256[:12]}"
    )


def bits_per_byte(path, manifests, tokenizer, mesh, config):
  """{language: bits per byte} of one checkpoint over all rows of the manifests."""
  import jax
  import jax.numpy as jnp

  from tiny_aya_jax import axes
  from tiny_aya_jax.model import attention, bits
  from tiny_aya_jax.model.transformer import TinyAya
  from tiny_aya_jax.train import checkpoint

  params, meta = checkpoint.restore_params(path, lambda tree: axes.shardings(mesh, tree))
  cfg = ml_collections.ConfigDict(meta["model"])
  attention.refuse_unless_possible(
      config.attention, config.dtype, cfg.H, mesh.devices.flat[0], mesh.shape["context"]
  )
  with jax.set_mesh(mesh):
    model = TinyAya(cfg, jnp.dtype(config.dtype), config.attention)
    codes = [manifest["language"] for manifest in manifests]
    score = bits.scorer(model, tokenizer.bytes_V, len(codes), chunk=config.chunk)
    batches = loader.every_row_once(manifests, config.batch, axes.process_part(mesh))
    found = bits.evaluate(score, params, batches, mesh, codes)
  return {code: entry["bits_per_byte"] for code, entry in found.items()}


def _untrained(workdir):
  """Bits per byte at step 0, from the training run's own metrics; None for a fork or a bare step."""
  for row in run.read_lines(pathlib.Path(workdir) / "metrics.jsonl"):
    if "evaluation" in row and row.get("from") == "scratch" and row["step"] == 0:
      return {code: entry["bits_per_byte"] for code, entry in row["evaluation"].items()}
  return None


def _bytes(manifests):
  """{language: validation bytes}, in the order of the languages table."""
  found = {}
  for manifest in manifests:
    found[manifest["language"]] = found.get(manifest["language"], 0) + manifest["bytes"]
  order = languages.select(("all",))
  return {code: found[code] for code in (*order, *sorted(found.keys() - set(order))) if code in found}


def _summary(column):
  """Mean, the worst five and the mean of every region of one checkpoint."""
  regions = {}
  for code, value in column.items():
    regions.setdefault(region(code), []).append(value)
  worst = sorted(column, key=column.get, reverse=True)[:5]
  return dict(
      mean=sum(column.values()) / len(column), worst={code: column[code] for code in worst},
      regions={name: sum(values) / len(values) for name, values in sorted(regions.items())},
  )


def region(code):
  """The region of a code; 'code' is its own."""
  return languages.find(code).region if code != "code" else "code"
