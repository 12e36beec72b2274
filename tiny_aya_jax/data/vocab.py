"""VERB vocab: weighted text -> tokenizer.model, tokenizer.json and a short report, vocab.json.

SentencePiece BPE with byte fall-back and no normalisation. All shaping happens in the training
text and options, nothing is split at encode time, so that every engine gives equal ids:
- words do not cross scripts; digits are single, those of all scripts;
- a newline stays at the head of the line it precedes and is an ordinary piece ("\\n", "\\n\\n")
  that merges like any other: no engine needs a rule for it;
- what is not covered by a piece is its UTF-8 bytes.

Not here: the fairness report, and the family-and-script weights of the report's Eq. 1. A
language's share of the sample is bytes^(1/temperature), capped by the text that exists; what a
capped language leaves is spread over the others.
"""

import functools
import io
import math
import os
import random
import re
import time

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import text as texts
from tiny_aya_jax.data import tokenizer as tokenizers

SMALLEST = len(tokenizers.SPECIALS) + 256 + 2  # specials, bytes, space and newline
MEMORY_PER_BYTE = 10  # of the sample, while training (ecosystem notes, B.5)
COLDEST = 0.1  # temperature: 10^15 bytes to the power 10 is still a double
HUGE = 2_000_000_000  # bytes, from where SentencePiece has to count in 64 bits
SLICE = 65_536  # bytes of each language's sample that the report encodes
# Training lines are cut at this many characters, before a space if there is one: SentencePiece
# drops what is longer than max_sentence_length bytes, and says so nowhere.
LONGEST = 2000
CHUNK = re.compile(rf".{{1,{LONGEST}}}(?=\s|$)|.{{1,{LONGEST}}}", re.DOTALL)
# No piece crosses a CUT, and it is part of none. Cut apart are digits outside ASCII (split_digits
# knows only ASCII's); cut out are NUL and SentencePiece's own mark for unknown characters, which
# can make it drop a whole line.
CUT = "\x1f"
DIGIT = re.compile(r"[^\D0-9]")
DROPPED = re.compile("[\0\u2585]")


def main(config, workdir):
  """Trains on `config.text`; writes workdir/{tokenizer.model, tokenizer.json, vocab.json}.

  Equal inputs give equal bytes; a rerun says "up to date". Refused: no text in the languages
  chosen, a size below specials and bytes, a size that the sample cannot fill.
  """
  start = time.monotonic()
  _check(config)
  sources = _sources(config)
  inputs = _fingerprint(config, sources)
  if run.up_to_date(workdir / "vocab.json", inputs, config.overwrite) and _whole(workdir):
    run.say(f"{workdir}: up to date")
    return
  have, cut_lines = _count(config.text, sources)
  want = shares(have, config.bytes, config.temperature)
  _say_sample(want, cut_lines)
  slices = {code: [] for code in want}
  model = train(
      sample(config, sources, have, want, slices),
      config.size,
      config.character_coverage,
      huge=sum(want.values()) > HUGE,
  )
  tokenizer = _write(workdir, model)
  table = {
      code: dict(text_bytes=have[code], sample_bytes=want[code], **_rates(tokenizer, slices[code]))
      for code in want
  }
  _say_table(table)
  record = dict(
      inputs=inputs,
      size=tokenizer.size,
      sha256=tokenizer.sha256,
      cut_lines=cut_lines,
      seconds=round(time.monotonic() - start, 1),
      languages=table,
  )
  run.write_json(workdir / "vocab.json", record)  # last: its presence says that all is there
  run.say(f"{workdir}: V={tokenizer.size} in {record['seconds']} s")


def _whole(workdir):
  """Whether both files are as vocab.json says; a lost or changed one is made again."""
  record, model = run.read_json(workdir / "vocab.json", "earlier result"), workdir / "tokenizer.model"
  there = model.is_file() and (workdir / "tokenizer.json").is_file()
  return there and run.sha256(model) == record["sha256"]


