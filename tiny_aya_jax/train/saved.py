"""What lies on disk of a checkpoint, read without jax: which steps there are, and their JSON facts.

workdir/checkpoints/<step>/{params, optimizer, data, meta}. Arrays are checkpoint.py's. Beside them,
<step>.damaged and <step>.suspect were set aside at a start and are never read or deleted again.
"""

import pathlib

from tiny_aya_jax import run


class Damaged(run.Refused):
  """A checkpoint that is not what was saved: an older one may do."""


def steps(workdir):
  """The steps of a workdir that evaluate, merge, export and talk can read, ascending."""
  return sorted(int(path.name) for path in _folders(workdir) if is_checkpoint(path))


def incomplete(workdir):
  """The folders named like a step that lack params or meta: something removed a part of them."""
  return sorted(path for path in _folders(workdir) if not is_checkpoint(path))


def aside(workdir):
  """The folders that were set aside, oldest step first."""
  found = [path for path in (pathlib.Path(workdir) / "checkpoints").glob("*.*")
           if path.suffix.split("-")[0] in (".damaged", ".suspect")]
  return sorted(found, key=lambda path: int(path.name.split(".")[0]))


def set_aside(path, why):
  """Renames a checkpoint to <step>.<why>, with a number if that is taken; returns the new path."""
  taken = 1
  while (new := path.with_name(f"{path.name}.{why}" + (f"-{taken}" if taken > 1 else ""))).exists():
    taken += 1
  return path.rename(new)


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
  path = find(path)
  found = _json(path, "meta")
  signed = {key: value for key, value in found.items() if key != "sha256"}
  # A checkpoint older than the digests has none; nor has one whose "sha256" itself was damaged.
  if found.get("sha256", {}).get("meta", run.fingerprint(signed)) != run.fingerprint(signed):
    raise Damaged(f"{path}: meta is not what was saved")
  return found


def data(path):
  """The data state of a checkpoint: {"step", "seed", "plan_sha256", "plan", "batch"}."""
  path = find(path)
  found, signed = _json(path, "data"), _json(path, "meta").get("sha256", {})
  if signed.get("data", run.fingerprint(found)) != run.fingerprint(found):
    raise Damaged(f"{path}: data is not what was saved")
  return found


def signed(meta, data):
  """`meta` with the digests of both, None for no data: what `meta` and `data` compare."""
  digests = dict(meta=run.fingerprint(meta)) | (dict(data=run.fingerprint(data)) if data else {})
  return meta | dict(sha256=digests)


_KEYS = dict(meta=("step", "model", "tokenizer_sha256", "fingerprints"),
             data=("step", "seed", "plan_sha256", "plan", "batch"))


def _json(path, name):
  try:
    found = run.read_json(path / name / "data.json", "checkpoint")  # Orbax's name for the file
  except run.Refused as error:
    raise Damaged(str(error)) from None
  if missing := [key for key in _KEYS[name] if key not in found]:
    raise Damaged(f"{path}: {name} lacks {', '.join(missing)}")
  return found


def _folders(workdir):
  folder = pathlib.Path(workdir) / "checkpoints"
  return [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def is_checkpoint(path):
  """Whether a folder has what later stages read of a checkpoint."""
  return (path / "params").is_dir() and (path / "meta").is_dir()
