"""The floating-point operations that a token of training needs, exactly; pure Python.

A multiply-add is two operations. A weight costs a token 2 forward and 4 backward; a visible (query,
key) pair costs 4 H a head forward (scores and values) and 8 H backward. Counted: matmuls, with the
tied head, and attention over the pairs that the mask lets through. Not counted: the look-up, norms,
softmax, optimiser, and whatever is computed twice (remat, flash attention's second scores), so
this over time over a chip's peak is the model FLOPs utilisation (PaLM, arXiv 2204.02311, app. B).

`cfg` has the fields D, N, K, H, F, V, L, window of a config's `model`.
"""

BLOCKS = dict(sliding=3, full=1)  # of a period (model/transformer.py)


def per_token(cfg, T, documents=None):
  """Operations per token of rows of T: {part: forward, ..., "forward": sum, "total": 3 forward}.

  Parts: attn_proj, ffn, lm_head, attn_full, attn_slide. documents: lengths of the segments of a
  packed row; the rest of T is padding, which passes the matmuls and attends to nothing. Absent:
  one document of T. ValueError if they are longer than T.
  """
  documents = (T,) if documents is None else tuple(documents)
  if sum(documents) > T or min(documents, default=1) < 1:
    raise ValueError(f"documents of {documents} tokens do not pack into a row of {T}")
  blocks = sum(BLOCKS.values()) * cfg.L
  pair = 4 * cfg.N * cfg.H
  full = sum(pairs(length) for length in documents)
  sliding = sum(pairs(length, cfg.window) for length in documents)
  parts = dict(
    attn_proj=2 * blocks * projections(cfg),
    ffn=2 * blocks * feed_forward(cfg),
    lm_head=2 * cfg.V * cfg.D,
    attn_full=BLOCKS["full"] * cfg.L * pair * full / T,
    attn_slide=BLOCKS["sliding"] * cfg.L * pair * sliding / T,
  )
  forward = sum(parts.values())
  return dict(parts, forward=forward, total=3 * forward)


def recomputed(cfg, T, remat):
  """Operations per token that a block does again for its backward pass, by config.remat.

  What is kept is model/transformer.py's KEEP. A kernel without the scores makes those again too:
  half of a forward attention, whatever is kept.
  """
  parts = per_token(cfg, T)
  blocks = sum(BLOCKS.values()) * cfg.L
  attention = parts["attn_full"] + parts["attn_slide"]
  qkv = 2 * blocks * cfg.D * (cfg.N + 2 * cfg.K) * cfg.H
  gate_up = 2 * blocks * 2 * cfg.D * cfg.F
  again = dict(
    full=attention + qkv + gate_up, attn=qkv + gate_up, qkv=gate_up, offload=gate_up, minimal=0,
    none=0,
  )  # fmt: skip
  return again[remat] + attention / 2


def parameters(cfg):
  """Number of parameters: the table once (it is the head too), the blocks and their norms."""
  block = projections(cfg) + feed_forward(cfg) + cfg.D
  return sum(BLOCKS.values()) * cfg.L * block + cfg.V * cfg.D + cfg.D


def adapters(cfg, rank, matrices):
  """Number of parameters of adapters: rank for each input and output of each matrix, named 'q'."""
  D, Q, K, F = cfg.D, cfg.N * cfg.H, cfg.K * cfg.H, cfg.F
  widths = dict(q=D + Q, k=D + K, v=D + K, o=D + Q, gate=D + F, up=D + F, down=D + F)
  return sum(BLOCKS.values()) * cfg.L * rank * sum(widths[name] for name in matrices)


def pairs(length, window=None):
  """(query, key) pairs of a document: the key not later, within the window, the query included."""
  reach = length if window is None else min(window, length)
  return reach * (reach + 1) // 2 + (length - reach) * reach


def projections(cfg):
  """Weights of q_DNH, k_DKH, v_DKH and o_NHD."""
  return 2 * cfg.D * (cfg.N + cfg.K) * cfg.H


def feed_forward(cfg):
  """Weights of gate_DF, up_DF and down_FD."""
  return 3 * cfg.D * cfg.F
