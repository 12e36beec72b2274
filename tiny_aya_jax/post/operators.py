"""Ways to merge models, each a pure function of one tensor of every model: NumPy fp32 in and out.

Not here: which tensors, from where and to where (merge.py). The formulas and their order of fp32
operations are mergekit's (tiny_aya.md 7.3), with four differences. Cosines and norms are summed in
float64: fp32 sums of 5e8 squares are wrong in the fourth digit. Where an average's models agree the
number stays as it is, bit for bit. DARE divides by the density, as its paper does. And collinear task
vectors that point apart are interpolated linearly too, where nuslerp divides by a sine of 1e-7.
`ties` with `cuts` and `zeros_up` is TIES as its authors published it: see `cut` and `Cut`.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 1 << 15  # elements: a block of every operand stays in the cache; even, for the generators
COLLINEAR = 0.9995  # mergekit's: at a larger |cosine| slerp is a straight line
SINE = 1e-4  # nuslerp's: arcs this flat differ from the line by 1e-9, below fp32


def linear(tensors, weights, normalize=False):
  """Sum of w x, over the sum of w if `normalize`; one of both must make it an average."""
  weights = np.float32(weights)
  average = normalize or abs(float(weights.sum()) - 1) < 1e-5

  def block(*parts):
    total = _sum(weight * part for weight, part in zip(weights, parts))
    if normalize:
      total /= weights.sum()
    return _kept(total, parts) if average else total

  return _blockwise(block, tensors)


def slerp(first, second, t):
  """From `first` at t=0 to `second` at t=1 along the arc, on the vectors as they are.

  A straight line if they are collinear, and a right angle to a zero tensor.
  """
  if t in (0, 1):
    return np.array((first, second)[int(t)], np.float32)
  cosine = _cosine(first, second)
  if abs(cosine) > COLLINEAR:
    return _line(first, second, t)
  a, b = _arc(cosine, t)
  return _blockwise(lambda x, y: a * x + b * y, (first, second))


def nuslerp(base, first, second, t):
  """slerp between the task vectors, added to the base; their angles are large where models are near."""
  if t in (0, 1):
    return np.array((first, second)[int(t)], np.float32)
  cosine = _cosine(first, second, base)
  if np.sqrt(max(0.0, 1 - cosine * cosine)) < SINE:
    a, b = np.float32(1 - t), np.float32(t)
    return _blockwise(
        lambda x, y, z: _kept(z + (a * (x - z) + b * (y - z)), (x, y)), (first, second, base))
  a, b = _arc(cosine, t)
  return _blockwise(lambda x, y, z: z + (a * (x - z) + b * (y - z)), (first, second, base))


def task_arithmetic(base, tensors, weights, scale=1.0, normalize=False):
  """base + lambda * sum of w (x - base), over the sum of w if `normalize` (Ilharco et al. 2023)."""
  return _task_vectors(base, tensors, weights, scale, normalize, _all, elect=None)


class Cut(NamedTuple):
  """What is kept of a flat task vector: larger than `threshold`; equal to it up to index `last`."""

  threshold: np.float32
  last: int

  def __call__(self, delta, start):
    size = np.abs(delta)
    kept = size > self.threshold
    if start <= self.last:
      equal = size == self.threshold
      equal[min(delta.size, self.last - start + 1):] = False
      kept |= equal
    return delta * kept.astype(np.float32)  # to float first: NumPy multiplies by bools slowly


def cut(base, tensor, density):
  """The Cut that keeps exactly int(density * size) of tensor - base; of equals, the first."""
  keep = int(density * base.size)
  if density >= 1:
    return Cut(np.float32(-1), -1)
  if keep == 0:
    return Cut(np.float32(np.inf), -1)
  size = np.abs(tensor - base).reshape(-1)
  threshold = np.partition(size, base.size - keep)[base.size - keep]
  above = np.count_nonzero(size > threshold)
  return Cut(threshold, int(np.flatnonzero(size == threshold)[keep - above - 1]))


def ties(base, tensors, weights, density, scale=1.0, normalize=True, cuts=None, zeros_up=True):
  """Trim, elect a sign, average what agrees with it (Yadav et al. 2023).

  cuts: one a model, where they are not of this tensor alone; zeros_up: the sign of sums that are 0.
  """
  cuts = cuts or [cut(base, tensor, density) for tensor in tensors]
  return _task_vectors(base, tensors, weights, scale, normalize, cuts, elect=zeros_up)


def elected(base, tensors, weights, cuts):
  """The sum of the elected signs, zeros as 0: of the whole model its sign is the authors' zeros_up."""
  weights = np.float32(weights)
  total = 0
  for start, parts in _parts([base, *tensors]):
    deltas = [keep(part - parts[0], start) for keep, part in zip(cuts, parts[1:])]
    total += int(np.sign(_sum(weight * delta for weight, delta in zip(weights, deltas))).sum())
  return total


