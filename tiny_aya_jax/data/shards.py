"""Writes the shards of a source so that it appears whole or not at all; loader.py reads them.

A source is written into a hidden folder beside its place, which is there from the start as a sign
that the stage is not whole, and renamed at the end.
"""

import os
import pathlib
import shutil

from tiny_aya_jax import run
from tiny_aya_jax.data import loader


def hidden(folder):
  """Where the rows of a source are written, and the sign that they are not whole yet."""
  folder = pathlib.Path(folder)
  return folder.with_name(loader.HIDDEN.format(folder.name))


def empty(folder):
  """Removes what is in it; the folder itself stays all the while, as a sign."""
  folder.mkdir(parents=True, exist_ok=True)
  for path in folder.iterdir():
    path.unlink()


def replace(folder, temporary):
  """Renames `temporary` to `folder`. An earlier result loses its manifest first, then its rows."""
  if folder.exists():
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder)
  os.replace(temporary, folder)


def write(records, folder, rows_per_shard):
  """Writes records (bytes) into ArrayRecord files; -> the manifest's shards."""
  parts, writer, count = [], None, 0  # the names hold the number of shards, known at the end
  for record in records:
    if count % rows_per_shard == 0:
      _close(writer)
      parts.append(folder / f"part{len(parts)}")
      writer = _open(parts[-1])
    writer.write(record)
    count += 1
  _close(writer)
  return [
      _shard(part, index, len(parts), min(rows_per_shard, count - index * rows_per_shard))
      for index, part in enumerate(parts)
  ]


def _open(path):
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordWriter(str(path), "group_size:1")


def _close(writer):
  if writer is not None:
    writer.close()


def _shard(part, index, shards, rows):
  path = part.with_name(f"rows-{index:05d}-of-{shards:05d}.array_record")
  os.replace(part, path)
  return dict(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=run.sha256(path))
