"""Batches are a function of (seed, plan, step) alone, and hold exactly what was packed."""

import hashlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tiny_aya_jax import languages
from tiny_aya_jax import run
from tiny_aya_jax.data import loader
from tiny_aya_jax.data import mixture
from tiny_aya_jax.data import pack

T = 16
ALL = dict(kind="temperature", temperature=2.0, languages=("all",))
SIZES = {"deu_Latn": 90, "fra_Latn": 30, "swh_Latn": 7, "yor_Latn": 1}  # documents


def write_source(stage, code, count, shift=0, source="text", **fields):
  """A packed source of random documents, without a tokenizer. Returns the documents."""
  random = np.random.default_rng(count + shift)
  documents = [
      random.integers(12, 100_000, random.integers(2, 60)).astype(np.uint32) for _ in range(count)
  ]
  weighted = [(token, (np.arange(len(token)) > 0).astype(np.uint8)) for token in documents]
  counted, folder = pack.collections.Counter(), pathlib.Path(stage) / code / source
  folder.mkdir(parents=True)
  rows = pack.split(weighted, T + 1, counted)
  shards = pack.write_shards(rows, T + 1, folder, 20, counted)
  manifest = dict(
      version=1, language=code, source=source, licence=None, T=T, rows=counted["rows"],
      fields=loader.FIELDS, tokenizer_sha256="a tokenizer", tokens=counted["tokens"], bytes=1,
      documents=count, truncated=counted["truncated"], dropped={}, shards=shards, packing="split",
  )  # fmt: skip
  run.write_json(folder / "manifest.json", manifest | fields)
  return documents


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
  folder = tmp_path_factory.mktemp("packed") / "train"
  for code, count in SIZES.items():
    write_source(folder, code, count)
  return folder


@pytest.fixture(scope="module")
def plan(stage):
  return mixture.plan(loader.read_manifests(stage), ALL)


def equal(one, other):
  return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_a_batch_has_the_shapes_and_types_of_the_contract(plan):
  batch = loader.Loader(plan, seed=1, batch=6)[3]
  shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
  assert shapes == dict(
      token_BT=((6, T), "int32"),
      target_BT=((6, T), "int32"),
      segment_BT=((6, T), "int32"),
      position_BT=((6, T), "int32"),
      weight_BT=((6, T), "float32"),
      source_B=((6,), "int32"),
  )


def test_hosts_threads_and_prefetch_do_not_change_the_global_batches(plan):
  whole = loader.Loader(plan, seed=1, batch=8)
  expected = [whole[step] for step in range(2, 8)]
  for hosts in (1, 2, 4, 8):
    loaders = [loader.Loader(plan, seed=1, batch=8, process=(i, hosts)) for i in range(hosts)]
    for step, batch in enumerate(expected, 2):
      parts = [each[step] for each in loaders]
      for key, value in batch.items():
        assert b"".join(part[key].tobytes() for part in parts) == value.tobytes()
  for threads, prefetch in ((0, 1), (1, 1), (4, 3), (16, 64)):
    read = whole.batches(2, threads=threads, prefetch=prefetch)
    assert all(equal(next(read), batch) for batch in expected)


