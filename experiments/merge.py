"""Models of one architecture and tokenizer -> one, without training (report 3.3).

  python -m tiny_aya_jax merge --config=experiments/merge.py --workdir=runs/merge \\
      --config.checkpoints="('runs/global', 'runs/south_asia')" --config.weights="(0.3, 0.7)"
  python -m tiny_aya_jax merge --config=experiments/merge.py:ties --workdir=runs/ties \\
      --config.checkpoints="('runs/global', 'runs/south_asia')" --config.base=runs/cooldown

Expected: WORKDIR/checkpoints/0, which evaluate, export, talk and train's init_from read, and
merge.json, the recipe. Memory is that of the largest parameter of each model, not of the models.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "slerp", "ties", "tiny"))
  c = ConfigDict()
  c.checkpoints = ()  # workdirs (their newest step), checkpoint folders or Hugging Face folders
  c.base = config_dict.placeholder(str)  # what task vectors are taken from: one more of these
  # linear, slerp, nuslerp (slerp of task vectors), task_arithmetic, ties, dare_linear, dare_ties
  c.operator = variant if variant in ("slerp", "ties") else "linear"
  c.weights = ()  # one a checkpoint; (): equal shares that sum to one
  c.t = 0.5  # slerp, nuslerp: 0 is the first checkpoint, 1 the second; ours: the middle
  # ties, dare: the part of a task vector that is kept; Yadav et al. 2023 keep 20%
  c.density = 0.2
  c.scale = 1.0  # lambda, of the merged task vector; ours: as it is, as mergekit
  c.trimming = "tensor"  # or "model": ties' threshold and zero sums as its authors' code has them
  # Divide by the sum of the weights. Absent: ties does (of the models that agree), the others do not
  # (mergekit's defaults), and the weights of linear must sum to one.
  c.normalize = config_dict.placeholder(bool)
  c.seed = 0  # of dare's coins
  c.tokenizer = config_dict.placeholder(str)  # to compare a checkpoint's with a folder's; for a folder
  c.output = "checkpoint"  # or "huggingface": the folder WORKDIR/huggingface
  c.dtype = "float32"  # of that folder
  c.overwrite = False
  return c
