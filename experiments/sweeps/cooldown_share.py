"""How long a cooldown: from none to two fifths of the tokens, of which the report takes a fifth (2.2).

  python -m tiny_aya_jax sweep --config=experiments/sweeps/cooldown_share.py:proxy --workdir=runs/cooldown_share \\
      --config.rows=runs/data/train --config.validation=runs/data/validation --config.tokenizer=...

Every trial has the same number of tokens, so a longer cooldown is a shorter trunk. Expected: any is
better than none; the optimum is flat around the report's share.
"""

import sweep
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, sweep.VARIANTS)
  c = sweep.get_config(variant)
  c.title = c.x = "cooldown_share"
  c.grid = (("cooldown_share", (0.0, 0.05, 0.1, 0.2, 0.4)),)
  c.more_seeds = ()
  c.seeds = 2
  if variant == "tiny":
    c.tokens = 163_840  # so that the shortest trunk holds its warm-up
  return c
