"""What is known of each TPU, as data: memory, speed, links, shape, price, and what XLA is told for it.

Read by `plan` and by whoever compiles. No jax here. Memory is what XLA reports as usable; 16, 95 and
32 GB, and peaks, by docs.cloud.google.com/tpu/docs (read 2026-11); links by the scaling book.
"""

import math
import re
from typing import NamedTuple

from tiny_aya_jax import run


class Chip(NamedTuple):
  """A chip, by the names of jax.experimental.topologies.get_topology_desc."""

  platform_name: str
  config_name: str
  kinds: tuple  # Device.device_kind
  axes: int  # of the torus
  hbm_gib: float  # usable
  wraps_at: int  # an axis of this many chips, or a multiple, is a ring
  flops: float  # a second, dense bf16
  link: float  # bytes a second of one link, one way; two links an axis and chip
  price: float  # USD a chip-hour, see PRICED


CHIPS = dict(
    v5e=Chip("v5e", "default", ("TPU v5 lite", "TPU v5e"), 2, 15.75, 16, 197e12, 45e9, 1.20),
    v5p=Chip("v5", "megacore", ("TPU v5", "TPU v5p"), 3, 95.73, 4, 459e12, 90e9, 4.20),
    v6e=Chip("v6e", "default", ("TPU v6 lite", "TPU v6e"), 2, 31.24, 16, 918e12, 90e9, 2.70),
)
PRICED = "2025 on demand in the US, unconfirmed: set config.price to yours"
CHIPS_A_HOST = 4
SHAPES = {  # slices to choose from, smallest first; wider ones exist
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


class Slice(NamedTuple):
  """A topology 'v5p:4x4x8': its chip and the chips along each axis; '2xv5p:4x4x8' is two of them."""

  name: str
  chip: Chip
  shape: tuple  # of one
  slices: int = 1

  @property
  def size(self):
    return self.slices * math.prod(self.shape)

  @property
  def wrap(self):
    """Which axes are rings; on three axes only all of them together (full cubes)."""
    rings = tuple(axis % self.chip.wraps_at == 0 for axis in self.shape)
    return rings if self.chip.axes == 2 else (all(rings),) * 3


def parse(name):
  """'v6e:16x16' or '4xv6e:16x16' -> Slice; refuses unknown chips and shapes."""
  slices, kind, shape = re.fullmatch(r"(?s)(?:([1-9]\d*)x)?([^:]*):?(.*)", name).groups()
  chip = CHIPS[run.choose("topology", kind, CHIPS)]
  sizes = tuple(int(size) for size in shape.split("x") if size.isdigit())
  if len(sizes) != chip.axes or min(sizes, default=0) < 1 or "x".join(map(str, sizes)) != shape:
    example = "x".join(["4"] * chip.axes)
    raise run.Refused(f"topology {name!r}: {kind} has {chip.axes} axes, for example {kind}:{example}")
  return Slice(name, chip, sizes, int(slices or 1))


# Layers are gathered while the layer before computes. Defaults do so on v5e only: without these,
# v5p and v6e gathered everything synchronously (jaxlib 0.10.2, libtpu 0.0.42.1; LOG.md 2026-11-25).
_ASYNCHRONOUS = dict(
    xla_enable_async_all_gather="true",
    xla_tpu_enable_async_collective_fusion="true",
    xla_tpu_enable_async_collective_fusion_fuse_all_gather="true",
    xla_tpu_enable_async_collective_fusion_multiple_steps="true",
    xla_tpu_overlap_compute_collective_tc="true",
)
# What XLA is told, by chip; everything else is left at its default.
COMPILER_OPTIONS = dict(v5e=_ASYNCHRONOUS, v5p=_ASYNCHRONOUS, v6e=_ASYNCHRONOUS)


def compiler_options(device_kind):
  """{option: value} for jax's compile(compiler_options=...); {} for kinds that need none."""
  for name, chip in CHIPS.items():
    if device_kind in chip.kinds:
      return COMPILER_OPTIONS[name]
  return {}


def refuse_other(topology, devices):
  """Refuses devices that are not the slice `topology` names; None names none."""
  if not topology:
    return
  target, kind = parse(topology), devices[0].device_kind
  if kind not in target.chip.kinds or len(devices) != target.size:
    raise run.Refused(
        f"config.topology is {topology}, {target.size} chips of kind {target.chip.kinds[0]!r}, and "
        f"there are {len(devices)} of {kind!r}: leave it out, or name what is there"
    )
