"""Bits per byte per language of one or more checkpoints, side by side, and a page.

  python -m tiny_aya_jax evaluate --config=experiments/evaluate.py --workdir=runs/report \\
      --config.checkpoints="('runs/pretrain', 'runs/cooldown')" \\
      --config.rows=runs/data/validation --config.tokenizer=runs/vocab/tokenizer.model

Expected: a table, WORKDIR/evaluation.json and WORKDIR/report.html. With config.baselines.train_text
and .validation_text, xz and an order-5 byte n-gram of the same text stand beside.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "tiny"))
  c = ConfigDict()
  c.checkpoints = ()  # workdirs (their newest step) or checkpoint folders
  c.rows = config_dict.placeholder(str)  # packed validation rows
  c.tokenizer = config_dict.placeholder(str)
  c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, context=1))
  c.batch = 32  # rows at a time
  c.chunk = 512  # positions of a row whose logits exist at a time
  c.dtype = "bfloat16" if variant == "full" else "float32"
  c.attention = "chunked"
  c.overwrite = False
  c.baselines = ConfigDict(dict(
      train_text=config_dict.placeholder(str), validation_text=config_dict.placeholder(str),
      processes=2,
  ))
  return c
