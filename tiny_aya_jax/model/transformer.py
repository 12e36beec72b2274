"""The one architecture: Cohere2 as Tiny Aya uses it (tiny_aya.md section 1), pure functions of a tree.

L periods of four parallel blocks, h <- h + attention(norm(h)) + feed_forward(norm(h)): three with a
sliding window and rotary positions, then one that sees everything and has no positions at all. The
periods are stacked and scanned; the head is the embedding, transposed. Not here: the loss, the mask
rules (attention.py), sharding rules (axes.py).

`cfg` is anything with the fields D, N, K, H, F, V, L, window, rope_theta, logit_scale,
norm_epsilon. Parameters:

  embedding_VD  norm_D  periods/{sliding_0,sliding_1,sliding_2,full}/{norm_D, q_DNH, k_DKH, v_DKH,
  o_NHD, gate_DF, up_DF, down_FD}, each with L in front; with adapters, the factors of adapter.py.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from tiny_aya_jax.axes import axis_size, letters, shard
from tiny_aya_jax.model import adapter as adapters, fp8
from tiny_aya_jax.model.attention import attention, ring_write
from tiny_aya_jax.model.collectives import from_copies, gather, settle, to_copies

BLOCKS = ("sliding_0", "sliding_1", "sliding_2", "full")  # one period: HF layers 4l .. 4l+3
normal = nn.initializers.normal(0.02)  # SmolLM3, same shape (tiny_aya.md 5.4); Tiny Aya's: unpublished


class TinyAya(nn.Module):
  """Tokens to final hidden states; `logits` or `losses` turn those into predictions.

  dtype: of activations and matmuls (parameters stay fp32). backend: of attention. remat: what
  each block keeps for its backward pass (KEEP, 'offload'), or 'none': everything. unroll: periods
  per scan step. matmul: 'dtype', or 'fp8' for the seven of each block (fp8.py); embedding and head
  stay in dtype, and so do adapters. adapter: adapter.Adapter, or None.
  """

  cfg: Any
  dtype: Any = jnp.float32
  backend: str = "reference"
  remat: str = "none"
  unroll: int = 1
  matmul: str = "dtype"
  adapter: Any = None

  @nn.compact
  def __call__(self, token_BT, segment_BT, position_BT):
    """Returns hidden_BTD after the final norm, in dtype.

    token_BT, segment_BT (0 is padding), position_BT (restarts per segment): int32. With the
    collection "cache" mutable, keys and values are kept there and read from there (decode.py).
    """
    embedding_VD = weight(self, "embedding_VD")
    x_BTD = shard(look_up(embedding_VD, token_BT, self.dtype), "BTD")
    periods = nn.scan(
        Period, variable_axes=dict(params=0, cache=0), split_rngs=dict(params=True),
        in_axes=(nn.broadcast, nn.broadcast), length=self.cfg.L, unroll=self.unroll,
    )(self.cfg, self.dtype, self.backend, self.remat, self.matmul, self.adapter, name="periods")
    x_BTD, _ = periods(x_BTD, segment_BT, position_BT)
    return layer_norm(x_BTD, weight(self, "norm_D", nn.initializers.ones), self.cfg)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(embedding_VD, token_BT, dtype):
  """Rows of the table in dtype: [B, T, D]. The gradient of the table is summed in fp32.

  Summed in bfloat16, a token that occurs 10,000 times in a batch loses a third of its gradient:
  each further addend is below half a unit in the last place of the sum. On a mesh each device
  looks up the columns it holds for the tokens of all, and one exchange of activations gives every
  device its own tokens: the table itself never moves.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return embedding_VD.astype(dtype)[token_BT]

  def columns(embedding_VD, token_BT):
    token_BT = jax.lax.all_gather(token_BT, "fsdp", tiled=True)
    held_BT, token_BT = _held(embedding_VD, token_BT)
    x_BTD = jnp.where(held_BT[..., None], embedding_VD[token_BT].astype(dtype), 0)
    x_BTD = jax.lax.psum(x_BTD, "tensor") if axis_size("tensor") > 1 else x_BTD
    return jax.lax.all_to_all(x_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)

  return jax.shard_map(
      columns, in_specs=(_TABLE, _TOKENS), out_specs=_TOKENS, check_vma=False
  )(embedding_VD, token_BT)


def _look_up_forward(embedding_VD, token_BT, dtype):
  return look_up(embedding_VD, token_BT, dtype), (embedding_VD, token_BT)


