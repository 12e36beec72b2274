"""Test sets as they are published -> items by language; nothing of a model, nothing of a metric.

A set is a folder (or one file) of .jsonl, .json, .csv, .tsv, .txt or .parquet files, compressed or
not, or hf://OWNER/NAME[/SUBSETS][@SPLIT] from the hub (SUBSETS may hold *; needs `datasets`). The
language is in a file's name, else its folder's, else each record's field `language`; of a hub set, in
its subset's: `deu_Latn.jsonl.gz`, `mgsm_de.tsv`, `xcopa/de/test.de.jsonl`. A script that is not the
language's is another language: hin_Latn is not Hindi. `zh` without a script is simplified. What is in
none of the 70 languages, and further varieties of one that is there already, are left out, and named.

Items are dicts. Multiple choice: {"context", "choices", "answer" (an index)}; questions: {"prompt"}
and what the answer is compared with.
"""

import csv
import fnmatch
import io
import json
import pathlib
import re

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import text
from tiny_aya_jax.data.identify import UNSPACED

HUB = "hf://"
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".devtest", ".dev", ".parquet")
COMPRESSED = (".gz", ".zst")
ENDING = re.compile("|".join(f"{re.escape(kind)}$" for kind in (*KINDS, *COMPRESSED)))
SPLITS = dict(test=("test", "devtest"), dev=("dev", "validation", "val"))
TRADITIONAL = ("TW", "HK", "MO")  # regions that write Chinese so
MOST_CHOICES = 8


def by_language(place, wanted=None, split="test", otherwise=None):
  """{code: [record, ...]} of a set, in the order of the languages table; a record is a dict.

  A line of a .txt is {"text": line}, one of a .tsv without a header {"0": .., "1": ..}. Where files
  of other splits lie beside, only those of `split` are read. wanted: codes, or None for all.
  otherwise: the language of what does not name one.
  """
  parts, found, unknown = {}, {}, set()
  for name, read in _parts(place, split):
    code, variety = language_of(name)
    if code is None:
      rows = read()
      labelled = _by_field(rows) or ({otherwise: rows} if otherwise else {})
      for code, rows in labelled.items():
        found.setdefault(code, []).extend(rows)
      unknown |= set() if labelled else {name}
    else:  # numbered files are one part
      part = variety, re.sub(r"\d+(-of-\d+)?", "", name)
      parts.setdefault(code, {}).setdefault(part, []).append((name, read))
  for code, varieties in parts.items():
    first, *others = sorted(varieties)
    unknown |= {name for part in others for name, _ in varieties[part]}
    if wanted is None or code in wanted:
      found[code] = [row for _, read in varieties[first] for row in read()]
  if unknown:
    run.say(f"{place}: {len(unknown)} parts are left out, in none of the 70 languages or varieties of "
            f"one that is there: {', '.join(sorted(unknown)[:5])}")
  found = {code: rows for code, rows in found.items() if wanted is None or code in wanted}
  if not found:
    raise run.Refused(f"{place} has no records in a language that is asked for; a file is called by "
                      "its language, such as deu_Latn.jsonl or set_de.tsv")
  order = [language.code for language in languages.LANGUAGES]
  return {code: found[code] for code in order if code in found}


def every_record(place):
  """The records of a set in one language, whatever its files are called."""
  for _, read in _parts(place, "test"):
    yield from read()


def language_of(name):
  """A file or subset -> (code of the 70 or None, its variety or "").

  'mgsm_bn.tsv' -> ('ben_Beng', ''); 'por_latn_braz' -> ('por_Latn', 'braz'); 'hin_Latn' -> (None, '')
  """
  folder, _, stem = name.rpartition("/")
  while (short := ENDING.sub("", stem)) != stem:  # 'x.jsonl.gz'
    stem = short
  stem = re.sub(r"[._-]\d+(-of-\d+)?$", "", stem)
  pieces = [piece for piece in re.split(r"[._\- ]", stem) if piece]
  if "translation" in pieces:  # of XCOPA: the same, translated by a machine
    return None, ""
  ends = ["_".join(pieces[at:]) for at in range(len(pieces))]  # the longest first
  for candidate in (stem, *ends, *pieces[:1], *reversed(folder.split("/"))):
    code, variety = tag(candidate)
    if code or variety:  # a script or region of another language is an answer too
      return code, variety if code else ""
  return None, ""


