"""Checkpoints that prove themselves: Orbax behind a few functions, one folder a step (saved.py).

workdir/checkpoints/<step>/{params, optimizer, data, meta}: two trees of arrays, two of JSON. Orbax
commits by renaming, so a folder named by digits is whole; it does not notice a flipped bit, so
`meta` holds a digest of the JSON and a fingerprint of every array, computed under jit on the sharded
arrays and the same on any mesh, and `restore` compares (ecosystem.md D.1). No other file imports
Orbax. Saving beside training, and again when it fails, is saver.py.
"""

import errno
import pathlib
import re
import shutil
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from tiny_aya_jax import processes, run
from tiny_aya_jax.model import adapter
from tiny_aya_jax.train import saved

TREES = ("params", "optimizer")
CHUNK_BYTES = 64 << 20  # of a leaf written alone: what a shard reads of it
RETRY_SECONDS = 1.0  # after a first failure to read
# In what TensorStore says when the fault is not the file's.
ELSEWHERE = ("UNAVAILABLE|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|ABORTED"
             "|CANCELLED|Too many open files")
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not committed
# Restoring NumPy arrays reads no sharding file; Orbax warns about it all the same.
warnings.filterwarnings("ignore", message="Sharding info not provided")


def save(workdir, step, items, *, keep):
  """Writes items {params, optimizer, data, meta} as `step`, then deletes all but the newest `keep`.

  Blocks until the checkpoint is committed. `meta` gains "step", "fingerprints" and "sha256".
  """
  begin(workdir, step, items, seconds=1200)()
  prune(workdir, keep)


def begin(workdir, step, items, *, seconds):
  """Starts to write a checkpoint; returns a function that waits until it is committed, or raises.

  On return the arrays are copied or held: they may be donated. All processes call it together.
  Raises OSError at once if there is not room for it; seconds: what Orbax waits for other processes.
  """
  folder = pathlib.Path(workdir).absolute() / "checkpoints"
  trees = {name: items[name] for name in TREES if name in items}
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
  folder.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(folder).free
  if not processes.agreed(free > size):
    raise OSError(errno.ENOSPC, f"a checkpoint is {size:,} bytes, {free:,} are free in {folder}")
  prints = {name: fingerprints(tree) for name, tree in trees.items()}
  meta = items["meta"] | dict(step=step, fingerprints=prints)
  items = items | dict(meta=saved.signed(meta, items.get("data")))
  with _context(seconds):
    return ocp.save_checkpointables_async(folder / str(step), items).result


def write_params(workdir, step, leaves, meta):
  """Writes a checkpoint of params and meta alone, as `step`, a leaf at a time; replaces an older one.

  leaves: (path, NumPy array) of every parameter, in any order; no more than one need be in memory.
  Orbax keeps all that it encodes until it commits: so there are many commits, joined when all leaves
  are there. One process, which must not be training in `workdir`.
  """
  folder = pathlib.Path(workdir).absolute() / "checkpoints"
  parts, whole = folder / f"{step}.parts{TEMPORARY}", folder / f"{step}.whole{TEMPORARY}"
  folder.mkdir(parents=True, exist_ok=True)
  sweep(workdir)
  try:
    prints = _write_leaves(parts / "params", leaves)
    meta = meta | dict(step=step, fingerprints=dict(params=prints))
    with _context():  # Orbax's own record of what a checkpoint has, with a stand-in for params
      ocp.save_checkpointables(whole, dict(params=dict(none=0), meta=saved.signed(meta, None)))
  except BaseException:
    sweep(workdir)
    raise
  shutil.rmtree(whole / "params")
  (parts / "params" / "state").rename(whole / "params")
  if (folder / str(step)).exists():
    (folder / str(step)).rename(folder / f"{step}.old")
  whole.rename(folder / str(step))
  sweep(workdir)
  prune(workdir, keep=1)


def _write_leaves(path, leaves):
  """Commits when the leaves at hand fill a chunk; {path: fingerprint}."""
  prints, tree, size = {}, {}, 0
  with _frugal(_context()):
    for key, leaf in leaves:
      prints["/".join(key)] = _fingerprint_of(leaf)
      node = tree
      for name in key[:-1]:
        node = node.setdefault(name, {})
      node[key[-1]] = leaf
      size += leaf.nbytes
      del leaf  # before the next is made
      if size >= CHUNK_BYTES:
        ocp.partial.save(path, tree)
        tree, size = {}, 0
    if tree:
      ocp.partial.save(path, tree)
    ocp.partial.finalize(path)
  return prints


