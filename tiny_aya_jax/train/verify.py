"""VERB verify: reads a checkpoint whole and compares every array with its fingerprint."""

from tiny_aya_jax import run
from tiny_aya_jax.train import checkpoint


def main(config, workdir):
  """Prints how many arrays are as saved; refuses (65) the first checkpoint that is damaged."""
  if not config.checkpoint:
    raise run.Refused("verify needs config.checkpoint, a workdir or a checkpoint folder")
  path = checkpoint.find(config.checkpoint)
  run.say(f"{path}: {checkpoint.verify(path)} arrays are as they were saved")