def tag(words):
  """'de', 'Hindi', 'zho_Hant', 'pt-BR', 'por_Latn_braz1246' -> (code, variety); (None, what is odd)
  for a language in another script; (None, "") for no language."""
  found = re.fullmatch(r"([A-Za-z]{2,3})[_-]([A-Za-z]{4})(?:[_-](\w+))?", words)
  if found and (code := _code(f"{found[1]}_{found[2].title()}") or _code(found[1])):
    same = _code(f"{found[1]}_{found[2].title()}")
    return (same, found[3] or "") if same else (None, found[2]) if _is_script(found[2]) else (None, "")
  found = re.fullmatch(r"([a-z]{2,3})[_-]([A-Z]{2})", words)
  if found and (code := _code(found[1])):
    traditional = code == "cmn_Hans" and found[2] in TRADITIONAL
    return ("cmn_Hant", "") if traditional else (code, found[2])
  return _code(words), ""


def _is_script(word):
  return word.title() in {language.script for language in languages.LANGUAGES}


def _code(name):
  """A code of the 70 by any of its names; two letters or more."""
  try:
    codes = languages.expand(name) if len(name) > 1 and name != "all" else ()
  except run.Refused:
    return None
  return codes[0] if len(codes) == 1 or codes == ("cmn_Hans", "cmn_Hant") else None


def _by_field(rows):
  """{code: rows} of records that name their own language; {} if they do not."""
  found = {}
  for row in rows:
    field = row.get("language", row.get("lang"))
    if not isinstance(field, str):
      return {}
    code, _ = tag(f"{field}_{row['script']}" if isinstance(row.get("script"), str) else field)
    if code:
      found.setdefault(code, []).append(row)
  return found


def _parts(place, split):
  """[(name, () -> records)]: the files of a folder, or the subsets of a set on the hub."""
  if str(place).startswith(HUB):
    return _hub(str(place).removeprefix(HUB), split)
  place = pathlib.Path(place)
  if place.is_file():
    return [(place.name, lambda: list(records(place)))]
  if not place.is_dir():
    raise run.Refused(f"{place} does not exist: give a folder of files, a file, or hf://OWNER/NAME")
  paths = sorted(path for path in place.rglob("*") if path.is_file() and _kind(path) in KINDS)
  of_split = set(SPLITS.get(split, (split,)))
  mine = [path for path in paths
          if of_split & set(re.split(r"[._/\-]", path.relative_to(place).as_posix()))]
  return [(path.relative_to(place).as_posix(), lambda path=path: list(records(path)))
          for path in mine or paths]


def _hub(name, split):
  name, _, given = name.partition("@")
  owner, _, rest = name.partition("/")
  name, _, pattern = rest.partition("/")
  name = f"{owner}/{name}"
  try:
    import datasets
  except ImportError:
    raise run.Refused(f"hf://{name} needs the datasets package: pip install datasets") from None
  try:
    subsets = datasets.get_dataset_config_names(name)
  except Exception as error:  # no network, no such set, no access: it raises whatever it likes
    raise run.Refused(f"hf://{name} cannot be read ({' '.join(str(error).split())[:200]})") from None
  subsets = fnmatch.filter(subsets, pattern or "*")
  if not subsets:
    raise run.Refused(f"hf://{name} has no subset {pattern}")

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
      if kind in (".txt", ".dev", ".devtest"):
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
    answer = str(row["answer"]).strip()
    yield _choice(row["question"], [row[f"option_{letter}"] for letter in "abcd"],
                  "ABCD".index(answer) if answer in tuple("ABCD") else int(answer))


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
  because, so = CONNECTORS[code]
  space = "" if languages.find(code).script in UNSPACED else " "
  for row in records:
    premise = row["premise"].strip().rstrip(".。")
    connector = dict(cause=because, effect=so)[row["question"]]
    yield _choice(f"{premise}{space}{connector}",
                  [_lower(row[name].strip(), code) for name in ("choice1", "choice2")], int(row["label"]))


