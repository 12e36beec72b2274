"""How fast a training step and the loader are, beside others. Nothing is written.

  tiny-aya bench --config=experiments/bench.py
  tiny-aya bench --config=experiments/bench.py --config.model.window=4096 --config.turns=5
  tiny-aya bench --config=experiments/bench.py:small --config.dtype=bfloat16 --config.tolerance=1e-2
  tiny-aya bench --config=experiments/bench.py:pieces --config.pieces="('attention', 'loss')"
  tiny-aya bench --config=experiments/bench.py:loader --config.T=2048
  tiny-aya bench --config=experiments/bench.py:evaluation --config.folder=runs/tiny/huggingface
  tiny-aya bench --config=experiments/bench.py:population --config.populations="(4, 16, 64)"

Expected: versions, shapes, equal losses on every side, then after each turn the medians in tokens/s
and the ratio of ours to PyTorch eager and to torch.compile (`transformers` Cohere2). Of `pieces`:
a line each for attention, the loss and a block, ours and others, time and peak memory; then whole
steps, a process a side. Of `loader`:
threads, descriptors, memory, then tokens/s of one thread beside Grain's IterDataset.mix and Hugging
Face's interleave_datasets, over the same rows. Of `evaluation`: equal results first, then a line
each for multiple choice and perplexity beside lm-eval's Hugging Face backend, and for generation
beside transformers.generate, on one exported folder. Of `population`: the losses of every trial,
then tokens/s and trials an hour together and one after another.
"""

from tiny_aya_jax import run

VARIANTS = ("train_step", "small", "pieces", "loader", "evaluation", "population")
OPTIMIZER = dict(learning_rate=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
# The recipe (pretrain.py) as launch/gpu_table.py times it; plain Python, because that runs where
# ml_collections is not.
FULL = dict(
    model=dict(D=2048, N=16, K=4, H=128, F=11008, V=262_144, L=9, window=4096,
               rope_theta=50_000.0, logit_scale=1.0, norm_epsilon=1e-5),
    T=8192, dtype="bfloat16", attention="cudnn", matmul="dtype", unroll=1, loss_chunk=512, seed=0,
    remat="minimal",  # keeps all that one H200 holds of 4 sequences (performance.md 2.2)
    optimizer=OPTIMIZER | dict(learning_rate=2e-4),
)


def get_config(variant="train_step"):
  run.choose("variant", variant, VARIANTS)
  if variant == "loader":
    return loader()
  if variant == "pieces":
    return pieces()
  if variant == "evaluation":
    return evaluation()
  if variant == "population":
    return population()
  c = config_dict()
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
  c.matmul = "dtype"  # or "fp8"; needs another tolerance
  c.attention = "chunked"
  c.remat = "none"
  c.loss_chunk = 64  # logits of 512 positions: fastest of 128 to 4,096 (16 MiB, half the L3 cache)
  c.unroll = 2  # both periods: no loop that copies what the backward pass needs, 7%
  c.optimizer = OPTIMIZER
  if variant == "small":
    # ours: a large vocabulary, where the head is half of the step
    c.model.F, c.model.V, c.batch, c.loss_chunk = 704, 32768, 32, 16
  return c


def pieces():
  c = config_dict()
  c.bench = "pieces"
  c.pieces = ("attention", "loss", "block", "step", "fp8", "start", "guards")
  c.threads = 2
  c.turns = 3  # every side once a turn
  c.steps = 1  # timed a turn and side, after one that is not timed
  # The largest difference over the largest element, of losses over the first; bfloat16 needs 3e-2.
  c.tolerance = 1e-3
  c.seed = 0
  c.model = dict(
      # ours: heads few enough that all scores of a row of 8,192, three times, are 3 GiB; so are all
      # logits
      D=256, N=4, K=1, H=64, F=1376, V=32_768, L=1, window=4096,
      rope_theta=50000.0, logit_scale=1.0, norm_epsilon=1e-5,  # tiny_aya.md 1.1
  )
  c.lengths = (2048, 8192)  # of rows, in attention and loss; the block has the first
  c.batch = 1
  c.losses = ("ours", "recompute tile", "materialised")
  c.remats = ("none", "minimal", "qkv", "attn", "full")
  c.T = 1024  # of step, fp8, start and guards
  c.batches = (4,)  # of theirs: the first that fits
  c.dtype = "float32"
  c.matmul = "dtype"
  c.attention = "chunked"
  c.remat = "none"
  c.loss_chunk = 512
  c.unroll = 1
  c.optimizer = OPTIMIZER
  return c


def loader():
  c = config_dict()
  c.bench = "loader"
  c.against = ("grain", "datasets", "datasets lists")  # those of them that are installed
  c.T = 8192
  c.rows = 32  # of each of 210 sources: 55M tokens at T 8192, half a minute to write
  c.batch = 16
  c.turns = 5  # every side once a turn
  c.batches = 20  # timed, a turn and side
  c.long = 200  # batches before memory is watched, and while it is
  return c


def evaluation():
  from ml_collections.config_dict import placeholder

  c = config_dict()
  c.bench = "evaluation"
  c.folder = placeholder(str)  # a Hugging Face folder, as export writes it
  c.pieces = ("choice", "rolling", "packed", "generate")
  c.threads = 2
  c.turns = 5  # every side once a turn, after one that is not timed
  c.requests = 280  # four of each language: items of four choices, documents
  c.batch = 32
  c.T = 512  # tokens of a window
  c.tokens = 64  # generated behind each of a batch of prompts
  c.chunk = 64
  c.dtype = "float32"
  c.attention = "chunked"
  c.tolerance = 1e-4  # relative, of log-likelihoods
  return c


def population():
  c = config_dict()
  c.bench = "population"
  c.populations = (2, 4, 8)
  c.tokens = 400_000  # of a trial
  c.devices = 1
  c.threads = 2
  c.turns = 3  # every side once a turn
  c.steps = 5  # of every trial, timed, a turn and side
  c.tolerance = 1e-5  # of the losses of the third step, fp32
  c.seed = 0
  c.model = dict(  # pretrain.py:proxy
      D=128, N=2, K=1, H=64, F=512, V=16_384, L=1, window=128,
      rope_theta=50000.0, logit_scale=1.0, norm_epsilon=1e-5,
  )
  c.batch = 4
  c.T = 256
  c.dtype = "float32"
  c.matmul = "dtype"
  c.attention = "chunked"
  c.remat = "none"
  c.loss_chunk = 64
  c.unroll = 1
  c.optimizer = OPTIMIZER | dict(learning_rate=4e-3, b2=0.99)
  return c


def config_dict():
  import ml_collections  # here: the launch script reads this file without it

  return ml_collections.ConfigDict()
