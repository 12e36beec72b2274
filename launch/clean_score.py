"""Recall and precision of clean: injects near duplicates and wrong-language lines, and scores.

  python launch/clean_score.py TEXT WORKDIR [--languages="('all',)"] [--veto=line]

TEXT (DIR/<code>.txt.gz and the like) is cut into documents of about 1,000 characters and cleaned
twice: as it is, and with 5% near duplicates (one word in twenty left out, at least one) and 2%
lines of another language, each a document of its own; with --veto=line, inside a document. What the
first run drops is natural: a false alarm of the language veto, or a duplicate that was there before.
Prints recall and precision per script and family group, and MB/s.
"""

import argparse
import collections
import gzip
import json
import pathlib
import random
import subprocess
import sys
import time

from tiny_aya_jax import languages
from tiny_aya_jax.data import identify, text

LENGTH = 1000  # characters a document, to the line's end
DUPLICATES, WRONG = 0.05, 0.02
EDITED = 0.05  # of a duplicate's words


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("text")
  parser.add_argument("workdir", type=pathlib.Path)
  parser.add_argument("--languages", default="('all',)")
  parser.add_argument("--veto", default="document", choices=("document", "line"))
  arguments = parser.parse_args()
  chosen = set(languages.select(eval(arguments.languages, {})))
  documents = {code: cut(arguments.text, code, names)
               for code, names in text.languages(arguments.text).items() if code in chosen}
  injected = inject(documents, random.Random(0), arguments.veto == "line")
  plain = {code: dict(enumerate(found)) for code, found in documents.items()}
  before, _ = clean(plain, arguments, "plain")
  mixed = {code: found for code, (found, _, _) in injected.items()}
  after, speed = clean(mixed, arguments, "mixed")
  report(injected, before, after, arguments.veto == "line")
  print(f"{speed:.2f} MB/s on {arguments.workdir / 'mixed'}, two tasks at once")


def cut(source, code, names):
  """Documents of about LENGTH characters; of Chinese, those in the code's script."""
  found = []
  for name in names:
    for document in text.read(source, code, name):
      lines, size = [], 0
      for line in document.split("\n"):
        lines.append(line)
        size += len(line)
        if size >= LENGTH:
          found.append("\n".join(lines))
          lines, size = [], 0
      if lines:
        found.append("\n".join(lines))
  return [d for d in found if not code.startswith("cmn_") or identify.han(d) == code]


def inject(documents, generator, inside):
  """{code: ({id: text}, {copy's id: original's id}, {id: wrong line})}."""
  lines = {code: [line for document in found[:200] for line in document.split("\n")
                  if len(line) >= 20] for code, found in documents.items()}
  mixed = {}
  for code, found in documents.items():
    texts, copies, wrong = dict(enumerate(found)), {}, {}
    for number in generator.sample(range(len(found)), round(DUPLICATES * len(found))):
      copies[f"copy-{number}"] = number
      texts[f"copy-{number}"] = edited(found[number], code, generator)
    others = [other for other in lines if lines[other] and foreign(code, other)]
    for number in range(round(WRONG * len(found)) if others else 0):
      line = generator.choice(lines[generator.choice(others)])
      if inside:
        place = generator.randrange(len(found))
        texts[place] = "\n".join([*texts[place].split("\n"), line])
        wrong[f"line-{number}"] = (place, line)
      else:
        texts[f"wrong-{number}"] = line
        wrong[f"wrong-{number}"] = line
    order = list(texts)
    generator.shuffle(order)
    mixed[code] = ({name: texts[name] for name in order}, copies, wrong)
  return mixed


def foreign(code, other):
  """Whether the two are clearly different languages: neither may be taken for the other."""
  one, two = languages.find(code), languages.find(other)
  return (one.iso != two.iso and one.iso not in two.confusable and two.iso not in one.confusable
          and not {code, other} <= {"cmn_Hans", "cmn_Hant", "yue_Hani", "jpn_Jpan"})


