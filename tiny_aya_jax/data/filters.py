"""What clean.py does to documents: datatrove's steps, told what our languages need.

Each class says what differs from datatrove's own. Words come from identify.words, never from
datatrove's tokenizers, which download models. MinHash shingles are character 5-grams of the
lower-cased text without punctuation, digits and diacritics kept: they carry meaning here (dates,
vowel signs), and "word" means little in a third of the scripts.

A step counts what it drops, and keeps samples of it, in a `Dropped`; the report adds those up.
"""

import collections
import functools
import gzip
import hashlib
import heapq
import importlib
import json
import math
import multiprocessing
import numbers
import os
import pathlib
import unicodedata

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.pipeline.filters.url_filter import URLFilter
from datatrove.pipeline.formatters.pii import PIIFormatter
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.text import TextNormConfig, ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger
import numpy as np
import regex

from tiny_aya_jax import run
from tiny_aya_jax.data import identify, text

KEPT_FIELDS = ("id", "url", "date", "licence", "license")  # of a record, if they are strings
NORMALISED = TextNormConfig(norm_numbers=False, norm_unicode_diacritics=False)
HASH = HashConfig(hash_fc="sha1")  # datatrove's default needs xxhash, whose versions differ
CHARACTERS_A_WORD = 3  # of an unspaced script, about: its n-grams are so many times longer
LINE_END = regex.compile(r"\r\n|[\r\f\v\x85]")
CONTROL = regex.compile(r"[\p{Cc}\p{Cs}--[\n\t]]|\ufeff", regex.VERSION1)
EXCERPT = 300  # characters of a dropped document that the report shows


class Dropped:
  """datatrove's exclusion writer: counts documents and bytes by reason, keeps samples.

  The samples are those of the smallest hash: the same ones for any number of tasks.
  """

  def __init__(self, path, samples, reason=None):
    self.path, self.samples, self.reason = pathlib.Path(path), samples, reason
    self.found = {}

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind is None and self.found:
      for found in self.found.values():
        found["samples"] = sorted(found["samples"], reverse=True)
      run.write_json(self.path, self.found)

  def write(self, document, rank=0):
    del rank
    reason = self.reason(document) if self.reason else document.metadata["filter_reason"]
    self.add(reason, document.id, document.text, document.metadata.get("note", ""))

  def add(self, reason, name, content, note="", unit="documents"):
    """`unit`: what `content` is, a document or some of its 'lines'."""
    found = self.found.setdefault(reason, {unit: 0, "bytes": 0, "samples": []})
    found[unit] += 1
    found["bytes"] += len(content.encode())
    sample = (-_hash(name + content), name, content[:EXCERPT], note)
    (heapq.heappush if len(found["samples"]) < self.samples else heapq.heappushpop)(
        found["samples"], sample)


def _hash(content):
  return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


class Read(PipelineStep):
  """The documents of one shard; what is malformed is counted. See text.py for the formats."""

  type, name = "reader", "text"

  def __init__(self, shard, dropped, counts):
    super().__init__()
    self.shard, self.dropped, self.counts = shard, dropped, counts

  def run(self, data=None, rank=0, world_size=1):
    read = dict(documents=0, bytes=0)
    with self.dropped as dropped:
      for number, record in enumerate(self.shard.records()):
        document = self._document(record, number, dropped)
        if document:
          read["documents"] += 1
          read["bytes"] += len(document.text.encode())
          yield document
      # What is malformed was read, too.
      read["documents"] += sum(found["documents"] for found in dropped.found.values())
    run.write_json(self.counts, read)

  def _document(self, record, number, dropped):
    name = f"{self.shard.name}/{number}"
    if isinstance(record, text.Malformed) or "messages" in record:
      if self.shard.counts_malformed:
        reason = record.reason if isinstance(record, text.Malformed) else "conversation"
        dropped.add(reason, name, str(record))
    elif not self.shard.split or identify.han(record["text"]) == self.shard.code:
      kept = {key: record[key] for key in KEPT_FIELDS if isinstance(record.get(key), str)}
      return Document(record["text"], kept.pop("id", name), metadata=kept)
    return None


def tidy(content):
  """Without control characters and byte-order marks; every line's end is a newline."""
  return CONTROL.sub("", LINE_END.sub("\n", content))


