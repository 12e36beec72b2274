"""Verb pack: documents, conversations or pairs -> rows of T+1 tokens and a manifest, once, offline.

Writes WORKDIR/<stage>/<code>/<source>/{rows-00000-of-000NN.array_record, manifest.json}; the row is
described in loader.py, the ids in tokenizer.py and chat.py. A source appears whole or not at all:
it is written into a hidden folder beside its place and renamed. The hidden folders of all sources
are there from the start, and a stage that holds one is refused by whoever reads it, so a killed or
refused pack is never trained on by mistake; called again, it goes on with what is left.

The law: no token lost or invented. The rows hold exactly the tokens of the kept documents, once
each; what is not kept is counted under "dropped". A plain document is BOS + text + EOS and its
first token has weight 0. Where it does not fit, it is split: the continuation has no BOS, starts
at position 0 and pays for it with weight 0 on its first token. A continuation of one token is
therefore never trained on, but it is kept and counted: "trained" beside "tokens" says how many
tokens are targets. A pair is two conversations, two segments of one row, so that a batch always
holds both; at most `config.pairs` of them a row.
"""

import bisect
import collections
import concurrent.futures
import hashlib
import multiprocessing
import os
import pathlib
import shutil

import numpy as np

from tiny_aya_jax import languages
from tiny_aya_jax import run
from tiny_aya_jax.data import chat
from tiny_aya_jax.data import loader
from tiny_aya_jax.data import rules
from tiny_aya_jax.data import shards
from tiny_aya_jax.data import text
from tiny_aya_jax.data import tokenizer as tokenizers

read_manifests = loader.read_manifests
check_shards = loader.check_shards

SMALLEST_T = 8
LARGEST_T = (1 << 16) - 2  # a row's segments are numbered in 16 bits, the smallest is one token
WINDOW = 1 << 22  # tokens that best_fit arranges at once: 20 MB, 512 rows at T 8192
TOGETHER = 1 << 20  # characters handed to the tokenizer at once
TOO_LONG = "longer than T+1"
EQUAL = "equal sides"


def main(config, workdir):
  """Packs each source of `config.text` in the wanted languages; prints one table."""
  _check(config, workdir)
  tokenizer_sha256 = tokenizers.load(config.tokenizer).sha256
  jobs = [
      _Job(code, source, paths, os.path.join(workdir, config.stage, code, source),
           _inputs(config, code, source, paths, tokenizer_sha256))
      for code, sources in _wanted(config).items()
      for source, paths in sorted(sources.items())
  ]  # fmt: skip
  due = [job for job in jobs if not _done(job, config.overwrite)]
  for job in due:
    shards.hidden(job.folder).mkdir(parents=True, exist_ok=True)
  _pack_all(due, config)
  manifests = [
      run.read_json(os.path.join(job.folder, "manifest.json"), "packed rows")
      for job in jobs
      if os.path.exists(os.path.join(job.folder, "manifest.json"))
  ]
  if not manifests:
    raise run.Refused(f"{config.text} has no documents at all: there is nothing to pack")
  for line in table(manifests):
    run.say(line)
  whole = _say_others(pathlib.Path(workdir) / config.stage, jobs)
  if not due and whole:
    run.say(f"up to date: {pathlib.Path(workdir) / config.stage}")
  return run.EXIT["done"]


_Job = collections.namedtuple("_Job", "code source paths folder inputs")


def _say_others(stage, jobs):
  """Names the sources of the stage that this call was not asked for; False if it is not whole."""
  ours = {(job.code, job.source) for job in jobs}
  found = sorted(path.parts[-3:-1] for path in stage.glob("*/*/manifest.json"))
  others = ["/".join(place) for place in found if place not in ours]
  if others:
    run.say(
        f"{stage} also holds {len(others)} sources that this call did not pack, and training draws "
        f"from them: {', '.join(others)}; remove their folders if they are stale"
    )
  unfinished = loader.unfinished(stage)
  if unfinished:
    run.say(f"{stage} is not whole: {', '.join(map(str, unfinished))} of another call are still to "
            "be packed; remove what is not wanted any more")
  return not unfinished


