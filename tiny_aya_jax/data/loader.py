"""Rows and a plan in, batches out: batch n is a function of (seed, plan, n) and of nothing else.

Rows were packed offline (pack.py) and are read at random, so there is no buffer, no worker state
and no position to save: a restart, another number of hosts or another prefetch gives the same
global batches. Which source comes next is decided in mixture.py; the order inside a source is a
permutation of its rows, another one each epoch (`_permuted`). Grain opens the shards and reads
ahead. Knows rows and manifests; not tokenizers, languages or jax.

A row is one ArrayRecord record: its manifest's `fields` one after the other, little-endian, each
of T+1 elements: token, segment (0 is padding, 1.. the row's documents), weight (of that token as a
target: 0 on a segment's first token and on prompts). Rows of pairs also have: pair (1.. the row's
pairs, 0 for none), side (1 chosen, 2 rejected), and once `score` was there reference [pairs, 2],
the log-probabilities of both sides, `pairs` being the manifest's: the most that a row holds.
"""

import functools
import hashlib
import itertools
import pathlib
import re
import resource
import sys

import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.data import mixture

# Grain is imported where rows are read: it takes 1.7 s, and manifests are checked without it.

VERSION = 1  # of the manifest
FIELDS = [["token", "uint32"], ["segment", "uint16"], ["weight", "uint8"]]
PAIRS = [*FIELDS, ["pair", "uint16"], ["side", "uint8"]]
SCORED = [*PAIRS, ["reference", "float32"]]
ROW_BYTES = 4 + 2 + 1  # a position of FIELDS
CHUNK = 4096  # rows located at once: 3 ms of floor sums (70 sources) for all of them
HIDDEN = ".{}.tmp"  # beside a source's folder while it is not whole: pack writes into it
OTHER_FILES = 256  # descriptors for everything but shards: logs, checkpoints, sockets


