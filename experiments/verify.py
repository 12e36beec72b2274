"""Reads a checkpoint whole and compares every array with the fingerprint taken when it was saved.

  python -m tiny_aya_jax verify --config=experiments/verify.py --config.checkpoint=runs/pretrain
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full",))
  c = ConfigDict()
  c.checkpoint = config_dict.placeholder(str)
  return c