def _check(config, workdir):
  for what, path in (("workdir", workdir), ("config.text", config.text),
                     ("config.tokenizer", config.tokenizer)):  # fmt: skip
    if not path:
      raise run.Refused(f"pack needs --{what}")
    loader.local(path, what)
  run.choose("config.packing", config.packing, PACKINGS)
  if not SMALLEST_T <= config.T <= LARGEST_T:
    raise run.Refused(f"config.T is {config.T}: rows have {SMALLEST_T} to {LARGEST_T} positions")
  if config.rows_per_shard < 1 or config.processes < 0:
    raise run.Refused(
        f"config.rows_per_shard is {config.rows_per_shard} and config.processes is "
        f"{config.processes}: expected at least 1 and at least 0"
    )
  if not 0 <= config.pairs <= config.T // 2:
    raise run.Refused(f"config.pairs is {config.pairs}: expected 0 (no pairs) to {config.T // 2}")
  if config.pairs and config.packing != "best_fit":
    raise run.Refused("pairs are packed whole: give --config.packing=best_fit")
  run.plain_name("stage", config.stage)
  run.choose("config.part", config.part, ("all", "train", "held_out"))
  if not 0 <= config.held_out < 1 or (config.part == "all") != (config.held_out == 0):
    raise run.Refused(f"config.part is {config.part!r} and config.held_out is {config.held_out}: expected "
                      "all and 0, or train or held_out and the share that is held out, such as 0.05")


def _wanted(config):
  languages.select(config.languages)  # an unknown name is refused before any text is looked at
  found = text.languages(config.text)
  if not found:
    raise run.Refused(f"{config.text} has no documents at all: there is nothing to pack")
  return {code: found[code] for code in rules.present(config.languages, found)}


def _inputs(config, code, source, paths, tokenizer_sha256):
  """Fingerprint of everything the rows depend on."""
  return run.fingerprint(
      dict(
          version=loader.VERSION,
          T=config.T,
          packing=config.packing,
          **(dict(pairs=config.pairs) if config.pairs else {}),
          **(dict(part=[config.part, config.held_out]) if config.held_out else {}),
          licence=_licence(config.text, config.licence, code, source),
          rows_per_shard=config.rows_per_shard,
          tokenizer=tokenizer_sha256,
          text=text.fingerprint(config.text, paths),
      )
  )


def _licence(folder, given, code, source):
  """config.licence, or what clean noted."""
  return given if given is not None else text.licence(folder, code, source)


def _done(job, overwrite):
  """Whether the source is packed from these inputs, and its rows are still there in full size."""
  if not run.up_to_date(os.path.join(job.folder, "manifest.json"), job.inputs, overwrite):
    return False
  if shards.hidden(job.folder).exists():  # an overwriting call was killed
    return False
  try:
    loader.read_manifest(job.folder)
  except run.Refused as refusal:
    run.say(f"packed again: {refusal}")
    return False
  return True


def _pack_all(jobs, config):
  arguments = [(job, config.to_dict()) for job in jobs]
  if config.processes == 0:
    for argument in run.progress(arguments, "pack"):
      pack_source(*argument)
    return
  # 'spawn': a forked child would inherit the progress bar's thread and its locks.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(config.processes, context, run.end_with) as pool:
    futures = [pool.submit(pack_source, *argument) for argument in arguments]
    try:
      finished = concurrent.futures.as_completed(futures)
      for future in run.progress(finished, "pack", total=len(futures)):
        future.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def pack_source(job, config):
  """Packs one source into job.folder; a source without documents leaves nothing but a line."""
  folder, hidden = pathlib.Path(job.folder), shards.hidden(job.folder)
  shards.empty(hidden)  # of what a killed pack left
  try:
    manifest = _write_source(job, config, hidden)
  except BaseException as error:
    shards.empty(hidden)
    if isinstance(error, run.Refused):
      raise run.Refused(f"{job.code}/{job.source}: {error}") from error
    raise
  if manifest["rows"]:
    run.write_json(hidden / "manifest.json", manifest)
    shards.replace(folder, hidden)
  else:
    shutil.rmtree(folder, ignore_errors=True)  # with overwrite: rows of text that is gone
    shutil.rmtree(hidden)
    run.say(f"{job.code}/{job.source}: no document to pack (dropped: {manifest['dropped']})")


def _write_source(job, config, folder):
  tokenizer, length = tokenizers.load(config["tokenizer"]), config["T"] + 1
  count = collections.Counter()
  documents = _part(text.read(config["text"], job.code, job.source), config)
  documents = _encoded(documents, tokenizer, config, count)
  if config["pairs"]:
    rows = best_fit(documents, length, count, most=config["pairs"])
  else:
    rows = PACKINGS[config["packing"]](documents, length, count)
  written = write_shards(rows, length, folder, config["rows_per_shard"], count)
  return dict(
      version=loader.VERSION,
      language=job.code,
      source=job.source,
      licence=_licence(config["text"], config["licence"], job.code, job.source),
      T=config["T"],
      rows=count["rows"],
      fields=loader.PAIRS if config["pairs"] else loader.FIELDS,
      **(dict(pairs=config["pairs"]) if config["pairs"] else {}),
      tokenizer_sha256=tokenizer.sha256,
      tokens=count["tokens"],
      trained=count["trained"],
      bytes=count["bytes"],
      documents=count["documents"],
      truncated=count["truncated"],
      dropped={reason: count[reason] for reason in (TOO_LONG, EQUAL) if count[reason]},
      shards=written,
      packing=config["packing"],
      inputs=job.inputs,
  )


