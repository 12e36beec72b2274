"""Text <-> ids for SentencePiece models and tokenizer.json files alike, and the special tokens.

Not here: training (vocab.py) and conversations (chat.py). Two promises hold in both engines:
`encode` never returns a special id, whatever the text says, and for a vocabulary of ours
`tokenizer.model` and the `tokenizer.json` made from it give equal ids.
`decode` is our own in both: the tokens' bytes, joined. The one loss: SentencePiece writes a space
as U+2581, so that a literal U+2581 in the text comes back as a space (the ids are still equal).
A foreign tokenizer.json may change letters before it cuts (NFC in Command R's): decomposed text then
comes back composed, and bytes_V counts the bytes of what comes back. One that moves spaces is refused.
"""

import functools
import json
import pathlib

import numpy as np

from tiny_aya_jax import run

# Ids 0 to 9 as released (tiny_aya.md 2.2); the last two directly behind them in our own
# vocabularies only: a released tokenizer.json has them at 261000 and 261001.
SPECIALS = {
    "<PAD>": 0,
    "<MASK_TOKEN>": 1,
    "<BOS_TOKEN>": 2,
    "<EOS_TOKEN>": 3,
    "<UNK>": 4,
    "<|START_OF_TURN_TOKEN|>": 5,
    "<|END_OF_TURN_TOKEN|>": 6,
    "<|USER_TOKEN|>": 7,
    "<|CHATBOT_TOKEN|>": 8,
    "<|SYSTEM_TOKEN|>": 9,
    "<|START_RESPONSE|>": 10,
    "<|END_RESPONSE|>": 11,
}
SPACE = "\u2581"  # SentencePiece's way to write a space inside a piece
PROBES = (" a  b\n c", "a")  # must come back, or bytes_V would not be the bytes of the text
MOST_IDS = 1 << 22  # of a vocabulary; what says more would fill memory with holes


def load(path):
  """tokenizer.model, tokenizer.json, or a folder with one (the model first) -> Tokenizer."""
  path = _file(path)
  tokenizer = _load_model(path) if path.suffix == ".model" else _load_json(path)
  for probe, ids in zip(PROBES, tokenizer.encode_many(PROBES)):
    if (back := tokenizer.decode(ids)) != probe:
      raise run.Refused(
          f"tokenizer {path} turns {probe!r} into {back!r}: it adds or drops spaces, so that bits per"
          " byte would be wrong; use one trained by the vocab verb or a released byte-level one"
      )
  return tokenizer


class Tokenizer:
  """What `load` returns; V is one more than the largest id.

  bytes_V: int32 [V], UTF-8 bytes of each token; 0 for specials and unused ids.
  pieces: bytes of each id, none for specials and unused ids.
  sha256: of the file it was loaded from.   size: V.   specials: {name: id}.
  flags: {name: {"lstrip", "rstrip", "single_word"}} of specials that a tokenizer.json flags so, which
  is read where text is searched for special tokens (template.py).
  """

  def __init__(self, path, pieces, specials, flags, encode_many, json_text):
    """`pieces`: the bytes of each id; `encode_many`: texts -> ids; `json_text`: () -> str."""
    self.path = str(path)
    self.size = len(pieces)
    self.specials = specials
    self.flags = flags
    self.sha256 = run.sha256(path)
    self.bytes_V = np.array([len(piece) for piece in pieces], np.int32)
    self.pieces = pieces
    self._names = {id: name for name, id in specials.items()}
    self._encode_many = encode_many
    self._json_text = json_text

  def encode(self, text):
    """str -> list of ids, none of them special; a lone surrogate is Refused."""
    return self.encode_many([text])[0]

  def encode_many(self, texts):
    """list of str -> list of lists of ids."""
    texts = list(texts)
    for text in texts:
      check(text)
    return self._encode_many(texts) if texts else []

  def decode(self, ids):
    """ids -> str; specials are dropped, bytes that are no UTF-8 become U+FFFD."""
    pieces = [self.pieces[self._check_id(id)] for id in ids]
    return b"".join(pieces).decode("utf-8", errors="replace")

  def piece(self, id):
    """One token as printable text: a special's name, else its decoded bytes."""
    return self._names.get(int(id)) or self.decode([id])

  def special(self, name):
    """The id of a special token by its name."""
    if name not in self.specials:
      raise run.Refused(
          f"tokenizer {self.path} has no special token {name!r}: {run.nearest(name, self.specials)}"
      )
    return self.specials[name]

  def same_ids(self, other):
    """Whether every id means the same bytes or the same special token in both."""
    return self.pieces == other.pieces and self.specials == other.specials

  def difference(self, other):
    """What differs first from another tokenizer, in words; '' where `same_ids` holds."""
    if self.size != other.size:
      return f"{self.size} ids and {other.size}"
    for name in sorted(self.specials.keys() | other.specials.keys()):
      if self.specials.get(name) != other.specials.get(name):
        return f"{name} is id {self.specials.get(name)} and {other.specials.get(name)}"
    for id, (mine, theirs) in enumerate(zip(self.pieces, other.pieces)):
      if mine != theirs:
        return f"id {id} is {mine!r} and {theirs!r}"
    return ""

  def json(self):
    """The text of a Hugging Face tokenizer.json with exactly these ids."""
    return self._json_text()

  def _check_id(self, id):
    if not 0 <= id < self.size:
      raise run.Refused(f"token id {id} is outside the vocabulary: expected 0 to {self.size - 1}")
    return int(id)


