"""VERB verify: reads a checkpoint or packed rows whole and compares them with their digests."""

from tiny_aya_jax import run
from tiny_aya_jax.data import loader
from tiny_aya_jax.train import saved


def main(config, workdir):
  """Prints how many arrays or shards are as they were written; refuses (65) what is damaged."""
  if bool(config.checkpoint) == bool(config.rows):
    raise run.Refused("verify needs one of config.checkpoint and config.rows, a packed stage")
  if config.rows:
    manifests = loader.read_manifests(config.rows)
    loader.check_shards(run.progress(manifests, "verify"))
    shards = sum(len(manifest["shards"]) for manifest in manifests)
    run.say(f"{config.rows}: {shards} shards of {len(manifests)} sources are as they were packed")
    return
  run.existing("checkpoint", config.checkpoint)
  path = saved.find(config.checkpoint)
  from tiny_aya_jax.train import checkpoint  # imports jax

  run.say(f"{path}: {checkpoint.verify(path)} arrays are as they were saved")
