"""Cooldown: a fork of the trunk's whole state, linear to zero, on a flatter and better mixture.

  python -m tiny_aya_jax train --config=experiments/cooldown.py --workdir=runs/cooldown \\
      --config.init_from=runs/pretrain --config.data.rows=runs/data/train \\
      --config.data.validation=runs/data/validation --config.tokenizer=runs/vocab/tokenizer.model

The report cools 40B of 200B tokens in its ablations (2.2), with the best data up-sampled and
instruction-style data in all 70 languages; its shares are unpublished. Here both are sources of
the train stage, by name: TEXT/<code>/high is what you hold to be the best of a language (pack it
with the rest), TEXT/<code>/instruct conversations (a second pack with packing=best_fit). A language
without one keeps its other text; one that no language has is refused: take it out of `within`. Each source goes on where the trunk's counter stood: nothing is
repeated before its rows are exhausted. Expected of tiny: 0.1 to 0.3 bits per byte below the trunk.
"""

import pretrain
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, pretrain.VARIANTS)
  c = pretrain.get_config(variant)
  c.init_what = "state"
  c.data.mixture.temperature = 5.0  # ours: flatter, so that every language has its share at the end
  c.data.mixture.within = (("high", 0.5), ("instruct", 0.15))  # ours, as all shares here
  c.steps = 19_073  # 40B tokens (report 2.2)
  c.schedule.update(shape="linear", warmup_steps=0)  # from peak; moments are warm
  if variant in ("small", "proxy"):
    c.steps = 600 if variant == "small" else 78  # a fifth of the run, as in the report's ablations
    c.data.mixture.within = ()  # one source a language
  if variant == "tiny":
    c.steps = 40
    c.data.mixture.within = (("instruct", 0.15),)  # pack.py:tiny_instruct
    c.log_every, c.evaluate_every, c.save_every = 20, 40, 40
  return c