class Tidy(BaseFilter):
  """`tidy`, and a document that has nothing else is empty."""

  name = "tidy"

  def filter(self, document):
    document.text = tidy(document.text)
    return bool(document.text.strip()) or (False, "empty")


class Mask(PipelineStep):
  """E-mail and public IP addresses replaced by datatrove's examples, and the documents counted.

  datatrove's expression takes quadratic time on a long word, and minutes on an image in base64: it
  is given only what may be an address, at most 64 characters before the @ and 255 behind.
  """

  type, name = "formatter", "mask"
  ADDRESS = regex.compile(
      r"[^\s@]{1,64}@[^\s@]{1,255}|(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)")

  def __init__(self, path):
    super().__init__()
    self.pii, self.path = PIIFormatter(), path

  def run(self, data, rank=0, world_size=1):
    masked = 0
    for document in data:
      content = self.ADDRESS.sub(lambda found: self.pii.format(found[0]), document.text)
      masked += content != document.text
      document.text = content
      yield document
    run.write_json(self.path, dict(masked=masked))


def urls(blocked, dropped):
  """datatrove's lists and more domains; read once a process, for they are millions."""
  step = _urls(tuple(domain.lower() for domain in blocked))
  step.exclusion_writer = dropped
  return step


@functools.cache
def _urls(blocked):
  return Urls(extra_domains=blocked)


class Urls(URLFilter):
  """datatrove's block lists. A document without url passes; nothing is downloaded."""

  def __init__(self, **options):
    from tldextract import TLDExtract

    super().__init__(**options)
    self.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)

  def filter(self, document):
    url = document.metadata.get("url")
    if not url:
      return True
    found = super().filter(Document("", "", metadata=dict(url=url.lower())))
    return found if found is True else (False, f"url: {found[1]}")


class Script(BaseFilter):
  """Drops a document that has fewer than `share` of its letters in its language's script."""

  def __init__(self, script, share, dropped):
    super().__init__(dropped)
    self.script, self.share = script, share

  def filter(self, document):
    share = identify.script_share(document.text, self.script)
    return share >= self.share or _because(document, "script", f"{share:.2f} {self.script}")


def _because(document, reason, note):
  """What a filter returns of a document it drops; the note stands by its sample."""
  document.metadata["note"] = note
  return False, reason


class Veto(BaseFilter):
  """Drops a document, or with `lines` only its lines, whose language is another by a margin."""

  def __init__(self, language, identifier, margin, lines, dropped):
    super().__init__(dropped)
    self.language, self.identifier, self.margin, self.lines = language, identifier, margin, lines

  def filter(self, document):
    if self.lines:
      return self._cut(document)
    label = self._other(document.text)
    return not label or _because(document, "language", label)

  def _cut(self, document):
    kept = []
    for line in document.text.split("\n"):
      if label := line.strip() and self._other(line):
        self.exclusion_writer.add("lines in another language", document.id, line, label, "lines")
      else:
        kept.append(line)
    document.text = "\n".join(kept)
    return bool(document.text.strip()) or (False, "language")

  def _other(self, content):
    """The label that speaks against the language, or None."""
    margin, label = identify.identifier(self.identifier).margin(content, self.language)
    return f"{label} by {margin:.1f}" if margin > self.margin else None


class Words(WordTokenizer):
  """Our words behind datatrove's interface."""

  def __init__(self, script):
    super().__init__(script)

  def word_tokenize(self, text):
    return identify.words(text, self.language)

  def sent_tokenize(self, text):
    raise NotImplementedError("no filter here asks for sentences")

  span_tokenize = sent_tokenize

  # split_into_parts caches by tokenizer, and tasks are copied.
  def __eq__(self, other):
    return isinstance(other, Words) and self.language == other.language

  def __hash__(self):
    return hash(self.language)


class StopWords(BaseFilter):
  """Drops a document with fewer than `least` different stop words, looked for as words or, in
  identify.SUBSTRINGS, anywhere."""

  def __init__(self, stop_words, least, script, dropped):
    super().__init__(dropped)
    self.stop_words, self.least, self.script = frozenset(stop_words), least, script

  def filter(self, document):
    content = document.text.lower()
    if self.script in identify.SUBSTRINGS:
      found = sum(word in content for word in self.stop_words)
    else:
      found = len(self.stop_words.intersection(identify.words(content, self.script)))
    return found >= self.least or _because(document, "stop words", f"{found} found")


