"""Models of one architecture and tokenizer -> one, without training (report 3.3).

  python -m tiny_aya_jax merge --config=experiments/merge.py --workdir=runs/merge \\
      --config.checkpoints="('runs/global', 'runs/south_asia')" --config.weights="(0.3, 0.7)"
  python -m tiny_aya_jax merge --config=experiments/merge.py:ties --workdir=runs/ties \\
      --config.checkpoints="('runs/global', 'runs/south_asia')" --config.base=runs/cooldown

  python -m tiny_aya_jax merge --config=experiments/merge.py:fire --workdir=runs/fire \\
      --config.checkpoints="('runs/global', 'runs/sft_fire')" --config.base=runs/cooldown \\
      --config.tokenizer=runs/vocab/tokenizer.model --config.search.rows=runs/data/sft_held_out \\
      --config.search.safety=runs/data/safety_pairs --config.search.probe=runs/data/validation

:earth, :fire and :water search: each candidate is merged and measured on development rows of its
region, and one is chosen (post/selection.py). Expected: WORKDIR/checkpoints/0, which evaluate,
export, talk and train's init_from read, and merge.json: the recipe, and what was measured. Memory is
that of the largest parameter of each model, not of the models; a search holds the models too.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run

REGIONS = dict(  # whose languages decide (report 3.3); ours: where a model is meant to be the best
    earth=("Africa", "West Asia"), fire=("South Asia",), water=("Asia Pacific", "Europe"))


def get_config(variant="full"):
  searches = [f"{size}{region}" for size in ("", "small_", "tiny_") for region in REGIONS]
  run.choose("variant", variant, ("full", "slerp", "ties", *searches))
  c = ConfigDict()
  c.checkpoints = ()  # workdirs (their newest step), checkpoint folders or Hugging Face folders
  c.base = config_dict.placeholder(str)  # what task vectors are taken from: one more of these
  # linear, slerp, nuslerp (slerp of task vectors), task_arithmetic, ties, dare_linear, dare_ties
  c.operator = variant if variant in ("slerp", "ties") else "linear"
  c.weights = ()  # one a checkpoint; (): equal shares that sum to one
  c.t = 0.5  # slerp, nuslerp: 0 is the first checkpoint, 1 the second; ours: the middle
  # ties, dare: the part of a task vector that is kept; Yadav et al. 2023 keep 20%
  c.density = 0.2
  c.scale = 1.0  # what the merged task vector is multiplied by (lambda of Yadav et al. 2023, section 5)
  c.trimming = "tensor"  # or "model": ties' threshold and zero sums as its authors' code has them
  # Divide by the sum of the weights. Absent: ties does (of the models that agree), the others do not
  # (mergekit's defaults), and the weights of linear must sum to one.
  c.normalize = config_dict.placeholder(bool)
  c.seed = 0  # of dare's coins
  c.tokenizer = config_dict.placeholder(str)  # to compare a checkpoint's with a folder's; for a folder
  c.search = ConfigDict(dict(  # over 2 checkpoints, Global and a region's; instead of the operator above
      candidates=(),  # "(('linear', 0.3), ('slerp', 0.5), ('ties', 0.7))": strengths are the second's share
      region=config_dict.placeholder(str),  # a name for the record: earth, fire, water
      languages=("all",),  # those that decide: names, regions
      rows=config_dict.placeholder(str),  # packed: scores are minus bits per byte of what has weight
      safety=config_dict.placeholder(str),  # packed pairs: how often the chosen answer is the likelier
      tolerance=0.01,  # by which safety may be below Global's; ours: unpublished
      minimum_weight=0.5,  # of the poorest language beside the mean; ours: report 3.3 says "strong minimum"
      probe=config_dict.placeholder(str),  # packed, unlabelled: similarity, into merge.json
      probe_tokens=10_000,  # a language (report 3.3)
      learn_from=(),  # merge.json of searches that measured: scores are predicted
      ridge=10.0,  # ours
      batch=32, chunk=512, dtype="bfloat16", attention="chunked",
      mesh=dict(data=1, fsdp=-1, tensor=1, context=1),
  ))
  size, _, region = variant.rpartition("_")
  if region in REGIONS:
    c.search.update(region=region, languages=REGIONS[region], candidates=tuple(
        (operator, strength) for operator in ("linear", "slerp", "ties") for strength in (
            (0.5,) if size == "tiny" else (0.1, 0.3, 0.5, 0.7, 0.9))))  # report 3.3; strengths: unpublished
    c.density = 0.5
  if size:
    c.search.update(batch=16, chunk=64, dtype="float32", tolerance=0.1)  # few pairs, young models
  c.output = "checkpoint"  # or "huggingface": the folder WORKDIR/huggingface
  c.dtype = "float32"  # of that folder
  c.overwrite = False
  return c
