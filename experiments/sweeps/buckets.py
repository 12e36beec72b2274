"""Balanced by language grouping, as the report says of its mixture (2.2): its Eq. 1, in both readings.

  python -m tiny_aya_jax sweep --config=experiments/sweeps/buckets.py:proxy --workdir=runs/buckets \\
      --config.rows=runs/data/train --config.validation=runs/data/validation --config.tokenizer=...

Expected: reading A takes from languages with many relatives in their script (Romance, Slavic); B with
equal buckets gives most to scripts that stand alone.
"""

import sweep
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, sweep.VARIANTS)
  c = sweep.get_config(variant)
  c.title, c.grid = "buckets", ()

  def bucket(by, reading, temperature=None):
    settings = dict(kind="buckets", temperature=3.33, by=by, reading=reading)
    if temperature is not None:
      settings["bucket_temperature"] = temperature
    return tuple((f"data.mixture.{field}", value) for field, value in settings.items())

  c.arms = (
      ("temperature 3.33", (("data.mixture.temperature", 3.33),)),
      ("A, family", bucket("family", "A")),
      ("A, genus", bucket("genus", "A")),
      ("B, family, 1", bucket("family", "B", 1.0)),
      ("B, family, 3.33", bucket("family", "B", 3.33)),
      ("B, family, equal", bucket("family", "B", float("inf"))),
  )
  c.x = None
  c.more_seeds = (("temperature 3.33", 3),)
  return c