def _look_up_backward(dtype, residuals, d_BTD):
  embedding_VD, token_BT = residuals

  def add(embedding_VD, token_BT, d_BTD):
    d_BTD = d_BTD.astype(embedding_VD.dtype)
    return jnp.zeros_like(embedding_VD).at[token_BT].add(d_BTD, mode="drop")

  if jax.sharding.get_abstract_mesh().empty:
    return add(embedding_VD, token_BT, d_BTD), None

  def columns(embedding_VD, token_BT, d_BTD):
    token_BT = jax.lax.all_gather(token_BT, "fsdp", tiled=True)
    held_BT, token_BT = _held(embedding_VD, token_BT)
    d_BTD = jax.lax.all_to_all(d_BTD, "fsdp", split_axis=2, concat_axis=0, tiled=True)
    d_VD = add(embedding_VD, jnp.where(held_BT, token_BT, embedding_VD.shape[0]), d_BTD)
    return jax.lax.psum(d_VD, ("data", "context"))

  return jax.shard_map(
      columns, in_specs=(_TABLE, _TOKENS, _TOKENS), out_specs=_TABLE, check_vma=False
  )(embedding_VD, token_BT, d_BTD), None


look_up.defvjp(_look_up_forward, _look_up_backward)
_TABLE, _TOKENS = PartitionSpec("tensor", "fsdp"), PartitionSpec(("data", "fsdp"), "context")


def _held(embedding_VD, token_BT):
  """(whether this device's rows of the table hold a token, the token's row among them)."""
  row_BT = token_BT - jax.lax.axis_index("tensor") * embedding_VD.shape[0]
  held_BT = (row_BT >= 0) & (row_BT < embedding_VD.shape[0])
  return held_BT, jnp.where(held_BT, row_BT, 0)


class Period(nn.Module):
  """Four blocks: three sliding, one full."""

  cfg: Any
  dtype: Any
  backend: str
  remat: str
  matmul: str
  adapter: Any = None

  @nn.compact
  def __call__(self, x_BTD, segment_BT, position_BT):
    block = Block if self.remat == "none" else nn.remat(
        Block, prevent_cse=RECOMPUTE_LATE, policy=remat_policy(self.remat)
    )
    for name in BLOCKS:
      window = None if name == "full" else self.cfg.window
      x_BTD = block(
          self.cfg, self.dtype, self.backend, window, self.matmul, self.adapter, name=name
      )(x_BTD, segment_BT, position_BT)
    return x_BTD, None


# What a block keeps for its backward pass, by checkpoint name; the rest is computed again.
# "attention" is the output with, from splash, its logsumexp: named inside the kernel, or both
# copies would be kept. GiB a sequence of 8,192 at full size: 1.1, 2.3, 4.0, 16 (performance.md 4).
KEEP = dict(
    full=(), attn=("attention",), qkv=("attention", "q", "k", "v"),
    minimal=("attention", "q", "k", "v", "gate", "up"),
)


# Of a block's (variables, rngs, x, segment, position): x waits for the gradient that comes back, or
# the four blocks of a period are all computed again before the first needs it. Weights do not wait.
RECOMPUTE_LATE = (False, False, True, False, False)


def remat_policy(remat):
  """jax.checkpoint policy: a key of KEEP, or 'offload', which keeps as 'qkv' but in host memory."""
  if remat == "offload":
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(), names_which_can_be_offloaded=KEEP["qkv"],
        offload_src="device", offload_dst="pinned_host",
    )
  return jax.checkpoint_policies.save_only_these_names(*KEEP[remat])


MATRICES = ("q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD")


class Block(nn.Module):
  """x + attention(norm(x)) + feed_forward(norm(x)); `window` None is the full, position-free kind."""

  cfg: Any
  dtype: Any
  backend: str
  window: Any
  matmul: str
  adapter: Any = None

  @nn.compact
  def __call__(self, x_BTD, segment_BT, position_BT):
    cfg = self.cfg
    weights = {name: weight(self, name) for name in MATRICES}
    factors = adapters.factors(self.adapter)
    beside = {name: weight(self, name, init) for pair in factors.values()
              for name, init in zip(pair, (adapters.first, nn.initializers.zeros))}
    trained, x_BTD = settle(beside or weights, x_BTD)  # no gradient waits for what is frozen
    weights = {name: gather(leaf, letters(name), self.dtype)
               for name, leaf in (weights | trained).items()}

    def times(x, name, letters):
      """x through the matrix `name`, and through its adapter."""
      y = project(x, weights[name], letters, self.matmul)
      if name not in factors:
        return y
      return y + low_rank(x, *(weights[leaf] for leaf in factors[name]), letters, self.adapter)

    y_BTD = layer_norm(x_BTD, weight(self, "norm_D", nn.initializers.ones), cfg)

    q_BTNH = times(y_BTD, "q_DNH", "BTD,DNH->BTNH")
    k_BTKH = times(y_BTD, "k_DKH", "BTD,DKH->BTKH")
    v_BTKH = times(y_BTD, "v_DKH", "BTD,DKH->BTKH")
    if self.window is not None:
      q_BTNH = rotate(q_BTNH, position_BT, cfg.rope_theta)
      k_BTKH = rotate(k_BTKH, position_BT, cfg.rope_theta)
    q_BTNH, k_BTKH, v_BTKH = (
        checkpoint_name(x, name) for x, name in ((q_BTNH, "q"), (k_BTKH, "k"), (v_BTKH, "v")))
    keys = dict(k_BSKH=k_BTKH, v_BSKH=v_BTKH)
    if self.is_mutable_collection("cache"):
      if self.has_variable("cache", "k_BSKH"):  # one more token; before, a whole prompt
        keys = ring_write(
            self.get_variable("cache", "k_BSKH"), self.get_variable("cache", "v_BSKH"),
            k_BTKH, v_BTKH, position_BT,
        )
      for name in ("k_BSKH", "v_BSKH"):
        self.put_variable("cache", name, keys[name])
    a_BTNH = attention(
        q_BTNH, **keys, segment_BT=segment_BT, position_BT=position_BT, window=self.window,
        backend=self.backend,
    )
    a_BTD = times(a_BTNH, "o_NHD", "BTNH,NHD->BTD")

    gate_BTF = checkpoint_name(times(y_BTD, "gate_DF", "BTD,DF->BTF"), "gate")
    up_BTF = checkpoint_name(times(y_BTD, "up_DF", "BTD,DF->BTF"), "up")
    f_BTD = times(jax.nn.silu(gate_BTF) * up_BTF, "down_FD", "BTF,FD->BTD")
    return shard(x_BTD + a_BTD + f_BTD, "BTD")


