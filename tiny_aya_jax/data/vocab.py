"""VERB vocab: weighted text -> tokenizer.model and tokenizer.json, and a report on its fairness.

SentencePiece BPE with byte fall-back and no normalisation. All shaping happens in the training
text and options, nothing is split at encode time, so that every engine gives equal ids:
- words do not cross scripts; digits are single, those of all scripts;
- a newline stays at the head of the line it precedes and is an ordinary piece ("\\n", "\\n\\n")
  that merges like any other: no engine needs a rule for it;
- what is not covered by a piece is its UTF-8 bytes.

A language's share of the sample is config.mixture's (rules.py, sizes in bytes), capped by its text
taken config.repeat times; what a capped language leaves is spread over the others in proportion,
`fixed` ones included.

Rules to compare (config.beside) are trained on the same text, budget and size, into
workdir/beside/NAME, each whole or not at all: a killed call goes on with those that are missing.
"""

import collections
import concurrent.futures
import functools
import io
import itertools
import math
import multiprocessing
import os
import pathlib
import random
import re
import time

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import fairness, rules
from tiny_aya_jax.data import text as texts
from tiny_aya_jax.data import tokenizer as tokenizers

SMALLEST = len(tokenizers.SPECIALS) + 256 + 2  # specials, bytes, space and newline
# Peak memory of a training, a line above measurements on 15 to 191 MB of real text (LOG.md): by 2 to
# 8% for all 69 languages and for the six that write no spaces, by 40% for six in Latin script.
MEMORY_PER_BYTE = 10  # of the sample
MEMORY_PER_PIECE = 2_000
MEMORY_AT_LEAST = 200_000_000
HUGE = 2_000_000_000  # bytes, from where SentencePiece has to count in 64 bits
SLICE = 65_536  # bytes of each language's text that are measured where no text is held out
BATCH = 1000  # lines encoded at once
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

CHOSEN, GIVEN = "chosen", "given"  # the report's column of config.mixture, of config.tokenizer
# Rules to set beside the chosen one, by the names that config.beside may hold.
BESIDE = dict(
    proportional=dict(kind="temperature", alpha=1.0),
    temperature=dict(kind="temperature", temperature=3.33),  # XLM-R (Conneau et al. 2020)
    uniform=dict(kind="temperature", alpha=0.0),  # capped by the text: UniMax of one epoch
    # The report's Eq. 1 in both readings (tiny_aya.md 3); w^d as in our training mixture, or raw.
    A=dict(kind="buckets", by="family", reading="A", temperature=3.33),
    B=dict(kind="buckets", by="family", reading="B", temperature=3.33, bucket_temperature=1.0),
    A_raw=dict(kind="buckets", by="family", reading="A", alpha=1.0),
    B_raw=dict(kind="buckets", by="family", reading="B", alpha=1.0, bucket_temperature=1.0),
)


def main(config, workdir):
  """Writes workdir/{tokenizer.model, tokenizer.json, vocab.json} and fairness.{json, html, svg}.

  With `config.tokenizer` nothing is trained and only the report is made. Equal inputs give equal
  bytes; a rerun says "up to date". Refused: no text in the languages chosen, a size below specials
  and bytes, a size that the sample cannot fill, a sample that does not fit the machine's memory.
  """
  _check(config)
  measured = _sources(config, config.validation or config.text)  # refused now, not after training
  paths = {GIVEN: config.tokenizer} if config.tokenizer else _trained(config, workdir)
  _report(config, workdir, measured, paths)


def _check(config):
  folders = [os.path.realpath(folder) for folder in (config.text, config.validation) if folder]
  if len(set(folders)) < len(folders):
    raise run.Refused(f"config.validation is the training text, {config.text}: give held-out text")
  for name in ("processes", "repeat"):
    if config[name] < 1:
      raise run.Refused(f"config.{name} is {config[name]}, expected at least 1")
  if config.plot:
    fairness.check_plot()
  for name in config.beside:
    run.choose("rule in config.beside", name, BESIDE)
  if config.tokenizer:
    _check_given(config)
    return
  if not config.text:
    raise run.Refused("text is not set: give --config.text=DIR, a folder of raw text")
  if config.size < SMALLEST:
    raise run.Refused(
        f"size is {config.size}, expected at least {SMALLEST} ({len(tokenizers.SPECIALS)} specials,"
        " 256 bytes, space and newline): raise --config.size"
    )
  for name in ("bytes", "character_coverage"):
    if not 0 < config[name] < math.inf:
      raise run.Refused(f"{name} is {config[name]}, expected a number above 0")
  if config.character_coverage > 1:
    raise run.Refused(
        f"character_coverage is {config.character_coverage}, expected a share of at most 1"
    )


