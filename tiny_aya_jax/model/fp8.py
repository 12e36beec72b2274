"""Matmuls in 8-bit floats: e4m3 forward, e5m2 gradients (arXiv 2209.05433), one scale a tensor.

x ~ scale x8, measured anew at every call (current scaling): there is no state, so scan, remat,
accumulation, checkpoints and another mesh need nothing. The scale is the least power of two above
max |x| / (largest of the format). Multiplying by it is exact in any dtype, so all that is lost is
the rounding to x8: 2^-4 (e4m3) or 2^-3 (e5m2) of an element, more of one that is less than 2^-14
(2^-29) of the largest.

The form is quantise, dot of 8-bit operands, scale the result; Flax calls it direct
(Fp8DirectDotGeneralOp) and deprecates the older convert-multiply-dot, which works only while no
simplification reaches the converts before XLA:GPU matches them (openxla/xla issue 17887). XLA:GPU
makes each such dot a cublasLt FP8 call and takes the scaling into it, if that is a product with a
scalar in the dot's own dtype (gemm_rewriter.cc, F8ScaleD). Elsewhere the operands are widened: the
same values, no gain.
"""

import jax
import jax.numpy as jnp
from jax import lax

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2  # largest: 448 and 57,344


@jax.custom_vjp
def dot(x, w):
  """x [.., T, C] times w [.., C, R], both in one float dtype: [.., T, R] in it, summed in fp32.

  The backward pass keeps the 8-bit x and w, one byte an element. Zeros give zeros; an infinity or
  NaN gives NaN everywhere, so that a loss that is not finite is seen.
  """
  return _forward(x, w)[0]


def _forward(x, w):
  kept = quantised(x, FORWARD), quantised(w, FORWARD)
  return _product(*kept, (-1, -2), x.dtype), kept


def _backward(kept, g):
  (x, w), g8 = kept, quantised(g, GRADIENT)
  # HIGHEST: cublasLt then adds up in full fp32, as Flax and Transformer Engine do for gradients.
  dx = _product(g8, w, (-1, -1), g.dtype, lax.Precision.HIGHEST)
  dw = _product(x, g8, (-2, -2), g.dtype, lax.Precision.HIGHEST)
  return dx, dw


dot.defvjp(_forward, _backward)


def quantised(x, dtype):
  """(x8 in the 8-bit dtype, scale fp32), x ~ scale x8; scale is 1 for zeros."""
  largest = jnp.finfo(dtype).max.astype(jnp.float32)
  ratio = jnp.max(jnp.abs(x)).astype(jnp.float32) / largest
  # The exponent bits alone are the power of two below; infinity for infinity and NaN, 0 for 0.
  below = lax.bitcast_convert_type(
      lax.bitcast_convert_type(ratio, jnp.int32) & 0x7F800000, jnp.float32
  )
  scale = jnp.where(below > 0, 2 * below, 1)
  # Clipped, because the cast does not saturate, and XLA may give it x before x's own rounding.
  x8 = jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype)
  return x8, scale


def _product(a, b, contracted, dtype, precision=lax.Precision.DEFAULT):
  (a8, a_scale), (b8, b_scale) = a, b
  axes, both = [[axis % a8.ndim] for axis in contracted], list(range(a8.ndim - 2))
  out = lax.dot_general(
      a8, b8, (axes, (both, both)), precision=precision, preferred_element_type=dtype
  )
  return out * (a_scale * b_scale).astype(dtype)