def heuristics(script, settings, dropped):
  """datatrove's Gopher and FineWeb filters with a language's thresholds.

  settings: dict(repetition, quality, lines) of keyword arguments of each, stop_words,
  min_stop_words, repetition_words. dropped: a function step name -> Dropped.
  """
  quality, repetition = dict(settings["quality"]), dict(settings["repetition"])
  if script in identify.UNSPACED:  # a word is a character: its length says nothing
    quality.update(min_avg_word_length=None, max_avg_word_length=None)
    for name, spaces in (("top_n_grams", 2), ("dup_n_grams", 1)):  # the former counts them
      repetition[name] = [(n * CHARACTERS_A_WORD, share * spaces) for n, share in repetition[name]]
  words = Words(script)
  yield Repetition(settings["repetition_words"], **repetition, language=words,
                   exclusion_writer=dropped("repetition"))
  yield GopherQualityFilter(
      **quality, min_stop_words=None, language=words, exclusion_writer=dropped("quality"))
  yield FineWebQualityFilter(**settings["lines"], language=words, exclusion_writer=dropped("lines"))
  if settings["stop_words"] and settings["min_stop_words"]:
    yield StopWords(settings["stop_words"], settings["min_stop_words"], script,
                    dropped("stop_words"))


class Repetition(GopherRepetitionFilter):
  """Shares of repeated n-grams say nothing about a few words: those documents pass.

  n-grams, most of datatrove's time, are counted only where a bound from the words alone does not
  settle it. The first of each distinct word is no part of a repeated n-gram, so those hold at most
  the rest. And an n-gram is no more frequent than any of its words, so that n times the most that
  one word takes up, with its space, bounds what the top n-gram does.
  """

  def __init__(self, least_words, **options):
    super().__init__(**options)
    self.least_words = least_words
    self.shares = dict(top=self.top_n_grams, dup=self.dup_n_grams)

  def filter(self, document):
    script = self.language.language
    words = identify.words(document.text, script)
    if len(words) < self.least_words * (CHARACTERS_A_WORD if script in identify.UNSPACED else 1):
      return True
    count = collections.Counter(words)
    rest = sum(len(word) * (times - 1) for word, times in count.items())
    most = max((len(word) + 1) * times for word, times in count.items())
    size = len(document.text)
    self.top_n_grams = [(n, share) for n, share in self.shares["top"] if n * most > share * size]
    self.dup_n_grams = [(n, share) for n, share in self.shares["dup"] if rest > share * size]
    return super().filter(document)


class Classify(BaseFilter):
  """Keeps documents that a classifier of the user's gives at least `threshold`.

  classifier: 'package.module:function', called as function(texts, code) -> scores, a batch at once.
  """

  def __init__(self, classifier, threshold, code, dropped):
    super().__init__(dropped, batch_size=64)
    self.classifier, self.threshold, self.code = classifier, threshold, code

  def filter(self, document):
    return self.filter_batch([document])[0]

  def filter_batch(self, batch):
    scores = list(hook(self.classifier)([document.text for document in batch], self.code))
    if len(scores) != len(batch) or any(not _number(score) for score in scores):
      raise run.Refused(
          f"{self.classifier} gave {scores!r:.60} for {len(batch)} documents: expected numbers")
    return [score >= self.threshold or _because(document, "classifier", f"{float(score):.3f}")
            for document, score in zip(batch, scores)]


def _number(value):
  return isinstance(value, numbers.Real) and not math.isnan(value)


@functools.cache
def hook(name):
  """'package.module:function' -> the function."""
  module, _, function = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), function)
  except Exception as error:  # whatever the user's module does when it is imported
    raise run.Refused(
        f"classifier {name!r} is no 'package.module:function' that can be imported ({error})"
    ) from None
  if not callable(found):
    raise run.Refused(f"classifier {name!r} is a {type(found).__name__}, expected a function")
  return found


