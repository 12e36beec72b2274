"""A second opinion: Cohere2 in NumPy, from the files of a folder alone, in torch's layout.

It shares with the rest of the package how a tensor's bytes are found (tensors.py), and nothing else:
no names, shapes, transpositions or arithmetic of ours, so that an error there cannot agree with
itself. fp32; a layer is in memory at a time (tiny_aya.md 1.3 has the formulas).
"""

import json
import pathlib

import numpy as np

from tiny_aya_jax.export import tensors as files

HEAD_ROWS = 16_384  # of the embedding, read at a time


def forward(folder, rows, past=None):
  """Token ids [[id, ...], ...] -> logits, one fp32 [T, V] a row.

  past: a dict, filled with what later tokens of these rows need; given again, with the tokens that
  come next alone, they go on.
  """
  config = _config(folder)
  held = files.open_folder(folder)
  past = {} if past is None else past
  begins = past.setdefault("tokens", [0] * len(rows))
  cuts = np.cumsum([len(row) for row in rows])[:-1]

  def weight(name):
    return held[f"model.{name}.weight"].mapped().astype(np.float32)

  embedding = held["model.embed_tokens.weight"].mapped()
  hidden = embedding[np.concatenate([np.asarray(row, np.int64) for row in rows])].astype(np.float32)
  for layer, kind in enumerate(config["layer_types"]):
    normed = _normed(hidden, weight(f"layers.{layer}.input_layernorm"), config)
    queries, keys, values = (
        np.split(normed @ weight(f"layers.{layer}.self_attn.{name}_proj").T, cuts) for name in "qkv")
    attended = np.concatenate([
        _attention(queries[row], keys[row], values[row], past.setdefault((layer, row), {}), begins[row],
                   config, kind == "sliding_attention")
        for row in range(len(rows))])
    gate = normed @ weight(f"layers.{layer}.mlp.gate_proj").T
    with np.errstate(over="ignore"):  # exp of a large number is inf, and the gate then 0
      gate *= 1 / (1 + np.exp(-gate))
    gate *= normed @ weight(f"layers.{layer}.mlp.up_proj").T
    hidden = (hidden + attended @ weight(f"layers.{layer}.self_attn.o_proj").T
              + gate @ weight(f"layers.{layer}.mlp.down_proj").T)
  past["tokens"] = [begin + len(row) for begin, row in zip(begins, rows)]
  hidden = _normed(hidden, weight("norm"), config)
  logits = np.empty((len(hidden), len(embedding)), np.float32)
  for first in range(0, len(embedding), HEAD_ROWS):
    part = embedding[first : first + HEAD_ROWS].astype(np.float32)
    logits[:, first : first + HEAD_ROWS] = hidden @ part.T
  return np.split(logits * np.float32(config["logit_scale"]), cuts)


def greedy(folder, prompts, steps):
  """The likeliest next token, `steps` times: a list of ids a prompt."""
  past, found, rows = {}, [[] for _ in prompts], prompts
  for _ in range(steps):
    rows = [[int(logits[-1].argmax())] for logits in forward(folder, rows, past)]
    for ids, row in zip(found, rows):
      ids += row
  return found


def _config(folder):
  """config.json, with what older writers leave to be inferred."""
  config = json.loads((pathlib.Path(folder) / "config.json").read_text())
  heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
  every = config.get("sliding_window_pattern", 4)
  return dict(
      head_dim=config["hidden_size"] // heads, logit_scale=0.0625, rope_theta=10_000.0, layer_norm_eps=1e-5,
      layer_types=["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)],
  ) | {name: value for name, value in config.items() if value is not None}


def _normed(x, weight, config):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(config["layer_norm_eps"])) * weight


def _attention(queries, keys, values, past, begin, config, sliding):
  """Of one row and layer, [T, heads * width] each -> the same for queries, before o_proj."""
  heads, width = config["num_attention_heads"], config["head_dim"]
  queries, keys, values = (part.reshape(len(part), -1, width) for part in (queries, keys, values))
  if sliding:
    at = np.arange(begin, begin + len(queries))
    queries, keys = _turned(queries, at, config), _turned(keys, at, config)
  if past:
    keys, values = np.concatenate([past["keys"], keys]), np.concatenate([past["values"], values])
  past["keys"], past["values"] = keys, values
  of_query, of_key = np.arange(begin, begin + len(queries))[:, None], np.arange(len(keys))[None]
  seen = of_key <= of_query
  if sliding:
    seen &= of_key > of_query - config["sliding_window"]
  out, shared = np.empty_like(queries), heads // keys.shape[1]
  for head in range(heads):
    scores = queries[:, head] @ keys[:, head // shared].T / np.float32(np.sqrt(width))
    scores = np.where(seen, scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out[:, head] = scores / scores.sum(-1, keepdims=True) @ values[:, head // shared]
  return out.reshape(len(out), -1)


def _turned(x, at, config):
  """Neighbouring pairs, turned by position times theta ** (-2i / width)."""
  theta = (config.get("rope_parameters") or config)["rope_theta"]
  angle = at[:, None] * theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
  cosine, sine = (np.float32(part)[:, None] for part in (np.cos(angle), np.sin(angle)))
  turned = np.empty_like(x)
  turned[..., 0::2] = x[..., 0::2] * cosine - x[..., 1::2] * sine
  turned[..., 1::2] = x[..., 1::2] * cosine + x[..., 0::2] * sine
  return turned
