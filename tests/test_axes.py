"""axes: meshes, and shardings read off names, at full size on eight simulated devices."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from tiny_aya_jax import axes, run
from tiny_aya_jax.model import collectives
from tiny_aya_jax.model.transformer import BLOCKS, TinyAya

# tiny-aya-global's config.json (tiny_aya.md 1.1), spelled out: a changed experiment must not
# change what this file holds.
FULL = ml_collections.ConfigDict(
  dict(
    D=2048,
    N=16,
    K=4,
    H=128,
    F=11008,
    V=262144,
    L=9,
    window=4096,
    rope_theta=50000.0,
    logit_scale=1.0,
    norm_epsilon=1e-5,
  )
)
BLOCK_SPECS = dict(
  norm_D=(None, "fsdp"),
  q_DNH=(None, "fsdp", "tensor", None),
  k_DKH=(None, "fsdp", "tensor", None),
  v_DKH=(None, "fsdp", "tensor", None),
  o_NHD=(None, "tensor", None, "fsdp"),
  gate_DF=(None, "fsdp", "tensor"),
  up_DF=(None, "fsdp", "tensor"),
  down_FD=(None, "tensor", "fsdp"),
)
SPECS = dict(
  embedding_VD=("tensor", "fsdp"), norm_D=("fsdp",), periods={name: BLOCK_SPECS for name in BLOCKS}
)


@pytest.fixture(scope="module")
def full():
  """The full-size parameter tree as shapes."""
  token_BT = np.zeros((1, 1), np.int32)
  init = TinyAya(FULL).init
  return jax.eval_shape(init, jax.random.key(0), token_BT, token_BT, token_BT)["params"]


def specs(mesh, tree):
  return jax.tree.map(lambda sharding: sharding.spec, axes.shardings(mesh, tree))


def expected():
  return jax.tree.map(lambda spec: PartitionSpec(*spec), SPECS, is_leaf=is_tuple)


def is_tuple(node):
  return isinstance(node, tuple)


def test_the_parameter_count_is_3_349_227_520(full):
  assert sum(leaf.size for leaf in jax.tree.leaves(full)) == 3_349_227_520
  assert {leaf.dtype for leaf in jax.tree.leaves(full)} == {np.dtype("float32")}


def test_every_leaf_has_the_rank_of_its_name_and_nine_periods_in_front_inside_the_stack(full):
  for path, leaf in jax.tree_util.tree_leaves_with_path(full):
    sizes = tuple(FULL[letter] for letter in axes.letters_of(path))
    stacked = (FULL.L,) if path[0].key == "periods" else ()
    assert leaf.shape == stacked + sizes, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
  "sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)]
)
def test_every_leaf_of_the_full_model_is_sharded_as_its_letters_say(full, sizes):
  mesh = axes.mesh(**sizes)
  assert specs(mesh, full) == expected()
  shapes = jax.tree.map(lambda s, leaf: s.shard_shape(leaf.shape), axes.shardings(mesh, full), full)
  held = sum(np.prod(shape) for shape in jax.tree.leaves(shapes, is_leaf=is_tuple))
  norms = (9 * 4 + 1) * 2048  # split over fsdp only
  split = sizes["fsdp"] * sizes.get("tensor", 1)
  assert held == (3_349_227_520 - norms) // split + norms // sizes["fsdp"]


def test_optimiser_moments_are_sharded_as_their_parameters_and_the_count_is_replicated(full):
  state = jax.eval_shape(optax.adamw(1e-3).init, full)
  adam = specs(axes.mesh(fsdp=4, tensor=2), state)[0]
  assert adam.mu == expected()
  assert adam.nu == expected()
  assert adam.count == PartitionSpec()


@pytest.mark.parametrize(
  "sizes, shape",
  [
    (dict(), (1, 8, 1, 1)),
    (dict(data=-1, fsdp=2), (4, 2, 1, 1)),
    (dict(data=1, fsdp=2, tensor=2, context=2), (1, 2, 2, 2)),
    (dict(fsdp=1, context=-1), (1, 1, 1, 8)),
  ],
)
def test_a_mesh_fills_in_the_rest(sizes, shape):
  assert tuple(axes.mesh(**sizes).shape.values()) == shape
  assert axes.mesh(**sizes).axis_names == ("data", "fsdp", "tensor", "context")


@pytest.mark.parametrize(
  "sizes",
  [
    dict(fsdp=3),
    dict(fsdp=4),
    dict(fsdp=16),
    dict(data=-1, fsdp=-1),
    dict(fsdp=0),
    dict(tensor=-2),
    dict(tensor=3),
  ],
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused_with_its_sizes(sizes):
  with pytest.raises(run.Refused, match=str(next(iter(sizes.values())))):
    axes.mesh(**sizes)


class Chip:
  """A device of a slice that is not there."""

  platform, device_kind, process_index = "cpu", "a chip", 0

  def __init__(self, slice_index):
    self.slice_index = slice_index


@pytest.mark.parametrize(
  "sizes", [dict(data=-1, fsdp=4, tensor=2), dict(data=4), dict(data=2, fsdp=2, context=4)]
)
def test_data_goes_over_slices_and_the_other_axes_stay_in_one(sizes):
  mesh = axes.mesh(**sizes, devices=[Chip(at % 2) for at in range(16)])
  slices = [[chip.slice_index for chip in replica.flat] for replica in mesh.devices]
  half = len(slices) // 2
  assert slices == [[0] * len(slices[0])] * half + [[1] * len(slices[0])] * half
  assert mesh.axis_names == axes.AXES and mesh.size == 16


@pytest.mark.parametrize("sizes", [dict(), dict(data=1, tensor=2), dict(fsdp=2, context=8)])
def test_slices_that_data_does_not_divide_over_are_refused_with_the_numbers(sizes):
  with pytest.raises(run.Refused, match="on 2 slices of 8 devices: .* a multiple of 2"):
    axes.mesh(**sizes, devices=[Chip(at // 8) for at in range(16)])


class Tpu:
  """A TPU v5e that is not there; hosts have 2x2."""

  platform, device_kind, core_on_chip = "tpu", "TPU v5 lite", 0

  def __init__(self, x, y, z=0, slice_index=0, width=8):
    self.coords, self.slice_index = (x, y, z), slice_index
    self.process_index = 1000 * slice_index + y // 2 * (width // 2) + x // 2
    self.id = 10_000 * slice_index + y * width + x


def rectangle(width, height, step=1, slice_index=0):
  return [Tpu(step * x, y, 0, slice_index, width) for y in range(height) for x in range(width)]


def distances(group):
  """Between each device of a list and the next, and the last and the first."""
  return [sum(abs(a - b) for a, b in zip(one.coords, other.coords))
          for one, other in zip(group, group[1:] + group[:1])]


@pytest.mark.parametrize("width, height", [(8, 2), (2, 8), (4, 4), (3, 2), (2, 3), (16, 16), (2, 2)])
def test_neighbours_follow_each_other_round_a_rectangle(width, height):
  group = rectangle(width, height)
  order = axes._ring(group)
  assert sorted(order) == list(range(len(group)))
  assert set(distances([group[index] for index in order])) == {1}


@pytest.mark.parametrize("sizes, slices", [
  (dict(data=-1, fsdp=16), 1), (dict(fsdp=16, context=4), 1), (dict(data=-1, fsdp=16), 2),
  (dict(data=2, fsdp=16, context=4), 2)], ids=str)
def test_every_group_of_fsdp_on_8x8_is_a_ring_of_neighbours(sizes, slices):
  devices = [device for index in range(slices) for device in rectangle(8, 8, slice_index=index)]
  placed = axes.mesh(**sizes, devices=devices).devices
  groups = placed[:, :, 0].swapaxes(1, 2).reshape(-1, placed.shape[1])
  for group in groups.tolist():
    assert len({device.slice_index for device in group}) == 1
    assert set(distances(group)) == {1}


@pytest.mark.parametrize("sizes, parts", [
  (dict(data=-1, fsdp=16), 16), (dict(fsdp=16, context=4), 4), (dict(fsdp=4, context=16), 2),
  (dict(data=16, fsdp=4), 16), (dict(fsdp=1, context=64), 1)], ids=str)
def test_hosts_share_out_the_rows_and_those_that_hold_parts_of_one_read_it_whole(
    sizes, parts, monkeypatch):
  mesh = axes.mesh(**sizes, devices=rectangle(8, 8))
  found = []
  for process in range(16):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    found.append(axes.process_part(mesh))
  assert {count for _, count in found} == {parts}
  indexes = [index for index, _ in found]
  assert all(indexes.count(part) == 16 // parts for part in range(parts))


@pytest.mark.parametrize("group", [
  rectangle(3, 3), rectangle(16, 1), rectangle(4, 2, step=2), rectangle(4, 2)[:-1], jax.devices(),
  [Tpu(x, y, z) for x in range(2) for y in range(2) for z in range(2)]],
  ids=["odd", "a line", "gaps", "a hole", "no chips", "a cube"])
def test_groups_without_such_a_round_trip_stay_as_they_are(group):
  assert axes._ring(group) == slice(None)


@pytest.mark.parametrize(
  "name, shape",
  [
    ("q_DNH", (8,)),
    ("q_DNH", (8, 8)),
    ("q_DNH", (2, 2, 8, 8, 8)),
    ("count", (8,)),
    ("Q_DNH", (8, 8, 8)),
  ],
)
def test_a_leaf_whose_rank_is_not_its_letters_is_refused_with_its_path(name, shape):
  tree = dict(full={name: jax.ShapeDtypeStruct(shape, np.float32)})
  with pytest.raises(run.Refused, match=rf"\['full'\]\['{name}'\]"):
    axes.shardings(axes.mesh(), tree)


def test_a_size_that_does_not_divide_is_refused_with_both_numbers():
  tree = dict(gate_DF=jax.ShapeDtypeStruct((12, 7), np.float32))
  with pytest.raises(run.Refused, match="12 does not divide over 8 devices of 'fsdp'"):
    axes.shardings(axes.mesh(fsdp=8), tree)
  with pytest.raises(run.Refused, match="7 does not divide over 2 devices of 'tensor'"):
    axes.shardings(axes.mesh(fsdp=4, tensor=2), tree)


def test_shard_does_nothing_outside_a_mesh_and_pins_the_layout_inside_one():
  x_BTD = np.ones((4, 6, 8), np.float32)
  assert axes.shard(x_BTD, "BTD") is x_BTD
  with jax.set_mesh(axes.mesh(data=2, fsdp=2, context=2)):
    pinned = jax.jit(lambda x_BTD: axes.shard(x_BTD, "BTD"))(x_BTD)
    assert axes.axis_size("context") == 2
  assert pinned.sharding.shard_shape(pinned.shape) == (1, 3, 8)
  assert axes.axis_size("context") == 1


def test_the_gradients_of_copies_are_summed_in_fp32():
  weight_DF = np.ones((8, 4), np.float32)
  with jax.set_mesh(axes.mesh(data=8, fsdp=1)):
    _, pull = jax.vjp(lambda weight: collectives.gather(weight, "DF", jnp.bfloat16), weight_DF)
    gradient = jnp.ones((8, 8, 4), jnp.bfloat16).at[0].set(256)  # in bfloat16, 256 + 1 is 256
    np.testing.assert_array_equal(jax.jit(pull)(gradient)[0], 263)


def test_what_goes_round_a_ring_travels_in_the_dtype_asked_for():
  def own(x):
    return collectives.ring_sum(lambda place: x[0].astype(jnp.float32), "fsdp", jnp.bfloat16)[None]

  mesh = axes.mesh(fsdp=8)
  with jax.set_mesh(mesh):
    summed = jax.jit(jax.shard_map(own, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp")))
    x = np.arange(8, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(np.float32(summed(x)), 28)  # every place gets the sum
    text = summed.lower(x).as_text()
  assert "collective_permute" in text and "tensor<1xbf16>" in text
