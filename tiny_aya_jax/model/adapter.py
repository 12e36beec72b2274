"""Low-rank adapters beside frozen matrices: W becomes W + alpha / R A B (LoRA, arXiv 2106.09685).

A parameter is an adapter's if its letters hold R: beside q_DNH lie q_DR and q_RNH. Where there are
any, they alone are trained. Not here: where x meets them (transformer.py).
"""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tiny_aya_jax.axes import letters, letters_of

# A matrix: its first factor, from what it reads to R, and its second.
FACTORS = dict(
    q_DNH=("q_DR", "q_RNH"), k_DKH=("k_DR", "k_RKH"), v_DKH=("v_DR", "v_RKH"), o_NHD=("o_NHR", "o_RD"),
    gate_DF=("gate_DR", "gate_RF"), up_DF=("up_DR", "up_RF"), down_FD=("down_FR", "down_RD"),
)


class Adapter(NamedTuple):
  """R: rank. alpha: of the scale alpha / R. matrices: which have one, as 'q', 'gate'."""

  R: int
  alpha: float
  matrices: tuple


def described(found):
  """fields.adapter of a config, or what a checkpoint's meta holds of it -> Adapter; None of None."""
  return found and Adapter(found["rank"], found["alpha"], tuple(found["matrices"]))


def factors(adapter):
  """{matrix: (first factor, second)}, by name, of those that `adapter` (or None) adapts."""
  return {name: pair for name, pair in FACTORS.items()
          if adapter and name.partition("_")[0] in adapter.matrices}


def is_factor(name):
  """Whether a leaf of this name is an adapter's."""
  return "R" in letters(name)


def first(key, shape, dtype=np.float32):
  """Uniform within 1 / sqrt(inputs), as PEFT draws a first factor; the second is 0."""
  limit = math.prod(shape[:-1]) ** -0.5
  return jax.random.uniform(key, shape, dtype, -limit, limit)


def split(params):
  """(trained, frozen) trees of params: adapters and all else; without adapters (params, {})."""
  flat = flatten_dict(params)
  trained = {path: leaf for path, leaf in flat.items() if is_factor(path[-1])}
  if not trained:
    return params, {}
  return unflatten_dict(trained), unflatten_dict({path: flat[path] for path in flat.keys() - trained})


def join(trained, frozen):
  """The way back of `split`."""
  return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def held(params, dtype):
  """params with what is frozen in dtype, in which alone it is used; norms stay fp32, as they are used."""
  trained, frozen = split(params)
  return join(trained, jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf if letters_of(path) == "D" else leaf.astype(dtype), frozen))


def merged(params, adapter):
  """The tree of a model without adapters, fp32: every matrix plus its adapter's product.

  `adapter` None: params as they are. Leaves on devices that change are given up, so that one at a
  time is held twice; NumPy arrays stay on the host.
  """
  if adapter is None:
    return params
  flat, scale, whole = flatten_dict(params), adapter.alpha / adapter.R, {}
  for path, leaf in flat.items():
    if not is_factor(path[-1]):
      pair = [flat[*path[:-1], name] for name in factors(adapter).get(path[-1], ())]
      whole[path] = _whole(functools.partial(total, scale=scale), leaf, *pair)
  return unflatten_dict(whole)


def _whole(compute, leaf, *pair):
  if not isinstance(leaf, jax.Array):
    return compute(leaf, *pair)
  if not pair and leaf.dtype == np.float32:
    return leaf
  whole = jax.jit(compute, out_shardings=leaf.sharding)(leaf, *pair)
  leaf.delete()
  return whole


def total(matrix, *pair, scale):
  """A leaf of all periods in fp32, plus scale times the product of its two factors, if it has them."""
  matrix = matrix.astype(np.float32)
  if not pair:
    return matrix
  (L, *_), R = matrix.shape, pair[0].shape[-1]
  with jax.default_matmul_precision("highest"):
    product = pair[0].reshape(L, -1, R) @ pair[1].reshape(L, R, -1)
  return matrix + np.float32(scale) * product.reshape(matrix.shape)