def _check_given(config):
  if config.beside:
    raise run.Refused(f"config.tokenizer is only measured, and config.beside={config.beside} would "
                      "be trained: set one of them")
  if not config.validation and not config.text:
    raise run.Refused("a given tokenizer is measured on text: set --config.validation=DIR")


def _sources(config, folder):
  """[(code, source name, paths)] of the languages chosen that have text in the folder."""
  chosen = rules.asked(_rule(config))
  found = texts.languages(folder)
  codes = [code for code in found if code in chosen]
  if not codes:
    raise run.Refused(
        f"{folder} has text of {len(found)} languages ({', '.join(list(found)[:5])} ...),"
        f" but of none of the {len(chosen)} in --config.languages: choose others or add text"
    )
  return [
      (code, name, [str(path) for path in paths])
      for code in codes
      for name, paths in sorted(found[code].items())
  ]


def _rule(config, rule=None):
  """config.mixture, or another, with what this verb knows: languages, unit, UniMax's budget."""
  rule = dict(rule or config.mixture, languages=tuple(config.languages), unit="bytes")
  if rule["kind"] == "unimax":
    rule |= dict(budget=config.bytes)
  if rule["kind"] == "explicit" and rule.pop("languages") != ("all",):
    raise run.Refused(f"config.languages is {tuple(config.languages)}, and a mixture of the kind "
                      "explicit names its own: leave it ('all',)")
  if rule["kind"] != "buckets":  # whose fields the config sets, and a command line cannot unset
    rule |= dict(by=None, reading=None)
  return rules.checked(rule)


def _text_fingerprint(folder, sources):
  """Of every file's name and bytes, wherever the folder lies."""
  return [[code, name, texts.fingerprint(folder, paths)] for code, name, paths in sources]


# --- the vocabularies ---------------------------------------------------------------------------

_Job = collections.namedtuple("_Job", "folder rule inputs")


def _trained(config, workdir):
  """{column: folder of its tokenizer}, training those that are not there: the workdir's first."""
  asked = {CHOSEN: _rule(config)} | {name: _rule(config, BESIDE[name]) for name in config.beside}
  folders = {
      name: workdir if rule == asked[CHOSEN] else workdir / "beside" / name
      for name, rule in asked.items()
  }
  sources = _sources(config, config.text)
  for rule in asked.values():  # a name, field or number that is wrong is refused before reading
    rules.weights(dict.fromkeys((code for code, *_ in sources), 1), rule)
  text = _text_fingerprint(config.text, sources)
  settings = [config.bytes, config.repeat, config.size, config.character_coverage, config.seed]
  jobs = {
      folders[name]: _Job(folders[name], rule, run.fingerprint([rule, *settings, text]))
      for name, rule in asked.items()
  }
  due = [job for job in jobs.values() if not _done(job, config.overwrite)]
  if due:
    _train_all(config, sources, due)
  else:
    run.say(f"{workdir}: up to date")
  return folders


def _done(job, overwrite):
  """Whether the vocabulary is there as its vocab.json says; a lost or changed one is made again."""
  if not run.up_to_date(job.folder / "vocab.json", job.inputs, overwrite):
    return False
  record = run.read_json(job.folder / "vocab.json", "earlier result")
  model = job.folder / "tokenizer.model"
  there = model.is_file() and (job.folder / "tokenizer.json").is_file()
  return there and run.sha256(model) == record.get("sha256")


def _train_all(config, sources, jobs):
  have, cut_lines = _count(config.text, sources)
  _check_text(config, have)
  most = {code: config.repeat * count for code, count in have.items()}
  wants = [shares(most, config.bytes, rules.weights(have, job.rule)) for job in jobs]
  _check_memory(config, wants)
  _say_sample(wants[0], jobs[0].rule, cut_lines)
  if config.processes == 1:
    for job, want in zip(jobs, wants):
      _train_one(job, config, run.progress(sources, "sampling"), have, want)
    return
  # 'spawn': a forked child would inherit the progress bar's thread and its locks.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(config.processes, context, run.end_with) as pool:
    futures = [
        pool.submit(_train_one, job, config, sources, have, want) for job, want in zip(jobs, wants)
    ]
    try:
      finished = concurrent.futures.as_completed(futures)
      for future in run.progress(finished, "training", total=len(futures)):
        future.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _check_text(config, have):
  total = config.repeat * sum(have.values())
  if not total:
    raise run.Refused(f"{config.text} holds no line of text in the languages chosen: add some")
  absent = sorted(rules.asked(_rule(config)) - have.keys())
  if absent:
    run.say(f"{config.text} has no text of {len(absent)} languages: {', '.join(absent)}")
  if config.beside and total <= config.bytes:
    raise run.Refused(
        f"config.bytes={config.bytes} takes all {total} bytes there are (config.repeat="
        f"{config.repeat}), by any rule: lower it to compare rules, or set --config.beside='()'"
    )


