"""Packed pairs -> the same rows with the log-probabilities of the model that is to be tuned.

  python -m tiny_aya_jax score --config=experiments/score.py --workdir=runs/data \\
      --config.checkpoint=runs/sft --config.rows=runs/data/pairs \\
      --config.tokenizer=runs/vocab/tokenizer.model

Expected: WORKDIR/scored/<code>/<source>, which train reads with experiments/preference.py. The
fields mesh, dtype, attention and matmul are those of the training, so that it begins at margin 0.
"""

import pretrain
from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "small", "tiny"))
  train = pretrain.get_config(variant)
  c = ConfigDict()
  c.checkpoint = config_dict.placeholder(str)  # a workdir (its newest step), a checkpoint or a Hugging Face folder
  c.rows = config_dict.placeholder(str)  # DIR/<stage> of pack with pairs
  c.tokenizer = config_dict.placeholder(str)
  c.stage = "scored"  # folder under the workdir
  c.batch = 32 if variant == "full" else 16  # rows at a time
  c.mesh = train.mesh
  c.dtype, c.attention, c.matmul, c.chunk = train.dtype, train.attention, train.matmul, train.loss.chunk
  c.heartbeat_seconds = 100  # a process that is silent for so long ends the others
  c.overwrite = False
  return c
