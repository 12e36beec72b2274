"""How fast checkpoints are evaluated, beside lm-eval's Hugging Face backend and `transformers`.

One exported folder, one batch size, one kind of request at a time, in turns, because on a busy
machine only ratios within one run mean anything. The sides must find the same: log-likelihoods
within config.tolerance, equal tokens. Requests are made of the embedded corpus, of all languages.
"""

import itertools
import os
import statistics

import jax
import ml_collections
import numpy as np

from tiny_aya_jax import axes, bench, languages, run
from tiny_aya_jax.data import loader, tokenizer as tokenizers, toy
from tiny_aya_jax.evaluate import engine as engines
from tiny_aya_jax.model import bits, decode

PIECES = ("choice", "rolling", "packed", "generate")


def main(config):
  """Runs config.pieces of config.folder; prints medians and ratios; -> {piece: {side: [seconds]}}."""
  for name in ("threads", "turns", "batch", "T", "requests", "tokens"):
    if config[name] < 1:
      raise run.Refused(f"config.{name} is {config[name]}, expected at least 1")
  for piece in config.pieces:
    run.choose("piece", piece, PIECES)
  run.existing("folder", config.folder)
  os.environ["HF_HUB_OFFLINE"] = "1"
  bench.keep_threads(config.threads)
  bench.keep_memory()
  run.say(bench.versions("jax", "torch", "transformers", "lm_eval"))
  sides = _sides(config)
  found = {}
  for piece in config.pieces:
    calls = _calls(piece, sides, config)
    _agree(piece, {side: call() for side, call in calls.items()}, config.tolerance)
    found[piece] = {side: [] for side in calls}
    for _ in range(config.turns):
      for side, call in calls.items():
        found[piece][side].append(bench.timed(call))
    run.say(_line(piece, found[piece]))
  return found


def _sides(config):
  """(engine, harness on it, lm-eval's backend) of one folder."""
  from lm_eval.models.huggingface import HFLM

  from tiny_aya_jax.evaluate import harness

  settings = ml_collections.ConfigDict(dict(
      batch=config.batch, dtype=config.dtype, attention=config.attention))
  engine = engines.load(config.folder, tokenizers.load(config.folder), axes.mesh(), settings, config.T)
  device = "cpu" if jax.default_backend() == "cpu" else "cuda"
  theirs = HFLM(pretrained=config.folder, device=device, batch_size=config.batch,
                max_length=config.T, dtype=config.dtype, add_bos_token=False)
  cfg = engine.cfg
  run.say(f"{4 * cfg.L} layers, D {cfg.D}, V {cfg.V}, {config.dtype}, batch {config.batch}, window of "
          f"{config.T} tokens, {config.requests} requests, medians of {config.turns} turns")
  return engine, harness.Harness(engine), theirs


def _calls(piece, sides, config):
  """{side: () -> what it found}."""
  return dict(choice=_choice, rolling=_rolling, packed=_packed, generate=_generate)[piece](
      *sides, config)


