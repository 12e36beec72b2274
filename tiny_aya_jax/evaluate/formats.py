"""Test sets as they are published -> items by language; nothing of a model, nothing of a metric.

A set is a folder (or one file) of .jsonl, .json, .csv, .tsv, .txt or .parquet files, compressed or
not, or hf://NAME[@SPLIT] from the hub (needs `pip install datasets`). The language of a file is in
its name, else its folder's: `deu_Latn.jsonl.gz`, `mgsm_de.tsv`, `xcopa/de/test.de.jsonl`; of a hub
set, in its subset's. `zh` without a script is simplified. Files in languages that are not among
the 70 are left out, and said so.

Items are dicts. Multiple choice: {"context", "choices", "answer" (an index)}; questions: {"prompt"}
and what the answer is compared with.
"""

import csv
import io
import json
import pathlib
import re

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import text

HUB = "hf://"
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
COMPRESSED = (".gz", ".zst")


def by_language(place, wanted=None, split="test"):
  """{code: [record, ...]} of a set, in the order of the languages table; a record is a dict.

  A line of a .txt is {"text": line}, one of a .tsv without a header {"0": .., "1": ..}. Where files
  of other splits lie beside, only those of `split` are read. wanted: codes, or None for all.
  """
  found, unknown = {}, set()
  for name, records in _parts(place, split):
    code = code_of(name)
    if code is None:
      unknown.add(name)
    elif wanted is None or code in wanted:
      found.setdefault(code, []).extend(records())
  if unknown:
    run.say(f"{place}: {len(unknown)} parts are in none of the 70 languages and are left out: "
            f"{', '.join(sorted(unknown)[:5])}")
  if not found:
    raise run.Refused(f"{place} has no records in a language that is asked for; a file is called by "
                      "its language, such as deu_Latn.jsonl or set_de.tsv")
  order = [language.code for language in languages.LANGUAGES]
  return {code: found[code] for code in order if code in found}


def every_record(place):
  """The records of a set in one language, whatever its files are called."""
  for _, read in _parts(place, "test"):
    yield from read()


def code_of(name):
  """'mgsm_bn.tsv', 'xcopa/et/test.et.jsonl', 'zho_Hant' -> a code of the 70, or None."""
  folder, _, stem = name.rpartition("/")
  stem = re.sub("|".join(re.escape(kind) for kind in (*KINDS, *COMPRESSED)), "", stem)
  pieces = re.split(r"[._\- ]", stem)
  pairs = ["_".join(pair) for pair in zip(pieces, pieces[1:])]
  for candidate in (stem, *reversed(pairs), *reversed(pieces), *reversed(folder.split("/"))):
    if len(candidate) < 2:
      continue
    try:
      codes = languages.expand(candidate)
    except run.Refused:
      continue
    if len(codes) == 1 or codes == ("cmn_Hans", "cmn_Hant"):
      return codes[0]
  return None


def _parts(place, split):
  """[(name, () -> records)]: the files of a folder, or the subsets of a set on the hub."""
  if str(place).startswith(HUB):
    return _hub(str(place).removeprefix(HUB), split)
  place = pathlib.Path(place)
  if place.is_file():
    return [(place.name, lambda: list(records(place)))]
  if not place.is_dir():
    raise run.Refused(f"{place} does not exist: give a folder of files, a file, or hf://NAME")
  paths = sorted(path for path in place.rglob("*") if path.is_file() and _kind(path) in KINDS)
  mine = [path for path in paths if split in re.split(r"[._\-]", path.name)]
  return [(path.relative_to(place).as_posix(), lambda path=path: list(records(path)))
          for path in mine or paths]


def _hub(name, split):
  name, _, given = name.partition("@")
  try:
    import datasets
  except ImportError:
    raise run.Refused(f"hf://{name} needs the datasets package: pip install datasets") from None
  try:
    subsets = datasets.get_dataset_config_names(name)
  except Exception as error:  # no network, no such set, no access: it raises whatever it likes
    raise run.Refused(f"hf://{name} cannot be read ({' '.join(str(error).split())[:200]})") from None

  def read(subset):
    return [dict(row) for row in datasets.load_dataset(name, subset, split=given or split)]

  return [(subset, lambda subset=subset: read(subset)) for subset in subsets]


def records(path):
  """Yields the records of one file; a broken one is Refused with its place."""
  path, kind = pathlib.Path(path), _kind(pathlib.Path(path))
  if kind == ".parquet":
    yield from _parquet(path)
  elif kind in (".csv", ".tsv"):
    yield from _table(path, "\t" if kind == ".tsv" else ",")
  elif kind == ".json":
    yield from _json(path, _whole(path))
  else:
    for number, line in text.lines(path):
      line = _utf8(line, f"{path}, line {number}")
      if kind == ".txt":
        yield dict(text=line)
      elif line.strip():
        yield from _json(f"{path}, line {number}", line)


