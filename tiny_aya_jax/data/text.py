"""Readers of raw text: a folder (or the embedded corpus) -> documents by language and source.

A document is a str, a list of {"role", "content"} messages, or a preference pair: {"messages" that
end with the user, "chosen", "rejected": two answers}. Streaming: one document in memory.
Not a filter: `read` refuses whatever is malformed with its place, repairs nothing and drops nothing
but empty documents; `records` hands what is malformed to a caller that counts it (clean.py).

    DIR/<code>[/<source>]/*.{jsonl,txt}[.gz,.zst]   source: the folder's name, else 'text'
    DIR/<code>[/<source>]/*.parquet                 the same
    DIR/<code>.{jsonl,txt}[.gz,.zst]                source 'text'
    DIR/<anything>.jsonl[.gz,.zst]                  language by each record's "lang" or "language",
                                                    source: the file's name (the file is read
                                                    once a language: split big ones)
    embedded/<split>                                toy.py, source 'cldr'; 'instruct' of instruct,
                                                    'pairs' of preference

In .txt a blank line ends a document. In .jsonl each line, and in .parquet each row, is
{"text": ...} or {"messages": [...]}; other fields are no part of the document. A pair is
{"messages" or "prompt": [...], "chosen": ..., "rejected": ...}; prompt and answers may also be text
alone, or the answers lists of one message.
"""

import functools
import gzip
import importlib.metadata
import itertools
import json
import pathlib
import unicodedata
import zlib

try:
  import zstandard
except ModuleNotFoundError:  # the extra `data`; a .zst file is refused without it
  zstandard = None

from tiny_aya_jax import languages as table
from tiny_aya_jax import run
from tiny_aya_jax.data import toy

KINDS = (".txt", ".jsonl")
COMPRESSIONS = ("", ".gz", ".zst")
PARQUET = ".parquet"
SUFFIXES = (*(kind + compression for kind in KINDS for compression in COMPRESSIONS), PARQUET)
CLEANING = ".clean"  # clean.py's unfinished work; while it is there, the folder is not whole
SYNTHESIS = ".synthesize"  # synthesize.py's, the same
EMPTY = "empty"
CLEANED = "clean.json"  # clean.py's report: licences among other things
LANGUAGE_FIELDS = ("lang", "language")
ANSWERS = ("chosen", "rejected")
ROLES = dict(system="system", user="user", assistant="assistant", chatbot="assistant")


class Malformed(run.Refused):
  """A record or document that is none. `reason`: one of a handful; str: with its place."""

  def __init__(self, reason, sentence):
    super().__init__(sentence)
    self.reason = reason


def languages(source):
  """{code: {source name: [paths]}} of a folder or 'embedded/<split>', in the table's order.

  Records with a language field make it read those files once. Refuses a missing or empty folder,
  a remote path, one that clean has not finished, and a text file or folder whose name is no
  language, with the nearest one. A name of two languages counts as the first, which is said.
  The embedded corpus has no paths: it is made by toy.py from the data of the installed Babel.
  """
  split = _embedded(source)
  if split:
    name = dict(instruct="instruct", preference="pairs").get(split.partition("_")[0], "cldr")
    return {language.code: {name: []} for language in table.LANGUAGES}
  found = {}
  for codes, name, path, broken in _found(source):
    if broken:
      raise broken
    paths = found.setdefault(_first(codes), {}).setdefault(name, [])
    if str(path) not in paths:  # of a file with labels for each script and for both
      paths.append(str(path))
  order = {code: row for row, code in enumerate(table.select(found))}
  return {code: dict(sorted(found[code].items())) for code in sorted(found, key=order.get)}


def files(source):
  """[(codes, source name, path, labels)] of a folder's text, by name: each document is in one.

  codes: what the file's, folder's or records' language name means: one code, or the two of
  'cmn_Hani', whose documents are of either. labels: what the records of a file in no language's
  folder call it, else None. Such a file's lines that are no records are said, and left out.
  """
  found = []
  for codes, name, path, broken in _found(source):
    if broken:
      run.say(f"{path} has lines that are no records and belong to no language: {broken}")
    names = _labels(path)[0] if _labelled(source, path) else {}
    ours = tuple(label for label, means in names.items() if means == codes)
    found.append((codes, name, path, ours or None))
  return found