def _part(documents, config):
  """Of a split, the documents of config.part: by a hash of the text or of the first question, so that
  equal questions are on one side, in every language and source."""
  def held_out(document):
    messages = document["messages"] if isinstance(document, dict) else document
    said = document if _is_text(document) else next(
        (turn["content"] for turn in messages if turn["role"] == "user"), "")
    return int(hashlib.sha256(said.encode()).hexdigest()[:8], 16) < config["held_out"] * 2**32

  if config["part"] == "all":
    return documents
  return (document for document in documents if held_out(document) == (config["part"] == "held_out"))


def _encoded(documents, tokenizer, config, count):
  """Documents -> (token uint32 [n], weight uint8 [n]) of each, of a pair also side uint8 [n]; counts
  documents, bytes, dropped."""
  bos, eos = tokenizer.special("<BOS_TOKEN>"), tokenizer.special("<EOS_TOKEN>")
  for together in _together(documents):
    plain = iter(tokenizer.encode_many([document for document in together if _is_text(document)]))
    for document in together:
      _check_kind(document, config)
      if _is_text(document):
        token = np.array([bos, *next(plain), eos], np.uint32)
        weight = np.ones(len(token), np.uint8)
        weight[0] = 0
        piece = token, weight
      else:
        piece = (_pair if config["pairs"] else _conversation)(document, tokenizer, config)
        # Split, its later part would be answers without their prompt.
        if why := EQUAL if piece is None else TOO_LONG if len(piece[0]) > config["T"] + 1 else None:
          count[why] += 1
          continue
      count["documents"] += 1
      count["bytes"] += _bytes(document)
      yield piece


def _check_kind(document, config):
  if isinstance(document, dict) != bool(config["pairs"]):
    raise run.Refused(
        "text of pairs (chosen, rejected) is packed with --config.pairs=16 or so, the most a row"
        if isinstance(document, dict) else
        f"config.pairs is {config['pairs']}, and the text holds documents that are no pairs: give "
        "--config.pairs=0, or pack pairs in a stage of their own")


def _pair(document, tokenizer, config):
  """Both sides, one behind the other: (token, weight, side), or None if they are the same ids."""
  sides = [
      _conversation([*document["messages"], dict(role="assistant", content=document[answer])],
                    tokenizer, config)
      for answer in text.ANSWERS
  ]
  (chosen, _), (rejected, _) = sides
  if np.array_equal(chosen, rejected):
    return None
  for _, weight in sides:  # earlier answers are the same on both sides: they say nothing
    weight[: len(weight) - _answered(weight)] = 0
  side = np.repeat(np.array([1, 2], np.uint8), [len(chosen), len(rejected)])
  return *map(np.concatenate, zip(*sides)), side


def _answered(weight):
  """How many tokens at the end have weight: the last answer."""
  return int(np.argmin(weight[::-1])) if not weight.all() else len(weight)


def _conversation(messages, tokenizer, config):
  if config["packing"] == "split":
    raise run.Refused(
        "packing 'split' would cut conversations from their prompts: "
        "give --config.packing=best_fit, which keeps them whole"
    )
  token, weight = chat.encode(tokenizer, messages)
  return np.array(token, np.uint32), np.array(weight, np.uint8)


def _is_text(document):
  return isinstance(document, str)


def _bytes(document):
  if _is_text(document):
    return len(document.encode())
  if isinstance(document, dict):
    return _bytes(document["messages"]) + sum(len(document[side].encode()) for side in text.ANSWERS)
  return sum(len(message["content"].encode()) for message in document)


def _together(documents):
  """Lists of documents of about a million characters: enough for the tokenizer's threads."""
  held, size = [], 0
  for document in documents:
    held.append(document)
    size += len(document) if _is_text(document) else 0
    if size >= TOGETHER or len(held) >= 4096:
      yield held
      held, size = [], 0
  if held:
    yield held