def test_a_resume_of_a_resume_of_a_resume_reads_on_where_it_stopped(plan):
  whole = loader.Loader(plan, seed=1, batch=5)
  running = whole.batches(0, threads=2, prefetch=4)
  batches, at = [next(running) for _ in range(20)], 0
  for steps, threads, hosts in ((3, 0, 1), (8, 3, 5), (1, 1, 1), (8, 16, 5)):
    state = json.loads(json.dumps(loader.Loader(plan, 1, 5).state(at)))  # as a checkpoint keeps it
    again = [
        loader.Loader(plan, state["seed"], 5, (i, hosts)).batches(state["step"], threads, 2)
        for i in range(hosts)
    ]
    for batch in batches[at : at + steps]:
      parts = [next(each) for each in again]
      assert equal({key: np.concatenate([p[key] for p in parts]) for key in batch}, batch)
    at += steps
  assert at == len(batches)


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="Linux's /proc")
def test_210_sources_hold_no_more_memory_threads_or_files_the_longer_they_are_read(tmp_path):
  for language in languages.LANGUAGES:
    for source in ("books", "instruct", "web"):
      write_source(tmp_path, language.code, 3, source=source)
  plan = mixture.plan(loader.read_manifests(tmp_path), ALL)
  running = loader.Loader(plan, seed=1, batch=256).batches(0, threads=2, prefetch=2)

  def held():
    for _ in range(100):
      next(running)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    others = (len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd"))
    return pages * os.sysconf("SC_PAGE_SIZE"), *others

  held()
  before, after = held(), held()
  assert len(plan["sources"]) == 210 and after[1:] == before[1:]
  assert after[0] - before[0] < 3 << 20  # the batches alone are 8 MiB


def test_batches_are_bit_for_bit_those_of_earlier_versions(plan):
  # A resume after an upgrade depends on this: the digest may only change with the row format.
  digest, each = hashlib.sha256(), loader.Loader(plan, seed=1, batch=8)
  for step in range(40):
    for key, value in sorted(each[step].items()):
      digest.update(key.encode() + value.dtype.str.encode() + value.tobytes())
  assert digest.hexdigest() == "bd3b1ce63e5a399757a75245de87a3d644a20e147acd7e7daa673ea282588398"


def plan_sources(plan):
  return [{**s, "T": T, "tokenizer_sha256": plan["tokenizer_sha256"]} for s in plan["sources"]]


def drawn(plan, seed, steps, batch=8):
  """{source: list of its rows in the order drawn}, a row as bytes."""
  rows, each = {}, loader.Loader(plan, seed, batch)
  for step in range(steps):
    made = each[step]
    for index, source in enumerate(made["source_B"]):
      row = np.append(made["token_BT"][index], made["target_BT"][index, -1])
      rows.setdefault(int(source), []).append(row.tobytes())
  return rows


def test_each_row_comes_once_an_epoch_and_each_epoch_in_another_order(plan):
  rows = drawn(plan, seed=1, steps=120)
  for index, source in enumerate(plan["sources"]):
    n, seen = source["rows"], rows[index]
    epochs = [seen[start : start + n] for start in range(0, len(seen) - n + 1, n)]
    assert len(epochs) > 1
    for epoch in epochs:
      assert len(set(epoch)) == n
      assert set(epoch) == set(epochs[0])
    if n > 5:
      assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def permuted(rows, epochs, key=5):
  counter_n = np.arange(rows * epochs)
  full = np.full(len(counter_n), rows)
  keys = np.full(len(counter_n), key, np.uint64)
  return loader._permuted(counter_n, full, keys).reshape(epochs, rows)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 1000, 65536, 65537])
def test_the_order_is_a_permutation_for_every_size(rows):
  for epoch in permuted(rows, epochs=3):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(rows))


def test_every_row_is_equally_likely_at_every_place_and_beside_every_other():
  epochs = 5000
  orders = permuted(7, epochs)
  places = np.array([np.bincount(orders[:, place], minlength=7) for place in range(7)])
  expected = epochs / 7
  chi = ((places - expected) ** 2 / expected).sum()
  assert chi < 90  # 36 degrees of freedom: 36 expected, 68 one time in a thousand
  steps = np.bincount((orders[:, 1] - orders[:, 0]) % 7, minlength=7)[1:]
  assert ((steps - epochs / 6) ** 2 / (epochs / 6)).sum() < 25  # 5 degrees: 21 one in a thousand
  long = permuted(100_000, 2)
  assert abs(np.corrcoef(long[0], long[1])[0, 1]) < 0.02
  assert abs(np.corrcoef(long[0][:-1], long[0][1:])[0, 1]) < 0.02


