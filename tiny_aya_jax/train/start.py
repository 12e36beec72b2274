"""The state a run begins with, placed on the mesh: what begin.py decided, loaded or drawn.

Of a workdir's checkpoints the newest that proves itself: a damaged one is set aside, never deleted,
and never replaced by a start from nothing.
"""

import jax
import jax.numpy as jnp

from tiny_aya_jax import processes, run
from tiny_aya_jax.data import tokenizer as tokenizers
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import begin as begins, checkpoint, guard, optimizer, saved, step


def newest(config, workdir, plan, mesh, tokenizer):
  """(begin.Begin, state) of a run; sets aside checkpoints of this workdir that are damaged.

  Refused if it has no other. All processes call it, the one with the lock among them.
  """
  for folder in saved.incomplete(workdir) if saved.steps(workdir) else ():
    _set_aside(workdir, folder, "a part of it was removed")
  while True:
    try:
      begin = begins.decide(config, workdir, plan, tokenizer)
      return begin, start(config, begin, mesh, tokenizer)
    except saved.Damaged as error:
      if not saved.steps(workdir):  # it is init_from's
        raise
      _set_aside(workdir, saved.find(workdir), error)


def _set_aside(workdir, path, why):
  processes.agreed(True)  # nobody is still reading it
  new = saved.set_aside(path, "damaged") if jax.process_index() == 0 else ""
  processes.agreed(True)
  left = saved.steps(workdir)
  lost = f"steps {left[-1] + 1} to {path.name} are trained again" if left else "there is no older one"
  run.say(f"damaged: {why}; set aside as {new}; {lost}")


def start(config, begin, mesh, tokenizer):
  """begin.Begin -> state {"step", "params", "optimizer", "guard"}, each leaf on its shards."""
  run.say(begin.said)
  scratch = step.scratch(config)
  abstract = step.abstract(mesh, jax.eval_shape(scratch))
  placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  if begin.path is None:
    return jax.jit(scratch, out_shardings=placed)()
  if begin.whole:
    items = _restored(config, begin.path, mesh, abstract)
    kept = guard.from_json(saved.meta(begin.path).get("guard"), config.guard.window)
    return items | dict(step=jax.device_put(jnp.int32(begin.step), placed["step"]),
                        guard=jax.device_put(kept, placed["guard"]))
  if (begin.path / "config.json").exists():
    params = _from_hugging_face(config, begin.path, abstract["params"], tokenizer)
  else:
    params = checkpoint.restore(begin.path, dict(params=abstract["params"]), ("params",))["params"]
  tx = optimizer.adamw(config.optimizer, lambda step: 0.0)  # its state does not depend on the rate
  moments = jax.jit(tx.init, out_shardings=placed["optimizer"])(params)
  zero = jax.device_put(jnp.int32(0), placed["step"])
  fresh = jax.device_put(guard.fresh(config.guard.window), placed["guard"])
  return dict(step=zero, params=params, optimizer=moments, guard=fresh)


def _restored(config, path, mesh, abstract):
  """{"params", "optimizer"} of a checkpoint, each moment in this run's dtype: begin.py compared them."""
  dtype = begins.trained(saved.meta(path))["optimizer"]["adamw"]["mu_dtype"]
  kept = abstract
  if dtype != config.optimizer.adamw.mu_dtype:
    theirs = config.copy_and_resolve_references()
    theirs.optimizer.adamw.mu_dtype = dtype
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
