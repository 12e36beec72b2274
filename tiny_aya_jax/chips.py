"""What is known of each TPU, as data: memory and shape.

Read by launch/tpu_lowering.py. No jax here. Memory is what XLA reports as usable, 16, 95 and 32 GB by
docs.cloud.google.com/tpu/docs (read 2026-11).
"""

import math
from typing import NamedTuple

from tiny_aya_jax import run


class Chip(NamedTuple):
  """A chip, by the names of jax.experimental.topologies.get_topology_desc."""

  platform_name: str
  config_name: str
  axes: int  # of the torus
  hbm_gib: float  # usable
  wraps_at: int  # an axis of this many chips, or a multiple, is a ring


CHIPS = dict(
    v5e=Chip("v5e", "default", 2, 15.75, 16),
    v5p=Chip("v5", "megacore", 3, 95.73, 4),
    v6e=Chip("v6e", "default", 2, 31.24, 16),
)


class Slice(NamedTuple):
  """A topology 'v5p:4x4x8': its chip and the chips along each axis."""

  name: str
  chip: Chip
  shape: tuple

  @property
  def size(self):
    return math.prod(self.shape)

  @property
  def wrap(self):
    """Which axes are rings; on three axes only all of them together (full cubes)."""
    rings = tuple(axis % self.chip.wraps_at == 0 for axis in self.shape)
    return rings if self.chip.axes == 2 else (all(rings),) * 3


def parse(name):
  """'v6e:16x16' -> Slice; refuses unknown chips and shapes."""
  kind, _, shape = name.partition(":")
  chip = CHIPS[run.choose("topology", kind, CHIPS)]
  sizes = tuple(int(size) for size in shape.split("x") if size.isdigit())
  if len(sizes) != chip.axes or min(sizes, default=0) < 1 or "x".join(map(str, sizes)) != shape:
    example = "x".join(["4"] * chip.axes)
    raise run.Refused(f"topology {name!r}: {kind} has {chip.axes} axes, for example {kind}:{example}")
  return Slice(name, chip, sizes)


# What XLA is told, by device kind as JAX names it; everything else is left at libtpu's default.
COMPILER_OPTIONS = {}


def compiler_options(device_kind):
  """{option: value} for jax's compile(compiler_options=...); {} for kinds that need none."""
  return COMPILER_OPTIONS.get(device_kind, {})
