"""The state a run begins with, placed on the mesh: what begin.py decided, loaded or drawn.

Of a workdir's checkpoints the newest that proves itself: a damaged one is set aside, never deleted,
and never replaced by a start from nothing.
"""

import jax
import jax.numpy as jnp

from tiny_aya_jax import axes, processes, run
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.model import adapter
from tiny_aya_jax.train import begin as begins, checkpoint, guard, optimizer, remap, saved, step


def newest(config, workdir, plan, mesh, tokenizer):
  """(begin.Begin, state) of a run, from the newest of its checkpoints that proves itself.

  Those that were tried before are set aside once an older one is restored; if none is, nothing is
  renamed, as the fault may not be theirs, and the run is refused. All processes call it, and try the
  same steps: those that process 0 sees.
  """
  steps = processes.told(saved.steps(workdir))
  if not processes.agreed(bool(steps) or not saved.steps(workdir)):
    raise OSError(f"{workdir}: not every process sees that there are no checkpoints")
  if not steps:
    begin = begins.decide(config, workdir, plan, tokenizer)
    state = start(config, begin, mesh)
    _set_aside(workdir, [], begin.step)
    return begin, state
  tried = []
  for at in reversed(steps):
    begin = error = None
    if not saved.is_checkpoint(saved.path(workdir, at)):  # to a mount that lags behind; it may be sound
      raise OSError(f"{saved.path(workdir, at)} is not seen by process {jax.process_index()}")
    try:
      begin = begins.decide(config, workdir, plan, tokenizer, at)
    except saved.Damaged as damage:
      error = str(damage)  # not the exception: its frames hold arrays, and an older state needs the room
    if processes.agreed(error is None):
      try:
        state = start(config, begin, mesh)
      except saved.Damaged as damage:  # on all processes, or on none
        error = str(damage)
      else:
        _set_aside(workdir, tried, at)
        return begin, state
    tried.append((at, error or "another process cannot read it"))
    run.say(f"damaged: {saved.path(workdir, at)}: {tried[-1][1]}")
  raise run.Refused(f"none of the checkpoints {', '.join(map(str, steps))} of {workdir} can be restored: "
                    f"nothing is begun anew behind your back; give another --workdir, or remove {workdir}. "
                    f"The newest: {tried[0][1]}")


def _set_aside(workdir, tried, at):
  """Renames what was tried before step `at`, and what is no checkpoint; process 0."""
  if jax.process_index() == 0:
    for path, why in [(saved.path(workdir, failed), "") for failed, _ in tried] + [
        (path, ": a part of it was removed") for path in saved.incomplete(workdir)]:
      run.say(f"{path} is set aside as {saved.set_aside(path, 'damaged').name}{why}")
    # What was exported beyond is of steps that are now trained again.
    for path in (workdir / "huggingface").glob("*"):
      if path.name.isdigit() and int(path.name) > at:
        run.say(f"{path} is set aside as {saved.set_aside(path, 'superseded').name}")
  if tried:
    run.say(f"steps {at + 1} to {tried[0][0]} are trained again")
  processes.agreed(True)  # nobody reads on before that


def start(config, begin, mesh):
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
  adapters, base = adapter.split(abstract["params"]) if config.adapter.rank else ({}, abstract["params"])
  if huggingface.is_folder(begin.path):
    params = _from_hugging_face(begin, base)
  elif begin.rows:
    params = _remapped(begin, checkpoint.leaves(begin.path)[1], base)
  else:
    params = _from_checkpoint(begin.path, base, mesh)
  if adapters:
    where = jax.tree.map(lambda leaf: leaf.sharding, adapters)
    drawn = jax.jit(lambda: adapter.split(scratch()["params"])[0], out_shardings=where)()
    params = adapter.join(drawn, params)
  tx = optimizer.adamw(config.optimizer, lambda step: 0.0)  # its state does not depend on the rate
  moments = jax.jit(tx.init, out_shardings=placed["optimizer"])(adapter.split(params)[0])
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


def _from_checkpoint(path, abstract, mesh):
  params, _ = checkpoint.restore_params(path, lambda tree: axes.shardings(mesh, tree))
  found, wanted = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, abstract))
  if found != wanted:
    raise run.Refused(f"{path}: params has other arrays than this program's model")

  def cast(x, like):  # one at a time is held twice
    if x.dtype == like.dtype:
      return x
    held = jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding)(x)
    x.delete()
    return held

  return jax.tree.map(cast, params, abstract)


def _remapped(begin, read, abstract):
  """A leaf at a time through this machine's memory, where the embedding gets its new rows.

  read: 'a/b' -> fp32 NumPy array.
  """
  def place(key, like):
    name = "/".join(part.key for part in key)
    leaf = read(name)
    if name == "embedding_VD":
      leaf = remap.embedding(begin.rows, leaf)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: leaf[index].astype(like.dtype))

  return jax.tree_util.tree_map_with_path(place, abstract)


def _from_hugging_face(begin, abstract):
  if begin.rows:
    _, read_leaf, _ = huggingface.leaves(begin.path)
    return _remapped(begin, lambda name: read_leaf(tuple(name.split("/"))), abstract)
  return huggingface.load(begin.path, lambda _: abstract)[0]
