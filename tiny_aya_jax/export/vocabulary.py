"""A tokenizer.json as the vocabulary of a GGUF file: tokens, their types, scores or merges.

Two kinds are known. BPE over U+2581 with byte fall-back, as our exports hold it, becomes llama.cpp's
"llama" (SentencePiece) vocabulary, which joins whichever two neighbours make the token with the best
score; equal ids are promised only where that is what the merges say, and anything else is refused.
Byte-level BPE becomes "gpt2" with the name of a pre-tokenizer that llama.cpp has compiled in.
Not here: tensors and keys (gguf.py), our own encoder (data/tokenizer.py).
"""

import collections
from typing import NamedTuple

from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer as tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
DIGITS = r"\d{1,3}(?=(?:\d{3})*\b)"  # the released splits, tiny_aya.md 2.1
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (normalizer, steps of the pre-tokenizer) -> llama.cpp's name, and where its ids differ nevertheless.
# What it calls gpt-4o is o200k's expression without marks: Hindi, Bengali or Arabic with vowel signs
# would get other ids. The last of its names for that expression has them.
COMPOSED = "llama.cpp does not compose characters: text that is not in NFC gets other ids"
GROUPED = ("llama.cpp groups digits beside letters, as in 2017\u5e74, from the right, the tokenizer from "
           "the left")
KNOWN = {
    (None, (("Split", DIGITS), ("Split", O200K), ("ByteLevel", False))): ("tiny_aya", GROUPED),
    (None, (("Split", O200K), ("ByteLevel", False))): ("granite-embed-multi-97m", ""),
    ("NFC", (("Digits", True), ("ByteLevel", True))): ("command-r", COMPOSED),
    (None, (("Digits", True), ("ByteLevel", True))): ("command-r", ""),
    (None, (("ByteLevel", True),)): ("gpt-2", ""),
}


class Vocabulary(NamedTuple):
  """What a GGUF file says of its tokenizer; lists of V entries, merges of their own number.

  model: "llama" (with scores) or "gpt2" (with merges).   specials: {name: id}.   used: ids,
  padding excluded.   joined: reserved tokens that llama.cpp makes of plain text which spells them.
  differs: where llama.cpp's ids are known to be others, in words, or "".
  """

  model: str
  pre: str
  tokens: list
  types: list
  scores: list
  merges: list
  specials: dict
  used: int
  joined: list
  differs: str


def read(path, V, pre=None):
  """tokenizer.json -> Vocabulary of V tokens; `pre` names the pre-tokenizer of a byte-level one.

  Refuses more ids than V, a token that is there twice, and what llama.cpp would encode otherwise.
  """
  whole = run.read_json(path, "tokenizer")
  specials = tokenizers.load(path).specials
  model = whole["model"]
  if model.get("type") != "BPE" or model.get("ignore_merges") or model.get("dropout"):
    raise run.Refused(f"{path} is a {model.get('type')} with ignore_merges {model.get('ignore_merges')} "
                      f"and dropout {model.get('dropout')}: GGUF needs BPE with neither")
  ids = _ids(path, whole, specials)
  tokens, types = _padded(path, ids, V)
  merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
            for merge in model["merges"]]
  scores, joined = [], []
  if model.get("byte_fallback"):
    if pre is not None:
      raise run.Refused(f"config.gguf.pre is {pre!r}, but {path} has no pre-tokenizer to be named: "
                        "leave it unset")
    _refuse_other_spaces(path, whole, ids)
    scores = _scores(path, ids, merges, V)
    joined = _joined(tokens, types)
    named, merges = ("default", ""), []
  else:
    named = (pre, "the pre-tokenizer was named by hand") if pre else recognised(path, whole)
  return Vocabulary(
      model="llama" if model.get("byte_fallback") else "gpt2", pre=named[0], tokens=tokens,
      types=types, scores=scores, merges=[" ".join(merge) for merge in merges], specials=specials,
      used=len(ids), joined=joined, differs=named[1],
  )


def _ids(path, whole, specials):
  """{token: (id, type)} of all that the file names."""
  model = whole["model"]
  unknown = model.get("unk_token") if model.get("byte_fallback") else None
  single = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else ()
  ids = {token: (id, BYTE if token in single else NORMAL) for token, id in model["vocab"].items()}
  for added in whole.get("added_tokens") or []:
    token = added["content"]
    kind = UNKNOWN if token == unknown else CONTROL if token in specials else USER_DEFINED
    if ids.setdefault(token, (added["id"], kind))[0] != added["id"]:
      raise run.Refused(f"{path}: {token!r} is id {ids[token][0]} and, as an added token, "
                        f"{added['id']}")
    ids[token] = (added["id"], kind)
  return ids