def split(documents, length, count):
  """Documents end to end, cut every `length` tokens: all rows full but the last.

  documents: iterable of (token [n], weight [n]); a row is a list of such pieces, its segments.
  """
  row, space = [], length
  for token, weight in documents:
    first = min(space, len(token))
    ends = [*range(first, len(token), length), len(token)]
    count["truncated"] += len(ends) > 1
    for start, end in zip([0, *ends], ends):
      row.append(_piece(token, weight, start=start, end=end))
      space -= end - start
      if not space:
        yield row
        row, space = [], length
  if row:
    yield row


def best_fit(documents, length, count, most=None):
  """Whole documents into rows; one longer than a row is split into full rows and a rest.

  Best fit, the longest first, over WINDOW tokens at a time; most: documents a row. Measured on conversations at T 512 to
  2048: longest-first fills rows to 91 to 99%, the order of the file to 79 to 95%.
  """
  pieces, size = [], 0
  for document in documents:
    starts = range(0, len(document[0]), length)
    count["truncated"] += len(starts) > 1
    pieces += [_piece(*document, start=start, end=start + length) for start in starts]
    size += len(document[0])
    if size >= WINDOW:
      yield from _fitted(pieces, length, most or length)
      pieces, size = [], 0
  yield from _fitted(pieces, length, most or length)


def _fitted(pieces, length, most):
  """Pieces -> rows, each piece into the row with the least space that still holds it."""
  rows, spaces = [], []  # spaces: sorted (space left, row)
  for piece in sorted(pieces, key=lambda piece: -len(piece[0])):
    size = len(piece[0])
    best = bisect.bisect_left(spaces, (size, 0))
    if best == len(spaces):
      spaces.append((length, len(rows)))
      rows.append([])
    space, row = spaces.pop(best)
    rows[row].append(piece)
    if space > size and len(rows[row]) < most:
      bisect.insort(spaces, (space - size, row))
  return rows


PACKINGS = dict(split=split, best_fit=best_fit)


def _piece(token, weight, *side, start, end):
  """Tokens start..end of a document as a segment: its first token is nothing's target."""
  weight = weight[start:end].copy()
  weight[0] = 0
  return token[start:end], weight, *(part[start:end] for part in side)


def write_shards(rows, length, folder, rows_per_shard, count):
  """Writes the rows, and counts them; -> the manifest's shards."""
  def records():
    for row in rows:
      yield row_bytes(row, length)
      count["rows"] += 1
      count["tokens"] += sum(len(token) for token, *_ in row)
      count["trained"] += sum(int(weight.sum()) for _, weight, *_ in row)

  return shards.write(records(), folder, rows_per_shard)


def row_bytes(row, length):
  """A row's pieces [(token, weight), ...] -> the record: token, segment, weight, each [length]; of
  pieces (token, weight, side), which are two segments, also pair and side."""
  token_T = np.zeros(length, "<u4")
  segment_T, pair_T = np.zeros((2, length), "<u2")
  weight_T, side_T = np.zeros((2, length), np.uint8)
  start = segment = 0
  for pair, (token, weight, *side) in enumerate(row, 1):
    here = slice(start, start + len(token))
    token_T[here], weight_T[here] = token, weight
    second = side[0] > 1 if side else 0
    segment_T[here] = segment + 1 + second
    if side:
      pair_T[here], side_T[here] = pair, side[0]
    start, segment = here.stop, segment + 1 + bool(side)
  record = token_T.tobytes() + segment_T.tobytes() + weight_T.tobytes()
  return record + pair_T.tobytes() + side_T.tobytes() if pair_T.any() else record


def table(manifests):
  """Text lines: documents, tokens, rows, bytes per token, fill of each language; what was cut."""
  lines = [
      f"{'language':10} {'documents':>11} {'tokens':>15} {'rows':>11} {'bytes/token':>12}"
      f" {'fill':>8} {'truncated':>10} {'dropped':>8}"
  ]
  total = collections.defaultdict(collections.Counter)
  for manifest in manifests:
    for code in (manifest["language"], "all"):
      total[code].update({key: manifest[key] for key in _SUMMED})
      total[code]["room"] += manifest["rows"] * (manifest["T"] + 1)
      total[code]["dropped"] += sum(manifest["dropped"].values())
  total["all"] = total.pop("all")  # the last line
  for code, sums in total.items():
    lines.append(
        f"{code:10} {sums['documents']:>11,} {sums['tokens']:>15,} {sums['rows']:>11,} "
        f"{sums['bytes'] / sums['tokens']:>12.2f} {sums['tokens'] / sums['room']:>8.2%} "
        f"{sums['truncated'] / sums['documents']:>10.2%} {sums['dropped']:>8,}"
    )
  return lines


_SUMMED = ("documents", "tokens", "rows", "bytes", "truncated")
