"""Preference pairs without a model: who the assistant is, which languages it speaks, what is safe.

The report's preference stage is minimal: it teaches a name and a list of languages, and keeps what
SFT taught of safety. A pair is {"messages": [..., user], "chosen", "rejected"}. Of identity pairs
only what stands in the template's places differs, so that nothing else is preferred. Templates are
a JSON file {code: [[question, answer], ...]}, an answer with some of {name}, {maker}, {languages}.
"""

import json
import pathlib
import unicodedata
import zlib

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import text, toy
from tiny_aya_jax.post import recipes

PLACES = ("{name}", "{maker}", "{languages}")
FIELDS = ("prompt", "safe", "unsafe")


def check(settings, wanted):
  """Refuses settings of which no pairs can be made."""
  for field in ("name", "maker"):
    if not settings[field]:
      raise run.Refused(f"config.pairs.{field} is not set: whose name a model learns is not ours to say")
  for other in settings.others:
    if not all(part.strip() for part in other.partition("/")):
      raise run.Refused(f"config.pairs.others has {other!r}, expected 'NAME/MAKER'")
    if other.partition("/")[0] == settings.name or other.partition("/")[2] == settings.maker:
      raise run.Refused(f"config.pairs.others has {other!r}, and the right answer is "
                        f"{settings.name}/{settings.maker}: nothing would be rejected")
  if not settings.others:
    raise run.Refused("config.pairs.others is empty, expected 'NAME/MAKER' of other assistants")
  if set(languages.select(settings.speaks)) <= set(languages.select(settings.wrong)):
    raise run.Refused("config.pairs.wrong names every language of config.pairs.speaks, expected a "
                      "list that is false")
  templates = read_templates(run.existing("pairs.templates", settings.templates))
  named = {code for name in wanted if len(codes := languages.expand(name)) == 1 for code in codes}
  if missing := sorted(named - templates.keys()):
    raise run.Refused(f"{settings.templates} has no templates in {', '.join(missing)}: write some, "
                      "or leave these languages out")
  if settings.safety:
    run.existing("pairs.safety", settings.safety)


def read_templates(path):
  """{code: [[question, answer]]}."""
  found = {}
  for name, rows in run.read_json(path, "templates").items():
    try:
      good = [[question, answer] for question, answer in rows
              if question.strip() and any(place in answer for place in PLACES)]
    except (TypeError, ValueError, AttributeError):
      good = []
    if not good or len(good) != len(rows):
      raise run.Refused(f"{path}: {name} has {str(rows)[:80]}, expected [[question, answer], ...] with "
                        f"one of {', '.join(PLACES)} in each answer")
    found[languages.find(name).code] = good
  return found


def items(settings, wanted, called):
  """Yields the items of all pairs; a language without templates is one that comes to nothing."""
  templates = read_templates(settings.templates)
  chosen = [code for code in languages.select(wanted) if code != languages.CODE]
  for code in chosen:
    for number, (question, answer) in enumerate(templates.get(code, [[None, None]]), 1):
      record = dict(question=question, answer=answer)
      yield recipes.Item(f"identity/{code}#{number}", code, code, record, f"{code}/{called or 'identity'}")
  if settings.safety:
    for number, line in text.lines(pathlib.Path(settings.safety)):
      if line.strip():
        code, record = _safety(line)
        if code is None or code in chosen:
          yield recipes.Item(f"safety#{number}", code or "", code or "", record,
                             f"{code or 'unknown'}/{called or 'safety'}")


def compose(item, tools):
  """{"messages", "chosen", "rejected"} of one item; a recipe that asks nothing."""
  yield []
  record, settings = item.record, tools.settings
  if "why" in record:
    raise recipes.Ended("dropped", "malformed", record["why"])
  if "safe" in record:
    return _pair(*(record[field] for field in FIELDS))
  if record["answer"] is None:
    raise recipes.Ended("dropped", "no template", f"{settings.templates} has none in {item.code}")
  others = settings.others
  other = others[zlib.crc32(item.name.encode()) % len(others)].partition("/")
  right = settings.name, settings.maker, spoken(item.code, languages.select(settings.speaks))
  wrong = other[0], other[2], spoken(item.code, languages.select(settings.wrong))
  return _pair(record["question"], _filled(record["answer"], right), _filled(record["answer"], wrong))


def spoken(code, codes):
  """'A, B and C': the names of languages in the language of `code`, as CLDR has them.

  One that CLDR lacks there stands by its own name, or else by its English one.
  """
  names = toy.tongues(code, codes)
  return toy.listed(code, [
      name or toy.own_name(other) or languages.find(other).name for other, name in names.items()])


def _filled(answer, values):
  for place, value in zip(PLACES, values):
    answer = answer.replace(place, value)
  return answer


def _pair(prompt, chosen, rejected):
  return dict(messages=[dict(role="user", content=prompt)], chosen=chosen, rejected=rejected)


def _safety(line):
  """A line {"lang", "prompt", "safe", "unsafe"} -> (code, record), or (None, {"why"})."""
  try:
    row = json.loads(line.decode())
    code = languages.find(row["lang"]).code
    record = {field: row[field] for field in FIELDS}
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    return None, dict(why=f"{type(error).__name__}: {error}")
  if not all(isinstance(said, str) and said.strip() for said in record.values()):
    return code, dict(why="a field is empty or no text")
  if any(unicodedata.category(letter) == "Cs" for said in record.values() for letter in said):
    return code, dict(why="a field holds half a surrogate pair, which UTF-8 cannot write")
  if record["safe"].strip() == record["unsafe"].strip():
    return code, dict(why="both answers are the same")
  return code, record
