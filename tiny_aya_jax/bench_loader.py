"""How fast rows become batches, beside Grain's mixing and Hugging Face's interleaving.

The same records in the same shares, decoded by the same function, one thread each, in turns,
because on a busy machine only ratios within one run mean anything: what differs is who finds the
next row and reads it. Also said: threads, open descriptors and memory over a long run. Rows are
random, of 3 sources in each of 70 languages, in a temporary folder.
"""

import collections
import importlib.metadata
import itertools
import os
import pathlib
import platform
import statistics
import tempfile
import threading
import time

import numpy as np

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import loader, mixture, pack

SOURCES = ("books", "instruct", "web")
RULE = dict(kind="temperature", temperature=3.33, languages=("all",))
MEAN_DOCUMENT = 700  # tokens; exponential, so that a row of 8,192 has about a dozen segments
V = 262_144
PREFETCH = 4
SEED = 0


def main(config):
  """Prints versions, shapes and, turn by turn, medians; returns {side: [tokens/s of each turn]}."""
  for name in ("turns", "batches", "long", "batch", "rows", "T"):
    if config[name] < 1:
      raise run.Refused(f"config.{name} is {config[name]}, expected at least 1")
  sides = [run.choose("side", side, SIDES) for side in config.against]
  packages = list(dict.fromkeys(side.partition(" ")[0] for side in sides))
  for package in packages:
    if not run.installed(package):
      run.say(f"{package} is not installed, so it is left out: pip install {package}")
  sides = [side for side in sides if run.installed(side.partition(" ")[0])]
  versions = [f"{name} {importlib.metadata.version(name)}"
              for name in dict.fromkeys(("numpy", "grain", *filter(run.installed, packages)))]
  run.say(f"python {platform.python_version()}, {', '.join(versions)}")
  with tempfile.TemporaryDirectory(prefix="bench_loader_") as folder:
    plan = _plan(config, pathlib.Path(folder))
    ours = loader.Loader(plan, SEED, config.batch)
    readers = {
        "loader[step]": map(ours.__getitem__, itertools.count()),
        "loader.batches": ours.batches(0, threads=1, prefetch=PREFETCH),
    }
    _long(readers["loader.batches"], config)
    readers |= {side: SIDES[side](plan, config, pathlib.Path(folder)) for side in sides}
    return _turns(readers, config)


def _plan(config, folder):
  """Random rows of every source, written as pack writes them; -> their plan."""
  random = np.random.default_rng(SEED)
  for language, source in itertools.product(languages.LANGUAGES, SOURCES):
    _write(folder / "rows" / language.code / source, language.code, source, config, random)
  manifests = loader.read_manifests(folder / "rows")
  size = sum(shard["bytes"] for manifest in manifests for shard in manifest["shards"])
  rows = config.rows * len(manifests)
  run.say(f"{len(manifests)} sources of {config.rows} rows of T {config.T}, {size / rows:,.0f} "
          f"bytes a row on disk, {loader.ROW_BYTES * (config.T + 1):,} raw; batch {config.batch}")
  return mixture.plan(manifests, RULE)


def _write(folder, code, source, config, random):
  folder.mkdir(parents=True)
  count = collections.Counter()
  rows = pack.split(_documents(random), config.T + 1, count)
  shards = pack.write_shards(
      itertools.islice(rows, config.rows), config.T + 1, folder, config.rows, count)
  run.write_json(folder / "manifest.json", dict(
      version=loader.VERSION, language=code, source=source, T=config.T, rows=count["rows"],
      fields=loader.FIELDS, tokenizer_sha256="none", tokens=count["tokens"], documents=0, bytes=1,
      shards=shards,
  ))


def _documents(random):
  """(token, weight) without end; ids are log-uniform, which is nearly how words are (Zipf)."""
  while True:
    token = V ** random.random(2 + int(random.exponential(MEAN_DOCUMENT)))
    yield token.astype(np.uint32), np.ones(len(token), np.uint8)


def _long(batches, config):
  """Says what a long run holds: memory is to stay where it is after the first half."""
  held = []
  for n in range(2 * config.long):
    next(batches)
    if n >= config.long:
      held.append(_resident())
  slope = np.polyfit(np.arange(len(held)), held, 1)[0] if len(held) > 1 else 0
  run.say(f"loader.batches, {2 * config.long} batches: {threading.active_count()} Python threads, "
          f"{_entries('/proc/self/task')} in all, {_entries('/proc/self/fd')} open descriptors, "
          f"{held[-1] / 2**20:.0f} MiB resident, in the second half {slope / 1024:+.1f} KiB a batch")