def test_the_order_is_frozen():
  # A checkpoint's next batch depends on these numbers: changing them breaks every resume.
  assert permuted(10, 2).tolist() == [
      [0, 9, 8, 5, 4, 1, 2, 6, 7, 3],
      [2, 3, 0, 9, 6, 5, 1, 8, 4, 7],
  ]


def test_sources_of_equal_size_are_shuffled_differently(tmp_path):
  write_source(tmp_path, "deu_Latn", 60)
  write_source(tmp_path, "fra_Latn", 60)  # the same documents
  plan = mixture.plan(loader.read_manifests(tmp_path), ALL)
  rows = drawn(plan, seed=1, steps=30)
  n = plan["sources"][0]["rows"]
  assert set(rows[0][:n]) == set(rows[1][:n]) and rows[0][:n] != rows[1][:n]


def test_documents_come_back_from_the_rows_exactly(stage):
  manifests = loader.read_manifests(stage)
  tokens = [[] for _ in manifests]
  for batch in loader.every_row_once(manifests, 8):
    for index, source in enumerate(batch["source_B"]):
      if source >= 0:
        row = np.append(batch["token_BT"][index], batch["target_BT"][index, -1])
        tokens[source].append(row)
  for manifest, rows in zip(manifests, tokens):
    count = SIZES[manifest["language"]]
    random = np.random.default_rng(count)
    packed = np.concatenate(rows)[: manifest["tokens"]]
    assert not np.concatenate(rows)[manifest["tokens"] :].any()  # padding, in the last row only
    made = [random.integers(12, 100_000, random.integers(2, 60)) for _ in range(count)]
    np.testing.assert_array_equal(packed, np.concatenate(made))


def test_every_row_once_is_every_row_once_and_padding_weighs_nothing(stage):
  manifests = loader.read_manifests(stage)
  batches = list(loader.every_row_once(manifests, 8))
  source_n = np.concatenate([batch["source_B"] for batch in batches])
  real = source_n[source_n >= 0]
  assert np.bincount(real).tolist() == [manifest["rows"] for manifest in manifests]
  assert (np.diff(real) >= 0).all() and len(source_n) % 8 == 0
  padding = batches[-1]["source_B"] < 0
  assert padding.any()
  for key in ("weight_BT", "segment_BT", "token_BT", "target_BT"):
    assert not batches[-1][key][padding].any()
  halves = [list(loader.every_row_once(manifests, 8, process=(i, 2))) for i in (0, 1)]
  for batch, first, second in zip(batches, *halves, strict=True):
    assert equal({key: np.concatenate([first[key], second[key]]) for key in batch}, batch)


def test_positions_restart_with_each_segment_and_targets_are_the_next_tokens(plan):
  each = loader.Loader(plan, seed=1, batch=8)
  borders = 0
  for step in range(10):
    batch = each[step]
    np.testing.assert_array_equal(batch["token_BT"][:, 1:], batch["target_BT"][:, :-1])
    for segment_T, position_T, weight_T in zip(
        batch["segment_BT"], batch["position_BT"], batch["weight_BT"]
    ):
      for segment in np.unique(segment_T):
        here = np.flatnonzero(segment_T == segment)
        np.testing.assert_array_equal(position_T[here], np.arange(len(here)))
        if segment > 1:  # the target before the border is another document's token
          assert weight_T[here[0] - 1] == 0
          borders += 1
  assert borders > 20


def test_a_change_of_mixture_repeats_and_skips_no_row(plan):
  changed = mixture.append(plan, 8 * 5 + 3, {**ALL, "temperature": 50.0})
  rows = drawn(changed, seed=1, steps=60)
  for index, source in enumerate(plan["sources"]):
    first_epoch = rows[index][: source["rows"]]
    assert len(set(first_epoch)) == len(first_epoch) > 1