def _file(path):
  path = pathlib.Path(path)
  if path.is_dir():
    names = ("tokenizer.model", "tokenizer.json")
    found = [path / name for name in names if (path / name).exists()]
    if not found:
      raise run.Refused(f"tokenizer folder {path} holds neither tokenizer.model nor tokenizer.json")
    path = found[0]
  if path.suffix not in (".model", ".json"):
    raise run.Refused(f"tokenizer {path} is neither a .model nor a .json file, nor a folder of one")
  if not path.is_file():
    raise run.Refused(f"tokenizer {path} does not exist: make one with the vocab verb")
  return path


def check(text):
  """Refuses what is no Unicode text: another type, a lone surrogate."""
  if not isinstance(text, str):
    raise run.Refused(f"only str can be encoded, given {type(text).__name__}: {str(text)[:60]!r}")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise run.Refused(
        f"text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start} of"
        f" {len(text)}, which is not Unicode text: drop the document or repair it at its source"
    ) from None


# --- SentencePiece ------------------------------------------------------------------------------


def _load_model(path):
  import sentencepiece

  engine = sentencepiece.SentencePieceProcessor()
  try:
    engine.load(str(path))
  except (OSError, RuntimeError) as error:
    raise run.Refused(f"tokenizer {path} is not a SentencePiece model ({error})") from None
  ids = range(engine.get_piece_size())
  byte_pieces = sum(engine.is_byte(id) for id in ids)
  if byte_pieces != 256:
    raise run.Refused(
        f"tokenizer {path} has {byte_pieces} byte pieces, expected 256: without byte_fallback rare"
        " characters become <UNK>; train it again with the vocab verb"
    )
  hidden = [engine.is_control(id) or engine.is_unknown(id) or engine.is_unused(id) for id in ids]
  return Tokenizer(
      path,
      pieces=[b"" if hidden[id] else _model_piece(engine, id) for id in ids],
      specials={engine.id_to_piece(id): id for id in ids if hidden[id]},
      flags={},
      encode_many=engine.encode,
      json_text=functools.partial(_model_to_json, path),
  )


def _model_piece(engine, id):
  piece = engine.id_to_piece(id)
  return bytes([int(piece[3:5], 16)]) if engine.is_byte(id) else _unescape(piece)


def _unescape(piece):
  return piece.replace(SPACE, " ").encode("utf-8")


def _model_to_json(path):
  """SentencePiece BPE -> tokenizer.json with equal ids.

  No pre-tokenizer: spaces are written as U+2581 and the whole text is merged at once, as
  SentencePiece does. Bytes are the fall-back in both. User-defined pieces are cut out first in
  both engines: one of a single character needs nothing (no merge touches it), a longer one is
  an added token that is not special.
  """
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(pathlib.Path(path).read_bytes())
  _check_model(path, model)
  kinds = model.SentencePiece
  hidden = (kinds.CONTROL, kinds.UNKNOWN)
  vocab = {piece.piece: id for id, piece in enumerate(model.pieces)}
  added = [
      _added_token(id, piece.piece, special=piece.type in hidden)
      for id, piece in enumerate(model.pieces)
      if piece.type in hidden or (piece.type == kinds.USER_DEFINED and len(piece.piece) > 1)
  ]
  spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
  bpe = {
      "type": "BPE",
      "dropout": None,
      "unk_token": model.trainer_spec.unk_piece,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": True,
      "byte_fallback": True,
      "ignore_merges": False,
      "vocab": vocab,
      "merges": _merges(model, vocab),
  }
  whole = {
      "version": "1.0",
      "truncation": None,
      "padding": None,
      "added_tokens": added,
      "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
      "pre_tokenizer": None,
      "post_processor": _begin_with(model.trainer_spec.bos_piece, vocab),
      "decoder": {
          "type": "Sequence",
          "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}],
      },
      "model": bpe,
  }
  return json.dumps(whole, ensure_ascii=False)


