"""Causal attention over packed documents, with an optional window: one signature, many backends.

A query sees a key when both belong to the same segment, the key is not later, and it lies within
the window, which counts the query itself: window W sees exactly W tokens (HF Cohere2:
kv > q - W). Scores are scaled by 1/sqrt(H); softmax is fp32; grouped queries share a key head
without repeating it: query head n reads key head n // G (tiny_aya.md 1.3).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tiny_aya_jax import run

CHUNK = 64  # least queries a block of `chunked`: the fastest of 32..256 on CPU at T=512
MOST_BLOCKS = 16  # of `chunked`: each is compiled by itself, so the blocks of a long row are longer


def attention(
    q_BTNH, k_BSKH, v_BSKH, *, segment_BT, position_BT, segment_BS=None, position_BS=None,
    window=None, backend
):
  """Attends queries to keys; returns [B, T, N, H] in the dtype of the values.

  segment_BT, position_BT: document number and position within it, per query. The keys' own
  segment_BS, position_BS are given when they are not the queries' (a cache while decoding).
  window: tokens visible, the query included; None for all. backend: a key of BACKENDS.
  """
  if segment_BS is None:
    segment_BS, position_BS = segment_BT, position_BT
  elif backend != "reference":
    raise ValueError(f"backend {backend!r} attends a row to itself; use 'reference' with a cache")
  out_BTNH = BACKENDS[backend](
      q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, segment_BS, position_BS, window
  )
  # splash names its output inside the kernel, with the logsumexp: a second name is a second copy.
  return out_BTNH if backend == "splash" else checkpoint_name(out_BTNH, "attention")


def reference(q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, segment_BS, position_BS, window):
  """The definition: all scores at once, [B, K, G, T, S] in fp32."""
  visible_BTS = visible(segment_BT, position_BT, segment_BS, position_BS, window)
  return _heads_last(_attend(*_heads_first(q_BTNH, k_BSKH, v_BSKH), visible_BTS))


def chunked(q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, segment_BS, position_BS, window):
  """`reference` over blocks of queries, each against only the keys its window can reach.

  Rows attend to themselves (T == S) and positions rise by one along a segment, so reach follows
  from the index in the row. The backward pass computes scores again; XLA for CPU runs blocks side by
  side, so that a row of 8,192 still holds half of what `reference` does (LOG.md 2026-11-25).
  """
  T = q_BTNH.shape[1]
  q_BKGTH, k_BKSH, v_BKSH = _heads_first(q_BTNH, k_BSKH, v_BSKH)
  chunk, attend = max(CHUNK, -(-T // MOST_BLOCKS)), jax.checkpoint(_attend, prevent_cse=False)
  blocks = []
  for start in range(0, T, chunk):
    query = slice(start, min(start + chunk, T))
    key = slice(0 if window is None else max(0, start - window + 1), query.stop)
    seen = visible(
        segment_BT[:, query], position_BT[:, query], segment_BS[:, key], position_BS[:, key], window
    )
    blocks.append(attend(q_BKGTH[..., query, :], k_BKSH[..., key, :], v_BKSH[..., key, :], seen))
  return _heads_last(jnp.concatenate(blocks, axis=3))


def splash(*inputs):
  """The TPU kernel, attention_splash.py."""
  from tiny_aya_jax.model import attention_splash  # Pallas takes a second to import

  return attention_splash.splash(*inputs)


def cudnn(*inputs):
  """The GPU kernel, attention_cudnn.py."""
  from tiny_aya_jax.model import attention_cudnn  # reaches into JAX: only where it is asked for

  return attention_cudnn.cudnn(*inputs)


def refuse_unless_possible(backend, dtype, H, device, context=1):
  """Refuses, before anything is compiled, a kernel that the device does not have.

  H: head width. context: devices that share a row's queries.
  """
  if backend == "splash" and device.platform != "tpu":
    raise run.Refused(
        f"config.attention is 'splash', a kernel for TPUs, and the devices are {device.device_kind}: "
        "choose 'cudnn' on NVIDIA GPUs, 'chunked' elsewhere"
    )
  if backend == "cudnn":
    from tiny_aya_jax.model import attention_cudnn

    attention_cudnn.refuse_unless_possible(dtype, H, device, context)


def slow_rows(backend, segment_BT):
  """What to say of rows [B, T] on the host that the backend's kernel does not take; or ''."""
  if backend != "cudnn":
    return ""
  from tiny_aya_jax.model import attention_cudnn

  most = 1 + int((segment_BT[:, 1:] != segment_BT[:, :-1]).sum(1).max())
  limit = attention_cudnn.SEGMENTS
  return "" if most <= limit else (
      f"a row has {most} segments, more than the {limit} that attention 'cudnn' takes: the rows of its "
      "device attend by blocks of 'reference', which is slower; said once"
  )


BACKENDS = dict(reference=reference, chunked=chunked, splash=splash, cudnn=cudnn)


def visible(segment_BT, position_BT, segment_BS, position_BS, window):
  """Boolean [B, T, S]: which keys each query sees."""
  distance_BTS = position_BT[:, :, None] - position_BS[:, None, :]
  visible_BTS = (segment_BT[:, :, None] == segment_BS[:, None, :]) & (distance_BTS >= 0)
  return visible_BTS if window is None else visible_BTS & (distance_BTS < window)


def _attend(q_BKGTH, k_BKSH, v_BKSH, visible_BTS):
  H = q_BKGTH.shape[-1]
  score_BKGTS = jnp.einsum(
      "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
  ) * (H**-0.5)
  score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS, jnp.finfo(jnp.float32).min)
  share_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BKSH.dtype)
  return jnp.einsum("BKGTS,BKSH->BKGTH", share_BKGTS, v_BKSH)


def _heads_first(q_BTNH, k_BSKH, v_BSKH):
  """Batch axes lead, so that both einsums are plain batched matmuls: a quarter less time on CPU."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  return q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)


def _heads_last(out_BKGTH):
  B, K, G, T, H = out_BKGTH.shape
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def ring_write(k_BSKH, v_BSKH, k_BTKH, v_BTKH, position_BT):
  """Writes one token's key and value (T = 1) into rings of S slots: position p lives in slot p % S.

  Returns the keyword arguments of `attention` that describe the keys: k_BSKH, v_BSKH,
  segment_BS (1 where a slot is filled, else 0) and position_BS, the newest position each slot
  holds. A ring of S >= window slots therefore never misses a visible key.
  """
  B, S = k_BSKH.shape[:2]
  row_B, slot_B = jnp.arange(B), position_BT[:, 0] % S
  position_BS = ring_positions(position_BT[:, 0], S)
  return dict(
      k_BSKH=k_BSKH.at[row_B, slot_B].set(k_BTKH[:, 0]),
      v_BSKH=v_BSKH.at[row_B, slot_B].set(v_BTKH[:, 0]),
      segment_BS=(position_BS >= 0).astype(jnp.int32),
      position_BS=position_BS,
  )


def ring_positions(newest_B, S):
  """[B, S]: the largest position p <= newest with p % S == slot; negative where none exists."""
  return newest_B[:, None] - (newest_B[:, None] - jnp.arange(S)) % S
