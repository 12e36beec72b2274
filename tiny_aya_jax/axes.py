"""The alphabet, the mesh and every sharding: one letter is one dimension, everywhere.

  B batch   T query position   S key position   D model width   F feed-forward width   V vocabulary
  N query heads   K key/value heads   G = N/K queries per key head   H head width   L stacked periods
  M microbatch   C chosen/rejected   R adapter rank   W steps that the guard remembers
  P devices (processors)   E positions of a row that are scored   J pairs of a row

A parameter's name carries its letters (`q_DNH` is [D, N, H]), so its sharding, and that of its
optimiser moments, is read off the name. There is no other table of shardings. What moves between devices inside
the model, and how, is model/collectives.py.
"""

import functools
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tiny_aya_jax import run

AXES = ("data", "fsdp", "tensor", "context")
PARAMETER = dict(V="tensor", D="fsdp", F="tensor", N="tensor", K="tensor")
ACTIVATION = dict(
    B=("data", "fsdp"), T="context", F="tensor", N="tensor", K="tensor", V="tensor", P=AXES
)


def mesh(data=1, fsdp=-1, tensor=1, context=1, devices=None):
  """A mesh over `devices` (default: all) with the axes of AXES; one size may be -1, 'the rest'.

  Of several slices, 'data' goes over all and the other axes stay within one: between slices only
  sums of gradients travel, a shard of them a device, and weights are gathered inside.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor, context=context)
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise run.Refused(f"mesh {sizes}: sizes are at least 1, and at most one is -1 (the rest)")
  if len(devices) % fixed or (not free and fixed != len(devices)):
    raise run.Refused(f"mesh {sizes} does not cover {len(devices)} devices: the sizes multiply to {fixed}")
  if free:
    sizes[free[0]] = len(devices) // fixed
  # What TPUs call a slice; JAX makes one of each host of GPUs.
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if sizes["data"] % slices:
    raise run.Refused(
        f"mesh {sizes} on {slices} slices of {len(devices) // slices} devices: 'data' goes over the "
        f"slices, so config.mesh.data is a multiple of {slices}, and the other axes fit into one"
    )
  # What travels most lies nearest: fsdp gathers every layer, context only keys.
  nearest_last = ("data", "context", "fsdp", "tensor")
  inside = [sizes["data"] // slices, *(sizes[axis] for axis in nearest_last[1:])]
  if slices == 1:
    placed = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
  else:
    placed = mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
  placed = placed.transpose([nearest_last.index(axis) for axis in AXES])
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return Mesh(placed[:, _ring(placed[0, :, 0, 0])], AXES, axis_types=auto)


def _ring(group):
  """Indexes of a group's devices such that each is a neighbour of the next, and the last of the first.

  Of TPUs that fill a rectangle with an even side; others stay as they are, a context of 4 strided
  over 8x8 among them. On v5e XLA makes steps of a ring synchronous that do not go to a neighbour
  (jaxlib 0.10.2; 8x8: 56% of the wire hidden instead of 88%); JAX has such orders for a few whole
  slices.
  """
  places = [getattr(device, "coords", ()) for device in group]
  axes = [sorted(set(axis)) for axis in zip(*places)]
  wide = [axis for axis, seen in enumerate(axes) if len(seen) > 1]
  if len(wide) != 2 or any(seen[-1] - seen[0] >= len(seen) for seen in axes):
    return slice(None)
  x, y = wide if len(axes[wide[0]]) % 2 == 0 else reversed(wide)
  if len(axes[x]) % 2 or len(axes[x]) * len(axes[y]) != len(group):
    return slice(None)
  first, *rest = axes[y]
  trip = [(column, first) for column in axes[x]]
  for turn, column in enumerate(reversed(axes[x])):
    trip += [(column, row) for row in (rest[::-1] if turn % 2 else rest)]
  at = {(place[x], place[y]): index for index, place in enumerate(places)}
  return [at[place] for place in trip]


def shardings(mesh, tree):
  """NamedSharding for every leaf of params, optimiser state or train state, read off its name.

  A leaf named `..._LETTERS` has the rank of its letters, or one more (stacked periods, L, in
  front); a leaf without letters is a scalar. Anything else is refused with its path.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: NamedSharding(mesh, spec(path, leaf, mesh)), tree
  )