def _found(source):
  found = list(_files(_folder(source)))
  if not found:
    raise run.Refused(
      f"{source} holds no text: expected <code>.txt.gz or <code>/*.jsonl and the like"
    )
  return found


def read(source, code, name):
  """Yields the documents of one language and source, str or messages, in the files' order.

  Refuses, with file and line: invalid UTF-8 (and its byte offset), broken JSON or compression,
  a record without text or messages, and a conversation whose turns do not alternate.
  """
  split = _embedded(source)
  if split:
    yield from toy.documents(code, split)
    return
  sources = languages(source)
  run.choose("language of " + str(source), code, sources)
  run.choose(f"source of {code}", name, sources[code])
  for path in map(pathlib.Path, sources[code][name]):
    names = _labels(path)[0] if _labelled(source, path) else {}
    ours = tuple(label for label, codes in names.items() if codes[0] == code)
    for record in records(path, ours or None):
      if not isinstance(record, Malformed):
        yield _said(record)
      elif record.reason != EMPTY:
        raise record


def _said(record):
  """A record -> the document."""
  if "chosen" in record:
    return {field: record[field] for field in ("messages", *ANSWERS)}
  return record["text"] if "text" in record else record["messages"]


def _labelled(source, path):
  """Whether the file's records name their languages."""
  return path.parent == pathlib.Path(source) and not _codes(_stem(path.name))


def records(path, labels=None):
  """Yields each document's record, {"text": str} or {"messages": list} and its other fields ("chosen"
  and "rejected" of a pair among them), or the Malformed that says why it is none, of the reason EMPTY for one that says nothing.

  labels: only records whose language field is one of them. Damaged compression is Refused.
  """
  path = pathlib.Path(path)
  reader = {".txt": _paragraphs, ".jsonl": _lines_of_json, PARQUET: _rows}[_kind(path.name)]
  yield from reader(path, labels) if labels else reader(path)


def licence(source, code, name):
  """What clean.py noted about a source's licence, or None."""
  path = pathlib.Path(source) / CLEANED
  if _embedded(source) or not path.is_file():
    return None
  licences = run.read_json(path, "clean's report").get("licences")
  found = licences.get(f"{code}/{name}") if isinstance(licences, dict) else None
  return found if isinstance(found, str) else None


def fingerprint(source, paths):
  """JSON that is equal when the text is: each file's name and bytes, wherever the folder lies.

  paths: of `languages`. The embedded corpus is made by code from Babel's data.
  """
  if _embedded(source):
    return [str(source), run.sha256(toy.__file__), importlib.metadata.version("Babel")]
  return [[pathlib.Path(path).name, run.sha256(path)] for path in paths]


def _embedded(source):
  """The split of 'embedded/<split>', or None."""
  prefix, _, split = str(source).partition("/")
  return run.choose("embedded split", split, toy.SPLITS) if prefix == "embedded" else None


# --- finding files ------------------------------------------------------------------------------


def _folder(source):
  if "://" in str(source):
    raise run.Refused(f"{source} is remote: mount it, or copy it, and give a local folder")
  folder = pathlib.Path(source)
  if not folder.is_dir():
    what = "is a file: give the folder that holds it" if folder.exists() else "does not exist"
    raise run.Refused(f"text folder {source} {what}")
  for sign in (CLEANING, SYNTHESIS):
    if (folder / sign).exists():
      raise run.Refused(f"{source} is not whole: {sign[1:]} is at work in it or was killed; run it again")
  digits = "[0-9]" * 5
  made = [int(path.stem[-5:]) for path in folder.glob(f"synthesis-{digits}-of-{digits}.json")]
  made += [1] * (folder / "synthesis.json").exists()
  if made and set(made) != {len(made)}:
    raise run.Refused(
      f"{source} is not whole: it has {len(made)} finished parts of synthesize, of runs in "
      f"{' and '.join(map(str, sorted(set(made))))} parts: make the missing ones, or remove what was "
      "made with another config.part (synthesis*.json and */*/rows*.jsonl)"
    )
  return folder


