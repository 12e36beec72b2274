"""VERB talk: chat with a checkpoint in the terminal; with config.prompt, answer once and exit; with
config.port, answer over HTTP (serve.py)."""

import math
import pathlib

import ml_collections

from tiny_aya_jax import run, serve
from tiny_aya_jax.data import template, tokenizer as tokenizers
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.train import saved

# What needs jax is imported behind the checks: a wrong field is refused in a second.


def main(config, workdir):
  """Loads config.checkpoint; a line is a turn, an empty line starts over."""
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
  path, T, tokenizer, turns = _found(config)
  if config.port is not None and config.tokens >= T:
    raise run.Refused(f"config.tokens is {config.tokens} and the model reads {T}: set config.tokens, or T")
  turns.prompt([dict(role="user", content="a")])  # refused now, not after minutes of loading
  params, cfg = _model(path)
  name = pathlib.Path(config.checkpoint).resolve().name
  model = serve.Model(name, params, cfg, tokenizer, turns, config, T)
  if config.port is not None:
    serve.serve(model, config.host, config.port)
    return
  if config.prompt:
    print(answer(model, [dict(role="user", content=config.prompt)]))
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
    messages.append(dict(role="assistant", content=answer(model, messages)))
    print(f"model: {messages[-1]['content']}")


def _found(config):
  """config -> (folder of the checkpoint or Hugging Face folder, most tokens, its Tokenizer, its Turns)."""
  path = pathlib.Path(config.checkpoint)
  if huggingface.is_folder(path):
    tokenizer = huggingface.tokenizer_of(path, config.tokenizer)
    turns = template.turns(tokenizer, path)
    run.say(f"{path} is spoken to by {turns.said}")
    return path, config.T or huggingface.describe(path)[1], tokenizer, turns
  tokenizer = tokenizers.load(run.existing("tokenizer", config.tokenizer))
  path = saved.find(path)
  meta = saved.meta(path)
  if meta["tokenizer_sha256"] != tokenizer.sha256:
    raise run.Refused(f"{path} was trained with tokenizer {meta['tokenizer_sha256'][:12]}, "
                      f"{config.tokenizer} is {tokenizer.sha256[:12]}")
  return path, config.T or meta["T"], tokenizer, template.turns(tokenizer)


def _model(path):
  """(params, cfg) of what `_found` named."""
  import jax

  from tiny_aya_jax.train import checkpoint

  if huggingface.is_folder(path):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return huggingface.load(path, lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree))
  params, meta = checkpoint.restore_params(path)
  return params, ml_collections.ConfigDict(meta["model"])


def answer(model, messages):
  """The next turn of a serve.Model as text."""
  import jax.numpy as jnp

  from tiny_aya_jax.model import decode

  config, turns = model.config, model.turns
  (reply,) = decode.generate(
      model.params, model.cfg, [turns.prompt(messages)], steps=config.tokens, stop_ids=turns.stop_ids,
      temperature=config.temperature, top_p=config.top_p, seed=config.seed,
      dtype=jnp.dtype(config.dtype), banned_ids=turns.unspoken(model.tokenizer, model.cfg.V),
  )
  return model.tokenizer.decode(reply)
