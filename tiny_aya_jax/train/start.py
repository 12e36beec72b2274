"""The state a run begins with, placed on the mesh: what begin.py decided, loaded or drawn."""

import jax
import jax.numpy as jnp

from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer as tokenizers
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import begin as begins, checkpoint, optimizer, saved, step


def start(config, begin, mesh, tokenizer):
  """begin.Begin -> state {"step", "params", "optimizer"}, each leaf on its shards."""
  run.say(begin.said)
  scratch = step.scratch(config)
  abstract = step.abstract(mesh, jax.eval_shape(scratch))
  placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  if begin.path is None:
    return jax.jit(scratch, out_shardings=placed)()
  if begin.whole:
    items = _restored(config, begin.path, mesh, abstract)
    return items | dict(step=jax.device_put(jnp.int32(begin.step), placed["step"]))
  if (begin.path / "config.json").exists():
    params = _from_hugging_face(config, begin.path, abstract["params"], tokenizer)
  else:
    params = checkpoint.restore(begin.path, dict(params=abstract["params"]), ("params",))["params"]
  tx = optimizer.adamw(config.optimizer, lambda step: 0.0)  # its state does not depend on the rate
  moments = jax.jit(tx.init, out_shardings=placed["optimizer"])(params)
  zero = jax.device_put(jnp.int32(0), placed["step"])
  return dict(step=zero, params=params, optimizer=moments)


def _restored(config, path, mesh, abstract):
  """{"params", "optimizer"} of a checkpoint, each moment in this run's dtype: begin.py compared them."""
  theirs = config.copy_and_resolve_references()
  theirs.optimizer.adamw.mu_dtype = begins.trained(saved.meta(path))["optimizer"]["adamw"]["mu_dtype"]
  kept = step.abstract(mesh, jax.eval_shape(step.scratch(theirs)))
  items = checkpoint.restore(path, {name: kept[name] for name in checkpoint.TREES})
  return {name: jax.tree.map(lambda x, ours: x.astype(ours.dtype), items[name], abstract[name])
          for name in checkpoint.TREES}


def _from_hugging_face(config, path, abstract, tokenizer):
  params, cfg = huggingface.read(path)
  begins.same_fields(path, cfg.to_dict(), config.model.to_dict())
  if not tokenizers.load(path / "tokenizer.json").same_ids(tokenizer):
    raise run.Refused(f"{path} has another tokenizer than {config.tokenizer}")
  return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)
