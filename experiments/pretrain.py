"""Pretraining: 3.35B parameters, 6T tokens of 70 languages, warm-up then constant rate.

  python -m tiny_aya_jax train --config=experiments/pretrain.py --workdir=runs/pretrain \\
      --config.data.rows=runs/data/train --config.data.validation=runs/data/validation \\
      --config.tokenizer=runs/vocab/tokenizer.model

`small` (2.0M parameters, real text, half an hour on two cores) and `tiny` (1.3M, the embedded
corpus, three minutes) are steps of launch/pipeline.sh; `proxy` (3.1M parameters, 0.4M tokens) is what
`sweep` compares mixtures with; figures in experiments/LOG.md. Expected of tiny: bits per byte on held-out facts falls from 5.5 to about 3. Sources named `instruct`, if there
are any, wait for the cooldown.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run

VARIANTS = ("full", "small", "tiny", "proxy")


def get_config(variant="full"):
  run.choose("variant", variant, VARIANTS)
  c = ConfigDict()
  c.seed = 0
  c.model = ConfigDict(dict(  # tiny_aya.md 1.1
      D=2048, N=16, K=4, H=128, F=11008, V=262_144, L=9, window=4096, rope_theta=50_000.0,
      logit_scale=1.0, norm_epsilon=1e-5,
  ))
  c.tokenizer = config_dict.placeholder(str)  # tokenizer.model or tokenizer.json
  c.data = ConfigDict(dict(
      rows=config_dict.placeholder(str),  # DIR/<stage> of pack
      validation=config_dict.placeholder(str),  # rows for bits per byte in the loop
      plan=config_dict.placeholder(str),  # a plan file, instead of the mixture
      mixture=mixture(),
      # Simulated epoching: share of the imitated run's tokens that this run has, and how large its
      # sources are: rows (as packed), web (FineWeb-2), or a JSON file {language: tokens}
      cut=dict(share=config_dict.placeholder(float), sizes="rows"),
      # rows: 2.1M tokens; ours: SmolLM3's 2.36M (tiny_aya.md 5.4), made to split over 16 to 256 chips
      batch=256,
      T=8192,
      seed=0,
      accept_change=False,
      threads=4,  # ours: readers ahead of the step, 0: none; the batches do not depend on it
      prefetch=8,
  ))
  # 16 chips share the state, which is then 2.3 GiB a chip; more would cut matrices into slivers
  c.mesh = ConfigDict(dict(data=-1, fsdp=16, tensor=1, context=1))
  c.dtype = "bfloat16"  # of activations; parameters and moments are float32 (report 3.1)
  c.matmul = "dtype"  # or "fp8": of the layers, on GPUs that have it (model/fp8.py)
  c.attention = "splash"  # on TPU; "cudnn" on NVIDIA GPUs, "chunked" anywhere
  c.remat = "full"
  c.unroll = 1  # periods a scan step
  # LoRA on a frozen base, which is then held in `dtype` (model/adapter.py); needs init_from
  c.adapter = ConfigDict(dict(
      rank=config_dict.placeholder(int),  # not set: everything is trained
      alpha=32.0,  # products count alpha / rank times
      matrices=("q", "k", "v", "o", "gate", "up", "down"),
  ))
  c.loss = ConfigDict(dict(
      kind="next_token",  # or dpo, ipo: of scored pairs (preference.py, model/preference.py)
      z_loss=0.0, chunk=256,  # SmolLM3: z-loss off
      beta=0.1, length_normalised=False,  # dpo and ipo
      pairs=0,  # a row, as packed
  ))
  # AdamW and clipping of SmolLM3, same shape (tiny_aya.md 5.4); Tiny Aya's are unpublished.
  c.optimizer = ConfigDict(dict(clip=1.0, adamw=dict(
      b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1,
      mu_dtype="float32",  # or "bfloat16": half the first moment's memory (train/optimizer.py)
  )))
  c.schedule = ConfigDict(dict(
      shape="wsd", peak=2e-4, final=0.0, warmup_steps=2000,
      decay_steps=0,  # the cooldown is its own experiment (cooldown.py)
  ))
  c.steps = config_dict.placeholder(int)
  c.steps = 2_861_023  # 6T tokens (report 2.2) at 2.1M a step
  # Where steps is not set: so many times the rows that the mixture draws from.
  c.epochs = config_dict.placeholder(float)
  c.accumulate = 1
  c.log_every = 10
  c.evaluate_every = 5000  # and at the end; 0: only there
  c.save_every = 1000
  c.keep = 2  # checkpoints
  c.export_every = config_dict.placeholder(int)  # steps: also WORKDIR/huggingface/<step>, bfloat16
  c.init_from = config_dict.placeholder(str)  # a workdir, a checkpoint or a Hugging Face folder
  c.init_what = "params"  # or "state": fork moments, step and data counters
  # The tokenizer that init_from was trained with, where config.tokenizer is another: the rows of its
  # embedding are then remapped (train/remap.py)
  c.init_tokenizer = config_dict.placeholder(str)
  c.stop_after = config_dict.placeholder(int)  # seconds of the process, then save and exit 75
  # Ours, but for 128 and 6 (OLMo's trainer, Levanter); train/guard.py, watchdog.py, saver.py.
  c.guard = ConfigDict(dict(
      window=128, sigma=6.0,  # no update from a loss so far above the last 128; inf: from any finite one
      not_finite=10,  # steps in a row that were not finite, none applied: exit 77
      hang_seconds=600,  # at least, and 10 times the median: exit 76
      save_seconds=1800,  # a save that takes longer is a hang
      failed_saves=3,  # in a row: exit 1
      heartbeat_seconds=100,  # a process that is silent for so long ends the others
  ))
  c.profile = ()  # (start, stop): trace these steps to WORKDIR/profile
  c.show = config_dict.placeholder(int)  # print so many rows and exit
  c.topology = config_dict.placeholder(str)  # plan: v5e:4x4,v5p:2x2x4; train refuses other devices
  c.price = config_dict.placeholder(float)  # plan: USD a chip-hour, instead of chips.py's
  if variant != "full":
    small(c)
  if variant == "tiny":
    tiny(c)
  if variant == "proxy":
    proxy(c)
  return c


def mixture():
  """Every field of data/rules.py, which has the formulas; None and () are not set.

  The report's shares are unpublished: it balances "based on language grouping used in the
  tokenizer data mixture" (2.2), which is kind="buckets". Ours: exponent 0.3, as mT5 and XLM-R
  (tiny_aya.md 4).
  """
  return ConfigDict(dict(
      kind="temperature",  # or unimax, buckets, explicit
      languages=("all",),  # names, regions; 'code' only if it is named
      temperature=3.33,  # temperature, buckets; explicit: inside a group
      alpha=config_dict.placeholder(float),  # the exponent itself, instead of 1 / temperature
      epochs=config_dict.placeholder(float),  # unimax: the cap; 1 was best (arXiv 2304.09151)
      # unimax: tokens or bytes; not set: what `steps` hold. More steps are then another mixture,
      # and a resume needs accept_change; set it, and they are not.
      budget=config_dict.placeholder(float),
      by=config_dict.placeholder(str),  # buckets: family (report, Eq. 1) or genus, with the script
      reading=config_dict.placeholder(str),  # buckets: A or B, two readings of Eq. 1
      bucket_temperature=config_dict.placeholder(float),  # reading B; inf: equal buckets
      weights=(),  # explicit: "(('eng_Latn', 0.3), ('Africa', 0.7))"
      keep=(),  # "(('Africa', 1.0),)": a mask, and factors
      fixed=(),  # "(('English', 0.3), ('code', 0.15))": shares of the whole
      floor=config_dict.placeholder(float),  # the least share of a language
      # "(('instruct', 0.15),)": a source's share of every language that has it; 0: not drawn
      within=(("instruct", 0.0),),
      unit="tokens",  # or bytes: what shares, sizes and budget count
      absent="refuse",  # a language that is named and has no rows; or leave_out
  ))


def small(c):
  """Real text, 9.8M tokens in half an hour on two cores; every number ours, chosen in LOG.md."""
  c.model.update(D=128, N=2, K=1, H=64, F=512, V=8192, L=1, window=128)
  c.data.update(batch=8, T=512, threads=1, prefetch=4)
  c.mesh.update(data=1, fsdp=-1)
  c.dtype = "float32"  # faster than bfloat16 on CPUs without bfloat16 units
  c.attention = "chunked"
  c.remat = "none"
  c.loss.chunk = 64  # logits of 512 positions stay in the cache
  c.optimizer.adamw.b2 = 0.99  # small batches: a longer memory
  c.schedule.update(peak=3e-3, warmup_steps=60)
  c.steps = 2400
  c.log_every, c.evaluate_every, c.save_every = 50, 10_000, 400


def tiny(c):
  """The embedded corpus in three minutes: every part of the road, nothing of a language."""
  c.model.update(D=128, N=4, K=2, H=32, F=352, V=4096, L=1, window=64)
  c.data.update(batch=16, T=256)
  c.dtype = "float32"  # faster than bfloat16 on CPUs without bfloat16 units
  c.loss.chunk = 64  # logits of 1,024 positions stay in the cache
  c.schedule.update(peak=4e-3, warmup_steps=20)
  c.steps = 160
  c.log_every, c.evaluate_every, c.save_every = 20, 160, 80


def proxy(c):
  """A trial of a sweep, a minute or two on two cores; compares mixtures and is no model of anything."""
  c.model.V = 16_384
  c.data.update(batch=4, T=256)  # 390 steps of 0.4M tokens
  c.schedule.update(peak=4e-3, warmup_steps=20)
  c.steps = 312
  c.log_every, c.evaluate_every, c.save_every = 100, 0, 10_000  # at the end: sooner made again than saved
  c.keep = 1