def _lower(clause, code):
  """Its first letter in lower case: it goes on a sentence."""
  first = {"I": "ı", "İ": "i"}.get(clause[:1]) if code == "tur_Latn" else None
  return (first or clause[:1].lower()) + clause[1:]


def cloze(records):
  """{"context", "choices", "answer"}: a text and how it may go on; for sets of your own. "between":
  what stands between the two, where that is not a space or, in unspaced scripts, nothing."""
  for row in records:
    more = dict(between=row["between"]) if "between" in row else {}
    yield _choice(row["context"], row["choices"], int(row["answer"]), **more)


def _choice(context, choices, answer, **more):
  choices = [str(choice) for choice in choices]
  if not 0 <= answer < len(choices) or not 2 <= len(choices) <= MOST_CHOICES or not all(choices):
    raise run.Refused(f"a question with choices {choices} has answer {answer}, expected 2 to "
                      f"{MOST_CHOICES} that say something, one of them the answer: {context[:60]!r}")
  return dict(context=context, choices=choices, answer=answer, **more)


# Questions: what is asked, and what the answer is compared with.


def mgsm(records):
  """Two columns, or fields question and answer_number or answer."""
  for row in records:
    names = ("0", "1") if "0" in row else (
        "question", "answer_number" if "answer_number" in row else "answer")
    question, expected = (row[name] for name in names)
    whole = isinstance(expected, float) and expected.is_integer()
    yield dict(question=question, expected=str(int(expected) if whole else expected).strip())


def qa(records):
  """{"question", "answers" or "answer": one or a list}; also BLEnD's {"question", "annotations"}."""
  for row in records:
    if "annotations" in row:
      answers = [answer for one in row["annotations"] for answer in one["answers"] + one["en_answers"]]
      if not answers or _unanswerable(row.get("idks", {})):
        continue
    else:
      answers = row["answers"] if "answers" in row else row["answer"]
      answers = answers if isinstance(answers, list) else [answers]
    if not answers or not all(isinstance(answer, (str, int, float)) for answer in answers):
      raise run.Refused(f"answers are {answers!r}, expected texts: {row['question'][:60]!r}")
    yield dict(prompt=row["question"], accepted=[str(answer) for answer in answers])


def _unanswerable(idks):
  """Whether too many of the people asked had no answer: BLEnD's own score leaves those out."""
  return idks.get("no-answer", 0) + idks.get("not-applicable", 0) >= 3 or idks.get("idk", 0) >= 5


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
  """A table with a column a language -> {code: [{"prompt"}]}, in the order of its rows."""
  rows, found = list(every_record(place)), {}
  for column in rows[0] if rows else ():
    code = tag(column)[0] if column not in ("id", "source", "tags") else None
    if code and (wanted is None or code in wanted):
      found[code] = [dict(prompt=row[column]) for row in rows if row[column] and row[column].strip()]
  if not found:
    raise run.Refused(f"{place} has no column in a language that is asked for")
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
  """Files of aligned lines, one a language, or of pairs (WMT24++: source, target), from `source`,
  -> {code: [{"source", "reference"}]}."""
  lines = by_language(place, None if wanted is None else {*wanted, source}, split)
  if all("target" in row for rows in lines.values() for row in rows[:1]):
    return {code: [dict(source=row["source"], reference=row["target"]) for row in rows
                   if not row.get("is_bad_source")]
            for code, rows in lines.items() if wanted is None or code in wanted}
  if source not in lines:
    raise run.Refused(f"{place} has no file in {source}, from which is translated")
  given, found = [_sentence(row) for row in lines.pop(source)], {}
  for code, rows in lines.items():
    if len(rows) != len(given):
      raise run.Refused(f"{place}: {code} has {len(rows)} lines and {source} {len(given)}: they must "
                        "be aligned")
    found[code] = [dict(source=one, reference=_sentence(row)) for one, row in zip(given, rows)]
  return found


def _sentence(row):
  return row["sentence"] if "sentence" in row else row["text"]
