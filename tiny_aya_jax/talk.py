"""VERB talk: chat with a checkpoint in the terminal; with config.prompt, answer once and exit; with
config.port, answer over HTTP (serve.py)."""

import math
import pathlib

import ml_collections

from tiny_aya_jax import run, serve
from tiny_aya_jax.data import chat, tokenizer as tokenizers
from tiny_aya_jax.train import saved

# What needs jax is imported behind the checks: a wrong field is refused in a second.


def main(config, workdir):
  """Reads config.checkpoint's params and meta; a line is a turn, an empty line starts over."""
  run.existing("checkpoint", config.checkpoint)
  run.choose_fields(config, "dtype")
  if config.tokens < 1:
    raise run.Refused(f"config.tokens is {config.tokens}, expected at least 1")
  if config.temperature != 0 and not 1e-3 <= config.temperature < math.inf:
    raise run.Refused(f"config.temperature is {config.temperature}, expected 0 (greedy) or at least "
                      "0.001")
  if not 0 < config.top_p <= 1:
    raise run.Refused(f"config.top_p is {config.top_p}, expected more than 0 and at most 1")
  if config.prompt == "":
    raise run.Refused("config.prompt is empty: leave it unset to chat")
  if config.port is not None and (config.prompt or not 0 <= config.port < 1 << 16):
    raise run.Refused(f"config.port is {config.port}, expected 0 to 65535 and no config.prompt beside it")
  if config.T is not None and config.T <= config.tokens:
    raise run.Refused(f"config.T is {config.T}, expected more than the {config.tokens} tokens of an answer")
  tokenizer = tokenizers.load(run.existing("tokenizer", config.tokenizer))
  path = saved.find(config.checkpoint)
  meta = saved.meta(path)
  if meta["tokenizer_sha256"] != tokenizer.sha256:
    raise run.Refused(f"{path} was trained with tokenizer {meta['tokenizer_sha256'][:12]}, "
                      f"{config.tokenizer} is {tokenizer.sha256[:12]}")
  from tiny_aya_jax.train import checkpoint

  params, _ = checkpoint.restore_params(path)
  cfg = ml_collections.ConfigDict(meta["model"])
  if config.port is not None:
    name = pathlib.Path(config.checkpoint).resolve().name
    T = config.T or meta["T"]
    if config.tokens >= T:
      raise run.Refused(f"config.tokens is {config.tokens} and the model reads {T}: set config.tokens, or T")
    serve.serve(serve.Model(name, params, cfg, tokenizer, config, T), config.host, config.port)
    return
  if config.prompt:
    print(answer(params, cfg, tokenizer, [dict(role="user", content=config.prompt)], config))
    return
  messages = []
  while True:
    try:
      line = input("you: ")
    except EOFError:
      return
    if not line:
      messages = []
      continue
    messages.append(dict(role="user", content=line))
    messages.append(dict(
        role="assistant", content=answer(params, cfg, tokenizer, messages, config)))
    print(f"model: {messages[-1]['content']}")


def answer(params, cfg, tokenizer, messages, config):
  """The model's next turn as text."""
  import jax.numpy as jnp

  from tiny_aya_jax.model import decode

  ids = chat.prompt(tokenizer, messages)
  (reply,) = decode.generate(
      params, cfg, [ids], steps=config.tokens, stop_ids=chat.stop_ids(tokenizer),
      temperature=config.temperature, top_p=config.top_p, seed=config.seed,
      dtype=jnp.dtype(config.dtype), banned_ids=chat.unspoken(tokenizer, cfg.V),
  )
  return tokenizer.decode(reply)
