"""How flat: the sampling temperature from proportional to equal shares, and UniMax beside it.

  python -m tiny_aya_jax sweep --config=experiments/sweeps/temperature.py:proxy --workdir=runs/temperature \\
      --config.rows=runs/data/train --config.validation=runs/data/validation --config.tokenizer=...

Expected: bits per byte of every language under each, who pays for whom, and whether three seeds at the
ends can tell them apart; what came of it at proxy size is in experiments/LOG.md.
"""

import sweep
from tiny_aya_jax import run

TEMPERATURES = (1.0, 2.0, 3.33, 5.0, 100.0)
CAPS = (1.0, 4.0)  # epochs; 1 was best in UniMax (arXiv 2304.09151), 4 is where repeats begin to cost


def get_config(variant="full"):
  run.choose("variant", variant, sweep.VARIANTS)
  c = sweep.get_config(variant)
  c.title, c.grid = "temperature and UniMax", ()
  c.arms = (*((f"temperature {value:g}", (("data.mixture.temperature", value),)) for value in TEMPERATURES),
            *((f"unimax {cap:g}", (("data.mixture.kind", "unimax"), ("data.mixture.epochs", cap)))
              for cap in CAPS))
  c.more_seeds = (("temperature 1", 3), ("temperature 100", 3))
  return c
