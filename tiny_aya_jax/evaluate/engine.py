"""A checkpoint on a mesh that answers lists of any length: log-likelihoods and greedy answers.

Likelihoods are of packed rows, many inputs side by side, which see nothing of each other; equal
inputs are computed once. Prompts are sorted by length and answered together. All processes ask the
same and get the same back. What is asked is tasks.py's and harness.py's.
"""

import bisect
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tiny_aya_jax import axes, processes, run
from tiny_aya_jax.data import template
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.model import attention, decode, likelihood
from tiny_aya_jax.model.transformer import TinyAya
from tiny_aya_jax.train import checkpoint

MOST_INPUTS = 63  # of a row: kernels know 64 segments, padding among them (attention_cudnn.py)
NARROWEST = 64  # of rows of packed inputs: below, a row is too little work


class Engine(NamedTuple):
  """Matrices are held in the dtype in which they are multiplied, which changes no bit."""

  params: Any
  cfg: Any
  tokenizer: Any
  mesh: Any
  model: TinyAya
  score: Any  # likelihood.scorer
  batch: int  # rows at a time
  T: int  # most tokens of a request; what is longer loses its beginning
  turns: template.Turns


class Likelihood(NamedTuple):
  """Of a continuation: log-probability in nats, whether each token is the likeliest, how many."""

  nats: float
  greedy: bool
  tokens: int


def load(place, tokenizer, mesh, config, T):
  """place: a checkpoint folder or a Hugging Face folder. config: batch, dtype, attention."""
  dtype = jnp.dtype(config.dtype)
  theirs = huggingface.is_folder(place)
  turns = template.turns(tokenizer, place if theirs else None)
  if theirs:
    params, cfg = huggingface.load(place, lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, x, sharding: jax.ShapeDtypeStruct(x.shape, _held(path, dtype), sharding=sharding),
        tree, axes.shardings(mesh, tree)))
  else:
    params, meta = checkpoint.restore_params(place, lambda tree: axes.shardings(mesh, tree))
    cfg = ml_collections.ConfigDict(meta["model"])
    params = jax.tree_util.tree_map_with_path(lambda path, x: _cast(x, _held(path, dtype)), params)
  model, score = _programs(decode.Frozen(cfg), dtype, config.attention)
  return Engine(params, cfg, tokenizer, mesh, model, score, config.batch, T, turns)


@functools.cache  # checkpoints of one model share their compiled programs
def _programs(frozen, dtype, backend):
  model = TinyAya(frozen.cfg, dtype, backend)
  return model, likelihood.scorer(model)


def refuse_unless_possible(cfg, mesh, config):
  """Refuses, before anything is loaded, a model that does not fit the mesh, or the kernel."""
  attention.refuse_unless_possible(
      config.attention, config.dtype, cfg.H, mesh.devices.flat[0], mesh.shape["context"])
  token_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  tree = jax.eval_shape(TinyAya(cfg).init, jax.random.key(0), token_BT, token_BT, token_BT)
  axes.shardings(mesh, tree["params"])
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  if config.batch % rows:
    raise run.Refused(f"a batch of {config.batch} rows does not split over {rows} devices of data and "
                      "fsdp")


def _held(path, dtype):
  """Norms are held in fp32, as they are used."""
  return jnp.float32 if axes.letters_of(path) == "D" else dtype


def _cast(x, dtype):
  """A matrix of another dtype goes at once, so that one is held twice."""
  if x.dtype == dtype:
    return x
  cast = jax.jit(lambda x: x.astype(dtype), out_shardings=x.sharding)(x)
  x.delete()
  return cast


def pair(tokenizer, context, continuation):
  """Two texts -> (ids, ids): cut where the context's own ids end; its last spaces go on.

  As lm-evaluation-harness cuts them, but where a token would hold the end of one and the beginning of
  the other: there it drops a part of the continuation, and here each has its own ids.
  """
  kept = context.rstrip()
  continuation, context = context[len(kept):] + continuation, kept
  before, whole, rest = tokenizer.encode_many([context, context + continuation, continuation])
  if whole[: len(before)] != before:  # a token would reach over the cut
    return before, rest
  return before, whole[len(before):]


def likelihoods(engine, requests, what, bos=True):
  """[(ids, continuation's ids)] -> [Likelihood]; with `bos`, BOS is put in front.

  what: said while it goes on. Refuses an empty continuation, and one without anything before it.
  """
  front, rows = [engine.tokenizer.special("<BOS_TOKEN>")] if bos else [], {}
  for number, (context, continuation) in enumerate(requests):
    if not continuation or len(continuation) > engine.T:
      raise run.Refused(f"{what}: continuation {number} has {len(continuation)} tokens, expected 1 to "
                        f"{engine.T}")
    if not front and not context:
      raise run.Refused(f"{what}: request {number} has no token before its continuation")
    ids = [*front, *context, *continuation][-engine.T - 1 :]
    rows.setdefault(tuple(ids[:-1]), []).append((number, ids[-len(continuation):]))
  _say_cut(engine, what, [len(front) + len(context) + len(rest) - 1 for context, rest in requests])
  found = [None] * len(requests)
  packed = pack(sorted(rows, key=len), engine.batch)
  for batch in run.progress(packed, what):
    asked = [[(ids, rows[ids]) for ids in row] for row in batch]
    for number, result in _likelihoods(engine, asked):
      found[number] = result
  return found