def _files(folder):
  """Yields (codes, source name, path, a first Malformed or None) of every text file, by name."""
  for path in _visible(folder):
    if path.is_dir():
      yield from _language_folder(path)
    elif _is_text(path.name):
      codes, stem = _codes(_stem(path.name)), _stem(path.name)
      if codes:
        yield codes, "text", path, None
      elif _kind(path.name) == ".jsonl":
        labels, broken = _labels(path)
        yield from ((codes, stem, path, broken) for codes in dict.fromkeys(labels.values()))
      else:
        table.find(stem)  # refuses with the nearest name


def _language_folder(folder):
  """Files of DIR/<code>/ (source 'text') and DIR/<code>/<source>/."""
  inside = [(path, "text") for path in _visible(folder) if path.is_file()]
  for child in _visible(folder):
    if child.is_dir():
      inside += [(path, child.name) for path in _visible(child)]
  deep = [path for path, _ in inside if path.is_dir()]
  if deep:
    raise run.Refused(f"{deep[0]} is a folder inside a source: text goes into <code>/<source>/")
  text = [(path, name) for path, name in inside if _is_text(path.name)]
  if text:
    codes = _codes(folder.name) or (table.find(folder.name).code,)
    if len(text) < len(inside):
      _say_ignored(folder, tuple(path.name for path, _ in inside if not _is_text(path.name)))
    yield from ((codes, name, path, None) for path, name in text)


@functools.cache  # so that it is said once
def _say_ignored(folder, names):
  run.say(f"{folder}: {len(names)} files are no text and are left out, such as {names[0]}")


def _visible(folder):
  paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
  for path in paths:
    if not path.exists():
      raise run.Refused(f"{path} is a link to nothing: remove it, or bring back what it names")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path.name):
      raise run.Refused(f"{str(path)!a} has a name with control characters or bytes that are no "
                        "UTF-8: rename it")
  return paths


def _is_text(name):
  return name.endswith(SUFFIXES)


def _stem(name):
  """'fra_Latn.jsonl.gz' -> 'fra_Latn'."""
  return name.removesuffix(next(suffix for suffix in SUFFIXES if name.endswith(suffix)))


def _kind(name):
  """'fra_Latn.jsonl.gz' -> '.jsonl'."""
  return "." + name.removeprefix(_stem(name)).split(".")[1]


def _codes(name):
  """The canonical codes that a file or folder name means, or None; two of an ambiguous one."""
  if name == table.CODE:
    return (name,)
  if name in table.AMBIGUOUS:
    return table.AMBIGUOUS[name]
  try:
    return (table.find(name).code,)
  except run.Refused:
    return None


@functools.cache  # so that it is said once
def _first(codes):
  if len(codes) > 1:
    run.say(f"text of {' and '.join(codes)} in one: all of it is read as {codes[0]}; the verb "
            "clean splits it")
  return codes[0]


