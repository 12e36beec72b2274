"""How much code: a fixed share of the tokens, taken from all languages alike.

  python -m tiny_aya_jax sweep --config=experiments/sweeps/code_share.py:proxy --workdir=runs/code_share \\
      --config.rows=runs/data/train --config.validation=runs/data/validation --config.tokenizer=...

Needs rows and held-out rows of `code`. The report's share is unpublished; proxies of the same lab had
15% (tiny_aya.md 2.4). Expected of bits per byte: what languages pay for it, and what code gains; what
code does for reasoning no loss shows.
"""

import sweep
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "proxy"))  # the embedded corpus has no code
  c = sweep.get_config(variant)
  c.title = "code share"
  c.grid = (("data.mixture.fixed", tuple((("code", share),) for share in (0.02, 0.05, 0.1, 0.15, 0.25))),)
  c.x = None
  c.imitate.sizes = "rows"  # FineWeb-2 has no size of code
  c.more_seeds = ()
  return c