class Decontaminate(NGramsDecontFilter):
  """Drops a document that shares an n-gram of words with a test set. See `index`."""

  def __init__(self, folder, n, script, dropped):
    config = NGramsDecontConfig(_ngram_words(n, script), hash_config=HASH, norm_config=NORMALISED)
    super().__init__(str(_index_folder(folder, script)), config, dropped, Words(script))

  def filter(self, document):
    probe = Document(_composed(document.text), document.id)
    found = super().filter(probe)
    return found if found is True else _because(
        document, "test set", probe.metadata["contaminated_task"])


def _composed(content):
  """NFC: a letter and its accent are one in both the text and the test."""
  return unicodedata.normalize("NFC", content)


def index(tests, folder, n):
  """{name: texts of a test set} -> datatrove's index in `folder`, for spaced and unspaced scripts.

  Returns how many texts of each are too short for a single n-gram, and so cannot be found.
  """
  findable = {name: set() for name in tests}
  for script in ("Latn", "Thai"):
    place, size = _index_folder(folder, script), _ngram_words(n, script)
    place.mkdir(parents=True, exist_ok=True)
    hashed = create_hash_func(HASH)
    for name, texts in tests.items():
      hashes = set()
      for number, content in enumerate(texts):
        words = identify.words(simplify_text(_composed(tidy(content)), NORMALISED), script)
        grams = {hashed(" ".join(gram)) for gram in ngrams(words, size)}
        hashes |= grams
        if grams:
          findable[name].add(number)
      np.array(sorted(hashes), np.uint64).tofile(place / f"{name}.index.hashes")
  return {name: len(texts) - len(findable[name]) for name, texts in tests.items()}


def _index_folder(folder, script):
  return pathlib.Path(folder) / ("unspaced" if script in identify.UNSPACED else "spaced")


def _ngram_words(n, script):
  return n * CHARACTERS_A_WORD if script in identify.UNSPACED else n


class Signature(minhash.MinhashDedupSignature):
  """datatrove's, with shingles hashed in NumPy and permutations modulo 2^64 instead of 2^61 - 1: a
  hundred times as fast, and in bounded memory for a document of any length."""

  BLOCK = 512  # shingles: 112 permutations of them stay in the cache

  def __init__(self, folder, config, whole):
    """`whole`: punctuation counts too, as in code, where little else may differ."""
    super().__init__(folder, config, Words("Latn"))  # it asks for words, which are not used
    self.whole = whole

  def get_shingles(self, text):
    """Distinct hashed character n-grams, uint64 [n]; of a shorter text, its one padded n-gram."""
    n = self.config.n_grams
    content = text if self.whole else simplify_text(text, self.config.norm_config)
    content = (content or text).ljust(n, "\0")  # a text of punctuation is that
    character = np.frombuffer(content.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    grams = np.zeros(len(character) - n + 1, np.uint64)
    for i in range(n):
      grams = _mixed(grams + character[i : len(grams) + i])
    return np.unique(grams)

  def get_signature(self, shingles):
    a, b = self.parameters
    a = a | np.uint64(1)
    least = np.full(self.num_hashes, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), self.BLOCK):
      hashed = shingles[start : start + self.BLOCK, None] * a + b
      np.minimum(least, hashed.min(axis=0), out=least)
    # datatrove reads signatures up to 2^61 - 1
    return [bucket.tolist() for bucket in np.split(least >> np.uint64(3), self.config.num_buckets)]


def _mixed(x):
  """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


class Hashes(PipelineStep):
  """Writes each document's hash, in order: which near duplicates are exact ones."""

  type, name = "dedup", "hashes"

  def __init__(self, path):
    super().__init__()
    self.path = pathlib.Path(path)

  def run(self, data, rank=0, world_size=1):
    hashes = []
    for document in data:
      hashes.append(_hash(document.text))
      yield document
    self.path.parent.mkdir(parents=True, exist_ok=True)
    np.array(hashes, np.uint64).tofile(self.path)


def minhash_config(settings):
  return minhash.MinhashConfig(
      n_grams=settings["n_grams"], num_buckets=settings["buckets"],
      hashes_per_bucket=settings["hashes"], norm_config=NORMALISED, hash_config=HASH,
  )


