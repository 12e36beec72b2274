"""safetensors files in and out: nothing is read before it is asked for, nothing kept, nothing trusted.

A file is 8 bytes, the length of a JSON header, the header ({name: dtype, shape, data_offsets}) and the
tensors' bytes. A folder has one model.safetensors, or several and their index. Not here: what the
names mean (huggingface.py). Pickles are never opened.
"""

import json
import math
import os
import pathlib
import shutil
from typing import NamedTuple

import ml_dtypes
import numpy as np

from tiny_aya_jax import run

DTYPES = dict(bfloat16=ml_dtypes.bfloat16, float16=np.float16, float32=np.float32)
STORED = dict(BF16=ml_dtypes.bfloat16, F16=np.float16, F32=np.float32)
SHARD_BYTES = 4 << 30  # below the 5 GB at which transformers itself shards
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
CHUNK_BYTES = 64 << 20  # cast and written at a time
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
  """One tensor of a file."""

  path: pathlib.Path
  dtype: np.dtype
  shape: tuple
  offset: int  # of its bytes in the file

  def read(self):
    """A copy of its values, in the stored dtype."""
    return np.fromfile(self.path, self.dtype, math.prod(self.shape), offset=self.offset).reshape(self.shape)

  def mapped(self):
    """Its values as pages of the file, which the system takes back when it needs room."""
    if not math.prod(self.shape):
      return np.empty(self.shape, self.dtype)
    return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def open_folder(folder):
  """{name: Tensor} over every file of a folder; refuses what is not whole, plain and consistent."""
  folder = pathlib.Path(folder)
  index = folder / INDEX
  where = run.read_json(index, "safetensors index").get("weight_map") if index.exists() else None
  if index.exists() and not (isinstance(where, dict) and where
                             and all(isinstance(name, str) for name in where.values())):
    raise run.Refused(f"{index} has no weight_map of tensor and file names")
  tensors = {}
  for name in sorted(set(where.values())) if where else [SINGLE]:
    if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(".safetensors"):
      raise run.Refused(f"{index} names the file {name!r}: expected a plain *.safetensors name")
    if not (folder / name).is_file():
      pickles = sorted(path.name for path in folder.glob("*.bin"))
      raise run.Refused(f"{folder} has no {name}" + (
          f", but {pickles[0]}, a pickle: pickles are never read, save it as safetensors" if pickles else ""))
    found = open_file(folder / name)
    if twice := sorted(found.keys() & tensors):
      raise run.Refused(f"{folder}: {twice[0]} is in {name} and in {tensors[twice[0]].path.name}")
    tensors |= found
  if where and tensors.keys() != where.keys():
    odd = sorted(tensors.keys() ^ where.keys())
    raise run.Refused(f"{index} and its shards disagree about {len(odd)} tensors, e.g. {odd[0]}")
  if odd := [name for name in where or () if tensors[name].path.name != where[name]]:
    raise run.Refused(f"{index} says that {odd[0]} is in {where[odd[0]]}, it is in {tensors[odd[0]].path.name}")
  return tensors