class Loader:
  """loader[step] -> {"token_BT", "target_BT", "segment_BT", "position_BT" int32, "weight_BT"
  float32, "source_B" int32 (index into plan["sources"])}; of pairs also "pair_BT", "side_BT" of the
  targets, and once scored "reference_BJC" float32.

  Rows step*batch .. step*batch + batch-1 of the plan; process (i, n) has rows i*batch/n .. of them.
  Raises Refused for rows that are not the plan's, and for shards that cannot be read.
  """

  def __init__(self, plan, seed, batch, process=(0, 1)):
    self.plan, self.seed, self.batch = plan, seed, batch
    self.rows = _slice(batch, process)
    manifests = planned(plan)
    _raise_open_files(sum(len(manifest["shards"]) for manifest in manifests))
    self._layout = layout(manifests)
    self._opened = {manifest["name"]: (in_order(manifest), manifest) for manifest in manifests}
    self._rows = np.array([source["rows"] for source in plan["sources"]], np.int64)
    self._keys = np.array([_key(seed, source["name"]) for source in plan["sources"]], np.uint64)
    # Of a cut source, which of its rows are there: a permutation's first, the same for every seed.
    self._of = np.array([source.get("of", 0) for source in plan["sources"]], np.int64)
    self._cut_keys = np.array([_key("cut", source["name"]) for source in plan["sources"]], np.uint64)
    self._located = functools.lru_cache(maxsize=64)(self._locate_chunk)

  def __getitem__(self, step):
    start = step * self.batch
    source_B, row_B = self._locate(start + self.rows.start, start + self.rows.stop)
    records = [
        _read(*self._source(source), row) for source, row in zip(source_B.tolist(), row_B.tolist())
    ]
    return decoded(records, source_B, *self._layout)

  def ids(self, step):
    """["deu_Latn/cldr:17", ...]: which rows of which sources make up the global batch of a step."""
    source_B, row_B = self._locate(step * self.batch, (step + 1) * self.batch)
    return [f"{self.plan['sources'][source]['name']}:{row}"
            for source, row in zip(source_B.tolist(), row_B.tolist())]

  def _source(self, index):
    source = self.plan["sources"][index]
    if source["name"] not in self._opened:
      _planned(source, self.plan)  # refuses: its rows are gone
    return self._opened[source["name"]]

  def batches(self, first_step, threads, prefetch):
    """Iterates over self[first_step], self[first_step + 1], ..., read ahead by Grain's threads.

    `prefetch` is how many batches may wait. With 0 threads the caller reads, and nothing waits. The
    batches do not depend on either number.
    """
    if not threads:
      return map(self.__getitem__, itertools.count(first_step))
    import grain

    steps = grain.MapDataset.range(first_step, sys.maxsize)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(steps.map(self.__getitem__).to_iter_dataset(options))

  def state(self, step):
    """All there is to save: with the plan, it names the next batch on any number of hosts."""
    return dict(step=step, seed=self.seed, plan_sha256=mixture.plan_sha256(self.plan))

  def _locate(self, start, stop):
    """Global rows -> (source, row of that source), both of length stop - start."""
    chunks = range(start // CHUNK, (stop - 1) // CHUNK + 1)
    source_n, row_n = map(np.concatenate, zip(*map(self._located, chunks)))
    first = chunks.start * CHUNK
    return source_n[start - first : stop - first], row_n[start - first : stop - first]

  def _locate_chunk(self, chunk):
    source_n, counter_n = mixture.locate_many(self.plan, chunk * CHUNK, CHUNK)
    row_n = _permuted(counter_n, self._rows[source_n], self._keys[source_n])
    if (cut := self._of[source_n] > 0).any():
      whole_n, key_n = self._of[source_n], self._cut_keys[source_n]
      row_n[cut] = _permuted(row_n[cut], whole_n[cut], key_n[cut])
    return source_n, row_n


def every_row_once(manifests, batch, process=(0, 1)):
  """Iterates over batches that hold each row of each manifest once, in order: for evaluation.

  source_B is the index into `manifests`. The last batch is filled up with rows of segment 0 and
  weight 0 whose source_B is -1. Process (i, n) has its slice of each batch, as in Loader.
  """
  T, fields, pairs = layout(manifests)
  _raise_open_files(sum(len(manifest["shards"]) for manifest in manifests))
  here, sources = _slice(batch, process), [in_order(manifest) for manifest in manifests]
  starts = np.cumsum([0, *(manifest["rows"] for manifest in manifests)])
  for start in range(0, int(starts[-1]), batch):
    row_B = np.arange(start + here.start, start + here.stop)
    source_B = np.searchsorted(starts, row_B, "right") - 1
    source_B[row_B >= starts[-1]] = -1
    records = [
        bytes(_row_bytes(T, fields, pairs))
        if source < 0
        else _read(sources[source], manifests[source], row - starts[source])
        for source, row in zip(source_B.tolist(), row_B.tolist())
    ]
    yield decoded(records, source_B, T, fields, pairs)


def layout(manifests):
  """(T, fields, pairs a row) that all manifests share; refuses fields that nobody here reads."""
  for manifest in manifests:
    check_fields(manifest)
  same = {field: _one(manifests, field) for field in ("T", "fields")}
  return *same.values(), _one(manifests, "pairs") if same["fields"] != FIELDS else 0


def _slice(batch, process):
  index, count = process
  if not 0 <= index < count:
    raise run.Refused(f"process {index} of {count}: expected an index from 0 to {count - 1}")
  if batch < 1 or batch % count:
    raise run.Refused(
        f"a batch of {batch} rows does not split over {count} processes: "
        "give a batch that is a multiple of them"
    )
  each = batch // count
  return range(index * each, (index + 1) * each)


def planned(plan):
  """The manifests of a plan's sources, which must still hold the rows that were planned.

  Left out are sources whose rows are gone, if the plan's last segment draws nothing from them.
  """
  drawn = mixture.drawn(plan)
  return [
      _planned(source, plan) for source in plan["sources"]
      if source["name"] in drawn or (pathlib.Path(source["path"]) / "manifest.json").exists()
  ]


def _planned(source, plan):
  manifest = read_manifest(local(source["path"], "the plan's rows"))
  for field in ("T", "tokenizer_sha256"):
    if manifest[field] != plan[field]:
      raise run.Refused(
          f"{source['path']} has rows of {field} {manifest[field]}, the plan of {plan[field]}: "
          "pack them again with the plan's"
      )
  rows = source.get("of", source["rows"])
  if (manifest["rows"], manifest["sha256"]) != (rows, source["sha256"]):
    raise run.Refused(
        f"{source['path']} was packed again since the plan was made: {manifest['rows']} rows now, "
        f"{rows} planned; make the plan again in another workdir"
    )
  return manifest


def check_fields(manifest, kinds=(FIELDS, PAIRS, SCORED)):
  """Refuses rows with other fields than those of `kinds`."""
  if manifest["fields"] in kinds and (manifest["fields"] == FIELDS or manifest.get("pairs", 0) > 0):
    return
  said = f"{manifest['path']} has rows of the fields {', '.join(name for name, _ in manifest['fields'])}"
  if SCORED in kinds[:1] and manifest["fields"] == PAIRS:
    raise run.Refused(f"{said}: the verb score adds the reference first")
  expected = " or ".join(", ".join(name for name, _ in kind) for kind in kinds)
  raise run.Refused(f"{said}, expected {expected}" + (
      ": give rows of another stage" if manifest["fields"] in (FIELDS, PAIRS, SCORED) else ": pack it again"))


def _key(seed, name):
  return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def _permuted(counter_n, rows_n, key_n):
  """Counters of sources with so many rows -> rows; each epoch of counters is a permutation.

  A Feistel network (Luby and Rackoff 1988) on the smallest even number of bits that holds the
  rows, walked until it falls inside them: 1 to 4 steps on average. Grain's index_shuffle is the
  same idea on at least 16 bits, which costs 2 ms a row for a source of 30 rows; nor is anything
  here at the mercy of another library's version: the order must survive an upgrade.
  """
  epoch_n, value_n = np.divmod(counter_n, rows_n)
  key_n = _mixed(key_n + epoch_n.astype(np.uint64) * np.uint64(mixture.STEP))
  bits = {rows: (int(rows) - 1).bit_length() for rows in np.unique(rows_n)}
  half_n = np.array([(bits[rows] + 1) // 2 for rows in rows_n], np.uint64)
  value_n, walking = value_n.astype(np.uint64), np.arange(len(rows_n))
  while len(walking):
    value_n[walking] = _feistel(value_n[walking], half_n[walking], key_n[walking])
    walking = walking[value_n[walking] >= rows_n[walking]]
  return value_n.astype(np.int64)


def _feistel(value_n, half_n, key_n):
  """A keyed bijection of 2 * half bits: eight rounds, as small halves mix slowly."""
  mask_n = (np.uint64(1) << half_n) - np.uint64(1)
  left_n, right_n = value_n >> half_n, value_n & mask_n
  for _ in range(8):
    key_n = key_n + np.uint64(mixture.STEP)
    left_n, right_n = right_n, left_n ^ (_mixed(right_n + key_n) & mask_n)
  return (left_n << half_n) | right_n


def _mixed(x_n):
  """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit depends on every bit."""
  x_n = (x_n ^ (x_n >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x_n = (x_n ^ (x_n >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x_n ^ (x_n >> np.uint64(31))


def in_order(manifest):
  """The source's records as a sequence: random access, in the order they were packed."""
  from grain.sources import ArrayRecordDataSource

  # [first:last] spares Grain opening every shard at once to count its records.
  folder = pathlib.Path(manifest["path"])
  return ArrayRecordDataSource(
      [f"{folder / shard['name']}[0:{shard['rows']}]" for shard in manifest["shards"]]
  )


def _row_bytes(T, fields, pairs):
  """Bytes of a record."""
  return sum(np.dtype(kind).itemsize * (2 * pairs if name == "reference" else T + 1)
             for name, kind in fields)


def _read(rows, manifest, index):
  size = _row_bytes(manifest["T"], manifest["fields"], manifest.get("pairs", 0))
  try:
    record = rows[int(index)]
  except (RuntimeError, ValueError, IndexError, OSError) as error:
    raise run.Refused(f"{_damaged(manifest)} cannot be read ({error}): pack it again") from error
  # ArrayRecord takes a shard cut at some lengths for an empty one and gives empty records.
  if len(record) != size:
    raise run.Refused(
        f"{_damaged(manifest)} gave a row of {len(record)} bytes, rows of T {manifest['T']} have "
        f"{size}: pack it again"
    )
  return record


def _damaged(manifest):
  """Path of the first shard that is not what the manifest says, or the folder's."""
  for shard in manifest["shards"]:
    path = pathlib.Path(manifest["path"]) / shard["name"]
    try:
      _check_shard(path, shard)
    except run.Refused:
      return path
  return manifest["path"]


def decoded(records, source_B, T, fields=FIELDS, pairs=0):
  """B records, each a row's bytes -> the batch that `Loader` gives."""
  B = len(records)
  of_pairs = {} if fields == FIELDS else _pairs(records, T, pairs, fields == SCORED)
  token = np.empty((B, T + 1), np.int32)
  segment_BT, weight_BT = np.empty((B, T), np.int32), np.empty((B, T), np.float32)
  for row, record in enumerate(records):  # without a copy of all records in between
    token[row] = np.frombuffer(record, "<u4", T + 1)
    segment_BT[row] = np.frombuffer(record, "<u2", T, 4 * (T + 1))
    weight_BT[row] = np.frombuffer(record, np.uint8, T, 6 * (T + 1) + 1)
  return dict(
      token_BT=token[:, :T],
      target_BT=token[:, 1:],
      segment_BT=segment_BT,
      position_BT=positions(segment_BT),
      weight_BT=weight_BT,
      source_B=source_B.astype(np.int32),
      **of_pairs,
  )


def _pairs(records, T, pairs, scored):
  """What rows of pairs have beside the others: pair and side of each target, the references."""
  start = ROW_BYTES * (T + 1)
  after = start + 3 * (T + 1)
  found = dict(
      pair_BT=[np.frombuffer(record, "<u2", T, start + 2) for record in records],
      side_BT=[np.frombuffer(record, np.uint8, T, start + 2 * (T + 1) + 1) for record in records],
  )
  found = {name: np.stack(rows).astype(np.int32) for name, rows in found.items()}
  if scored:
    reference = [np.frombuffer(record, "<f4", 2 * pairs, after) for record in records]
    found["reference_BJC"] = np.stack(reference).reshape(len(records), pairs, 2)
  return found


def positions(segment_BT):
  """[[1, 1, 2, 2, 2, 0]] -> [[0, 1, 0, 1, 2, 0]]: each segment counts from 0."""
  begins_BT = np.ones(segment_BT.shape, bool)
  np.not_equal(segment_BT[:, 1:], segment_BT[:, :-1], out=begins_BT[:, 1:])
  start = np.flatnonzero(begins_BT).astype(np.int32)
  index_BT = np.arange(segment_BT.size, dtype=np.int32)  # a batch has less than 2^31 tokens
  index_BT -= np.repeat(start, np.diff(start, append=segment_BT.size))
  return index_BT.reshape(segment_BT.shape)


def _raise_open_files(shards):
  """One descriptor per shard stays open: raises the soft limit to the hard one, which must do.

  Training and validation rows share the limit, so what these shards need is not all there is.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = shards + OTHER_FILES
  if hard != resource.RLIM_INFINITY and hard < needed:
    raise run.Refused(
        f"{shards} shards need {needed} open files, the hard limit is {hard}: raise it "
        "(ulimit -Hn) or pack with a larger config.rows_per_shard"
    )
  if soft != resource.RLIM_INFINITY:
    most = hard if hard != resource.RLIM_INFINITY else max(soft, 4 * needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def local(path, what):
  """Returns `path`; refuses a remote scheme, on which an ArrayRecord reader would hang."""
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
    raise run.Refused(
        f"{what}: {path} is a remote path, and rows are read and written on local or mounted ones: "
        "mount the bucket (gcsfuse) or copy it"
    )
  return path


def read_manifests(folder):
  """DIR/<code>/<source>/manifest.json of a packed stage -> list of manifests.

  Sorted by language and source, each with "path" (its folder), "name" ("<code>/<source>") and
  "sha256" (of its shards' digests) added: what mixture.plan takes. Every shard must be there in
  its full size; `check_shards` compares the contents. A stage that is still being packed, or whose
  pack was killed or refused, is Refused.
  """
  folder = pathlib.Path(local(folder, "packed rows"))
  if hidden := unfinished(folder):
    raise run.Refused(
        f"{folder} is not whole: {len(hidden)} sources are still to be packed, such as "
        f"{hidden[0]}: run pack again, or remove {folder / '*' / HIDDEN.format('*')} if their text is not wanted"
    )
  found = sorted(path.parent for path in folder.glob("*/*/manifest.json"))
  manifests = [read_manifest(path) for path in found]
  if not manifests:
    raise run.Refused(
        f"{folder} holds no packed rows (<code>/<source>/manifest.json): run the verb pack, or "
        "name the folder of one of its stages"
    )
  _one(manifests, "T")
  _one(manifests, "tokenizer_sha256")
  return sorted(manifests, key=lambda manifest: (manifest["language"], manifest["source"]))


def unfinished(stage):
  """The hidden folders of a stage's sources that pack has begun and not finished."""
  return sorted(stage.glob("*/" + HIDDEN.format("*")))


def read_manifest(folder):
  """One source's manifest, its shards present in full size; "path", "name", "sha256" added."""
  path = pathlib.Path(folder) / "manifest.json"
  manifest = run.read_json(path, "packed rows")
  missing = [key for key in _KEYS if key not in manifest]
  if missing or manifest["version"] != VERSION:
    raise run.Refused(
        f"{path} has version {manifest.get('version')} and lacks {missing or 'nothing'}: "
        f"expected version {VERSION} with {', '.join(_KEYS)}; pack it again"
    )
  for shard in manifest["shards"]:
    _present(path.with_name(shard["name"]), shard)
  manifest["path"] = str(folder)
  manifest["name"] = f"{manifest['language']}/{manifest['source']}"
  manifest["sha256"] = run.fingerprint([shard["sha256"] for shard in manifest["shards"]])
  return manifest


_KEYS = ("version", "language", "source", "T", "rows", "fields", "tokenizer_sha256", "tokens",
         "bytes", "documents", "shards")  # fmt: skip


def _present(path, shard):
  if not path.is_file():
    raise run.Refused(f"{path} is missing: its manifest lists it with {shard['rows']} rows")
  # "bytes" is ours; manifests of version 1 without it are complete all the same.
  if "bytes" in shard and path.stat().st_size != shard["bytes"]:
    raise run.Refused(
        f"{path} has {path.stat().st_size} bytes, its manifest says {shard['bytes']}: "
        "it is truncated or was overwritten; pack it again"
    )


def check_shards(manifests):
  """Reads every shard and compares its sha256 with the manifest's; refuses one that differs."""
  for manifest in manifests:
    for shard in manifest["shards"]:
      _check_shard(pathlib.Path(manifest["path"]) / shard["name"], shard)


def _check_shard(path, shard):
  _present(path, shard)
  found = run.sha256(path)
  if found != shard["sha256"]:
    raise run.Refused(
        f"{path} has sha256 {found}, its manifest says {shard['sha256']}: pack it again"
    )


def _one(manifests, field):
  """The value all manifests share."""
  first = manifests[0]
  for other in manifests:
    if other[field] != first[field]:
      raise run.Refused(
          f"{other['path']} has {field} {other[field]} and {first['path']} has {first[field]}: "
          "rows of one stage are packed alike; pack one of them again, or into another stage"
      )
  return first[field]