def pack(inputs, batch):
  """Inputs, shortest first -> batches of rows of inputs, side by side as documents; takes them all.

  A row begins with the longest that is left and is filled up with the longest that still fit, so
  that rows are nearly full and few widths, thus few programs, do for all lengths.
  """
  inputs, lengths, batches = list(inputs), [len(ids) for ids in inputs], []
  while inputs:
    rows, width = [], row_width(lengths[-1])
    while inputs and len(rows) < batch:
      row, room = [], width
      while len(row) < MOST_INPUTS and (at := bisect.bisect_right(lengths, room)):
        row.append(inputs.pop(at - 1))
        room -= lengths.pop(at - 1)
      rows.append(row)
    batches.append(rows)
  return batches


def row_width(length):
  """The width of rows that begin with an input of this length: a power of two, or three quarters."""
  power = max(NARROWEST, 1 << (length - 1).bit_length())
  return power * 3 // 4 if NARROWEST < length <= power * 3 // 4 else power


def _likelihoods(engine, rows):
  """Up to a batch of rows of (ids, [(number, targets), ...]) -> (number, Likelihood) of each."""
  B, T = _filled(engine, len(rows)), row_width(max(len(ids) for row in rows for ids, _ in row))
  scored = [[(start + len(ids) - len(chosen) + at, target)
             for start, (ids, asked) in zip(_starts(row), row)
             for _, chosen in asked for at, target in enumerate(chosen)] for row in rows]
  E = decode.prompt_slots(max(map(len, scored)))
  arrays = {name: np.zeros((B, T), np.int32) for name in ("token_BT", "segment_BT", "position_BT")}
  arrays |= {name: np.zeros((B, E), np.int32) for name in ("place_BE", "target_BE")}
  for at, row in enumerate(rows):
    for segment, (start, (ids, _)) in enumerate(zip(_starts(row), row), 1):
      here = slice(start, start + len(ids))
      arrays["token_BT"][at, here], arrays["segment_BT"][at, here] = ids, segment
      arrays["position_BT"][at, here] = np.arange(len(ids))
    arrays["place_BE"][at, : len(scored[at])], arrays["target_BE"][at, : len(scored[at])] = zip(*scored[at])
  nats_BE, greedy_BE = _on_mesh(engine, arrays)
  for at, row in enumerate(rows):
    first = 0
    for number, chosen in (one for _, asked in row for one in asked):
      part, first = slice(first, first + len(chosen)), first + len(chosen)
      yield number, Likelihood(math.fsum(nats_BE[at, part].tolist()), bool(greedy_BE[at, part].all()),
                               len(chosen))


def _starts(row):
  """Where each input of a row begins."""
  return [0, *itertools.accumulate(len(ids) for ids, _ in row)]


def _on_mesh(engine, arrays):
  """engine.score of a batch that each process has whole -> whole results on each."""
  part, parts = axes.process_part(engine.mesh)
  each = len(arrays["token_BT"]) // parts
  mine = {name: array[part * each : (part + 1) * each] for name, array in arrays.items()}
  with jax.set_mesh(engine.mesh):
    return processes.gathered(engine.score(engine.params, axes.place(engine.mesh, mine)))


def _filled(engine, rows):
  """Rows of a batch, filled up so that they split over the mesh; few sizes, so few programs."""
  blocks = engine.mesh.shape["data"] * engine.mesh.shape["fsdp"]
  return min(engine.batch, -(-(1 << (rows - 1).bit_length()) // blocks) * blocks)


def _say_cut(engine, what, lengths):
  if over := sum(length > engine.T for length in lengths):
    run.say(f"{what}: {over} of {len(lengths)} are longer than {engine.T} tokens and lose their beginning")


def answers(engine, prompts, *, tokens, what, ends=(), strip=""):
  """Lists of ids -> [(text, whether it ended by itself)]: greedy, of at most `tokens` tokens.

  ends: texts that end an answer and are cut off with what follows; so do the model's stop ids.
  strip: characters before which an answer has not begun.
  A prompt longer than T less the answer loses its beginning, BOS excepted.
  """
  room = engine.T - tokens
  if room < 2:
    raise run.Refused(f"{what}: an answer of {tokens} tokens leaves no room for a prompt in {engine.T}")
  _say_cut(engine._replace(T=room), what, [len(ids) for ids in prompts])
  prompts = [ids if len(ids) <= room else [ids[0], *ids[-room + 1 :]] for ids in prompts]
  order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
  found = [None] * len(prompts)
  batches = [order[at : at + engine.batch] for at in range(0, len(order), engine.batch)]
  for batch in run.progress(batches, what):
    def cut(ids):
      return _cut(engine.tokenizer.decode(ids).lstrip(strip), ends)

    for number, ids in zip(batch, _generate(engine, [prompts[one] for one in batch], tokens,
                                            cut if ends else None)):
      text, ended = cut(ids)
      found[number] = text, ended or len(ids) < tokens
  return found


def _generate(engine, prompts, tokens, cut):
  filled = _filled(engine, len(prompts))
  prompts = [prompts[row % len(prompts)] for row in range(filled)]
  with jax.set_mesh(engine.mesh):
    return decode.generate_until(
        engine.params, engine.cfg, prompts,
        cut and (lambda ids: cut(ids)[1]), steps=tokens,
        stop_ids=engine.turns.stop_ids, dtype=engine.model.dtype,
        banned_ids=engine.turns.unspoken(engine.tokenizer, engine.cfg.V))


def _cut(text, ends):
  """(text before the first of `ends`, whether there was one)."""
  at = min((text.index(end) for end in ends if end in text), default=None)
  return (text, False) if at is None else (text[:at], True)
