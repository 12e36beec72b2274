"""What lies on disk of a checkpoint, read without jax: which steps there are, and their JSON facts.

workdir/checkpoints/<step>/{params, optimizer, data, meta}. Arrays are checkpoint.py's.
"""

import pathlib

from tiny_aya_jax import run


def steps(workdir):
  """The steps of a workdir that evaluate, merge, export and talk can read, ascending."""
  return sorted(int(path.name) for path in _folders(workdir) if is_checkpoint(path))


def incomplete(workdir):
  """The folders named like a step that lack params or meta: something removed a part of them."""
  return sorted(path for path in _folders(workdir) if not is_checkpoint(path))


def find(path):
  """A workdir (its newest step) or a checkpoint folder itself -> the checkpoint's folder."""
  path = pathlib.Path(path).absolute()
  if is_checkpoint(path):
    return path
  found = steps(path)
  if not found:
    raise run.Refused(f"{path} is no checkpoint and holds none under checkpoints/")
  return path / "checkpoints" / str(found[-1])


def meta(path):
  """The facts of a checkpoint: step, model, T, tokenizer_sha256, start, run, fingerprints."""
  return _json(path, "meta")


def data(path):
  """The data state of a checkpoint: {"step", "seed", "plan_sha256", "plan", "batch"}."""
  return _json(path, "data")


def _json(path, name):
  return run.read_json(find(path) / name / "data.json", "checkpoint")  # Orbax's name for the file


def _folders(workdir):
  folder = pathlib.Path(workdir) / "checkpoints"
  return [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def is_checkpoint(path):
  """Whether a folder has what later stages read of a checkpoint."""
  return (path / "params").is_dir() and (path / "meta").is_dir()