def _kind(path):
  suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
  return suffixes[-1] if suffixes else ""


def _json(place, line):
  try:
    found = json.loads(line)
  except ValueError as error:
    raise run.Refused(f"{place} is not JSON ({error})") from None
  for record in found if isinstance(found, list) else [found]:
    if not isinstance(record, dict):
      raise run.Refused(f"{place} holds a JSON {type(record).__name__}, expected an object")
    yield record


def _table(path, delimiter):
  """Rows by the header's names; a .tsv whose first row has a number in it has no header."""
  quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
  rows = list(csv.reader(io.StringIO(_whole(path), newline=""), delimiter=delimiter, quoting=quoting))
  if not rows:
    return
  named = delimiter == "," or not any(re.fullmatch(r"[\d,.]+", cell) for cell in rows[0])
  head = rows[0] if named else [str(column) for column in range(len(rows[0]))]
  for number, row in enumerate(rows[named:], 1 + named):
    if len(row) != len(head):
      raise run.Refused(f"{path}, row {number} has {len(row)} cells, expected {len(head)}")
    yield dict(zip(head, row))


def _parquet(path):
  import pyarrow.parquet

  try:
    yield from pyarrow.parquet.read_table(path).to_pylist()
  except (pyarrow.ArrowException, OSError) as error:
    raise run.Refused(f"{path} is damaged or no parquet ({error}): fetch it again") from None


def _whole(path):
  return _utf8(b"\n".join(line for _, line in text.lines(path)), path)


def _utf8(content, place):
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise run.Refused(f"{place} is not UTF-8 ({error.reason})") from None


# Multiple choice: record(s) of a set -> items.


def belebele(records):
  """The set's own rows, or passages with their questions under "items"."""
  for row in records:
    if "items" in row:
      for item in row["items"]:
        right = [number for number, answer in enumerate(item["answers"]) if answer["correct"]]
        yield _choice(f"{row['text'].strip()}\n\n{item['question'].strip()}",
                      [answer["text"] for answer in item["answers"]], right[0])
    else:
      yield _choice(f"{row['flores_passage'].strip()}\n\n{row['question'].strip()}",
                    [row[f"mc_answer{number}"] for number in range(1, 5)],
                    int(row["correct_answer_num"]) - 1)


def global_mmlu(records):
  for row in records:
    yield _choice(row["question"], [row[f"option_{letter}"] for letter in "abcd"],
                  "ABCD".index(row["answer"].strip().upper()))


def include(records):
  for row in records:
    answer = row["answer"]
    yield _choice(row["question"], [row[f"option_{letter}"] for letter in "abcd"],
                  "ABCD".index(answer) if str(answer) in "ABCD" else int(answer))


def global_piqa(records):
  """solution0, solution1, and up to four of the parallel set."""
  for row in records:
    solutions = [row[name] for name in sorted(row) if re.fullmatch(r"solution\d", name)]
    yield _choice(row["prompt"], solutions, int(row["label"]))


# "because" and "so", by which a premise goes on (our own; not checked by speakers of each language).
CONNECTORS = dict(
    ekk_Latn=("sest", "seetõttu"), ind_Latn=("karena", "maka"), ita_Latn=("perché", "quindi"),
    swh_Latn=("kwa sababu", "kwa hiyo"), tam_Taml=("ஏனென்றால்", "எனவே"),
    tha_Thai=("เพราะ", "ดังนั้น"), tur_Latn=("çünkü", "bu yüzden"), vie_Latn=("bởi vì", "vì vậy"),
    cmn_Hans=("因为", "所以"), eng_Latn=("because", "so"),
)


def xcopa(records, code):
  """A premise that goes on with 'because' or 'so', and two clauses that may follow."""
  if code not in CONNECTORS:
    raise run.Refused(f"xcopa has no connectors for {code}: languages are {', '.join(CONNECTORS)}")
  for row in records:
    because, so = CONNECTORS[code]
    premise = row["premise"].strip().rstrip(".。")
    item = _choice(f"{premise} {because if row['question'] == 'cause' else so}",
                   [row[name][:1].lower() + row[name][1:] for name in ("choice1", "choice2")],
                   int(row["label"]))
    yield item


def cloze(records):
  """{"context", "choices", "answer"}: a text and how it may go on; for sets of your own."""
  for row in records:
    yield _choice(row["context"], row["choices"], int(row["answer"]))


