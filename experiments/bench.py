"""How fast a training step and the loader are, beside others. Nothing is written.

  tiny-aya bench --config=experiments/bench.py
  tiny-aya bench --config=experiments/bench.py --config.model.window=4096 --config.turns=5
  tiny-aya bench --config=experiments/bench.py:small --config.dtype=bfloat16 --config.tolerance=1e-2
  tiny-aya bench --config=experiments/bench.py:loader --config.T=2048

Expected: versions, shapes, equal losses on every side, then after each turn the medians in tokens/s
and the ratio of ours to PyTorch eager and to torch.compile (`transformers` Cohere2). Of `loader`:
threads, descriptors, memory, then tokens/s of one thread beside Grain's IterDataset.mix and Hugging
Face's interleave_datasets, over the same rows.
"""

import ml_collections

from tiny_aya_jax import run

VARIANTS = ("train_step", "small", "loader")


def get_config(variant="train_step"):
  run.choose("variant", variant, VARIANTS)
  if variant == "loader":
    return loader()
  c = ml_collections.ConfigDict()
  c.bench = "train_step"
  c.against = ("eager", "compile")  # () for ours alone; needs torch and transformers otherwise
  c.threads = 2
  c.turns = 3  # every side once a turn
  c.steps = 5  # timed steps a turn and side, after one that is not timed
  c.tolerance = 1e-4  # nats between the losses of the sides, fp32; bfloat16 needs 1e-2
  c.seed = 0
  c.model = dict(
      D=256, N=4, K=1, H=64, F=1376, V=8192, L=2,
      # ours: half a row, so that the sliding layers really mask; Tiny Aya's 4096 would not at T 512
      window=256,
      rope_theta=50000.0, logit_scale=1.0, norm_epsilon=1e-5,  # tiny_aya.md 1.1
  )
  c.batch = 8
  c.T = 512
  c.dtype = "float32"
  c.attention = "chunked"
  c.remat = "none"
  c.loss_chunk = 64  # logits of 512 positions: fastest of 128 to 4,096 (16 MiB, half the L3 cache)
  c.unroll = 2  # both periods: no loop that copies what the backward pass needs, 7%
  c.optimizer = dict(
      learning_rate=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0
  )
  if variant == "small":
    # ours: a large vocabulary, where the head is half of the step
    c.model.F, c.model.V, c.batch, c.loss_chunk = 704, 32768, 32, 16
  return c


def loader():
  c = ml_collections.ConfigDict()
  c.bench = "loader"
  c.against = ("grain", "datasets", "datasets lists")  # those of them that are installed
  c.T = 8192
  c.rows = 32  # of each of 210 sources: 55M tokens at T 8192, half a minute to write
  c.batch = 16
  c.turns = 5  # every side once a turn
  c.batches = 20  # timed, a turn and side
  c.long = 200  # batches before memory is watched, and while it is
  return c