def edited(document, code, generator):
  """One word (an unspaced script: three characters) in twenty left out, at least one."""
  unspaced = languages.find(code).script in identify.UNSPACED
  words = document.split(" ")
  if unspaced:
    words = [document[start : start + 3] for start in range(0, len(document), 3)]
  gone = set(generator.sample(range(len(words)), max(1, round(EDITED * len(words)))))
  return ("" if unspaced else " ").join(word for n, word in enumerate(words) if n not in gone)


def clean(texts, arguments, name):
  """-> ({code: {id: text} of what was kept, and the report's row}, MB/s)."""
  folder = arguments.workdir / name
  size = 0
  for code, found in texts.items():
    (folder / "raw" / code).mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "raw" / code / "text.jsonl.gz", "wt", 1, encoding="utf-8") as file:
      for key, document in found.items():
        size += len(document.encode())
        file.write(json.dumps(dict(id=str(key), text=document), ensure_ascii=False) + "\n")
  started = time.monotonic()
  subprocess.run(
      [sys.executable, "-m", "tiny_aya_jax", "clean", "--config=experiments/clean.py",
       f"--workdir={folder / 'clean'}", f"--config.text={folder / 'raw'}",
       "--config.overwrite=True", f"--config.veto={arguments.veto}"], check=True)
  speed = size / 1e6 / (time.monotonic() - started)
  rows = json.loads((folder / "clean" / "clean.json").read_text())["languages"]
  kept = {code: {} for code in texts}
  for path in (folder / "clean").glob("*/*/*.jsonl.gz"):
    for line in gzip.open(path, "rt", encoding="utf-8"):
      record = json.loads(line)
      kept[path.parent.parent.name][record["id"]] = record["text"]
  return {code: (kept[code], rows[code]) for code in texts}, speed


def report(injected, before, after, inside):
  groups = collections.defaultdict(collections.Counter)
  for code, (texts, copies, wrong) in injected.items():
    language = languages.find(code)
    count = groups[f"{language.script}, {language.family if language.script == 'Latn' else ''}"]
    plain, row = before[code]
    kept, _ = after[code]
    count["languages"] += 1
    scored = {copy: original for copy, original in copies.items() if str(original) in plain}
    touched = {str(name) for pair in scored.items() for name in pair}
    count["copies"] += len(scored)
    count["found"] += sum(not {copy, str(original)} <= kept.keys()
                          for copy, original in scored.items())
    count["false"] += sum(str(name) in plain and str(name) not in kept and str(name) not in touched
                          for name in texts)
    count["wrong"] += len(wrong)
    count["caught"] += sum(_gone(name, line, kept, inside) for name, line in wrong.items())
    count["vetoed"] += sum(found.get("documents", found.get("lines"))
                           for reason, found in row["dropped"].items()
                           if reason in ("language", "script", "lines in another language"))
  print(f"{'group':28} {'lang.':>5} {'copies':>7} {'recall':>7} {'precision':>9}"
        f" {'wrong':>7} {'recall':>7} {'precision':>9}")
  total = collections.Counter()
  for group, count in sorted(groups.items()):
    print(_row(group, count))
    total.update(count)
  print(_row("all", total))


def _gone(name, line, kept, inside):
  if not inside:
    return name not in kept
  place, content = line
  return content not in kept.get(str(place), "").split("\n")


def _row(group, count):
  def share(part, whole):
    return f"{part / whole:.4f}" if whole else "-"

  return (f"{group:28} {count['languages']:>5} {count['copies']:>7}"
          f" {share(count['found'], count['copies']):>7}"
          f" {share(count['found'], count['found'] + count['false']):>9}"
          f" {count['wrong']:>7} {share(count['caught'], count['wrong']):>7}"
          f" {share(count['caught'], count['caught'] + count['vetoed']):>9}")


if __name__ == "__main__":
  main()
