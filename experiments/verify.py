"""Reads a checkpoint, or a packed stage, whole and compares it with the digests of its writing.

  python -m tiny_aya_jax verify --config=experiments/verify.py --config.checkpoint=runs/pretrain
  python -m tiny_aya_jax verify --config=experiments/verify.py --config.rows=runs/data/train

Expected: how many arrays or shards are as they were, or exit 65 naming the first that is not.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full",))
  c = ConfigDict()
  c.checkpoint = config_dict.placeholder(str)  # a workdir or a checkpoint folder
  c.rows = config_dict.placeholder(str)  # DIR/<stage> of pack
  return c