def _choice(engine, ours, theirs, config):
  """Cloze items in every language, in turn: four choices each."""
  codes, pairs = languages.select(("all",)), []
  for number in range(config.requests):
    items = toy.cloze(codes[number % len(codes)])
    item = items[number // len(codes) % len(items)]
    pairs += [engines.pair(engine.tokenizer, item["context"], f" {choice}") for choice in item["choices"]]
  bos = engine.tokenizer.special("<BOS_TOKEN>")
  requests = [(None, [bos, *context], rest) for context, rest in pairs]
  return dict(ours=lambda: [nats for nats, _ in ours._loglikelihood_tokens(requests)],
              lm_eval=lambda: [nats for nats, _ in theirs._loglikelihood_tokens(requests, True)])


def _documents(engine, config):
  """Documents of all languages, in turn, that fit a window whole."""
  codes = languages.select(("all",))
  some = [[document for document in toy.documents(code, "validation")
           if len(engine.tokenizer.encode(document)) <= config.T] for code in codes]
  return [document for row in itertools.zip_longest(*some) for document in row if document][
      : config.requests]


def _rolling(engine, ours, theirs, config):
  """Whole documents, as tasks of perplexity ask for them."""
  from lm_eval.api.instance import Instance

  requests = [Instance("loglikelihood_rolling", {}, (document,), 0) for document in _documents(engine, config)]
  return dict(ours=lambda: ours.loglikelihood_rolling(requests),
              lm_eval=lambda: theirs.loglikelihood_rolling(requests, True))


def _packed(engine, ours, theirs, config):
  """The same documents as `evaluate` reads them: packed rows, all in one sum."""
  rows = _rows(engine, _documents(engine, config), config)
  score = bits.scorer(engine.model, engine.tokenizer.bytes_V, 1, chunk=config.chunk)

  def packed():
    found = bits.evaluate(score, engine.params, rows, engine.mesh, ["all"])
    return [-found["all"]["nats"]]

  rolling = _rolling(engine, ours, theirs, config)["lm_eval"]
  return dict(ours=packed, lm_eval=lambda: [sum(rolling())])


def _rows(engine, documents, config):
  """Batches of packed rows with whole documents in them, each token behind BOS counted."""
  bos, batches = engine.tokenizer.special("<BOS_TOKEN>"), []
  documents = [(bos, *ids) for ids in engine.tokenizer.encode_many(documents)]
  for rows in engines.pack(sorted(documents, key=len), config.batch):
    width = max(sum(map(len, row)) for row in rows)
    token, segment, weight = (np.zeros((config.batch, width), np.int32) for _ in range(3))
    for number, row in enumerate(rows):
      start = 0
      for place, ids in enumerate(row, 1):
        here = slice(start, start + len(ids))
        token[number, here], segment[number, here], weight[number, here] = ids, place, 1
        weight[number, start] = 0
        start = here.stop
    batches.append(dict(
        token_BT=token[:, :-1], target_BT=token[:, 1:], segment_BT=segment[:, :-1],
        position_BT=loader.positions(segment)[:, :-1], weight_BT=weight[:, 1:].astype(np.float32),
        source_B=np.where(np.arange(config.batch) < len(rows), 0, -1)))
  return batches


def _generate(engine, ours, theirs, config):
  """One batch of prompts of unequal length, greedy, `tokens` each, in both of their own loops."""
  import torch

  bos = engine.tokenizer.special("<BOS_TOKEN>")
  prompts = [[bos, *engine.tokenizer.encode(document)[: 16 + number % 17]]
             for number, document in enumerate(_documents(engine, config)[: config.batch])]
  longest = max(map(len, prompts))
  padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
  seen = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])

  def generate():
    with torch.no_grad():
      found = theirs.model.generate(
          padded.to(theirs.device), attention_mask=seen.to(theirs.device), do_sample=False,
          max_new_tokens=config.tokens, min_new_tokens=config.tokens, pad_token_id=0)
    return found[:, longest:].tolist()

  stops = sorted({engine.tokenizer.special("<EOS_TOKEN>"), *theirs.model.generation_config.eos_token_id})

  def decoded():
    with jax.set_mesh(engine.mesh):
      return decode.generate(engine.params, engine.cfg, prompts, steps=config.tokens,
                             dtype=engine.model.dtype, banned_ids=stops)

  return {"ours": decoded, "transformers": generate}


def _agree(piece, found, tolerance):
  ours, theirs = found.values()
  if piece == "generate":
    equal = sum(one == other for one, other in zip(ours, theirs))
    run.say(f"{piece}: {equal} of {len(ours)} answers equal")
    if equal < len(ours):
      raise run.Refused(f"{piece}: only {equal} of {len(ours)} answers are equal, so times compare nothing")
    return
  difference = max(abs(one - other) / max(1, abs(other)) for one, other in zip(ours, theirs, strict=True))
  run.say(f"{piece}: {len(ours)} results, largest relative difference {difference:.1e}")
  if not difference <= tolerance:
    raise run.Refused(f"{piece}: sides differ by {difference:.1e}, more than {tolerance}")


def _line(piece, seconds):
  (ours, mine), (other, theirs) = ((side, statistics.median(values)) for side, values in seconds.items())
  return f"{piece:9} ours {mine:.3f} s, {other} {theirs:.3f} s: {theirs / mine:.2f} times as fast"