def test_no_row_is_repeated_or_skipped_over_three_stages_of_which_one_joins_a_source(tmp_path):
  for code, count in SIZES.items():
    write_source(tmp_path, code, count)
  plan = mixture.plan(loader.read_manifests(tmp_path), ALL)
  write_source(tmp_path, "deu_Latn", 25, source="instruct")
  joined = loader.read_manifests(tmp_path)
  flat = dict(kind="buckets", alpha=0.3, by="genus", reading="A", languages=("all",))
  plan = mixture.append(plan, 8 * 7 + 3, flat | dict(within=(("instruct", 0.4),)), joined)
  plan = mixture.append(plan, 8 * 31, dict(kind="explicit", weights={"Europe": 0.3, "Africa": 0.7}))
  rows, every = drawn(plan, seed=1, steps=80), loader.every_row_once(joined, 8)
  names = [manifest["name"] for manifest in joined]
  packed = {name: [] for name in names}
  for batch in every:
    for index, source in enumerate(batch["source_B"]):
      if source >= 0:
        row = np.append(batch["token_BT"][index], batch["target_BT"][index, -1])
        packed[names[source]].append(row.tobytes())
  exhausted = 0
  for index, source in enumerate(plan["sources"]):
    n, seen = source["rows"], rows[index]
    for start in range(0, len(seen), n):
      epoch = seen[start : start + n]
      assert len(set(epoch)) == len(epoch) and set(epoch) <= set(packed[source["name"]])
      exhausted += len(epoch) == n
  assert exhausted > 5 and plan["sources"][-1]["name"] == "deu_Latn/instruct" and rows[4]


def test_the_state_is_three_small_values(plan):
  state = loader.Loader(plan, seed=1, batch=8).state(17)
  assert state == dict(step=17, seed=1, plan_sha256=mixture.plan_sha256(plan))
  assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize("batch, process", [(6, (0, 4)), (0, (0, 1)), (8, (2, 2)), (8, (-1, 2))])
def test_a_batch_that_does_not_split_is_refused(plan, batch, process):
  with pytest.raises(run.Refused, match=f"{batch} rows|process {process[0]} of"):
    loader.Loader(plan, 1, batch, process)


def test_remote_rows_are_refused_at_once(plan):
  with pytest.raises(run.Refused, match="gs://bucket/rows is a remote path"):
    loader.read_manifests("gs://bucket/rows")
  remote = {**plan, "sources": [{**plan["sources"][0], "path": "s3://bucket/rows"}]}
  with pytest.raises(run.Refused, match="s3://bucket/rows is a remote path"):
    loader.Loader(remote, 1, 8)


def test_an_empty_folder_and_mixed_rows_are_refused(tmp_path):
  with pytest.raises(run.Refused, match="holds no packed rows"):
    loader.read_manifests(tmp_path)
  write_source(tmp_path, "deu_Latn", 5)
  write_source(tmp_path, "fra_Latn", 5, tokenizer_sha256="another")
  with pytest.raises(run.Refused, match="another .*a tokenizer"):
    loader.read_manifests(tmp_path)


def test_rows_that_are_not_the_plans_are_refused(tmp_path):
  write_source(tmp_path, "deu_Latn", 5)
  manifests = loader.read_manifests(tmp_path)
  plan = mixture.plan(manifests, ALL)
  path = tmp_path / "deu_Latn" / "text" / "manifest.json"
  good = json.loads(path.read_text())

  def says(match, plan=plan, **change):
    run.write_json(path, good | change)
    with pytest.raises(run.Refused, match=match):
      loader.Loader(plan, 1, 1)

  says("rows of T 32, the plan of 16", T=32)
  says("rows of tokenizer_sha256 other", tokenizer_sha256="other")
  says("rows of the fields.*pair", fields=[*loader.FIELDS, ["pair", "uint16"]])
  says("packed again", shards=[{**good["shards"][0], "sha256": "0"}, *good["shards"][1:]])
  says("version 2", version=2)
  path.unlink()
  with pytest.raises(run.Refused, match="manifest.json does not exist"):
    loader.Loader(plan, 1, 1)