def _labels(path):
  """({label: codes}, the first Malformed or None) of a file whose records name their language."""
  status = path.stat()
  return _scan(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _scan(path, size, modified):
  del size, modified  # only to read a changed file again
  found, broken = {}, None
  for number, line in lines(path):
    if line.strip():
      record = _attempt(_record, line, path, number)
      if isinstance(record, Malformed):
        broken = broken or record
        continue
      label = _label(record, path, number)
      if label not in found:
        found[label] = _codes(label) or _refuse_language(label, f"{path}, line {number}")
  if broken and not found:
    raise broken
  return found, broken


def _label(record, path, number):
  for field in LANGUAGE_FIELDS:
    if isinstance(record.get(field), str):
      return record[field]
  fields = " or ".join(map(repr, LANGUAGE_FIELDS))
  return _refuse_language(_stem(path.name), f"{path}, whose line {number} has no {fields} field")


def _refuse_language(name, place):
  try:
    table.find(name)
  except run.Refused as refused:
    raise run.Refused(f"{place}: {refused}") from None


# --- reading one file ---------------------------------------------------------------------------


def _paragraphs(path):
  """Records of a .txt: runs of lines between blank lines, joined by newlines."""
  block, malformed = [], None
  for number, line in _and_blank(lines(path)):
    line = _attempt(_decoded, line, path, number)
    if isinstance(line, Malformed):
      malformed = malformed or line
    elif line.strip():
      block.append(line)
    else:
      if block or malformed:
        yield malformed or dict(text="\n".join(block))
      block, malformed = [], None


def _and_blank(lines):
  yield from lines
  yield 0, b""


def _lines_of_json(path, labels=None):
  """Records of a .jsonl; with `labels`, those whose language is one of them."""
  # A line without the label's bytes cannot be of that language, unless JSON escapes a letter of it:
  # most need no parsing.
  marks = [b"\\u", *(label.encode() for label in labels)] if labels else [b""]
  for number, line in lines(path):
    if line.strip() and any(mark in line for mark in marks):
      record = _attempt(_record, line, path, number)
      if isinstance(record, Malformed):
        yield record
      elif not labels or _label(record, path, number) in labels:
        yield _attempt(_document, record, f"{path}, line {number}")


def _rows(path):
  """Records of a .parquet, a batch of rows in memory."""
  try:
    import pyarrow  # here: it takes a fifth of a second
    import pyarrow.parquet
  except ModuleNotFoundError:
    raise run.Refused(f"{path} needs the pyarrow package: pip install pyarrow") from None
  try:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=100):
      for row in range(len(batch)):
        number += 1
        place = f"{path}, row {number}"
        record = _attempt(_row, batch.slice(row, 1), place)
        yield record if isinstance(record, Malformed) else _attempt(_document, record, place)
  except (pyarrow.ArrowException, OSError) as error:
    raise run.Refused(f"{path} is damaged or no parquet ({error}): fetch it again") from None


def _row(batch, place):
  try:
    return batch.to_pylist()[0]
  except UnicodeDecodeError as error:
    raise Malformed("invalid UTF-8", f"{place} is not UTF-8 ({error.reason})") from None


def _attempt(reader, *arguments):
  """What reader(*arguments) returns, or the Malformed it raises."""
  try:
    return reader(*arguments)
  except Malformed as malformed:
    return malformed


def _record(line, path, number):
  line = _decoded(line, path, number)
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:  # also a number or a depth beyond reason
    raise Malformed("not JSON", f"{path}, line {number} is not JSON ({error})") from None
  if not isinstance(record, dict):
    kind = type(record).__name__
    raise Malformed("not JSON", f"{path}, line {number} is a JSON {kind}: expected an object")
  return record


def _document(record, place):
  """The record, its text or messages checked."""
  if all(record.get(field) is not None for field in ANSWERS):
    return _pair(record, place)
  fields = [field for field in ("text", "messages") if record.get(field) is not None]
  if len(fields) != 1:
    raise Malformed(
      "no text",
      f"{place} has the fields {', '.join(map(repr, record)) or 'none'}: "
      "expected exactly one of 'text' and 'messages'"
    )
  if fields == ["messages"]:
    checked = dict(messages=_messages(record["messages"], place))
  else:
    checked = dict(text=_checked(record["text"], "text", place))
  if not _spoken(checked):
    raise Malformed(EMPTY, f"{place} says nothing")
  return {key: value for key, value in record.items() if key not in ("text", "messages")} | checked


