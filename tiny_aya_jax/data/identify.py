"""Which language and script is a text in? Only as a veto: what is not clearly wrong passes.

Not a classifier of unlabelled text: every document comes with the language of its folder, and an
identifier's word counts only against it, when its label lies outside the language's confusable
group (languages.py) by a clear margin. Languages an identifier has no label for pass through.

  margin(text) = log p(best label) - log p(best label that the language may have)
"""

import functools
import math
import pathlib

from babel.core import get_global
import regex

from tiny_aya_jax import run

BUILT_IN = "py3langid"
SAMPLE = 2000  # characters of a long text that are looked at: half from its head, half its middle
SCRIPTS = dict(  # ISO 15924 as in languages.py -> Unicode scripts, where they differ
    Latn="Latin", Cyrl="Cyrillic", Grek="Greek", Arab="Arabic", Hebr="Hebrew", Deva="Devanagari",
    Beng="Bengali", Gujr="Gujarati", Guru="Gurmukhi", Taml="Tamil", Telu="Telugu", Khmr="Khmer",
    Thai="Thai", Laoo="Lao", Mymr="Myanmar", Ethi="Ethiopic", Hani="Han", Hang="Hangul Han",
    Jpan="Hiragana Katakana Han",
)  # fmt: skip
# Written without spaces between words: filters take characters for words.
UNSPACED = ("Thai", "Laoo", "Khmr", "Mymr", "Hani", "Jpan")
SUBSTRINGS = (*UNSPACED, "Hang")  # stop words are looked for inside words: Korean's are suffixes
FEWEST_LETTERS = 20
LETTER = regex.compile(r"\p{L}")
WORD = regex.compile(r"[\p{L}\p{M}\p{N}][\p{L}\p{M}\p{N}'’\u200c\u200d]*")
CHARACTER = regex.compile(r"\p{L}\p{M}*|\p{N}+")


def words(text, script):
  """Words and numbers; in an unspaced script each letter with its marks is a word.

  'Ça va?' -> ['Ça', 'va'];   '北京 2008' -> ['北', '京', '2008'];   '***' -> ['***']
  """
  return (CHARACTER if script in UNSPACED else WORD).findall(text) or text.split()


def script_share(text, script):
  """Share of the text's letters that are of the script (languages.py); 1.0 for under 20 letters: a
  line of a page may well be a name or a command."""
  text = sample(text)
  letters = len(LETTER.findall(text))
  return len(_letters_of(script).findall(text)) / letters if letters >= FEWEST_LETTERS else 1.0


@functools.cache
def _letters_of(script):
  scripts = "".join(rf"\p{{Script={name}}}" for name in SCRIPTS[script].split())
  return regex.compile(rf"[[{scripts}]&&\p{{L}}]", regex.VERSION1)


def sample(text):
  """At most SAMPLE characters of the text: its head and its middle."""
  if len(text) <= SAMPLE:
    return text
  middle = len(text) // 2
  return text[: SAMPLE // 2] + "\n" + text[middle : middle + SAMPLE // 2]


def han(text):
  """'cmn_Hans' or 'cmn_Hant': which has more characters of its own; alike counts as 'cmn_Hans'.

  Simplified only is what GB 2312 can write and Big5 cannot, traditional only the reverse.
  """
  found = {character: text.count(character) for character in set(text) if character > "\u2e7f"}
  simplified = sum(count for character, count in found.items() if _written(character) == "Hans")
  traditional = sum(count for character, count in found.items() if _written(character) == "Hant")
  return "cmn_Hant" if traditional > simplified else "cmn_Hans"


@functools.cache
def _written(character):
  """'Hans', 'Hant' or None (in both, or in neither)."""
  simplified, traditional = (_encodes(character, codec) for codec in ("gb2312", "big5"))
  if simplified == traditional:
    return None
  return "Hans" if simplified else "Hant"


def _encodes(character, codec):
  try:
    character.encode(codec)
  except UnicodeEncodeError:
    return False
  return True


@functools.cache  # a model a process
def identifier(name):
  """'py3langid', or the path of a fastText model such as GlotLID's -> an identifier.

  An identifier has `sees(language)`, whether it has a label for it, `best(text)` -> (label, its
  probability) and `margin(text, language)` -> (margin >= 0 in nats, the best label).
  """
  return _Py3langid() if name == BUILT_IN else _FastText(name)


def same(label, code):
  """Whether an identifier's label means the language of the code, whatever the scripts.

  'zh' is cmn_Hans and cmn_Hant, 'no' is nob_Latn, 'tl' is fil_Latn; 'nn', 'yue', 'arz' are none of
  them, and 'ms' is not 'id'.
  """
  return _key(label) == _key(code)


class _Identifier:
  """Subclasses give `labels`, all that the model can say, and `scores(text)` -> {label: log p},
  whose p add up to 1."""

  def sees(self, language):
    return any(same(label, language.code) for label in self.labels)

  def best(self, text):
    scores = self.scores(text)
    label = max(scores, key=scores.get)
    return label, math.exp(scores[label])

  def margin(self, text, language):
    scores = self.scores(sample(text))
    allowed = _allowed(language)
    best = max(scores, key=scores.get)
    own = max(score for label, score in scores.items() if _key(label) in allowed)
    return scores[best] - own, best


@functools.cache
def _allowed(language):
  return {_key(label) for label in (language.code, *language.confusable)}


@functools.cache
def _key(label):
  """'fra_Latn', 'fra' and 'fr' are one language; CLDR knows which, and calls Bokmål 'nb'."""
  code = label.partition("_")[0]
  code = get_global("language_aliases").get(code, code).partition("_")[0]
  return "nb" if code == "no" else code


class _Py3langid(_Identifier):
  """langid.py retrained, 139 labels in ISO 639 codes; its probabilities are kept calibrated over
  lengths by a temperature of sqrt(bytes), so that one margin serves lines and pages."""

  def __init__(self):
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    self._model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    self.labels = set(self._model.labels)

  def scores(self, text):
    return {label: math.log(max(p, 1e-30)) for label, p in self._model.rank(text)}


class _FastText(_Identifier):
  """A fastText model file, labels `__label__fra_Latn` or `__label__fr`; needs fasttext-predict."""

  prefix = "__label__"

  def __init__(self, path):
    try:
      import fasttext
    except ModuleNotFoundError:
      raise run.Refused(f"{path} is read by fastText: pip install fasttext-predict") from None
    if not pathlib.Path(path).is_file():
      raise run.Refused(f"fastText model {path} does not exist: give 'py3langid' or a model's path")
    try:
      self._model = fasttext.load_model(str(path))
    except (ValueError, RuntimeError) as error:
      raise run.Refused(f"{path} is no fastText model ({error})") from None
    self.labels = set(self.probabilities("a b c"))

  def best(self, text):
    """Of one line, as it stands: ('', 0.0) where the model knows nothing in it."""
    labels, p = self._model.predict(text.replace("\n", " "), k=1)
    return (labels[0].removeprefix(self.prefix), float(p[0])) if labels else ("", 0.0)

  def probabilities(self, text):
    """{label without its prefix: p} of all labels; fastText reads one line."""
    labels, p = self._model.predict(" ".join(text.split()), k=-1, threshold=-1.0)
    return {label.removeprefix(self.prefix): float(value) for label, value in zip(labels, p)}

  def scores(self, text):
    return {label: math.log(max(p, 1e-9)) for label, p in self.probabilities(text).items()}