def _padded(path, ids, V):
  """(tokens, types) of V ids; those without a token are "[PAD<id>]", unused, as converters have it."""
  largest = max(id for id, _ in ids.values())
  if largest >= V:
    raise run.Refused(f"{path} has ids up to {largest}, the embedding only {V} rows")
  tokens, types = [f"[PAD{id}]" for id in range(V)], [UNUSED] * V
  for token, (id, kind) in ids.items():
    if types[id] != UNUSED:
      raise run.Refused(f"{path}: id {id} is {tokens[id]!r} and {token!r}")
    tokens[id], types[id] = token, kind
  twice, count = collections.Counter(tokens).most_common(1)[0]
  if count > 1:  # llama.cpp aborts
    raise run.Refused(f"{path}: {twice!r} would be two tokens of the GGUF file, one of them padding")
  return tokens, types


# --- SentencePiece ------------------------------------------------------------------------------


def _refuse_other_spaces(path, whole, ids):
  """llama.cpp writes spaces as U+2581 and cuts nothing; user-defined tokens it finds before that."""
  normalizer, steps = whole.get("normalizer") or {}, whole.get("pre_tokenizer")
  spaces = {"type": "Replace", "pattern": {"String": " "}, "content": tokenizers.SPACE}
  if steps or normalizer != spaces:
    raise run.Refused(f"{path} has byte fall-back with normalizer {normalizer} and pre-tokenizer "
                      f"{steps}: GGUF can say only {spaces}, and no pre-tokenizer")
  for token, (_, kind) in ids.items():
    if kind == USER_DEFINED and tokenizers.SPACE in token:
      raise run.Refused(f"{path}: the added token {token!r} holds a space: llama.cpp does not find it")


def _scores(path, ids, merges, V):
  """Scores by which joining the best neighbours is what the merges do: an earlier token is better.

  llama.cpp ranks tokens, a merges file pairs. They agree if all pairs of one token stand together,
  no pair of two tokens that make a third is missing, and no character is without a token. Then only
  the order of pairs of one token is not kept, as in SentencePiece itself: leftmost first.
  """
  normal = {token for token, (_, kind) in ids.items() if kind == NORMAL}
  order = []
  for left, right in merges:
    if not {left, right, left + right} <= normal:
      raise run.Refused(f"{path}: the merge {left!r} {right!r} is not of normal tokens")
    if not order or order[-1] != left + right:
      order.append(left + right)
  places = {token: place for place, token in enumerate(order)}
  pairs = sum(token[:cut] in normal and token[cut:] in normal
              for token in normal for cut in range(1, len(token)))
  strange = sum(not set(token) <= normal for token in normal)
  if len(places) < len(order) or pairs != len(merges) or strange:
    raise run.Refused(
        f"{path} has {len(merges)} merges of {len(places)} tokens in {len(order)} runs, where {pairs} "
        f"pairs of tokens make a token, and {strange} tokens with characters that are none: llama.cpp, "
        "which ranks tokens and not merges, would encode otherwise; use a vocabulary of the vocab verb")
  scores = [0.0] * V
  for token in normal:
    scores[ids[token][0]] = -float(places.get(token, len(places)))
  return scores


def _joined(tokens, types):
  """Reserved tokens whose text two neighbours can make: llama.cpp joins into any token it knows."""
  known = set(tokens)
  reached = lambda part: len(part) == 1 or part in known
  joined = lambda token: any(
      reached(token[:cut]) and reached(token[cut:]) for cut in range(1, len(token)))
  return [token for token, kind in zip(tokens, types)
          if kind not in (NORMAL, USER_DEFINED) and joined(token)]


# --- byte-level BPE -----------------------------------------------------------------------------


def recognised(path, whole):
  """(llama.cpp's name, where it differs) of what a byte-level tokenizer.json does before merging."""
  normalizer = (whole.get("normalizer") or {}).get("type")
  steps = whole.get("pre_tokenizer") or {}
  found = tuple(_step(step) for step in steps.get("pretokenizers", [steps] if steps else []))
  if (normalizer, found) not in KNOWN:
    raise run.Refused(f"{path}: no pre-tokenizer of llama.cpp is known here for normalizer {normalizer} "
                      f"and the steps {list(found)}: config.gguf.pre names one by hand")
  return KNOWN[normalizer, found]


def _step(step):
  """A step of a pre-tokenizer in the words of KNOWN, or as it stands."""
  kind = step.get("type")
  isolated = step.get("behavior") == "Isolated" and not step.get("invert")
  # What an expression that matches all text does not match is nothing: the same cut.
  if kind == "Split" and (isolated or (step.get("behavior") == "Removed" and step.get("invert"))):
    return kind, (step.get("pattern") or {}).get("Regex")
  if kind == "Digits":
    return kind, bool(step.get("individual_digits"))
  if kind == "ByteLevel" and not step.get("add_prefix_space"):
    return kind, step.get("use_regex", True)
  return kind, str(step)
