"""Causal attention over packed documents, with an optional window: one signature, many backends.

A query sees a key when both belong to the same segment, the key is not later, and it lies within
the window, which counts the query itself: window W sees exactly W tokens (HF Cohere2:
kv > q - W). Scores are scaled by 1/sqrt(H); softmax is fp32; grouped queries share a key head
without repeating it: query head n reads key head n // G (tiny_aya.md 1.3).
"""

import functools

import jax
import jax.numpy as jnp

CHUNK = 128  # queries a block of `chunked`; 128 was the fastest of 64..512 on 2 CPU cores at T=512


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
  return BACKENDS[backend](
      q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, segment_BS, position_BS, window
  )


def reference(q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, segment_BS, position_BS, window):
  """The definition: all scores at once, [B, K, G, T, S] in fp32."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  score_BKGTS = jnp.einsum(
      "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  ) * (H**-0.5)
  visible_BTS = visible(segment_BT, position_BT, segment_BS, position_BS, window)
  score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS, jnp.finfo(jnp.float32).min)
  share_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BSKH.dtype)
  out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", share_BKGTS, v_BSKH)
  return out_BTKGH.reshape(B, T, N, H)


def chunked(q_BTNH, k_BSKH, v_BSKH, segment_BT, position_BT, segment_BS, position_BS, window):
  """`reference` over blocks of queries, each against only the keys its window can reach.

  Rows attend to themselves (T == S) and positions rise by one along a segment, so reach follows
  from the index in the row. Memory is one block of scores; the backward pass recomputes it.
  """
  T = q_BTNH.shape[1]
  blocks = []
  for start in range(0, T, CHUNK):
    stop = min(start + CHUNK, T)
    first = 0 if window is None else max(0, start - window + 1)
    query, key = slice(start, stop), slice(first, stop)
    block = jax.checkpoint(functools.partial(reference, window=window), prevent_cse=False)
    blocks.append(block(
        q_BTNH[:, query], k_BSKH[:, key], v_BSKH[:, key], segment_BT[:, query],
        position_BT[:, query], segment_BS[:, key], position_BS[:, key],
    ))
  return jnp.concatenate(blocks, axis=1)


BACKENDS = dict(reference=reference, chunked=chunked)


def visible(segment_BT, position_BT, segment_BS, position_BS, window):
  """Boolean [B, T, S]: which keys each query sees."""
  distance_BTS = position_BT[:, :, None] - position_BS[:, None, :]
  visible_BTS = (segment_BT[:, :, None] == segment_BS[:, None, :]) & (distance_BTS >= 0)
  return visible_BTS if window is None else visible_BTS & (distance_BTS < window)


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