def prune(workdir, keep):
  """Deletes all but the newest `keep` checkpoints: half a deletion is no checkpoint. Process 0."""
  folder = pathlib.Path(workdir) / "checkpoints"
  for old in saved.steps(workdir)[:-keep]:
    (folder / str(old)).rename(folder / f"{old}.old")
  for stale in folder.glob("*.old"):
    shutil.rmtree(stale)


def sweep(workdir):
  """Deletes what a save left that was never committed. Process 0, while nothing is being saved."""
  for stale in (pathlib.Path(workdir) / "checkpoints").glob(f"*{TEMPORARY}*"):
    shutil.rmtree(stale, ignore_errors=True)


def restore(path, abstract, names=TREES):
  """Reads the trees in `names`, and meta, verified against their fingerprints.

  abstract: {name: tree of jax.ShapeDtypeStruct, with shardings to read straight into shards}.
  Refuses other paths, shapes or dtypes than the checkpoint holds (nothing is cast silently), and
  arrays that are not what was saved.
  """
  path, facts = saved.find(path), saved.meta(path)
  for name in names:
    _compare(path, name, abstract[name], facts)
  items = _load(path, {name: abstract[name] for name in names})
  for name in names:
    _check(path, name, items[name], facts)
  return items | dict(meta=facts)


def restore_params(path, shardings=None):
  """(params, meta) of a checkpoint: all that later stages read. Adapters are merged into their matrices.

  shardings: tree -> shardings of its leaves, to read straight into shards; None: one device.
  """
  params, meta = restore_apart(path, shardings)
  return adapter.merged(params, adapter.described(meta.get("adapter"))), meta


def restore_apart(path, shardings=None):
  """`restore_params` with adapters beside their matrices, as they were trained."""
  path = saved.find(path)
  described = _described(path, "params")
  placed = shardings(described) if shardings else jax.tree.map(lambda _: _here(), described)
  abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      described, placed,
  )
  items = restore(path, dict(params=abstract), names=("params",))
  return items["params"], items["meta"]


def leaves(path):
  """(shapes, read) of a checkpoint's params: {"a/b": shape}, and "a/b" -> NumPy array, verified.

  A call reads one leaf, and its adapter, which is merged; nothing is kept.
  """
  path, facts = saved.find(path), saved.meta(path)
  described = _described(path, "params")
  shapes = {_name(key): leaf.shape for key, leaf in jax.tree_util.tree_leaves_with_path(described)}
  if odd := sorted(shapes.keys() ^ facts["fingerprints"]["params"].keys()):
    raise saved.Damaged(f"{path}: params is not what was saved in {len(odd)} arrays, e.g. {odd[0]}")

  adapted = adapter.described(facts.get("adapter"))

  def read(name):
    parent, slash, own = name.rpartition("/")
    pair = adapter.factors(adapted).get(own, ())
    leaf, *pair = (read_one(one) for one in (name, *(f"{parent}{slash}{one}" for one in pair)))
    return adapter.total(leaf, *pair, scale=adapted.alpha / adapted.R) if adapted else leaf

  def read_one(name):
    abstract = jax.tree_util.tree_map_with_path(
        lambda key, leaf: _like(leaf) if _name(key) == name else ..., described)
    found = _load(path, dict(params=abstract))["params"]
    leaf = next(leaf for key, leaf in jax.tree_util.tree_leaves_with_path(found) if _name(key) == name)
    if _fingerprint_of(leaf) != facts["fingerprints"]["params"][name]:
      _refuse_damaged(path, "params", [name], 1)
    return leaf

  return {name: shape for name, shape in shapes.items() if not adapter.is_factor(name)}, read


def verify(path):
  """Reads every array of a checkpoint and compares fingerprints; returns how many were right."""
  path = saved.find(path)
  facts = saved.meta(path)
  right = 0
  for name, prints in facts["fingerprints"].items():
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_here()),
        _described(path, name),
    )
    tree = _load(path, {name: abstract})[name]
    _check(path, name, tree, facts)
    right += len(prints)
  if (path / "data").is_dir():
    saved.data(path)
  return right


def fingerprints(tree):
  """{path: 8 hex digits} of every array: equal on every mesh, different after any one bit flip."""
  found = _fingerprints(tree)
  return {
      _name(path): f"{int(value):08x}"
      for path, value in jax.tree_util.tree_leaves_with_path(jax.device_get(found))
  }


def _fingerprint_of(leaf):
  """The fingerprint of one NumPy array, a chunk at a time: whole, its program needs twice its bytes."""
  flat, total = leaf.reshape(-1), 0
  step = CHUNK_BYTES // leaf.itemsize
  for first in range(0, flat.size, step):
    total += int(_fingerprint_part(flat[first : first + step], np.uint32(first % 2**32)))
  return f"{total % 2**32:08x}"