class Write(PipelineStep):
  """Documents -> one .jsonl.gz, whole or not at all, the same bytes for the same documents."""

  type, name = "writer", "jsonl"

  def __init__(self, path, counts):
    super().__init__()
    self.path, self.counts = pathlib.Path(path), counts

  def run(self, data, rank=0, world_size=1):
    counts, licences = dict(documents=0, bytes=0), {}
    self.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = self.path.with_name(f".{self.path.name}.tmp{os.getpid()}")
    with open(temporary, "wb") as raw, gzip.GzipFile("", "wb", 5, raw, mtime=0) as file:
      for document in data:
        fields = {key: document.metadata[key] for key in KEPT_FIELDS if key in document.metadata}
        record = dict(id=document.id, **fields, text=document.text)
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        counts["documents"] += 1
        counts["bytes"] += len(document.text.encode())
        licence = fields.get("licence", fields.get("license", ""))
        licences[licence] = licences.get(licence, 0) + 1
        yield document
    os.replace(temporary, self.path)
    run.write_json(self.counts, counts | dict(licences=licences))


class Shards(PipelineStep):
  """Task number `rank` runs the steps that build(rank) gives, one after the other."""

  type, name = "clean", "shard"

  def __init__(self, build):
    super().__init__()
    self.build = build

  def run(self, data=None, rank=0, world_size=1):
    for step in self.build(rank):
      data = step.run(data, rank, world_size)
    for _ in data or ():
      pass


class Match(PipelineStep):
  """The buckets of one language's signatures -> pairs of like documents."""

  type, name = "dedup", "match"

  def __init__(self, signatures, pairs, config, buckets):
    super().__init__()
    self.signatures, self.pairs, self.config, self.buckets = signatures, pairs, config, buckets

  def run(self, data=None, rank=0, world_size=1):
    step = minhash.MinhashDedupBuckets(
        self.signatures, self.pairs, config=self.config, lines_to_buffer=1000)
    for bucket in self.buckets:
      step.run(None, bucket, self.config.num_buckets)


class Exact:
  """A duplicate's name: 'exact duplicate' if another document of its language is the same."""

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)

  @functools.cached_property
  def repeated(self):
    files = [np.fromfile(path, np.uint64) for path in sorted(self.folder.iterdir())]
    hashes, counts = np.unique(np.concatenate(files), return_counts=True)
    return frozenset(hashes[counts > 1].tolist())

  def __call__(self, document):
    return ("exact" if _hash(document.text) in self.repeated else "near") + " duplicate"


class Call(PipelineStep):
  """A function as a step of one task."""

  type, name = "clean", "call"

  def __init__(self, function):
    super().__init__()
    self.function = function

  def run(self, data=None, rank=0, world_size=1):
    self.function()


def executor(kind, settings, name, pipeline, tasks, logs, depends):
  """A stage's datatrove executor: kind is 'local', 'slurm' or 'ray'."""
  common = dict(pipeline=pipeline, tasks=tasks, logging_dir=logs, depends=depends)
  if kind == "local":
    return Local(workers=min(settings["workers"], tasks), **common)
  if kind == "ray":
    from datatrove.executor import RayPipelineExecutor

    return RayPipelineExecutor(workers=settings["workers"], **common)
  from datatrove.executor import SlurmPipelineExecutor

  slurm = settings["slurm"]
  return SlurmPipelineExecutor(
      workers=settings["workers"], job_name=f"clean-{name}", time=slurm["time"],
      partition=slurm["partition"], mem_per_cpu_gb=slurm["mem_per_cpu_gb"], qos=slurm["qos"],
      venv_path=slurm["venv"], mail_type="NONE", **common)


@functools.cache  # handlers stay
def _end_forks():
  """datatrove starts a server process for its queues, which would outlive a killed call."""
  os.register_at_fork(after_in_child=run.end_with)


class Local(LocalPipelineExecutor):
  """Without datatrove's logs: what it raises reaches the terminal all the same."""

  def run(self):
    logger.disable("datatrove")
    _end_forks()
    return super().run()

  def _run_for_rank(self, rank, local_rank=0, node_rank=-1):
    logger.disable("datatrove")  # in the task's process
    if multiprocessing.parent_process():
      run.end_with()
    return super()._run_for_rank(rank, local_rank, node_rank)
