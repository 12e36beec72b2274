"""What lies on disk of a run, read without jax: which steps were saved, and their JSON facts.

workdir/checkpoints/<step>/{params, optimizer, data, meta}. Arrays are checkpoint.py's. Beside them,
<step>.damaged and <step>.suspect were set aside, and are never read or deleted by a run.
"""

import json
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


def gone(workdir):
  """The newest step that the ledger has as saved; None if nothing ever was."""
  rows = run.read_lines(pathlib.Path(workdir) / "ledger.jsonl")
  return max((row["saved"] for row in rows if row.get("saved")), default=None)


def set_aside(path, why):
  """Renames a folder to <name>.<why>, with a number if that is taken; returns the new path."""
  taken = 1
  while (new := path.with_name(f"{path.name}.{why}" + (f"-{taken}" if taken > 1 else ""))).exists():
    taken += 1
  return path.rename(new)


def path(workdir, step):
  """Where a step of a workdir lies."""
  return pathlib.Path(workdir).absolute() / "checkpoints" / str(step)


def find(place):
  """A workdir (its newest step) or a checkpoint folder itself -> the checkpoint's folder."""
  place = pathlib.Path(place).absolute()
  if is_checkpoint(place):
    return place
  found = steps(place)
  if not found:
    raise run.Refused(f"{place} is no checkpoint and holds none under checkpoints/")
  return path(place, found[-1])


def meta(place):
  """The facts of a checkpoint: step, model, T, tokenizer_sha256, start, run, fingerprints."""
  folder = find(place)
  found = _json(folder, "meta")
  signed = {key: value for key, value in found.items() if key != "sha256"}
  # A checkpoint older than the digests has none; nor has one whose "sha256" itself was damaged.
  if _digests(found).get("meta", run.fingerprint(signed)) != run.fingerprint(signed):
    raise Damaged(f"{folder}: meta is not what was saved")
  return found


def data(place):
  """The data state of a checkpoint: {"step", "seed", "plan_sha256", "plan", "batch"}."""
  folder = find(place)
  found = _json(folder, "data")
  if _digests(_json(folder, "meta")).get("data", run.fingerprint(found)) != run.fingerprint(found):
    raise Damaged(f"{folder}: data is not what was saved")
  return found


def signed(meta, data):
  """`meta` with the digests of both, None for no data: what `meta` and `data` compare."""
  digests = dict(meta=run.fingerprint(meta)) | (dict(data=run.fingerprint(data)) if data else {})
  return meta | dict(sha256=digests)


def _digests(meta):
  found = meta.get("sha256", {})
  return found if isinstance(found, dict) else {}


_KEYS = dict(meta=("step", "model", "tokenizer_sha256", "fingerprints"),
             data=("step", "seed", "plan_sha256", "plan", "batch"))


def _json(folder, name):
  """Damaged if the file is not there or not ours; a disk that does not answer is another matter."""
  file = folder / name / "data.json"  # Orbax's name for the file
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except (FileNotFoundError, NotADirectoryError):
    raise Damaged(f"{file} does not exist") from None
  except (ValueError, RecursionError) as error:
    raise Damaged(f"{file} is not JSON ({error})") from None
  if missing := [key for key in _KEYS[name] if not isinstance(found, dict) or key not in found]:
    raise Damaged(f"{folder}: {name} lacks {', '.join(missing)}")
  return found


def _folders(workdir):
  folder = pathlib.Path(workdir) / "checkpoints"
  return [found for found in folder.iterdir() if found.name.isdigit()] if folder.is_dir() else []


def is_checkpoint(folder):
  """Whether a folder has what later stages read of a checkpoint."""
  return (folder / "params").is_dir() and (folder / "meta").is_dir()
