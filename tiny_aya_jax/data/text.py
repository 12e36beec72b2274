"""Readers of raw text: a folder (or the embedded corpus) -> documents by language and source.

A document is a str, or a list of {"role", "content"} messages. Streaming: one document in memory.
Not a filter: whatever is malformed is refused with its place, and nothing is repaired or dropped
but empty documents.

    DIR/<code>[/<source>]/*.{jsonl,txt}[.gz,.zst]   source: the folder's name, else 'text'
    DIR/<code>.{jsonl,txt}[.gz,.zst]                source 'text'
    DIR/<anything>.jsonl[.gz,.zst]                  language by each record's "lang" or "language",
                                                    source: the file's name (the file is read
                                                    once a language: split big ones)
    embedded/<split>                                toy.py, source 'cldr'; 'instruct' of instruct

In .txt a blank line ends a document. In .jsonl each line is {"text": ...} or {"messages": [...]}.
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
SUFFIXES = tuple(kind + compression for kind in KINDS for compression in COMPRESSIONS)
LANGUAGE_FIELDS = ("lang", "language")
ROLES = dict(system="system", user="user", assistant="assistant", chatbot="assistant")


def languages(source):
  """{code: {source name: [paths]}} of a folder or 'embedded/<split>', in the table's order.

  Records with a language field make it read those files once. Refuses a missing or empty folder,
  a remote path, and a text file or folder whose name is no language, with the nearest one.
  The embedded corpus has no paths: it is made by toy.py from the data of the installed Babel.
  """
  split = _embedded(source)
  if split:
    name = "instruct" if split == "instruct" else "cldr"
    return {language.code: {name: []} for language in table.LANGUAGES}
  found = {}
  for code, name, path in _files(_folder(source)):
    found.setdefault(code, {}).setdefault(name, []).append(str(path))
  if not found:
    raise run.Refused(
      f"{source} holds no text: expected <code>.txt.gz or <code>/*.jsonl and the like"
    )
  order = {code: row for row, code in enumerate(table.select(found))}
  return {code: dict(sorted(found[code].items())) for code in sorted(found, key=order.get)}


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
    if _kind(path.name) == ".txt":
      yield from _paragraphs(path)
    elif path.parent == pathlib.Path(source) and not _code(_stem(path.name)):
      yield from _records(path, _labels(path)[code])
    else:
      yield from _records(path)


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
  return folder


def _files(folder):
  """Yields (code, source name, path) of every text file, by name."""
  for path in _visible(folder):
    if path.is_dir():
      yield from _language_folder(path)
    elif _is_text(path.name):
      code, stem = _code(_stem(path.name)), _stem(path.name)
      if code:
        yield code, "text", path
      elif _kind(path.name) == ".jsonl":
        yield from ((code, stem, path) for code in _labels(path))
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
  inside = [(path, name) for path, name in inside if _is_text(path.name)]
  if inside:
    code = _code(folder.name) or table.find(folder.name).code
    yield from ((code, name, path) for path, name in inside)


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


@functools.cache  # so that it is said once
def _code(name):
  """The canonical code that a file or folder name means, or None."""
  if name == table.CODE:
    return name
  if name in table.AMBIGUOUS:
    first = table.AMBIGUOUS[name][0]
    run.say(f"{name} means {' and '.join(table.AMBIGUOUS[name])}: all of it is read as {first}")
    return first
  try:
    return table.find(name).code
  except run.Refused:
    return None


def _labels(path):
  """{code: labels} of a file whose records name their language."""
  status = path.stat()
  return _scan(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _scan(path, size, modified):
  del size, modified  # only to read a changed file again
  found = {}
  for number, line in _lines(path):
    if line.strip():
      label = _label(_record(line, path, number), path, number)
      if label not in found:
        found[label] = _code(label) or _refuse_language(label, f"{path}, line {number}")
  codes = dict.fromkeys(found.values())
  return {code: tuple(label for label in found if found[label] == code) for code in codes}


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
  """Documents of a .txt: runs of lines between blank lines, joined by newlines."""
  lines = []
  for number, line in _lines(path):
    line = _decoded(line, path, number)
    if line.strip():
      lines.append(line)
    elif lines:
      yield "\n".join(lines)
      lines = []
  if lines:
    yield "\n".join(lines)


def _records(path, labels=None):
  """Documents of a .jsonl; with `labels`, those of records whose language is one of them."""
  # A line without the label's bytes cannot be of that language, unless JSON escapes a letter of it:
  # most need no parsing.
  marks = [b"\\u", *(label.encode() for label in labels)] if labels else [b""]
  for number, line in _lines(path):
    if not line.strip() or not any(mark in line for mark in marks):
      continue
    record = _record(line, path, number)
    if not labels or _label(record, path, number) in labels:
      document = _document(record, f"{path}, line {number}")
      if document:
        yield document


def _record(line, path, number):
  line = _decoded(line, path, number)
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:  # also a number or a depth beyond reason
    raise run.Refused(f"{path}, line {number} is not JSON ({error})") from None
  if not isinstance(record, dict):
    kind = type(record).__name__
    raise run.Refused(f"{path}, line {number} is a JSON {kind}: expected an object")
  return record


def _document(record, place):
  """A record -> its str or messages, or None if empty."""
  fields = [field for field in ("text", "messages") if record.get(field) is not None]
  if len(fields) != 1:
    raise run.Refused(
      f"{place} has the fields {', '.join(map(repr, record)) or 'none'}: "
      "expected exactly one of 'text' and 'messages'"
    )
  if fields == ["messages"]:
    return _messages(record["messages"], place)
  return _checked(record["text"], "text", place) if str(record["text"]).strip() else None


def _messages(messages, place):
  """Checked turns with 'chatbot' called 'assistant'; None if nobody says anything."""
  if not isinstance(messages, list) or not messages:
    raise run.Refused(
      f"{place}: 'messages' is {messages!r:.60}, expected a list of role and content"
    )
  turns = [_message(message, f"{place}, message {i}") for i, message in enumerate(messages, 1)]
  roles = [turn["role"] for turn in turns]
  spoken = roles[1:] if roles[0] == "system" else roles
  expected = [("user", "assistant")[i % 2] for i in range(max(len(spoken), 1))]
  if spoken != expected:
    raise run.Refused(
      f"{place}: the roles are {', '.join(roles)}; expected an optional system, then user and "
      "assistant in turn, the user first"
    )
  return turns if any(turn["content"].strip() for turn in turns) else None


def _message(message, place):
  if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
    raise run.Refused(f"{place} is {message!r:.60}, expected an object with 'role' and 'content'")
  run.choose(f"role in {place}", message["role"], ROLES)
  content = _checked(message["content"], "content", place)
  return dict(role=ROLES[message["role"]], content=content)


def _checked(text, field, place):
  if not isinstance(text, str):
    raise run.Refused(f"{place}: {field!r} is a {type(text).__name__}, expected a string")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise run.Refused(
      f"{place}: {field!r} holds half a surrogate pair at character {error.start}, "
      "which UTF-8 cannot write"
    ) from None
  return text


def _decoded(line, path, number):
  try:
    return line.decode()
  except UnicodeDecodeError as error:
    offset = _offset(path, number) + error.start
    raise run.Refused(
      f"{path}, line {number}: byte {offset} (0x{line[error.start]:02x}) is not UTF-8 "
      f"({error.reason}): convert the file, or cut the line"
    ) from None


def _offset(path, number):
  """Where line `number` starts, in uncompressed bytes; only an error asks, so read again."""
  before = sum(map(len, itertools.islice(_raw_lines(path), number - 1)))
  return before + (len(BOM) if number == 1 and next(_raw_lines(path)).startswith(BOM) else 0)


BOM = b"\xef\xbb\xbf"
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, *([zstandard.ZstdError] if zstandard else []))


def _lines(path):
  """Yields (number from 1, bytes without the line's end); LF or CRLF; a leading BOM is no text."""
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
