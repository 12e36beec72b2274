"""VERB verify: reads a checkpoint whole and compares every array with its fingerprint."""

from tiny_aya_jax import run


def main(config, workdir):
  """Prints how many arrays are as saved; refuses (65) the first checkpoint that is damaged."""
  run.existing("checkpoint", config.checkpoint)
  from tiny_aya_jax.train import checkpoint  # imports jax

  path = checkpoint.find(config.checkpoint)
  run.say(f"{path}: {checkpoint.verify(path)} arrays are as they were saved")