def _choice(context, choices, answer):
  if not 0 <= answer < len(choices):
    raise run.Refused(f"a question with {len(choices)} choices has answer {answer}: {context[:60]!r}")
  return dict(context=context, choices=[str(choice) for choice in choices], answer=answer)


# Questions: what is asked, and what the answer is compared with.


def mgsm(records):
  """Two columns, or fields question and answer (answer_number)."""
  for row in records:
    question = row.get("question", row.get("0"))
    yield dict(question=question, expected=str(row.get("answer_number", row.get("answer", row.get("1")))))


def qa(records):
  """{"question", "answers": one or a list}; also BLEnD's {"question", "annotations"}."""
  for row in records:
    answers = row.get("answers", row.get("answer"))
    if "annotations" in row:
      answers = [answer for one in row["annotations"] for answer in one["answers"] + one["en_answers"]]
    answers = [answers] if isinstance(answers, str) else list(answers)
    if answers:
      yield dict(prompt=row["question"], accepted=answers)


# Country of BLEnD's files -> language; Azerbaijani, Assamese and Sundanese are not among the 70.
COUNTRIES = dict(
    Algeria="arb_Arab", China="cmn_Hans", Ethiopia="amh_Ethi", Greece="ell_Grek",
    Indonesia="ind_Latn", Iran="fas_Arab", Mexico="spa_Latn", North_Korea="kor_Hang",
    Northern_Nigeria="hau_Latn", South_Korea="kor_Hang", Spain="spa_Latn", UK="eng_Latn",
    US="eng_Latn",
)


def blend(place, wanted=None):
  """BLEnD's annotations, {Country}_data.json: {id: {"question", "annotations"}} -> {code: [record]}."""
  place, found = pathlib.Path(place), {}
  for path in sorted(place.glob("*_data.json*")):
    country = path.name.partition("_data.json")[0]
    code = COUNTRIES.get(country)
    if code is None:
      run.say(f"{path}: the language of {country} is not among the 70; it is left out")
    elif wanted is None or code in wanted:
      entries = next(records(path))
      found.setdefault(code, []).extend(dict(entry, country=country) for entry in entries.values())
  if not found:
    raise run.Refused(f"{place} has no <Country>_data.json of BLEnD in a language that is asked for")
  return found


def prompts(records):
  """Open-ended prompts: the field prompt, inputs, question or text."""
  for row in records:
    found = [row[name] for name in ("prompt", "inputs", "question", "text") if row.get(name)]
    if not found:
      raise run.Refused(f"a record has no prompt, inputs, question or text: {str(row)[:60]}")
    yield dict(prompt=found[0])


def multijail(place, wanted=None):
  """MultiJail.csv, a column a language -> {code: [{"prompt"}]}; in the order of its rows."""
  place = pathlib.Path(place)
  paths = [place] if place.is_file() else sorted(place.glob("*.csv*"))
  if len(paths) != 1:
    raise run.Refused(f"{place}: expected one .csv with a column a language, found {len(paths)}")
  rows, found = list(records(paths[0])), {}
  for column in rows[0] if rows else ():
    code = code_of(column) if column not in ("id", "source", "tags") else None
    if code and (wanted is None or code in wanted):
      found[code] = [dict(prompt=row[column]) for row in rows if row[column].strip()]
  if not found:
    raise run.Refused(f"{paths[0]} has no column in a language that is asked for")
  return found


def xstest(records):
  for row in records:
    label = row.get("label") or ("unsafe" if row["type"].startswith("contrast") else "safe")
    yield dict(prompt=row["prompt"], label=run.choose("label of XSTest", label, ("safe", "unsafe")))


def normad(records):
  """{"story", "country", "label" or "Gold Label": yes, no or neutral}: the neutral are left out."""
  for row in records:
    row = {name.lower().replace(" ", "_"): value for name, value in row.items()}
    label = str(row.get("label", row.get("gold_label"))).strip().lower()
    if label in ("yes", "no"):
      yield dict(story=row["story"], country=row["country"].replace("_", " "), expected=label)


def parallel(place, source, wanted=None, split="test"):
  """Files of aligned lines, one a language -> {code: [{"source", "reference"}]}, from `source`."""
  lines = by_language(place, None if wanted is None else {*wanted, source}, split)
  if source not in lines:
    raise run.Refused(f"{place} has no file in {source}, from which is translated")
  given = [_sentence(row) for row in lines.pop(source)]
  found = {}
  for code, rows in lines.items():
    if len(rows) != len(given):
      raise run.Refused(f"{place}: {code} has {len(rows)} lines and {source} {len(given)}: they must "
                        "be aligned")
    found[code] = [dict(source=one, reference=_sentence(row)) for one, row in zip(given, rows)]
  return found


def _sentence(row):
  return row.get("text", row.get("sentence", ""))