def _check(config):
  if not config.text:
    raise run.Refused("text is not set: give --config.text=DIR, a folder of raw text")
  if config.size < SMALLEST:
    raise run.Refused(
        f"size is {config.size}, expected at least {SMALLEST} ({len(tokenizers.SPECIALS)} specials,"
        " 256 bytes, space and newline): raise --config.size"
    )
  for name in ("bytes", "temperature", "character_coverage"):
    if not 0 < config[name] < math.inf:
      raise run.Refused(f"{name} is {config[name]}, expected a number above 0")
  if config.temperature < COLDEST:
    raise run.Refused(f"temperature is {config.temperature}, expected at least {COLDEST}: all text "
                      "would be of the largest language")
  if config.character_coverage > 1:
    raise run.Refused(
        f"character_coverage is {config.character_coverage}, expected a share of at most 1"
    )


def _sources(config):
  """[(code, source name, paths)] of the languages chosen that have text."""
  chosen = languages.select(config.languages)
  found = texts.languages(config.text)
  sources = [
      (code, name, [str(path) for path in paths])
      for code in chosen
      for name, paths in sorted(found.get(code, {}).items())
  ]
  if not sources:
    raise run.Refused(
        f"{config.text} has text of {len(found)} languages ({', '.join(sorted(found)[:5])} ...),"
        f" but of none of the {len(chosen)} in --config.languages: choose others or add text"
    )
  return sources


def _fingerprint(config, sources):
  """Of the settings and of every file's name and bytes, wherever the folder lies."""
  settings = {name: str(config[name]) for name in config if name not in ("overwrite", "text")}
  files = [
      [code, name, texts.fingerprint(config.text, paths)] for code, name, paths in sources
  ]
  return run.fingerprint([settings, files])


# --- the sample ---------------------------------------------------------------------------------


def _count(source, sources):
  """-> ({code: bytes of text}, how many lines are longer than LONGEST)."""
  have, cut_lines = dict.fromkeys((code for code, *_ in sources), 0), 0
  for code, name, _ in run.progress(sources, "reading"):
    for document in _documents(source, code, name):
      tokenizers.check(document)
      for line in lines(document):
        have[code] += len(line.encode())
        cut_lines += len(line) > LONGEST
  return {code: count for code, count in have.items() if count}, cut_lines


def _documents(source, code, name):
  """Plain texts; of a conversation, each message's text."""
  embedded = source.startswith("embedded/")
  for document in _made(source, code, name) if embedded else texts.read(source, code, name):
    if isinstance(document, str):
      yield document
    else:
      yield from (message["content"] for message in document)


@functools.cache
def _made(source, code, name):
  """The embedded corpus is slow to make and small (4 MB): kept between the two readings."""
  return tuple(texts.read(source, code, name))


def lines(document):
  """'a\\n\\nb' -> 'a', '\\n\\nb': newlines stay with the line they precede."""
  return re.findall(r"\n*[^\n]+", document)


def shares(have, budget, temperature):
  """{code: bytes of text} -> {code: bytes to take}, proportional to bytes^(1/temperature).

  No language gives more than it has; what it leaves is shared by the others in proportion.
  """
  weights = {code: count ** (1 / temperature) for code, count in have.items()}
  left, want = min(budget, sum(have.values())), {}
  while weights:
    scale = left / sum(weights.values())
    full = [code for code in weights if weights[code] * scale >= have[code]]
    if not full:
      want |= {code: int(weight * scale) for code, weight in weights.items()}
      break
    for code in full:
      want[code] = have[code]
      left -= have[code]
      del weights[code]
  return {code: want[code] for code in have}


def sample(config, sources, have, want, slices):
  """Yields training lines; fills slices[code] with about SLICE bytes of them.

  Lines are taken at even distances through all files of a language, not from their heads.
  """
  take = {code: _evenly(want[code] / have[code], f"{config.seed} {code}") for code in want}
  keep = {code: _evenly(SLICE / max(want[code], 1), f"slice {code}") for code in want}
  for code, name, _ in run.progress(sources, "sampling"):
    for document in _documents(config.text, code, name):
      for line in lines(document):
        for chunk in CHUNK.findall(line):
          if next(take[code]):
            if next(keep[code]):
              slices[code].append(chunk)
            yield shape(chunk)