def _pair(record, place):
  """The record of a pair, its prompt as "messages", its answers as text."""
  prompt = record.get("messages") if record.get("prompt") is None else record["prompt"]
  messages = _messages([dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt, place)
  if messages[-1]["role"] != "user":
    raise Malformed("no pair", f"{place}: the prompt of a pair ends with {messages[-1]['role']}, "
                    "expected user")
  answers = {}
  for field in ANSWERS:
    given = record[field]
    if isinstance(given, list):
      if len(given) != 1 or _message(given[0], f"{place}, {field}")["role"] != "assistant":
        raise Malformed("no pair", f"{place}: {field!r} is {given!r:.60}, expected one answer: text, or "
                        "a list of one message from assistant")
      given = given[0]["content"]
    answers[field] = _checked(given, field, place)
    if not answers[field].strip():
      raise Malformed("empty turn", f"{place}: {field!r} says nothing: leave the pair out")
  rest = {key: value for key, value in record.items() if key not in ("prompt", "messages", *ANSWERS)}
  return rest | dict(messages=messages) | answers


def _spoken(record):
  """Whether it says anything."""
  if "text" in record:
    return bool(record["text"].strip())
  return any(turn["content"].strip() for turn in record["messages"])


def _messages(messages, place):
  """Checked turns with 'chatbot' called 'assistant'."""
  if not isinstance(messages, list) or not messages:
    raise Malformed(
      "no conversation",
      f"{place}: 'messages' is {messages!r:.60}, expected a list of role and content"
    )
  turns = [_message(message, f"{place}, message {i}") for i, message in enumerate(messages, 1)]
  silent = [i for i, turn in enumerate(turns, 1) if not turn["content"].strip()]
  if 0 < len(silent) < len(turns):  # of one that says nothing at all the caller says so
    raise Malformed("empty turn", f"{place}, message {silent[0]} says nothing: leave the conversation "
                    "out; the verb clean drops and counts such")
  roles = [turn["role"] for turn in turns]
  spoken = roles[1:] if roles[0] == "system" else roles
  expected = [("user", "assistant")[i % 2] for i in range(max(len(spoken), 1))]
  if spoken != expected:
    raise Malformed(
      "no conversation",
      f"{place}: the roles are {', '.join(roles)}; expected an optional system, then user and "
      "assistant in turn, the user first"
    )
  return turns


def _message(message, place):
  if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
    raise Malformed("no conversation",
                    f"{place} is {message!r:.60}, expected an object with 'role' and 'content'")
  try:
    run.choose(f"role in {place}", message["role"], ROLES)
  except run.Refused as refusal:
    raise Malformed("no conversation", str(refusal)) from None
  content = _checked(message["content"], "content", place)
  return dict(role=ROLES[message["role"]], content=content)


def _checked(text, field, place):
  if not isinstance(text, str):
    raise Malformed("no text", f"{place}: {field!r} is a {type(text).__name__}, expected a string")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise Malformed(
      "lone surrogate",
      f"{place}: {field!r} holds half a surrogate pair at character {error.start}, "
      "which UTF-8 cannot write"
    ) from None
  return text


def _decoded(line, path, number):
  try:
    return line.decode()
  except UnicodeDecodeError as error:
    offset = _offset(path, number) + error.start
    raise Malformed(
      "invalid UTF-8",
      f"{path}, line {number}: byte {offset} (0x{line[error.start]:02x}) is not UTF-8 "
      f"({error.reason}): convert the file, or cut the line"
    ) from None


def _offset(path, number):
  """Where line `number` starts, in uncompressed bytes; only an error asks, so read again."""
  before = sum(map(len, itertools.islice(_raw_lines(path), number - 1)))
  return before + (len(BOM) if number == 1 and next(_raw_lines(path)).startswith(BOM) else 0)


BOM = b"\xef\xbb\xbf"
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, *([zstandard.ZstdError] if zstandard else []))


def lines(path):
  """Yields (number from 1, bytes without the line's end) of a file, compressed or not.

  Lines end in LF or CRLF; a leading BOM is no text.
  """
  try:
    for number, line in enumerate(_raw_lines(path), 1):
      line = line.removesuffix(b"\n").removesuffix(b"\r")
      yield number, line.removeprefix(BOM) if number == 1 else line
  except DAMAGED as error:
    raise run.Refused(f"{path} is damaged or cut short ({error}): fetch it again") from None
  except OSError as error:
    raise run.Refused(f"{path} cannot be read: {error.strerror}") from None


def _raw_lines(path):
  if path.suffix == ".zst":
    yield from _split(_zstandard_blocks(path))
    return
  with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
    yield from file


def _zstandard_blocks(path):
  """Decompressed pieces of all frames; the package's own reader stops after the first frame."""
  if zstandard is None:
    raise run.Refused(f"{path} needs the zstandard package: pip install zstandard")
  frame = None
  with open(path, "rb") as file:
    while block := file.read(1 << 20):
      while block:
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(block)
        block = frame.unused_data if frame.eof else b""
        frame = None if frame.eof else frame
  if frame:
    raise EOFError("the last frame has no end")


def _split(blocks):
  """Lines, with their ends, of a stream that comes in pieces."""
  rest = b""
  for block in blocks:
    *lines, rest = (rest + block).split(b"\n")
    yield from (line + b"\n" for line in lines)
  if rest:
    yield rest
