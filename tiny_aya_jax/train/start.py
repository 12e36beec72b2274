"""The state a run begins with, placed on the mesh: what begin.py decided, loaded or drawn."""

import jax
import jax.numpy as jnp

from tiny_aya_jax import axes, run
from tiny_aya_jax.data import tokenizer as tokenizers
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import begin as begins, checkpoint, optimizer, step


def start(config, begin, mesh, tokenizer):
  """begin.Begin -> state {"step", "params", "optimizer"}, each leaf on its shards."""
  run.say(begin.said)
  scratch = step.scratch(config)
  abstract = step.abstract(mesh, jax.eval_shape(scratch))
  placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  if begin.path is None:
    return jax.jit(scratch, out_shardings=placed)()
  if begin.whole:
    items = checkpoint.restore(begin.path, {name: abstract[name] for name in checkpoint.TREES})
    items["step"] = jax.device_put(jnp.int32(begin.step), placed["step"])
    return {name: items[name] for name in abstract}
  if (begin.path / "config.json").exists():
    params = _from_hugging_face(config, begin.path, abstract["params"], tokenizer)
  else:
    params = checkpoint.restore(begin.path, dict(params=abstract["params"]), ("params",))["params"]
  tx = optimizer.adamw(config.optimizer, lambda step: 0.0)  # its state does not depend on the rate
  moments = jax.jit(tx.init, out_shardings=placed["optimizer"])(params)
  zero = jax.device_put(jnp.int32(0), placed["step"])
  return dict(step=zero, params=params, optimizer=moments)


def _from_hugging_face(config, path, abstract, tokenizer):
  params, cfg = huggingface.read(path)
  begins.same_fields(path, cfg.to_dict(), config.model.to_dict())
  if not tokenizers.load(path / "tokenizer.json").same_ids(tokenizer):
    raise run.Refused(f"{path} has another tokenizer than {config.tokenizer}")
  return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)
