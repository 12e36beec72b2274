"""VERB verify: reads a checkpoint whole and compares every array with its fingerprint."""

from tiny_aya_jax import run
from tiny_aya_jax.train import saved


def main(config, workdir):
  """Prints how many arrays are as saved; refuses (65) the first checkpoint that is damaged."""
  run.existing("checkpoint", config.checkpoint)
  path = saved.find(config.checkpoint)
  from tiny_aya_jax.train import checkpoint  # imports jax

  run.say(f"{path}: {checkpoint.verify(path)} arrays are as they were saved")
