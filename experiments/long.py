"""Continuation at 32,768 tokens a row: a cooled-down model learns to use four times its rows.

  tiny-aya pack --config=experiments/pack.py --config.T=32768 ...    # long documents, whole
  tiny-aya train --config=experiments/long.py --workdir=runs/long --config.init_from=runs/cooldown \\
      --config.data.rows=runs/data_32768/train --config.tokenizer=runs/vocab/tokenizer.model
  tiny-aya plan --config=experiments/long.py --config.topology=v5e:8x8

What changes is T, and that four chips share the queries of a row (`mesh.context`): a chip holds 8,192
tokens, as before, and gathers the keys of the row. The positions stay as they are: a sliding layer
never sees further than its window of 4,096, so no rotary angle is new, and full layers have none. The
report stops at 8,192; a 32K base model was released later without its recipe. Expected: full is compiled
ahead of time as the last line above says, not trained (LOG.md); tiny, on rows of 1,024 of the embedded corpus,
one device a row, goes from 2.747 to 2.744 bits per byte.
"""

import pretrain
from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "tiny"))
  c = pretrain.get_config(variant)
  c.init_what = "params"  # rows of another length are another run: fresh moments
  c.data.update(T=32_768, batch=64)  # 2.1M tokens, as in pretraining
  c.mesh.context = 4
  c.accumulate = 4  # one row on four chips at a time
  # Ours, after SmolLM3's step from 4k to 32k (tiny_aya.md 5.4): 20,000 steps, cosine; theta not.
  c.schedule.update(shape="cosine", peak=2e-5, final=2e-6, warmup_steps=1000)
  c.steps = 20_000
  c.data.mixture.temperature = 5.0  # the cooldown's
  if variant == "tiny":
    c.data.update(T=1024, batch=4)
    c.mesh.context = 1
    c.accumulate = 1
    c.schedule.update(peak=1e-3, final=1e-4, warmup_steps=5)
    c.steps = 20
    c.log_every, c.evaluate_every, c.save_every = 5, 20, 20
  return c
