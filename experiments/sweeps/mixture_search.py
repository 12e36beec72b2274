"""The same question to Optuna: temperature of both stages and the cooldown's share, one after another.

  python -m tiny_aya_jax sweep --config=experiments/sweeps/mixture_search.py:proxy --workdir=runs/search \\
      --config.rows=runs/data/train --config.validation=runs/data/validation --config.tokenizer=...

Needs pip install 'tiny_aya_jax[sweep]'. Expected: a best trial; with the noise between seeds of a sweep
beside it (temperature.py), whether it is one.
"""

import sweep
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, sweep.VARIANTS)
  c = sweep.get_config(variant)
  c.title, c.x = "temperature and cooldown, searched", "trunk.data.mixture.temperature"
  c.search, c.grid = "optuna", ()
  c.space = (("trunk.data.mixture.temperature", "log", 1.0, 100.0),
             ("cooldown.data.mixture.temperature", "log", 1.0, 100.0),
             ("cooldown_share", "uniform", 0.05, 0.4 if variant != "tiny" else 0.3))
  c.draws = 30 if variant != "tiny" else 3
  c.more_seeds = ()
  return c