def _entries(folder):
  return len(os.listdir(folder)) if os.path.isdir(folder) else "unknown"  # Linux


def _resident():
  """Bytes of this process in memory; 0 where there is no /proc."""
  statm = pathlib.Path("/proc/self/statm")
  return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _turns(readers, config):
  """Every side once a turn; tokens/s of each turn."""
  speed = {side: [] for side in readers}
  for turn in range(config.turns):
    for side, batches in readers.items():
      for _ in range(PREFETCH + 2):  # untimed: what was read ahead while others ran, caches
        next(batches)
      begin = time.perf_counter()
      for _ in range(config.batches):
        next(batches)
      seconds = time.perf_counter() - begin
      speed[side].append(config.batches * config.batch * config.T / seconds)
    run.say(f"turn {turn + 1}/{config.turns}: " + _medians(speed))
  return speed


def _medians(speed):
  """'ours 20.0M tokens/s; grain 5.0M tokens/s, ours is 4.00 of it', medians over the turns."""
  (ours, first), *_ = speed.items()
  ratio = {side: statistics.median(a / b for a, b in zip(first, of)) for side, of in speed.items()}
  return "; ".join(
      f"{side} {statistics.median(of) / 1e6:.1f}M tokens/s"
      + (f", {ours} is {ratio[side]:.2f} of it" if side != ours else "")
      for side, of in speed.items()
  )


def _grain(plan, config, folder):
  """IterDataset.mix of the same shards, repeated, read by the caller's thread.

  Not shuffled: its shuffle works on 16 bits at least, 2 ms a row for sources this small.
  """
  del folder
  import grain

  here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  sources = [
      grain.MapDataset.source(loader.in_order(manifest)).repeat().to_iter_dataset(here)
      for manifest in loader.planned(plan)
  ]
  mixed = grain.IterDataset.mix(sources, list(mixture.drawn(plan).values()))
  return iter(mixed.batch(config.batch, batch_fn=lambda records: _decoded(records, config)))


def _datasets(plan, config, folder):
  """interleave_datasets of streamed parquet files: one binary column, the same records."""
  def columns(manifest):
    return dict(row=list(loader.in_order(manifest)))

  mixed = _interleaved(plan, folder / "binary", columns)
  records = (example["row"] for example in mixed)
  while True:
    yield _decoded(list(itertools.islice(records, config.batch)), config)


def _datasets_lists(plan, config, folder):
  """The same with a list of numbers a field, as a tokenised dataset is usually stored."""
  names = [name for name, _ in loader.FIELDS]

  def columns(manifest):
    rows = [np.split(np.frombuffer(record, np.uint8), [4 * (config.T + 1), 6 * (config.T + 1)])
            for record in loader.in_order(manifest)]
    return {name: [row[field].view(kind) for row in rows]
            for field, (name, kind) in enumerate(loader.FIELDS)}

  mixed = _interleaved(plan, folder / "lists", columns, "numpy")
  while True:
    rows = list(itertools.islice(mixed, config.batch))
    token, segment, weight = (np.stack([row[name] for row in rows]) for name in names)
    segment_BT = segment[:, :-1].astype(np.int32)
    yield dict(token_BT=token[:, :-1].astype(np.int32), target_BT=token[:, 1:].astype(np.int32),
               segment_BT=segment_BT, position_BT=loader.positions(segment_BT),
               weight_BT=weight[:, 1:].astype(np.float32))


def _interleaved(plan, folder, columns, kind=None):
  """Examples without end of parquet files, one a source, drawn in the plan's shares."""
  os.environ |= dict(HF_HOME=str(folder / "hub"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
  import datasets
  import pyarrow
  from pyarrow import parquet

  datasets.disable_progress_bars()
  sources = []
  folder.mkdir()
  for index, manifest in enumerate(loader.planned(plan)):
    path = folder / f"{index}.parquet"
    parquet.write_table(pyarrow.table(columns(manifest)), path)
    sources.append(datasets.load_dataset(
        "parquet", data_files=str(path), split="train", streaming=True))
  width = np.array(list(mixture.drawn(plan).values()))
  mixed = datasets.interleave_datasets(
      sources, list(width / width.sum()), seed=SEED, stopping_strategy="all_exhausted")
  return itertools.chain.from_iterable(itertools.repeat(mixed.with_format(kind)))


def _decoded(records, config):
  return loader.decoded(records, np.zeros(config.batch, np.int32), config.T)


# By name, which begins with the package they need.
SIDES = {"grain": _grain, "datasets": _datasets, "datasets lists": _datasets_lists}
