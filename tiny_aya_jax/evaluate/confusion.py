"""Language confusion: does an answer stay in the language that it was asked for?

Not a judge of the answer, and not of its script: Serbian in Latin letters is Serbian, and either
Chinese script passes for the other. After for-ai/language-confusion, compute_metrics.py (Marchisio
et al. 2024, arXiv 2406.20052), whose numbers come out to the last bit with the same identifier and
its splitting (whitespace; jieba for Chinese, fugashi for Japanese); it takes fastText's lid.176:

  a line counts     with 5 tokens or more, punctuation stripped, before any "\\nQ:"
  a line's label    the identifier's, where its probability is above 0.3, else "unknown"
  lpr               1 - answers with a wrong line / answers with a line that counts
  accuracy          mean over answers of the share of lines that are right
  wpr               1 - answers with an English word / answers whose lines are all right

A label is right when it means the language itself, whatever code it is written in (identify.same):
no group of confusable languages is forgiven, so Malay for Indonesian or Mandarin for Cantonese is
wrong. A language that the identifier has no label for is unsupported and has no score; it is not 0.
py3langid lacks Wolof; lid.176 lacks Hausa, Igbo, Nigerian Pidgin, Shona, Wolof, Xhosa and Zulu
(fasttext.cc's list).
"""

import collections
import functools
import gzip
import string

import regex

from tiny_aya_jax import languages, run
from tiny_aya_jax.data.identify import SCRIPTS, UNSPACED, same

UNKNOWN = "unknown"
SUREST_UNKNOWN = 0.3  # probability; compute_metrics.py
FEWEST_TOKENS = 5
FEWEST_LETTERS = 4  # of an English word: shorter ones are names, units and code in any language
# An English word is foreign where the script is another (compute_metrics.py; one code for Chinese).
WORD_LEVEL = ("arb_Arab", "hin_Deva", "jpn_Jpan", "kor_Hang", "rus_Cyrl", "cmn_Hans", "cmn_Hant")
# ASCII punctuation and the Arabic comma vanish, a dash parts two words.
_STRIPPED = str.maketrans("—", " ", string.punctuation + "،")


def tokens(text, script):
  """Whitespace tokens; in a script without spaces each of its letters, with its marks, is a token.

  'It is 9 a.m.' -> 4 tokens;   '使用 Python 编程' -> ['使', '用', 'Python', '编', '程']
  So "fewer than 5 tokens" drops lines of up to 4 letters in Thai, Lao, Khmer, Burmese, Chinese and
  Japanese, where whitespace would drop nearly all. jieba and fugashi, whose words are longer but
  who count punctuation, give 1 token for 1.3 of these and decide otherwise for 4% of lines (the
  answers in for-ai/language-confusion). Words of other scripts stay whole, which identify.words
  splits, so that the English ones are found.
  """
  return _tokens_of(script).findall(text) if script in UNSPACED else text.split()


def labels(text, code, identify, split=tokens):
  """The language of each line that counts: `code` where it is right, else another of our codes, the
  identifier's own label where we have none, or "unknown".

  `identify` has `best(line)` -> (label, probability); `split` is (text, script) -> tokens.
  """
  language = languages.find(code)
  return [_label(line, language, identify) for line, _ in _lines(text, language, split)]


def score(answers, *, identify, split=tokens, english=None):
  """[(code, text)] -> {code: {"lpr", "accuracy", "wpr", "answers", "judged", "passed", "unsupported"}}.

  `code` is the language that the answer has to be in, whatever the prompt's: monolingual and
  crosslingual alike. Shares are 0 to 1; `judged` counts answers with a line that counts, `passed` those
  with all lines right, of which `wpr` is a share. As in compute_metrics.py a share of no answers is
  1.0: look at the counts. `wpr` is None without `english`
  (see read_english) and for languages not in WORD_LEVEL; all three are None where `unsupported`.
  Raises Refused for an unknown code.
  """
  texts = collections.defaultdict(list)
  for code, text in answers:
    texts[languages.find(code).code].append(text)
  return {code: _score(code, texts[code], identify, split, english) for code in texts}


def read_english(path):
  """A word list, one a line, .gz or not -> the lower-case words of 4 letters or more, a set."""
  opened = gzip.open if str(path).endswith(".gz") else open
  try:
    with opened(path, "rt", encoding="utf-8") as file:
      words = {line.strip() for line in file}
  except (OSError, EOFError, UnicodeDecodeError) as error:
    raise run.Refused(f"no word list can be read from {path}: {error}") from None
  return {word for word in words if word.islower() and len(word) >= FEWEST_LETTERS}


@functools.cache
def _tokens_of(script):
  own = "".join(rf"\p{{Script={name}}}" for name in SCRIPTS[script].split())
  one_letter, foreign = rf"[[{own}]&&\p{{L}}]\p{{M}}*", rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{own}]]+"
  return regex.compile(rf"{one_letter}|{foreign}|\p{{N}}+", regex.VERSION1)


def _lines(text, language, split):
  """[(line, its tokens)] of the lines that count."""
  text = text.split("\nQ:")[0].strip().translate(_STRIPPED)
  lines = [(line, split(line, language.script)) for line in text.split("\n")]
  return [(line, words) for line, words in lines if len(words) >= FEWEST_TOKENS]


def _label(line, language, identify):
  label, probability = identify.best(line)
  if probability <= SUREST_UNKNOWN:
    return UNKNOWN
  return language.code if same(label, language.code) else _code(label)


@functools.cache
def _code(label):
  return next((known.code for known in languages.LANGUAGES if same(label, known.code)), label)


def _score(code, texts, identify, split, english):
  language = languages.find(code)
  result = dict(lpr=None, accuracy=None, wpr=None, answers=len(texts), judged=0, passed=0,
                unsupported=True)
  if not identify.sees(language):
    return result
  judged = [lines for lines in (_lines(text, language, split) for text in texts) if lines]
  right = [[_label(line, language, identify) == code for line, _ in lines] for lines in judged]
  passed = [lines for lines, is_right in zip(judged, right, strict=True) if all(is_right)]
  result |= dict(
    judged=len(judged),
    passed=len(passed),
    unsupported=False,
    lpr=1 - (len(judged) - len(passed)) / max(1, len(judged)),
    # 1 - share of wrong lines, summed in this order: the very floats of compute_metrics.py
    accuracy=sum(1 - x.count(False) / len(x) for x in right) / len(right) if right else 1.0,
  )
  if english is not None and code in WORD_LEVEL:
    mixed = sum(any(word.strip() in english for _, ws in lines for word in ws) for lines in passed)
    result["wpr"] = 1 - mixed / max(1, len(passed))
  return result