def _check_model(path, model):
  """Refuses what has no equal in a tokenizer.json of the form above."""
  kinds = model.SentencePiece
  wrong = [
      reason
      for reason, holds in (
          ("its type is not BPE", model.trainer_spec.model_type != model.trainer_spec.BPE),
          ("it normalises text", bool(model.normalizer_spec.precompiled_charsmap)),
          ("it has unused pieces", any(piece.type == kinds.UNUSED for piece in model.pieces)),
          ("a piece occurs twice", len({p.piece for p in model.pieces}) < len(model.pieces)),
      )
      if holds
  ]
  if wrong:
    raise run.Refused(
        f"tokenizer {path} has no exact tokenizer.json: {', '.join(wrong)};"
        " train one with the vocab verb"
    )


def _merges(model, vocab):
  """All ways to join two normal pieces into a third, best score first."""
  normal = {p.piece: p.score for p in model.pieces if p.type == model.SentencePiece.NORMAL}
  merges = []
  for piece, score in normal.items():
    for cut in range(1, len(piece)):
      left, right = piece[:cut], piece[cut:]
      if left in normal and right in normal:
        merges.append((-score, vocab[left], vocab[right], left, right))
  return [[left, right] for *_, left, right in sorted(merges)]


def _added_token(id, content, special):
  # normalized: a user-defined piece is looked for after spaces were rewritten, a special before.
  return {
      "id": id,
      "content": content,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": not special,
      "special": special,
  }


def _begin_with(bos, vocab):
  """A post-processor that puts BOS in front, as the released tokenizer does (tiny_aya.md 2.1)."""
  if bos not in vocab:
    return None
  first = {"SpecialToken": {"id": bos, "type_id": 0}}
  return {
      "type": "TemplateProcessing",
      "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
      "pair": [
          first,
          {"Sequence": {"id": "A", "type_id": 0}},
          {"SpecialToken": {"id": bos, "type_id": 1}},
          {"Sequence": {"id": "B", "type_id": 1}},
      ],
      "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
  }


# --- tokenizer.json -----------------------------------------------------------------------------


def _load_json(path):
  tokenizers = _import_tokenizers()
  whole = run.read_json(path, "tokenizer")
  whole["added_tokens"] = _added_tokens(path, whole)
  specials = {token["content"]: token["id"] for token in whole["added_tokens"] if token["special"]}
  _refuse_affixes(path, whole)
  try:
    engine = tokenizers.Tokenizer.from_str(json.dumps(whole))
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # noqa: BLE001 (the package raises nothing narrower, or panics)
    why = " ".join(str(error).split())[:300]
    raise run.Refused(f"tokenizer {path} is not a tokenizer.json ({why})") from None
  if whole["model"].get("dropout"):
    raise run.Refused(f"tokenizer {path} drops merges at random (model.dropout {whole['model']['dropout']}): "
                      "one text would have many ids; set it to null")
  engine.encode_special_tokens = True  # the text of a special token stays text
  engine.no_truncation()
  engine.no_padding()
  tokenizer = Tokenizer(
      path,
      pieces=_json_pieces(path, whole, engine, specials),
      specials=specials,
      flags={token["content"]: flags for token in whole["added_tokens"] if (flags := {
          flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)}) and token["special"]},
      encode_many=functools.partial(_encode_many, path, engine, set(specials.values())),
      json_text=functools.partial(pathlib.Path(path).read_text, encoding="utf-8"),
  )
  tokenizer.encode_many([text for name in specials for text in (name, f"a{name} b")])  # refuses
  return tokenizer


def _refuse_affixes(path, whole):
  """Pieces that look otherwise inside a word: the package may end this process where merges have none."""
  model = whole.get("model")
  for name in ("continuing_subword_prefix", "end_of_word_suffix"):
    if isinstance(model, dict) and (given := model.get(name)):
      raise run.Refused(f"tokenizer {path} has model.{name} {str(given)[:60]!r}, expected none: the bytes of a "
                        "token would depend on its place")