def _check_memory(config, wants):
  """Refuses a sample whose training would end in an out-of-memory kill, hours later."""
  together = min(config.processes, len(wants))
  fixed = MEMORY_PER_PIECE * config.size + MEMORY_AT_LEAST
  need = together * (max(sum(want.values()) for want in wants) * MEMORY_PER_BYTE + fixed)
  have = _memory()
  if need > have:
    fits = int((have / together - fixed) / MEMORY_PER_BYTE)
    raise run.Refused(
        f"training takes about {need / 1e9:.1f} GB of memory, {together} at a time, and this "
        f"machine has {have / 1e9:.1f} GB: "
        + (f"set --config.bytes={fits} or less" if fits > 0 else "lower --config.processes or size")
    )


def _memory():
  """Bytes of memory: the machine's, or its container's if that has less."""
  whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = pathlib.Path("/sys/fs/cgroup/memory.max")
  given = limit.read_text().strip() if limit.is_file() else "max"
  return whole if given == "max" else min(whole, int(given))


def _train_one(job, config, sources, have, want):
  """Trains one vocabulary into its folder, vocab.json last: its presence says that all is there."""
  start = time.monotonic()
  lines = sample(config, sources, have, want)
  try:
    model = train(lines, config.size, config.character_coverage, sum(want.values()) > HUGE)
  except run.Refused as refusal:
    raise run.Refused(f"{job.folder}: {refusal}") from refusal
  tokenizer = _write(job.folder, model)
  record = dict(
      inputs=job.inputs,
      rule=rules.words(job.rule),
      size=tokenizer.size,
      sha256=tokenizer.sha256,
      seconds=round(time.monotonic() - start, 1),
      languages={
          code: dict(text_bytes=have[code], sample_bytes=count) for code, count in want.items()
      },
  )
  run.write_json(job.folder / "vocab.json", record)
  run.say(f"{job.folder}: V={tokenizer.size} in {record['seconds']} s")


def _say_sample(want, rule, cut_lines):
  total = sum(want.values())
  run.say(f"sample: {total / 1e6:.1f} MB in {len(want)} languages, {cut_lines} long lines cut; "
          f"{rules.words(rule)}")
  if rule["kind"] == "buckets":
    _say_buckets(want, rules.BUCKETS[rule["by"]])


def _say_buckets(want, bucket):
  """Realised shares, after the caps: one line a bucket, the largest first."""
  members = {}
  for code in want:
    name = (code,) if code == languages.CODE else bucket(languages.find(code))
    members.setdefault(" ".join(name), []).append(code)
  taken = {name: sum(want[code] for code in codes) for name, codes in members.items()}
  for name in sorted(taken, key=taken.get, reverse=True):
    share = taken[name] / sum(taken.values())
    short = [code.removesuffix("_" + name[-4:]) for code in members[name]]
    run.say(f"{share:7.2%}  {name:30}{len(short):3}  {' '.join(short)}")


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


def shares(most, budget, weights):
  """{code: bytes at most}, bytes, {code: weight} -> {code: bytes to take}, as the weights say.

  What a language cannot give is shared by the others in proportion.
  """
  weights, want = dict(weights), {}
  left = min(budget, sum(most[code] for code in weights))
  while weights:
    scale = left / sum(weights.values())
    full = [code for code in weights if weights[code] * scale >= most[code]]
    if not full:
      want |= {code: int(weight * scale) for code, weight in weights.items()}
      break
    for code in full:
      want[code] = most[code]
      left -= most[code]
      del weights[code]
  return {code: want[code] for code in most if code in want}


def sample(config, sources, have, want):
  """Yields training lines: at even distances through all files of a language, not their heads.

  A language that has less than is wanted gives every line, some of them once more than others.
  """
  take = {code: _evenly(want[code] / have[code], f"{config.seed} {code}") for code in want}
  for code, name, _ in sources:
    for document in _documents(config.text, code, name) if code in take else ():
      for line in lines(document):
        for chunk in CHUNK.findall(line):
          yield from [shape(chunk)] * next(take[code])