def open_file(path):
  """{name: Tensor} of one file; refuses a header that its bytes do not bear out."""
  def refuse(what):
    raise run.Refused(f"{path} is not a whole safetensors file: {what}")

  size = os.path.getsize(path)
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
      refuse(f"its header would be {length:,} bytes, and the file has {size:,}")
    text = file.read(length)
  try:
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
  except (ValueError, RecursionError) as error:
    refuse(f"its header is not JSON ({error})")
  if not isinstance(header, dict):
    refuse("its header is no JSON object")
  header.pop("__metadata__", None)
  tensors, spans = {}, []
  for name, entry in header.items():
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
      refuse(f"{name} is described by {str(entry)[:60]}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in STORED:
      raise run.Refused(f"{path}: {name} is {kind}, expected one of {', '.join(STORED)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
      refuse(f"{name} has shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]}")
    begin, end = offsets
    dtype = np.dtype(STORED[kind])
    if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
      refuse(f"{name}, {kind}{shape}, would be bytes {begin:,} to {end:,} of {size - 8 - length:,}")
    spans.append((begin, end, name))
    tensors[name] = Tensor(path, dtype, tuple(shape), 8 + length + begin)
  at = 0
  for begin, end, name in sorted(spans):  # the format allows neither holes nor overlaps
    if begin != at:
      refuse(f"{name} begins at byte {begin:,}, expected {at:,}")
    at = end
  if 8 + length + at != size:
    refuse(f"its tensors are {at:,} bytes, and it has {size - 8 - length:,}")
  return tensors


def _once(pairs):
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a name occurs twice")
  return found


def _whole_numbers(values):
  return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def write(folder, shapes, tensors, *, dtype="float32", shard_bytes=SHARD_BYTES):
  """Writes model.safetensors, or model-0000x-of-0000n.safetensors and their index, to the disk.

  shapes: {name: shape} in the order of the files. tensors: all (name, value) in any order; each goes
  to its place when it comes, so that no more than one need be in memory. Refuses values that dtype
  cannot hold.
  """
  folder, item = pathlib.Path(folder), np.dtype(DTYPES[dtype]).itemsize
  sizes = {name: item * math.prod(shape) for name, shape in shapes.items()}
  shards = [[]]
  for name in shapes:
    if shards[-1] and sum(sizes[kept] for kept in shards[-1]) + sizes[name] > shard_bytes:
      shards.append([])
    shards[-1].append(name)
  where, places = {}, {}
  for number, shard in enumerate(shards, 1):
    file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    places |= _lay_out(folder / file, {name: shapes[name] for name in shard}, dtype)
    where |= dict.fromkeys(shard, file)
  _fill(places, shapes, tensors, dtype)
  if len(shards) > 1:
    run.write_json(folder / INDEX, dict(metadata=dict(total_size=sum(sizes.values())), weight_map=where))


def write_file(path, shapes, tensors, dtype="float32"):
  """`write` of one file, whatever its name."""
  _fill(_lay_out(path, shapes, dtype), shapes, tensors, dtype)


def _fill(places, shapes, tensors, dtype):
  """Writes the tensors to their places, and all of it to the disk."""
  paths = {path for path, _ in places.values()}
  for name, value in tensors:
    if value.shape != tuple(shapes[name]):
      raise ValueError(f"{name} has shape {value.shape}, expected {tuple(shapes[name])}")
    _write_one(*places.pop(name), name, value, dtype)
    del value  # before the next is made
  if places:
    raise ValueError(f"{len(places)} tensors were not given, e.g. {next(iter(places))}")
  for path in paths:
    with open(path, "rb") as written:
      os.fsync(written.fileno())


def refuse_full(folder, size):
  """Makes a folder, and refuses one with fewer than `size` bytes free."""
  pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(folder).free
  if free < size:
    raise run.Refused(f"{size:,} bytes are to be written, {free:,} are free in {folder}")


def rounded(value, dtype):
  """Yields value in `dtype`, a few rows at a time; refuses what it cannot hold."""
  most = float(ml_dtypes.finfo(DTYPES[dtype]).max)
  rows = max(CHUNK_BYTES // max(value[:1].nbytes, 1), 1)
  for first in range(0, len(value), rows):
    part = np.asarray(value[first : first + rows])
    if part.size and not max(float(part.max()), -float(part.min())) <= most:
      raise run.Refused(f"values that {dtype} cannot hold: up to {float(np.abs(part).max()):.3g}")
    yield np.ascontiguousarray(part.astype(DTYPES[dtype], copy=False))


def _write_one(path, offset, name, value, dtype):
  with open(path, "r+b") as file:
    file.seek(offset)
    try:
      for part in rounded(value, dtype):
        file.write(part.reshape(-1).view(np.uint8))
    except run.Refused as error:
      raise run.Refused(f"{name} has {error}") from None


def _lay_out(path, shapes, dtype):
  """Writes a file's header; {name: (path, where its bytes begin)}."""
  stored = next(name for name, kept in STORED.items() if kept == DTYPES[dtype])
  header, at = {"__metadata__": dict(format="pt")}, 0
  for name, shape in shapes.items():
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    header[name] = dict(dtype=stored, shape=list(shape), data_offsets=[at, at + size])
    at += size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + at)
  return {name: (path, 8 + len(text) + header[name]["data_offsets"][0]) for name in shapes}
