"""How often may a small language repeat: UniMax with caps from half an epoch to eight.

  python -m tiny_aya_jax sweep --config=experiments/sweeps/unimax.py:proxy --workdir=runs/unimax \\
      --config.rows=runs/data/train --config.validation=runs/data/validation --config.tokenizer=...

Expected: little between 1 and 4 (UniMax's own finding, arXiv 2304.09151), losses of the smallest
languages above. Needs config.imitate.tokens to mean anything at proxy size.
"""

import sweep
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, sweep.VARIANTS)
  c = sweep.get_config(variant)
  c.title = "UniMax cap"
  c.arms = (("unimax", (("data.mixture.kind", "unimax"),)),)
  c.grid = (("data.mixture.epochs", (0.5, 1.0, 2.0, 4.0, 8.0)),)
  c.x = "data.mixture.epochs"
  c.more_seeds = ()
  c.seeds = 2
  return c