@jax.jit
def _fingerprints(tree):
  # One program: many small ones with collectives starve each other on simulated CPU devices.
  return jax.tree.map(_fingerprint, tree)


def _fingerprint(x, first=0):
  """Sum over elements of mixed (bits, index), modulo 2^32; integer sums do not depend on order.

  first: the index of the first element.
  """
  width = x.dtype.itemsize * 8
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  index += jnp.uint32(first)
  # An odd factor per element: a flipped bit changes its own term, and never cancels itself.
  factor = (index * jnp.uint32(0x9E3779B9) ^ (index >> 15) * jnp.uint32(0x85EBCA6B)) | jnp.uint32(1)
  return jnp.sum(bits * factor, dtype=jnp.uint32)


_fingerprint_part = jax.jit(_fingerprint)


def _described(path, name):
  """Shapes and dtypes of one item's arrays, as they lie on disk."""
  with _context():
    found = _read(path, lambda: ocp.checkpointables_metadata(path).metadata)
  if found.get(name) is None:
    raise saved.Damaged(f"{path} has no readable {name}: a part of it was removed; use another step")
  return found[name]


def _like(leaf):
  """What Orbax restores as a NumPy array: an array of that shape, of one number's memory."""
  return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _compare(path, name, abstract, facts):
  described = _described(path, name)
  held = {_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(described)}
  wanted = {_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
  if odd := sorted(held.keys() ^ wanted.keys()):
    other = facts["fingerprints"][name].keys() == held.keys()  # as it was saved, by another program
    raise (run.Refused if other else saved.Damaged)(
        f"{path}: {name} differs from this run's in {len(odd)} arrays, e.g. {odd[0]}")
  for key, leaf in wanted.items():
    if (held[key].shape, held[key].dtype) != (leaf.shape, leaf.dtype):
      raise saved.Damaged(
          f"{path}: {name} {key} is {held[key].dtype}{list(held[key].shape)}, "
          f"this run's is {leaf.dtype}{list(leaf.shape)}"
      )


def _check(path, name, tree, facts):
  found, expected = fingerprints(tree), facts["fingerprints"][name]
  wrong = sorted(key for key in found if found[key] != expected.get(key))
  if wrong:
    _refuse_damaged(path, name, wrong, len(found))


def _refuse_damaged(path, name, wrong, count):
  raise saved.Damaged(
      f"{path}: {len(wrong)} of {count} arrays of {name} are not what was saved, e.g. "
      f"{wrong[0]}: the files are damaged; use an older step"
  )


def _load(path, abstract):
  with _context():
    return _read(path, lambda: ocp.load_checkpointables(path, abstract))


def _read(path, read):
  """What `read` gives, tried twice; Damaged if it fails, on every process if it does on one."""
  for last in (False, True):
    found = error = None
    try:
      found = read()
    except (FileNotFoundError, NotADirectoryError) as failure:
      error = failure
    except (jax.errors.JaxRuntimeError, MemoryError, OSError):  # TimeoutError too
      raise  # memory, the disk or another process: nothing is known of the files
    except Exception as failure:  # of damaged files Orbax and TensorStore raise whatever they like
      if re.search(ELSEWHERE, str(failure)):
        raise
      error = failure
    if processes.agreed(error is None):
      return found
    if not last:
      time.sleep(RETRY_SECONDS)  # a network may have failed for a moment
  said = " ".join(str(error or "on another process").split())[:200]
  raise saved.Damaged(f"{path} cannot be read: {said}") from error


def _name(path):
  """One name for a leaf, whether its parents are tuples or the lists Orbax describes them as."""
  keys = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
  return "/".join(str(key) for key in keys)


def _here():
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _frugal(context):
  """For NumPy arrays that nobody changes meanwhile: no copy, and pieces that a shard can read alone.

  Not compressed: fp32 weights would shrink by a tenth, in twice the time.
  """
  context.memory_options.deepcopy_host_arrays = False
  context.array_options.saving.use_compression = False
  context.memory_options.write_concurrent_bytes = 4 * CHUNK_BYTES
  context.array_options.saving.storage_options.chunk_byte_size = CHUNK_BYTES
  return context


def _context(seconds=1200):
  """Orbax with `data` and `meta` as JSON files, not as trees of scalar arrays."""
  registry = ocp.handlers.local_registry(include_global_registry=True)
  for name in ("data", "meta"):
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
  context = ocp.Context()
  context.checkpointables.registry = registry
  context.asynchronous.timeout_secs = seconds
  return context