def dare_linear(base, tensors, weights, density, seeds, scale=1.0, normalize=False):
  """task_arithmetic of what a coin keeps of each task vector, over the density (Yu et al. 2024).

  seeds: one a model, what np.random.default_rng takes.
  """
  drops = [_drop(density, seed) for seed in seeds]
  return _task_vectors(base, tensors, weights, scale, normalize, drops, elect=None)


def dare_ties(base, tensors, weights, density, seeds, scale=1.0, normalize=False):
  """dare_linear with the elected signs of TIES."""
  drops = [_drop(density, seed) for seed in seeds]
  return _task_vectors(base, tensors, weights, scale, normalize, drops, elect=True)


def finite(tensor):
  """Whether no number is infinite or not a number."""
  return all(np.isfinite(part).all() for _, (part,) in _parts([tensor]))


def _task_vectors(base, tensors, weights, scale, normalize, sparse, elect):
  """sparse: (delta, start) -> delta, one a model; elect: None, or the sign of sums that are 0 (up)."""
  weights = np.float32(weights)
  shape, out = base.shape, np.empty(base.size, np.float32)
  sparse = [_all] * len(tensors) if sparse is _all else sparse
  for start, (below, *parts) in _parts([base, *tensors]):
    deltas = [weight * keep(part - below, start)
              for weight, keep, part in zip(weights, sparse, parts)]
    total = _sum(deltas)
    if elect is None:
      divisor = weights.sum() if abs(weights.sum()) >= 1e-8 else np.float32(1)
    else:
      up = (total >= 0 if elect else total > 0).astype(np.float32) * 2 - 1
      agree = [(delta * up > 0).astype(np.float32) for delta in deltas]
      total = _sum(delta * mask for delta, mask in zip(deltas, agree))
      divisor = _sum(weight * mask for weight, mask in zip(weights, agree))
      divisor += (divisor == 0).astype(np.float32)
    if normalize:
      total /= divisor
    if scale != 1:
      total *= np.float32(scale)
    out[start:start + below.size] = below + total
  return out.reshape(shape)


def _all(delta, start):
  return delta


def _drop(density, seed):
  random = np.random.default_rng(seed)

  def drop(delta, start):
    if density >= 1:
      return delta
    kept = random.random(delta.size, np.float32) < np.float32(density)
    return delta * kept.astype(np.float32) / np.float32(density)

  return drop


def _line(first, second, t):
  a, b = np.float32(1 - t), np.float32(t)
  return _blockwise(lambda x, y: _kept(a * x + b * y, (x, y)), (first, second))


def _arc(cosine, t):
  angle = np.arccos(cosine)
  return np.float32(np.sin((1 - t) * angle) / np.sin(angle)), np.float32(
      np.sin(t * angle) / np.sin(angle))


def _cosine(first, second, base=None):
  """Of two tensors, or of their differences from base; 0 if one is all zeros."""
  squares = np.zeros(3)
  for _, (x, y, *below) in _parts([first, second] + ([] if base is None else [base])):
    x, y = (x - below[0], y - below[0]) if below else (x, y)
    squares += [np.multiply(p, q, dtype=np.float64).sum() for p, q in ((x, y), (x, x), (y, y))]
  dot, *norms = squares
  return float(np.clip(dot / np.sqrt(norms[0]) / np.sqrt(norms[1]), -1, 1)) if all(norms) else 0.0


def _sum(terms):
  """Left to right, as the models are given."""
  first, *rest = terms
  total = np.array(first, np.float32)
  for term in rest:
    total += term
  return total


def _kept(total, parts):
  same = np.logical_and.reduce([part == parts[0] for part in parts[1:]])
  if same.any():
    np.copyto(total, parts[0], where=same)
  return total


def _blockwise(formula, tensors):
  out = np.empty(tensors[0].size, np.float32)
  for start, parts in _parts(tensors):
    out[start:start + parts[0].size] = formula(*parts)
  return out.reshape(tensors[0].shape)


def _parts(tensors):
  """(start, [the same block of every tensor]) over the flattened tensors."""
  flat = [np.reshape(tensor, -1) for tensor in tensors]
  for start in range(0, flat[0].size, BLOCK):
    yield start, [tensor[start:start + BLOCK] for tensor in flat]
