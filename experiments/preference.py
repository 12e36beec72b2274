"""Preference tuning of Global, minimal: name, list of languages, safety, kept in every language.

  python -m tiny_aya_jax train --config=experiments/preference.py --workdir=runs/global \\
      --config.init_from=runs/sft --config.data.rows=runs/data/scored \\
      --config.data.validation=runs/data/scored_validation \\
      --config.tokenizer=runs/vocab/tokenizer.model

The rows are pairs (pack with --config.pairs=16) that the verb score has seen with init_from. The report says of this stage that it is small and what it is for
(3.2); algorithm, rate, beta and data are unpublished, and all numbers here are ours. Expected: the
loss begins at log 2 = 0.6931 a pair, and the margin of held-out pairs grows. The divergence from
init_from is evaluate's: --config.divergence_from=runs/sft.
"""

import sft
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "small", "tiny"))
  c = sft.get_config("global" if variant == "full" else f"{variant}_global")
  c.loss.update(kind="dpo", beta=0.1, pairs=16)  # DPO's own beta (arXiv 2305.18290)
  c.data.mixture.update(kind="temperature", weights=(), languages=("all",), temperature=1.0)
  c.schedule.update(shape="linear", peak=1e-6, final=0.0, warmup_steps=10)  # tiny_aya.md 6.3: 5e-7 to 1e-6
  c.steps, c.epochs = None, 1.0
  c.evaluate_every, c.save_every = 50, 100
  if variant == "small":
    c.schedule.update(peak=1e-4, warmup_steps=4)
    c.epochs, c.steps = None, 40
    c.log_every, c.evaluate_every, c.save_every = 10, 20, 100
  if variant == "tiny":
    c.schedule.update(peak=2e-4, warmup_steps=4)
    c.epochs, c.steps = None, 20
    c.log_every, c.evaluate_every, c.save_every = 10, 20, 20
  return c