def _added_tokens(path, whole):
  """The added tokens, each with an id, content, and whether it is special."""
  tokens = whole.get("added_tokens") or []
  for token in tokens if isinstance(tokens, list) else [tokens]:
    if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(
        token.get("id")) is not int or not token["content"]:
      raise run.Refused(f"tokenizer {path} has the added token {str(token)[:60]}, expected an id and content")
    # Cohere files flag only some of their turn markers as special; the name tells the rest.
    content = token["content"]
    token["special"] = bool(token.get("special")) or content in SPECIALS or (
        content.startswith("<|") and content.endswith("|>"))
  return tokens


def _check_ids(path, whole, engine):
  """Refuses ids that are no rows of a table, that two tokens share, or that the engine does not use."""
  named = engine.get_vocab(with_added_tokens=False)
  for token in whole["added_tokens"]:
    content, id = token["content"], token["id"]
    if engine.token_to_id(content) != id or named.get(content, id) != id:
      raise run.Refused(f"tokenizer {path}: the added token {content[:60]!r} has id {id}, but is numbered "
                        f"{engine.token_to_id(content)}: expected each token once, and ids without a gap")
    named[content] = id
  owners = {}
  for content, id in named.items():
    if not 0 <= id < MOST_IDS:
      raise run.Refused(f"tokenizer {path}: {content[:60]!r} has id {id}, expected 0 to {MOST_IDS - 1}")
    if owners.setdefault(id, content) != content:
      raise run.Refused(f"tokenizer {path}: {owners[id][:60]!r} and {content[:60]!r} are both id {id}")


def _import_tokenizers():
  try:
    import tokenizers
  except ImportError:
    raise run.Refused(
        "a tokenizer.json needs the tokenizers package: pip install 'tiny_aya_jax[export]',"
        " or use tokenizer.model"
    ) from None
  return tokenizers


def _encode_many(path, engine, hidden, texts):
  found = [coded.ids for coded in engine.encode_batch(texts, add_special_tokens=False)]
  for text, ids in zip(texts, found):
    if not hidden.isdisjoint(ids):  # a model that knows its specials as pieces, or none for a letter
      raise run.Refused(f"tokenizer {path} makes a special token of the text {text[:60]!r}: text would end "
                        "turns")
  return found


def _json_pieces(path, whole, engine, specials):
  """The bytes of each id."""
  read, single_bytes = _piece_reader(path, whole)
  vocab = engine.get_vocab(with_added_tokens=False)
  missing = [piece for piece in single_bytes if piece not in vocab]
  if missing:
    raise run.Refused(
        f"tokenizer {path} lacks {len(missing)} of the 256 byte pieces, {missing[0]!r} for one:"
        " some texts would have no ids"
    )
  _check_ids(path, whole, engine)
  added = {token["content"]: token["id"] for token in whole["added_tokens"]}
  pieces = [b""] * (1 + max([*vocab.values(), *added.values()]))
  for piece, id in vocab.items():
    if piece not in added:
      pieces[id] = read(piece)
  for piece, id in added.items():
    pieces[id] = b"" if piece in specials else read(piece)
  return pieces


def _piece_reader(path, whole):
  """-> (piece -> its bytes, the pieces of the 256 single bytes), from how the file decodes."""
  steps = set(_steps(path, whole.get("decoder") or {}))
  if "ByteLevel" in steps:
    alphabet = _byte_level_alphabet()
    return functools.partial(_byte_level_piece, alphabet), alphabet
  if "ByteFallback" in steps:
    single = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    return lambda piece: single.get(piece) or _unescape(piece), single
  raise run.Refused(
      f"tokenizer {path} decodes by {sorted(steps)}: the bytes of a token are known only for"
      " ByteLevel and ByteFallback decoders"
  )


def _steps(path, decoder):
  """The types of a decoder's steps, in sequences of sequences too."""
  inner = decoder.get("decoders", []) if isinstance(decoder, dict) else None
  if not isinstance(inner, list) or not isinstance(decoder.get("type", ""), str):
    raise run.Refused(f"tokenizer {path} has the decoder {str(decoder)[:60]}, expected an object with its type, "
                      "or a list of decoders")
  for step in inner:
    yield from _steps(path, step)
  if "decoders" not in decoder and "type" in decoder:
    yield decoder["type"]


def _byte_level_piece(alphabet, piece):
  """An added token may hold letters that are no byte's: it stands for itself, as in the decoder."""
  if any(letter not in alphabet for letter in piece):
    return piece.encode()
  return bytes(alphabet[letter] for letter in piece)


def _byte_level_alphabet():
  """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  letters = {chr(byte): byte for byte in printable}
  return letters | {chr(0x100 + n): byte for n, byte in enumerate(others)}