def test_a_missing_or_truncated_shard_is_refused_by_name(tmp_path):
  write_source(tmp_path, "deu_Latn", 60)
  plan = mixture.plan(loader.read_manifests(tmp_path), ALL)
  opened = loader.Loader(plan, 1, 8)
  shard = sorted((tmp_path / "deu_Latn" / "text").glob("*.array_record"))[1]
  content = shard.read_bytes()
  for cut in (0, 100, 65536 - 1):
    shard.write_bytes(content[:cut])
    with pytest.raises(run.Refused, match=f"{shard.name} has {cut} bytes"):
      loader.read_manifests(tmp_path)
    with pytest.raises(run.Refused, match=f"{shard.name} cannot be read|{shard.name} gave a row"):
      [loader.Loader.__getitem__(reopened(opened), step) for step in range(20)]
  shard.unlink()
  with pytest.raises(run.Refused, match=f"{shard.name} is missing"):
    loader.read_manifests(tmp_path)


def test_a_source_that_is_drawn_no_more_may_be_gone(tmp_path):
  for code in ("deu_Latn", "fra_Latn"):
    write_source(tmp_path, code, 60)
  manifests = loader.read_manifests(tmp_path)
  plan = mixture.append(mixture.plan(manifests, ALL), 40, {"fra_Latn": 1.0})
  before = loader.Loader(plan, 1, 8)
  batches = {step: before[step] for step in (3, 5, 9)}
  shutil.rmtree(tmp_path / "deu_Latn")
  after = loader.Loader(plan, 1, 8)
  for step in (5, 9):
    for key, value in after[step].items():
      np.testing.assert_array_equal(value, batches[step][key])
  with pytest.raises(run.Refused, match="deu_Latn"):
    after[3]
  with pytest.raises(run.Refused, match="fra_Latn"):  # one that is drawn must be there
    shutil.rmtree(tmp_path / "fra_Latn")
    loader.Loader(plan, 1, 8)


def reopened(opened):
  """A loader past its door, whose shards are not open yet: what a long run meets later."""
  opened._opened = {name: (loader.in_order(manifest), manifest)
                    for name, (_, manifest) in opened._opened.items()}
  return opened


def test_a_flipped_bit_is_found_by_check_shards_and_by_reading(tmp_path):
  write_source(tmp_path, "deu_Latn", 60)
  manifests = loader.read_manifests(tmp_path)
  loader.check_shards(manifests)
  shard = sorted((tmp_path / "deu_Latn" / "text").glob("*.array_record"))[0]
  content = bytearray(shard.read_bytes())
  content[200] ^= 1
  shard.write_bytes(content)
  with pytest.raises(run.Refused, match=f"{shard.name} has sha256"):
    loader.check_shards(manifests)
  with pytest.raises(run.Refused, match=shard.name):
    list(loader.every_row_once(manifests, 8))


def test_a_fault_while_prefetching_reaches_the_reader_as_a_refusal(tmp_path):
  write_source(tmp_path, "deu_Latn", 60)
  plan = mixture.plan(loader.read_manifests(tmp_path), ALL)
  opened = loader.Loader(plan, 1, 8)
  for shard in (tmp_path / "deu_Latn" / "text").glob("*.array_record"):
    shard.unlink()
  with pytest.raises(run.Refused, match="array_record"):
    next(opened.batches(0, threads=2, prefetch=2))


def test_open_files_are_raised_as_far_as_allowed():
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    loader._raise_open_files(100)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard % (1 << 63), 4 * 356)
    if hard != resource.RLIM_INFINITY:
      with pytest.raises(run.Refused, match=f"hard limit is {hard}"):
        loader._raise_open_files(hard)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_manifests_are_checked_before_jax_or_grain_is_imported():
  code = (
      "import sys; from tiny_aya_jax.data import loader, mixture, pack\n"
      "assert not {'jax', 'grain'} & sys.modules.keys(), 'imported too early'"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
