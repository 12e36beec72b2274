"""What speaks against a text that a model wrote, without asking another: pure functions.

Only vetoes, as in data/identify.py: what is not clearly wrong passes. A measured false alarm stands
beside each bound in experiments/synthesize.py.
"""

import collections
import re
import unicodedata
import zlib

from tiny_aya_jax import languages
from tiny_aya_jax.data import identify

URL = re.compile(r"https?://[^\s<>()\[\]{}\"'،。、]+[^\s<>()\[\]{}\"'.,;:!?،。、]")
LOOPED = 0.12  # of its bytes, compressed; the lowest of 3,178 documents in 69 languages is 0.149
LOOK = (400, 8000)  # bytes: a shorter text says nothing; of a longer one the end, where loops are
SHORT = 20  # characters: of so little, lengths and copies mean nothing


def other_language(text, code, identifier, margin, script_share):
  """Why the text is not in the language of the code, or None.

  identifier: of identify.identifier. A language that it has no label for is judged by script alone.
  """
  language = languages.find(code)
  if identify.script_share(text, language.script) < script_share:
    return f"not in {language.script}"
  if code.startswith("cmn_") and (written := _chinese(text, code)):
    return f"written in {written}"
  if identifier.sees(language):
    found, label = identifier.margin(text, language)
    if found > margin:
      return f"{label} by {found:.1f}"
  return None


def _chinese(text, code):
  """The other Chinese script if the text is clearly in it; `han` calls a text of neither Hans."""
  written = identify.han(text if code == "cmn_Hans" else text + "們")
  return None if written == code else written


def length_ratio(one, two):
  """How many times longer the longer one is; wide characters (Han, kana, Hangul) count three.

  On translated news in 67 languages the thousandth part is beyond 3.7.
  """
  sizes = _length(one), _length(two)
  return max(sizes) / max(min(sizes), 1)


def _length(text):
  return len(text) + 2 * sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def copied(source, target):
  """Whether a translation is what was to be translated; never of texts that have few letters."""
  one, two = (" ".join(text.casefold().split()) for text in (source, target))
  return one == two and len(identify.LETTER.findall(one)) >= identify.FEWEST_LETTERS


def shared_digits(one, two):
  """Share of digits, in whatever script, that two texts have in common; 1.0 if either has none:
  numbers are spelled out in some languages, and written in others."""
  found = [collections.Counter(unicodedata.decimal(letter) for letter in text if letter.isdecimal())
           for text in (one, two)]
  if not all(found):
    return 1.0
  return (found[0] & found[1]).total() / (found[0] | found[1]).total()


def urls(text):
  """The addresses in a text, sorted."""
  return sorted(URL.findall(text))


def looped(text):
  """Whether a text says the same over and over: it compresses as no written text does."""
  content = text.encode()[-LOOK[1]:]
  return len(content) >= LOOK[0] and len(zlib.compress(content, 9)) < LOOPED * len(content)