def hidden(params, batch, model):
  """hidden_BTD of a batch of packed rows, {"token_BT", "segment_BT", "position_BT", ...}."""
  return model.apply(
      {"params": params}, batch["token_BT"], batch["segment_BT"], batch["position_BT"])


def logits(params, hidden_BTD, cfg):
  """Next-token logits [B, T, V] in fp32, by the tied head and its scale."""
  head_VD = params["embedding_VD"].astype(hidden_BTD.dtype)
  logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
  return logits_BTV * cfg.logit_scale


def weight(module, name, init=normal):
  """A parameter whose name is its shape: weight(self, "q_DNH") is [D, N, H], fp32."""
  sizes = (getattr(module.adapter if letter == "R" else module.cfg, letter) for letter in letters(name))
  return module.param(name, init, tuple(sizes))


def layer_norm(x_BTD, norm_D, cfg):
  """Mean-subtracting, bias-free LayerNorm with biased variance, in fp32; keeps x's dtype."""
  x32_BTD = x_BTD.astype(jnp.float32)
  x32_BTD -= x32_BTD.mean(-1, keepdims=True)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), -1, keepdims=True) + cfg.norm_epsilon)
  return (x32_BTD * scale * norm_D).astype(x_BTD.dtype)


def project(x, weight, letters, matmul):
  """einsum(letters, x, weight[0]) for x = B T c.. and weight [copies, c.., r..] of gather.

  matmul: 'dtype', in x's own, or 'fp8'. Tokens are flattened to one axis: a contraction over two
  (every weight gradient of a [B, T, D] einsum) runs at half speed on CPU (performance.md 1.8).
  """
  inputs, result = letters.split("->")
  contracted, (B, T) = len(inputs.split(",")[0]) - 2, x.shape[:2]
  width, rest = math.prod(x.shape[2:]), weight.shape[1 + contracted:]
  product = fp8.dot if matmul == "fp8" else jnp.matmul
  tokens, matrix = to_copies(x.reshape(B, T, width)), weight.reshape(len(weight), width, -1)
  if len(weight) == 1:  # plain matrices: what XLA:GPU folds the scales of fp8 into
    flat = product(tokens[0], matrix[0])
  else:
    flat = product(tokens, matrix)
  return shard(from_copies(flat, B, T).reshape(B, T, *rest), result)


def low_rank(x, first, second, letters, adapter):
  """alpha / R x first second, in x's dtype; letters are those of the matrix beside it.

  The product of the two is never made: then no gradient of a matrix is either, a third of what
  training computes (experiments/LOG.md), and in bfloat16 no update is lost by rounding a sum.
  """
  inputs, _, result = letters.replace("->", ",").split(",")
  x_BTR = project(x, first, f"{inputs},{inputs[2:]}R->BTR", "dtype")
  return project(adapter.alpha / adapter.R * x_BTR, second, f"BTR,R{result[2:]}->{result}", "dtype")


def rotate(x_BTNH, position_BT, theta):
  """Interleaved rotary positions (GPT-J pairs): (x[2i], x[2i+1]) turned by position * theta^(-2i/H)."""
  H = x_BTNH.shape[-1]
  angle = position_BT[:, :, None, None] * theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
  cosine, sine = jnp.cos(angle), jnp.sin(angle)
  pair = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], H // 2, 2)
  even, odd = pair[..., 0], pair[..., 1]
  turned = jnp.stack([even * cosine - odd * sine, odd * cosine + even * sine], axis=-1)
  return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
