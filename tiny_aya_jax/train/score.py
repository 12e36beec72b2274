"""VERB score: packed pairs -> the same rows with the reference's log-probabilities of both answers.

Once, before preference training: then no second model is in memory (model/preference.py). Writes
WORKDIR/<stage>/<code>/<source> as pack does, whole or not at all; called again, it goes on with what
is left. Score with the dtype and the attention that will train: then training begins at a margin of
nothing but rounding.
"""

import functools
import pathlib

from tiny_aya_jax import run
from tiny_aya_jax.data import loader, shards, tokenizer as tokenizers
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import saved

# What needs jax is imported behind the checks: a wrong field is refused in a second.


def main(config, workdir):
  """Scores each source of `config.rows` under `config.checkpoint`; returns an exit code."""
  path, step, digest, manifests = check(config, workdir)
  inputs = {manifest["name"]: run.fingerprint(
      [manifest["sha256"], digest, config.dtype, config.attention, config.matmul])
            for manifest in manifests}
  stage = pathlib.Path(workdir) / config.stage
  due = [manifest for manifest in manifests
         if shards.hidden(stage / manifest["name"]).exists() or not run.up_to_date(
             stage / manifest["name"] / "manifest.json", inputs[manifest["name"]], config.overwrite)]
  from tiny_aya_jax import processes

  processes.join(config.heartbeat_seconds)
  if processes.told([step]) != [step]:
    raise OSError(f"{path} is not the step that process 0 sees")
  due = [manifests[index] for index in processes.told([manifests.index(one) for one in due])]
  if others := sorted({"/".join(found.parts[-3:-1]) for found in stage.glob("*/*/manifest.json")}
                      - inputs.keys()):
    run.say(f"{stage} also holds {len(others)} sources that {config.rows} lacks, and training draws from "
            f"them: {', '.join(others)}; remove their folders if they are stale")
  if not due:
    run.say(f"up to date: {stage}")
    return run.EXIT["done"]
  if processes.first():
    for manifest in due:
      shards.empty(shards.hidden(stage / manifest["name"]))
  for manifest, reference_nJC in _references(config, path, due):
    if processes.first():
      _write(stage / manifest["name"], manifest, reference_nJC, dict(
          inputs=inputs[manifest["name"]], reference=dict(
              step=step, params=digest, dtype=config.dtype, attention=config.attention,
              matmul=config.matmul)))
  processes.agreed(True)  # nobody ends while process 0 writes
  run.say(f"scored {sum(manifest['documents'] for manifest in due):,} pairs of {len(due)} sources under "
          f"{path}: {stage}")
  return run.EXIT["done"]


def check(config, workdir):
  """Refuses what cannot be; -> (the checkpoint's folder or a Hugging Face folder, its step, the digest
  of its parameters, manifests of the pairs)."""
  run.choose_fields(config, "dtype", "attention", "matmul")
  run.plain_name("stage", config.stage)
  for field in ("batch", "chunk"):
    if config[field] < 1:
      raise run.Refused(f"config.{field} is {config[field]}, expected at least 1")
  path = pathlib.Path(run.existing("checkpoint", config.checkpoint))
  tokenizer, meta = tokenizers.load(run.existing("tokenizer", config.tokenizer)), None
  if huggingface.is_folder(path):
    huggingface.tokenizer_of(path, config.tokenizer)
  else:
    path = saved.find(path)
    meta = saved.meta(path)
  manifests = loader.read_manifests(run.existing("rows", config.rows))
  for manifest in manifests:
    loader.check_fields(manifest, (loader.PAIRS,))
  if (pathlib.Path(workdir) / config.stage).resolve() == pathlib.Path(config.rows).resolve():
    raise run.Refused(f"config.stage {config.stage} is config.rows itself: give another name")
  for what, found in ((path, meta and meta["tokenizer_sha256"]),
                      (config.rows, manifests[0]["tokenizer_sha256"])):
    if found and found != tokenizer.sha256:
      raise run.Refused(f"{what} was made with tokenizer {found[:12]}, {config.tokenizer} is "
                        f"{tokenizer.sha256[:12]}")
  if meta is None:
    return path, 0, run.fingerprint(huggingface.digests(path)), manifests
  return path, meta["step"], run.fingerprint(meta["fingerprints"]["params"]), manifests


def _references(config, path, manifests):
  """Yields (manifest, reference float32 [rows, J, C]) of each source, in order, on every process."""
  import jax
  import ml_collections
  import numpy as np

  from tiny_aya_jax import axes
  from tiny_aya_jax.model import attention, preference
  from tiny_aya_jax.model.transformer import TinyAya
  from tiny_aya_jax.train import checkpoint, fields, proof

  mesh, cfg = axes.mesh(**config.mesh.to_dict()), _model(path)
  fields.check_batch(ml_collections.ConfigDict(
      dict(data=dict(batch=config.batch, T=manifests[0]["T"]), accumulate=1)), mesh)
  attention.refuse_unless_possible(
      config.attention, config.dtype, cfg.H, mesh.devices.flat[0], mesh.shape["context"])
  model = TinyAya(cfg, np.dtype(config.dtype), config.attention, matmul=config.matmul)
  compute = jax.jit(functools.partial(
      preference.references, model=model, J=manifests[0]["pairs"], chunk=config.chunk))
  with jax.set_mesh(mesh):
    proof.check_attention(ml_collections.ConfigDict(config.to_dict() | dict(model=cfg.to_dict())), mesh)
    if huggingface.is_folder(path):
      params, _ = huggingface.load(path, lambda tree: jax.tree.map(
          lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
          tree, axes.shardings(mesh, tree)))
    else:
      params, _ = checkpoint.restore_params(path, lambda tree: axes.shardings(mesh, tree))
    batches = loader.every_row_once(manifests, config.batch, axes.process_part(mesh))
    rows = sum(manifest["rows"] for manifest in manifests)
    held = np.empty((0, manifests[0]["pairs"], 2), np.float32)
    waiting = iter(manifests)
    manifest = next(waiting)
    for batch in run.progress(batches, "score", total=-(-rows // config.batch)):
      held = np.concatenate([held, np.asarray(compute(params, axes.place(mesh, batch)))])
      while manifest and len(held) >= manifest["rows"]:
        yield manifest, held[: manifest["rows"]]
        held, manifest = held[manifest["rows"]:], next(waiting, None)


def _model(path):
  import ml_collections

  if huggingface.is_folder(path):
    return huggingface.describe(path)[0]
  return ml_collections.ConfigDict(saved.meta(path)["model"])


def _write(place, manifest, reference_nJC, more):
  """The source's rows, each with its references behind it."""
  hidden, rows = shards.hidden(place), loader.in_order(manifest)
  records = (rows[row] + reference_JC.astype("<f4").tobytes()
             for row, reference_JC in enumerate(reference_nJC))
  found = shards.write(records, hidden, max(shard["rows"] for shard in manifest["shards"]))
  kept = {key: value for key, value in manifest.items() if key not in ("path", "name", "sha256")}
  run.write_json(hidden / "manifest.json", kept | dict(fields=loader.SCORED, shards=found) | more)
  shards.replace(place, hidden)
