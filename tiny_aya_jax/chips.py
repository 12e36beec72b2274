"""What is known of each TPU, as data: memory, peaks, links, price, how XLA is asked to compile for it.

Read by plan.py and train.py. No jax here. Sources: docs.cloud.google.com/tpu/docs (v5e, v5p, v6e, read
2026-11), the memory that XLA reports as usable (performance figures of LOG.md), and for the links
the scaling book: one direction of one link, of which a torus axis has two if it is wrapped.
"""

import math
from typing import NamedTuple

from tiny_aya_jax import run


class Chip(NamedTuple):
  """A chip: topology_name of get_topology_desc; usable HBM in GiB; FLOP/s in bf16; bytes/s."""

  platform_name: str
  config_name: str
  axes: int  # of the torus
  hbm_gib: float
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float  # one direction of one link
  wraps_at: int  # an axis of this many chips, or a multiple, is a ring


CHIPS = dict(
    v5e=Chip("v5e", "default", 2, 15.75, 197e12, 819e9, 45e9, 16),
    v5p=Chip("v5", "megacore", 3, 95.73, 459e12, 2765e9, 90e9, 4),
    v6e=Chip("v6e", "default", 2, 31.24, 918e12, 1638e9, 90e9, 16),
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

  @property
  def gather_bandwidth(self):
    """Bytes/s with which a chip receives an all-gather over all chips, every link at work."""
    links = sum(1 + ring for ring, axis in zip(self.wrap, self.shape) if axis > 1)
    return links * self.chip.link_bandwidth


def parse(name):
  """'v6e:16x16' -> Slice; refuses unknown chips and shapes."""
  kind, _, shape = name.partition(":")
  chip = CHIPS[run.choose("topology", kind, CHIPS)]
  sizes = tuple(int(size) for size in shape.split("x") if size.isdigit())
  if len(sizes) != chip.axes or min(sizes, default=0) < 1 or "x".join(map(str, sizes)) != shape:
    example = "x".join(["4"] * chip.axes)
    raise run.Refused(f"topology {name!r}: {kind} has {chip.axes} axes, for example {kind}:{example}")
  return Slice(name, chip, sizes)
