"""Which mixture, from laws: random mixtures around a random temperature, and a prediction that is run.

  python -m tiny_aya_jax sweep --config=experiments/sweeps/mixture_law.py:proxy --workdir=runs/mixture_law \\
      --config.rows=runs/data/train --config.validation=runs/data/validation --config.tokenizer=...

The arms of temperature.py, and, as in RegMix (arXiv 2407.01492), random mixtures around a prior, whose
temperature is here another one in each draw, with factors for regions and for languages. In the workdir
of temperature.py its trials are not run again. Expected: the laws' errors beside those of a constant and
the noise between seeds, and whether the optimum that they predict holds; figures in experiments/LOG.md.
"""

import sweep
import temperature
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, sweep.VARIANTS)
  c = temperature.get_config(variant)
  c.title, c.x = "mixture laws", None
  c.search = "random"
  # ours: half of all factors lie between 0.6 and 1.6 (a region and a language: deviation 0.7)
  c.space = (("data.mixture.temperature", "log", 1.0, 20.0), ("data.mixture.keep", "factors", 0.5, 0.5))
  c.draws = 12 if variant != "tiny" else 2
  c.law.fit = True
  c.law.confirm = 3 if variant != "tiny" else 1
  return c
