"""Which mixture, from laws: random mixtures around a random temperature, and a prediction that is run.

  python -m tiny_aya_jax sweep --config=experiments/sweeps/mixture_law.py:proxy --workdir=runs/mixture_law \\
      --config.rows=runs/data/train --config.validation=runs/data/validation --config.tokenizer=...

As in RegMix (arXiv 2407.01492), which draws mixtures around the token prior; here the prior has a
temperature of its own in each draw, and regions and languages factors. Expected: the laws' errors beside
those of a constant and the noise between seeds, and whether the optimum that they predict holds.
"""

import sweep
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, sweep.VARIANTS)
  c = sweep.get_config(variant)
  c.title, c.x = "mixture laws", None
  c.search, c.grid = "random", ()
  # ours: half of all factors lie between 0.6 and 1.6 (a region and a language: deviation 0.7)
  c.space = (("data.mixture.temperature", "log", 1.0, 20.0), ("data.mixture.keep", "factors", 0.5, 0.5))
  c.draws = 20 if variant != "tiny" else 3
  c.more_seeds = (("draw 0", 3), ("draw 1", 3)) if variant != "tiny" else ()
  c.law.fit = variant != "tiny"
  c.law.confirm = 3
  if variant == "tiny":
    c.law.confirm = 0
  return c