def _evenly(rate, seed):
  """Whole numbers, `rate` on average, as even as can be; the seed says where to begin."""
  phase = random.Random(seed).random()
  while True:
    phase += rate
    yield int(phase)
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


def _write(folder, model):
  """Both files, each whole or not at all -> the loaded tokenizer."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.json").unlink(missing_ok=True)  # with overwrite: it speaks of the old files
  _replace(folder / "tokenizer.model", model)
  tokenizer = tokenizers.load(folder / "tokenizer.model")
  _replace(folder / "tokenizer.json", tokenizer.json().encode())
  return tokenizer


def _replace(path, content):
  temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
  temporary.write_bytes(content)
  os.replace(temporary, path)


# --- the report ---------------------------------------------------------------------------------


def _report(config, workdir, sources, paths):
  """paths: {column: a tokenizer}. Writes workdir/fairness.{html, svg, json}, the last one last.

  Made again whenever what it reads has changed: it costs little beside a training.
  """
  folder = config.validation or config.text
  columns = {name: tokenizers.load(path) for name, path in paths.items()}
  made = {} if config.tokenizer else {
      name: run.read_json(path / "vocab.json", "vocabulary") for name, path in paths.items()
  }
  inputs = run.fingerprint([
      {name: tokenizer.sha256 for name, tokenizer in columns.items()},
      {name: [vocabulary["rule"], vocabulary["languages"]] for name, vocabulary in made.items()},
      [bool(config.validation), config.plot, str(folder), _text_fingerprint(folder, sources)],
  ])  # fmt: skip
  record = workdir / "fairness.json"
  if _same_report(config, workdir, inputs) and not config.overwrite:
    run.say(f"{record}: up to date")
    return
  record.unlink(missing_ok=True)
  result = dict(inputs=inputs, **_measured(config, folder, sources, columns, paths, made))
  workdir.mkdir(parents=True, exist_ok=True)
  picture = workdir / "fairness.svg"
  picture.unlink(missing_ok=True)
  if config.plot:
    fairness.plot(result, picture)
  page = fairness.page(result, picture.name if config.plot else None)
  (workdir / "fairness.html").write_text(page, encoding="utf-8")
  run.write_json(record, result)
  for line in fairness.table(result):
    run.say(line)
  run.say(f"page: {workdir / 'fairness.html'}")


def _same_report(config, workdir, inputs):
  kinds = ("json", "html", "svg") if config.plot else ("json", "html")
  if not all((workdir / f"fairness.{kind}").is_file() for kind in kinds):
    return False
  return run.read_json(workdir / "fairness.json", "earlier report").get("inputs") == inputs


def _measured(config, folder, sources, columns, paths, made):
  """The result of fairness.measure, with what it was measured on and the rules in words.

  made: {column: its vocab.json} of those that were trained.
  """
  sampled = {name: _shares(record) for name, record in made.items()}
  lines = _batches(folder, sources) if config.validation else _slices(folder, sources)
  result = fairness.measure(columns, lines, sampled)
  unseen = sorted({code for share in sampled.values() for code in share} - result["text"].keys())
  if unseen:
    run.say(f"{folder} has no text to measure {len(unseen)} languages on: {', '.join(unseen)}")
  return dict(
      measured_on=f"{'held-out' if config.validation else 'a part of the training'} text, {folder}",
      rules={name: made[name]["rule"] if made else str(path) for name, path in paths.items()},
      **result,
  )


def _shares(record):
  """{code: share of the sample} of a vocabulary."""
  taken = {code: row["sample_bytes"] for code, row in record["languages"].items()}
  return {code: count / sum(taken.values()) for code, count in taken.items()}


def _batches(folder, sources):
  """Yields (code, lines) of all text, a thousand lines at once."""
  for code, name, _ in run.progress(sources, "measuring"):
    found = (line for document in _documents(folder, code, name) for line in lines(document))
    while batch := list(itertools.islice(found, BATCH)):
      yield code, batch


def _slices(folder, sources):
  """Yields (code, lines), about SLICE bytes of each language, at even distances."""
  have, _ = _count(folder, sources)
  keep = {code: _evenly(min(1, SLICE / have[code]), f"slice {code}") for code in have}
  for code, batch in _batches(folder, sources):
    if code in keep:
      yield code, [line for line in batch if next(keep[code])]
