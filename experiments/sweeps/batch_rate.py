"""Batch and learning rate, before mixtures are compared: a proxy off its optimum compares rates.

  python -m tiny_aya_jax sweep --config=experiments/sweeps/batch_rate.py:proxy --workdir=runs/batch_rate \\
      --config.rows=runs/data/train --config.validation=runs/data/validation --config.tokenizer=...

Expected: at equal tokens a batch twice as large wants about 1.4 times the rate. A rate that is too high
is no error: its trial is marked as diverged.
"""

import sweep
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, sweep.VARIANTS)
  c = sweep.get_config(variant)
  c.title, c.x = "batch and learning rate", "schedule.peak"
  batches, rates = ((128, 256, 512), (1e-4, 2e-4, 4e-4)) if variant == "full" else ((4, 8), (2e-3, 4e-3, 8e-3))
  c.grid = (("data.batch", batches), ("schedule.peak", rates))
  c.more_seeds = ()
  return c
