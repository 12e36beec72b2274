"""Chat with a checkpoint in the terminal; with --config.prompt="..." it answers once and exits.

  python -m tiny_aya_jax talk --config=experiments/talk.py --workdir=runs \\
      --config.checkpoint=runs/sft --config.tokenizer=runs/vocab/tokenizer.model

With --config.port=8000 it is an OpenAI-compatible endpoint, http://127.0.0.1:8000/v1, for
synthesize, evaluate's judge, or curl; one answer at a time, without a key.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "tiny"))
  c = ConfigDict()
  c.checkpoint = config_dict.placeholder(str)  # a workdir, a checkpoint or a Hugging Face folder
  c.tokenizer = config_dict.placeholder(str)  # of our checkpoints; a Hugging Face folder has its own
  c.prompt = config_dict.placeholder(str)
  c.port = config_dict.placeholder(int)  # 0: any that is free
  c.host = "127.0.0.1"  # who may ask: this machine; nobody is asked for a key
  c.T = config_dict.placeholder(int)  # most tokens of prompt and answer; absent: the checkpoint's own
  c.tokens = 64 if variant == "tiny" else 512  # of an answer, at most
  c.temperature = 0.0 if variant == "tiny" else 0.3  # the model card's example (tiny_aya.md 2.3)
  c.top_p = 0.95
  c.seed = 0
  c.dtype = "float32"
  return c