def _evenly(rate, seed):
  """True for a share `rate` of the calls, at even distances; the seed says where to begin."""
  phase = random.Random(seed).random()
  while True:
    phase += min(rate, 1)
    yield phase >= 1
    phase %= 1


def shape(line):
  """Marks where no piece may cross: around digits of all scripts, at what must not be there."""
  return DIGIT.sub(rf"{CUT}\g<0>{CUT}", DROPPED.sub(CUT, line))


# --- training -----------------------------------------------------------------------------------


def train(sentences, size, character_coverage, huge=False):
  """Iterable of lines -> the bytes of a tokenizer.model with `size` pieces, specials included."""
  import sentencepiece

  written = io.BytesIO()
  ids = tokenizers.SPECIALS
  named = dict(pad="<PAD>", bos="<BOS_TOKEN>", eos="<EOS_TOKEN>", unk="<UNK>")
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=True,
        character_coverage=character_coverage,
        required_chars="\n" + tokenizers.SPACE,  # pieces, however rare they are in the sample
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        split_by_unicode_script=True,
        pretokenization_delimiter=CUT,
        max_sentence_length=8 * LONGEST,  # a character is 4 bytes at most, a cut digit 6
        train_extremely_large_corpus=huge,
        # The other specials take the ids these leave free, in order.
        control_symbols=[name for name in ids if name not in named.values()],
        minloglevel=2,
        **{f"{role}_id": ids[name] for role, name in named.items()},
        **{f"{role}_piece": name for role, name in named.items()},
    )
  except RuntimeError as error:
    raise _refusal(size, str(error)) from error
  return written.getvalue()


def _refusal(size, message):
  if found := re.search(r"too high \(\d+\).*<= (\d+)", message):
    return run.Refused(
        f"size {size} is too large: the sample gives at most {found[1]} pieces;"
        f" set --config.size={found[1]} or less, raise --config.bytes or add text"
    )
  if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
    return run.Refused(
        f"size {size} is too small: specials, bytes and the characters to cover are {found[1]};"
        " raise --config.size or lower --config.character_coverage"
    )
  if "sentences_.empty()" in message:
    return run.Refused(
        "the sample holds no text that could be trained on: add text, or raise --config.bytes or"
        " --config.character_coverage"
    )
  return run.Refused(f"SentencePiece cannot train a vocabulary of {size} pieces: {message}")


def _write(workdir, model):
  """Both files, each whole or not at all -> the loaded tokenizer."""
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "vocab.json").unlink(missing_ok=True)  # with overwrite: it speaks of the old files
  _replace(workdir / "tokenizer.model", model)
  tokenizer = tokenizers.load(workdir / "tokenizer.model")
  _replace(workdir / "tokenizer.json", tokenizer.json().encode())
  return tokenizer


def _replace(path, content):
  temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
  temporary.write_bytes(content)
  os.replace(temporary, path)


# --- the report ---------------------------------------------------------------------------------


def _rates(tokenizer, chunks):
  tokens = sum(map(len, tokenizer.encode_many(chunks)))
  return dict(
      tokens_per_character=round(tokens / max(sum(map(len, chunks)), 1), 4),
      bytes_per_token=round(sum(len(chunk.encode()) for chunk in chunks) / max(tokens, 1), 4),
  )


def _say_sample(want, cut_lines):
  taken = sum(want.values()) / 1e6
  run.say(
      f"sample: {taken:.1f} MB in {len(want)} languages, {cut_lines} long lines cut; training needs"
      f" about {MEMORY_PER_BYTE * taken:,.0f} MB of memory"
  )


def _say_table(table):
  order = sorted(table, key=lambda code: table[code]["tokens_per_character"])
  run.say("language     sample kB   tokens/character   bytes/token")
  for code in order if len(order) <= 10 else [*order[:5], None, *order[-5:]]:
    row = table.get(code)
    run.say(
        f"{code:11} {row['sample_bytes'] / 1e3:10.0f} {row['tokens_per_character']:18.3f}"
        f" {row['bytes_per_token']:13.2f}"
        if row
        else "..."
    )