def spec(path, leaf, mesh):
  """PartitionSpec of the leaf at `path`; refuses sizes that do not divide over the mesh."""
  name, letters = jax.tree_util.keystr(path), letters_of(path)
  rank = len(leaf.shape)
  if rank not in (len(letters), len(letters) + 1) or (not letters and rank):
    raise run.Refused(f"{name} has shape {leaf.shape}, but its name says {letters or 'a scalar'}")
  axes = [None] * (rank - len(letters)) + [PARAMETER.get(letter) for letter in letters]
  for size, axis in zip(leaf.shape, axes):
    if axis is not None and size % mesh.shape[axis]:
      raise run.Refused(
          f"{name} {leaf.shape}: {size} does not divide over {mesh.shape[axis]} devices of {axis!r}"
      )
  return PartitionSpec(*axes)


def letters_of(path):
  """The letters of a leaf's own name: (..., 'periods', 'full', 'q_DNH') -> 'DNH'; '' if none."""
  key = path[-1]
  name = str(getattr(key, "key", getattr(key, "name", "")))
  found = re.fullmatch(r"[a-z]+(?:_[a-z]+)*_([A-Z]+)", name)
  return found.group(1) if found else ""


def shard(x, letters):
  """Pins an activation's layout over the current mesh; a no-op outside a mesh."""
  return constrain(x, *(ACTIVATION.get(letter) for letter in letters))


def constrain(x, *axes):
  """Pins x to the PartitionSpec of `axes` over the current mesh; a no-op outside a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def axis_size(axis):
  """Devices along one axis of the current mesh; 1 outside a mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def activation(mesh, name):
  """NamedSharding of an activation by the letters of its name: 'token_BT'."""
  return NamedSharding(mesh, PartitionSpec(*(ACTIVATION.get(letter) for letter in letters(name))))


def letters(name):
  """'q_DNH' -> 'DNH'."""
  return name.rpartition("_")[2]


def place(mesh, batch):
  """This process's rows {"token_BT": array, ...} -> global arrays laid out by their letters.

  Its rows are whole, part `process_part(mesh)` of the batch, also where others hold the rest of T.
  """
  _, count = process_part(mesh)
  blocks = _blocks(mesh)[jax.process_index()]

  def array(name, rows):
    each = len(rows) // len(blocks)

    def piece(index):
      first = blocks.index((index[0].start or 0) // each) * each
      return rows[(slice(first, first + each), *index[1:])]

    shape = (len(rows) * count, *rows.shape[1:])
    return jax.make_array_from_callback(shape, activation(mesh, name), piece)

  return {name: array(name, rows) for name, rows in batch.items()}


def own(mesh, value):
  """[P] int32: this process's value on each of its devices, beside those of the others."""
  return jax.make_array_from_callback(
      (mesh.size,), activation(mesh, "value_P"), lambda index: np.full(1, value, np.int32))


def process_part(mesh):
  """(index, count): this process reads part `index` of a batch's rows in `count` equal parts.

  Processes that share rows, because the axis context crosses them, read the same part.
  """
  held = _blocks(mesh)
  parts = sorted(set(held.values()))
  if sum(map(len, parts)) != mesh.shape["data"] * mesh.shape["fsdp"] or len(set(map(len, parts))) > 1:
    raise run.Refused(f"mesh {dict(mesh.shape)}: processes hold rows in part together, {parts}")
  return parts.index(held[jax.process_index()]), len(parts)


@functools.lru_cache
def _blocks(mesh):
  """{process: its blocks of rows, of data x fsdp}."""
  held = {}
  for (data, fsdp, *_), device in np.ndenumerate(mesh.devices):
    held.setdefault(device.process_index, set()).add(data * mesh.shape["fsdp"] + fsdp)
  return {process: tuple(sorted(blocks)) for process, blocks in held.items()}
