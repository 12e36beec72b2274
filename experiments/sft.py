"""Supervised fine-tuning on conversations: all regions (Global), and the clusters of three regions.

  python -m tiny_aya_jax train --config=experiments/sft.py:global --workdir=runs/sft \\
      --config.init_from=runs/cooldown --config.data.rows=runs/data/sft \\
      --config.tokenizer=runs/vocab/tokenizer.model
  ... experiments/sft.py:earth, :fire, :water, each from the same cooldown and the same rows

Prompt tokens weigh nothing: pack has seen to that. One pool makes the four mixtures of the report
(Appendix A): the column of all regions, and for a cluster this column under a mask, as its own
shows. Expected of tiny (the embedded corpus): the loss on answers falls from 5.7 to 3.9 nats a
token (means of 20 steps), and `talk` answers in the form of the corpus.
On one GPU `adapter` trains low-rank factors beside frozen matrices, on such a checkpoint or a Hugging
Face folder; every later stage reads the sum, and `export` has either (--config.form).
"""

import csv
import pathlib

import pretrain
from tiny_aya_jax import languages, run

# Region of the released model: (column of Appendix A, the regions that its cluster is made of).
CLUSTERS = dict(  # report 3.2; Urdu is kept in every mix (tiny_aya.md 10.2)
    earth=("europe_wa_af", ("Europe", "West Asia", "Africa")),
    fire=("south_asia", ("South Asia",)),
    water=("europe_wa_ap", ("Europe", "West Asia", "Asia Pacific")),
)
SIZES = ("", "small_", "tiny_")


def get_config(variant="global"):
  variant = "tiny_global" if variant == "tiny" else variant
  run.choose("variant", variant, [size + name for size in SIZES for name in ("global", "adapter", *CLUSTERS)])
  size, _, name = variant.rpartition("_")
  c = pretrain.get_config(size or "full")
  c.init_what = "params"
  c.data.mixture.update(
      kind="explicit", weights=weights(), temperature=1.0, keep=mask(name), within=(), absent="leave_out")
  c.schedule.update(shape="cosine", peak=2.5e-5, final=1.2e-6)  # report 3.2
  c.schedule.warmup_steps = 100  # ours: unpublished
  c.steps, c.epochs = None, 3.0  # report 3.2
  if not size:
    c.data.batch = 32  # report 3.2; unit not stated, rows here
  if size == "small":  # ours: for models of a few million parameters
    c.schedule.update(peak=1e-3, final=5e-5, warmup_steps=10)
    c.epochs, c.steps = None, 73  # 300k tokens
    c.log_every, c.evaluate_every, c.save_every = 25, 10_000, 100
  if size == "tiny":
    c.schedule.update(peak=2e-3, final=1e-4, warmup_steps=10)
    c.epochs, c.steps = None, 60 if name == "global" else 30
    c.log_every, c.evaluate_every, c.save_every = 20, 60, 60
  if name == "adapter":
    c.adapter.rank = 16  # ours
    # ours: ten times the report's
    c.schedule.update(peak=10 * c.schedule.peak, final=10 * c.schedule.final)
    if not size:
      c.mesh.fsdp = 1
      c.accumulate = 32  # a row at a time
      c.attention = "cudnn"  # of NVIDIA GPUs; "splash" on TPU
  return c


def weights():
  """((name, share), ...): Appendix A's column of all regions, made to sum to 1."""
  rows = appendix_a()
  total = sum(row["all_regions"] for row in rows.values())
  return tuple((name, row["all_regions"] / total) for name, row in rows.items())


def mask(name):
  """((region or language, factor), ...): what a cluster keeps of the pool; () for all of it.

  All of English, code, Urdu and its own regions; of each other region the few percent that its
  column shows, data sets that are in every mix (tiny_aya.md 10.2).
  """
  if name not in CLUSTERS:
    return ()
  column, regions = CLUSTERS[name]
  rows = appendix_a()
  scale = rows["English"][column] / rows["English"]["all_regions"]
  keep = [("English", 1.0), ("code", 1.0), ("Urdu", 1.0)]
  for region in languages.REGIONS:
    members = [row for language, row in rows.items()
               if language not in dict(keep) and _region(language) == region]
    left = sum(row[column] for row in members) / sum(row["all_regions"] for row in members) / scale
    keep.append((region, 1.0 if region in regions else round(left, 4)))
  return tuple(keep)


def _region(language):
  code = languages.expand(language)[0]
  return {known.code: known.region for known in languages.LANGUAGES}.get(code)


def appendix_a():
  """{language: {column: share in %}} as printed in the report (Tables 8 to 14)."""
  lines = (pathlib.Path(__file__).parent / "appendix_a.csv").read_text(encoding="utf-8").splitlines()
  return {row.pop("language"): {column: float(row[column]) for column in row if column != "appendixA_region"}
          for row in csv.DictReader(line for line in lines if not line.startswith("#"))}
