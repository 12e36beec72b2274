"""safetensors files: what the library writes we read, what we write it reads, and nothing is trusted."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from tiny_aya_jax import run
from tiny_aya_jax.export import tensors

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs the test extra")


def random(shape, dtype=np.float32, seed=0):
  return np.random.default_rng(seed).normal(0, 1, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path, dtype):
  mine = {"a": random((3, 5)), "b": random((7,), seed=1), "c": random((4, 2), seed=2)}
  shapes = {name: value.shape for name, value in mine.items()}
  tensors.write(tmp_path, shapes, reversed(mine.items()), dtype=dtype)
  found = safetensors_numpy.load_file(tmp_path / "model.safetensors")
  rounded = {name: value.astype(tensors.DTYPES[dtype]) for name, value in mine.items()}
  assert list(found) == list(mine)
  for name, value in rounded.items():
    np.testing.assert_array_equal(found[name], value)
  safetensors_numpy.save_file(rounded, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
  for name, one in tensors.open_file(tmp_path / "theirs.safetensors").items():
    assert one.read().tobytes() == one.mapped().tobytes() == rounded[name].tobytes()
    assert one.dtype == rounded[name].dtype


def test_a_transposed_tensor_is_written_a_few_rows_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(tensors, "CHUNK_BYTES", 64 << 10)
  whole = random((1024, 2048))
  tracemalloc.start()
  tensors.write(tmp_path, {"a": (2048, 1024)}, [("a", whole.T)], dtype="bfloat16")
  most = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  found = tensors.open_folder(tmp_path)["a"].mapped()
  assert found.tobytes() == whole.T.astype(ml_dtypes.bfloat16).tobytes()
  assert most < whole.nbytes / 8


@pytest.mark.parametrize("dtype, value", [
    ("float16", 70_000.0), ("float32", np.nan), ("bfloat16", np.inf), ("float16", -np.inf), ("bfloat16", 3.4e38)])
def test_values_that_a_dtype_cannot_hold_are_refused_by_name(tmp_path, dtype, value):
  bad = random((4, 4))
  bad[3, 1] = value
  with pytest.raises(run.Refused, match=f"bad has values that {dtype} cannot hold"):
    tensors.write(tmp_path, {"bad": bad.shape}, [("bad", bad)], dtype=dtype)


def test_tensors_that_do_not_come_or_have_another_shape_are_errors(tmp_path):
  with pytest.raises(ValueError, match="1 tensors were not given, e.g. b"):
    tensors.write(tmp_path, {"a": (2,), "b": (2,)}, [("a", random((2,)))])
  with pytest.raises(ValueError, match="a has shape"):
    tensors.write(tmp_path, {"a": (2,)}, [("a", random((3,)))])


# --- nothing is trusted -------------------------------------------------------------------------


def file_of(header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return dict(dtype=dtype, shape=list(shape), data_offsets=list(offsets))


FILES = {
    "empty": (b"", "its header would be"),
    "three bytes": (b"abc", "its header would be"),
    "a header beyond the file": (file_of({"a": entry()}, bytes(8), length=10**9), "its header would be 1,000,000,000"),
    "a huge header": (file_of({"a": entry()}, bytes(8), length=2**63), "its header would be"),
    "no JSON": (file_of(b"{]"), "its header is not JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "its header is not JSON"),
    "nested beyond reason": (file_of(b"[" * 100_000), "its header is not JSON"),
    "a list": (file_of([1]), "no JSON object"),
    "a name twice": (file_of(b'{"a": {}, "a": {}}'), "a name occurs twice"),
    "an entry too much": (file_of({"a": entry() | dict(code="x")}, bytes(8)), "a is described by"),
    "no entry": (file_of({"a": None}), "a is described by None"),
    "a foreign dtype": (file_of({"a": entry("F8_E4M3", (8,))}, bytes(8)), "a is F8_E4M3, expected one of BF16, F16, F32"),
    "whole numbers": (file_of({"a": entry("I64", (1,))}, bytes(8)), "a is I64"),
    "a negative size": (file_of({"a": entry(shape=(-2,))}, bytes(8)), "a has shape"),
    "a size of True": (file_of({"a": entry(shape=(True, 2))}, bytes(8)), "a has shape"),
    "sizes beyond reason": (file_of({"a": entry(shape=(2**40, 2**40))}, bytes(8)), "would be bytes"),
    "more than the file": (file_of({"a": entry(offsets=(0, 16), shape=(4,))}, bytes(8)), "would be bytes 0 to 16 of 8"),
    "fewer than its shape": (file_of({"a": entry(shape=(1,))}, bytes(8)), "would be bytes"),
    "backwards": (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), "would be bytes"),
    "overlapping": (file_of({"a": entry(), "b": entry()}, bytes(8)), "b begins at byte 0, expected 8"),
    "a hole": (file_of({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)), "b begins at byte 16, expected 8"),
    "truncated": (file_of({"a": entry()}, bytes(7)), "would be bytes 0 to 8 of 7"),
    "something behind": (file_of({"a": entry()}, bytes(9)), "its tensors are 8 bytes, and it has 9"),
}


@pytest.mark.parametrize("raw, sentence", FILES.values(), ids=FILES)
def test_a_file_that_its_bytes_do_not_bear_out_is_refused(tmp_path, raw, sentence):
  (tmp_path / "model.safetensors").write_bytes(raw)
  with pytest.raises(run.Refused, match=sentence):
    tensors.open_folder(tmp_path)


def shards(tmp_path, weight_map, **held):
  for file, names in held.items():
    safetensors_numpy.save_file({name: random((2,)) for name in names}, tmp_path / f"{file}.safetensors")
  (tmp_path / tensors.INDEX).write_text(json.dumps(dict(weight_map=weight_map)))


def test_a_folder_of_pickles_is_told_what_to_do(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(run.Refused, match="but pytorch_model.bin, a pickle: pickles are never read"):
    tensors.open_folder(tmp_path)


def test_an_index_says_where_each_tensor_is_and_is_held_to_it(tmp_path):
  shards(tmp_path, dict(a="one.safetensors", b="two.safetensors"), one=["a"], two=["b"])
  assert sorted(tensors.open_folder(tmp_path)) == ["a", "b"]
  shards(tmp_path, dict(a="two.safetensors", b="one.safetensors"), one=["a"], two=["b"])
  with pytest.raises(run.Refused, match="says that a is in two.safetensors, it is in one.safetensors"):
    tensors.open_folder(tmp_path)
  shards(tmp_path, dict(a="one.safetensors", b="two.safetensors"), one=["a"], two=["a", "b"])
  with pytest.raises(run.Refused, match="a is in two.safetensors and in one.safetensors"):
    tensors.open_folder(tmp_path)
  for weight_map in ({}, [], {"a": 1}, None):
    shards(tmp_path, weight_map)
    with pytest.raises(run.Refused, match="has no weight_map"):
      tensors.open_folder(tmp_path)


@pytest.mark.parametrize("name", [
    "../one.safetensors", "/etc/one.safetensors", "a/one.safetensors", "a\\one.safetensors", ".one.safetensors",
    "one.bin", "one.safetensors.pkl", ""])
def test_a_file_name_that_is_not_plain_is_refused(tmp_path, name):
  shards(tmp_path, dict(a=name), one=["a"])
  with pytest.raises(run.Refused, match="expected a plain"):
    tensors.open_folder(tmp_path)
