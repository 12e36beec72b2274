"""What becomes of one item under each recipe. Nothing is sent, read or written here.

A recipe is a generator: it yields lists of `Ask`, is given their replies in order, returns the new
record's own fields, and raises `Ended` for an item that comes to nothing. So it can be played by
whatever asks (rounds.py), any number at a time, and again from its beginning: the same replies make
the same record. A reply is (text or value, None), or (None, why).
"""

import hashlib
import math
from typing import Callable, NamedTuple

from tiny_aya_jax import run
from tiny_aya_jax.post import checks, prompts

REWRITES = dict(plain=(), natural=("natural",), cultural=("natural", "cultural"),
                difficult=("natural", "difficult"))  # the report's order: naturalness first


class Item(NamedTuple):
  """One thing to do, and the one line of the ledger."""

  name: str  # where it was read, and into which language it goes
  code: str  # the language of what was read
  target: str  # the language of what is made
  record: dict  # as read: "messages", or "source" and "target", and whatever stood beside
  folder: str  # '<code>/<name>', where it is written
  back: bool = False  # of filter: `code` is what the pair's target is to be translated into


class Ask(NamedTuple):
  """A request's own fields for an endpoint; with `read`, for a JSON object that `read` takes."""

  endpoint: str
  request: dict
  read: Callable | None = None


class Tools(NamedTuple):
  """What recipes work with."""

  settings: object  # the config's group of the recipe
  wrong: Callable  # (text, code) -> why it is not in that language, or None
  models: dict  # {language: the endpoint that writes in it}
  scores: dict  # {hook: {item's name: number}}, of those that are files


class Ended(Exception):
  """An item that comes to nothing. state: 'dropped', by us, or 'failed', for want of an answer;
  reason: one of a handful, counted; why: a sentence, in the ledger."""

  def __init__(self, state, reason, why=""):
    super().__init__(reason)
    self.state, self.reason, self.why = state, reason, why


def translate(item, tools):
  """A conversation, or with what='prompts' all but its last answer, into item.target.

  Messages are translated one by one, each with those before it to understand it by.
  """
  messages = item.record["messages"]
  if tools.settings.what == "prompts":
    messages = _until_user(messages)
  asked = [prompts.translation(message["content"], messages[:at], item.code, item.target)
           for at, message in enumerate(messages)]
  endpoint = tools.models[item.target]
  replies = yield [Ask(endpoint, _user(content)) for content, _ in asked]
  translated = []
  for message, reply, (_, mark) in zip(messages, replies, asked, strict=True):
    text = _text(reply, mark)
    _refuse_translation(message["content"], text, item.target, tools)
    translated.append(message | dict(content=text))
  return dict(messages=translated, model=endpoint)


def _refuse_translation(source, text, code, tools):
  if checks.copied(source, text):
    raise Ended("dropped", "a copy", text[:60])
  # A short text may well become twice as long, but not an answer to it.
  if checks.length_ratio(source.ljust(checks.SHORT), text.ljust(checks.SHORT)) > tools.settings.longest:
    raise Ended("dropped", "length", f"{len(source)} characters became {len(text)}")
  _refuse_text(text, code, tools)


def _refuse_text(text, code, tools):
  if checks.looped(text):
    raise Ended("dropped", "repeated text", text[-60:])
  if why := tools.wrong(text, code):
    raise Ended("dropped", "language", why)


def transform(item, tools):
  """The prompt of a conversation of one exchange, made natural, then cultural or difficult.

  The answer that stood beneath it is left out: it answers another prompt.
  """
  *before, prompt = _until_user(item.record["messages"])
  if any(message["role"] == "user" for message in before):
    raise Ended("dropped", "more than one exchange")
  kind, text = share_of(item, tools.settings.shares, tools.settings.seed), prompt["content"]
  endpoint = tools.models[item.target]
  for rewrite in REWRITES[kind]:
    content, mark = prompts.rewriting(rewrite, text, item.target)
    (reply,) = yield [Ask(endpoint, _user(content))]
    text = _text(reply, mark)
    _refuse_text(text, item.target, tools)
  return dict(messages=[*before, dict(role="user", content=text)], transform=kind,
              model=endpoint if REWRITES[kind] else None)


def share_of(item, shares, seed):
  """Which of `shares` (they add up to 1) an item falls into: by a digest of what it says."""
  text = run.fingerprint([seed, item.code, item.record["messages"]]).encode()
  place = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
  reached = 0.0
  for kind, share in shares.items():
    reached += share
    if place < reached:
      return kind
  return max(shares, key=shares.get)  # shares that rounding left short of 1


def fuse(item, tools):
  """FusioN (arXiv 2510.00931): teachers answer, a fusor compares and writes the final answer."""
  messages, settings = _until_user(item.record["messages"]), tools.settings
  names = [name for name in settings.teachers for _ in range(settings.samples)]
  replies = yield [
      Ask(name, _with_seed(messages, at % settings.samples)) for at, name in enumerate(names)]
  candidates = [(name, said) for name, (text, why) in zip(names, replies, strict=True)
                if not why and (said := prompts.without_thoughts(text))]
  if len(candidates) < settings.least:
    why = next((why for _, why in replies if why), "a thought without an answer")
    raise Ended("failed", "teachers", f"{len(candidates)} of {len(names)} answered: {why}")
  text, model = yield from _fused(messages, candidates, item, settings)
  longest = max(len(answer) for _, answer in candidates)
  if len(text) > settings.longest * max(longest, checks.SHORT):
    raise Ended("dropped", "length", f"{len(text)} characters, the longest candidate {longest}")
  _refuse_text(text, item.target, tools)
  return dict(messages=[*messages, dict(role="assistant", content=text)], model=model,
              teachers=[name for name, _ in candidates])


def _with_seed(messages, sample):
  """Samples of one teacher differ by their seed: of equal requests a client sends one."""
  return dict(messages=messages) | (dict(seed=sample) if sample else {})


def _fused(messages, candidates, item, settings):
  """-> (the final answer, who wrote it): the fusor, asked twice, or else the fallback."""
  content, mark = prompts.fusion(messages, [text for _, text in candidates], item.target)
  request = _user(content)
  for _ in range(2):
    ((reply, why),) = yield [Ask(settings.fusor, request)]
    if why:
      break
    if text := prompts.fused(prompts.without_thoughts(reply), mark):
      return text, settings.fusor
    request = dict(messages=[
        *request["messages"], dict(role="assistant", content=reply),
        dict(role="user", content=prompts.fusion_again(mark, item.target))])
  if settings.fallback == "drop":
    raise Ended("failed", "fusor", why) if why else Ended("dropped", "no marks")
  prompt = messages[-1]["content"]
  asked = [prompts.rating(prompt, text, item.target)[0] for _, text in candidates]
  replies = yield [Ask(settings.judge, _user(content), prompts.score) for content in asked]
  rated = [(score, -at) for at, (score, why) in enumerate(replies) if not why]
  if not rated:
    raise Ended("failed", "judge", replies[0][1])
  name, text = candidates[-max(rated)[1]]
  return text, name


def filter_pairs(item, tools):
  """A pair of texts as a conversation of our own model; with `back`, from another language."""
  record, settings = item.record, tools.settings
  reference = yield from _sound(item, record["source"], record["target"], record["code"], tools)
  if not item.back:
    given = record.get("messages")
    return dict(messages=given) if given else _pair(record["source"], record["target"], item)
  content, mark = prompts.translation(record["target"], [], item.target, item.code)
  (reply,) = yield [Ask(tools.models[item.code], _user(content))]
  source = _text(reply, mark)
  _refuse_rules(source, record["target"], settings)
  _refuse_language(source, item.code, "source", tools)
  score = yield from _score(item, "quality", source, record["target"], item.code, tools)
  if score is not None and score > reference:
    raise Ended("dropped", "above the reference", f"{score:g}, the reference {reference:g}")
  return _pair(source, record["target"], item) | dict(model=tools.models[item.code])


def _pair(source, target, item):
  return dict(messages=[dict(role="user", content=prompts.pair_request(source, item.target)),
                        dict(role="assistant", content=target)])


def pair_of(record, code, other, wrong):
  """(source, target, code of the source, code of the target) of a record in the folder of `code`.

  A record is {"source", "target"}, into the folder's language, or a translation conversation: the
  source behind the first line break of the request. `source_lang` and `target_lang` count where
  they stand; else a conversation is out of `other` or into it, whichever its two texts allow.
  """
  if "messages" in record:
    request, target = (message["content"] for message in record["messages"])
    source = request.partition("\n")[2] or request
  else:
    source, target = record["source"], record["target"]
  ways = [(record.get("source_lang", other), record.get("target_lang", code))]
  if "messages" in record and not {"source_lang", "target_lang"} & record.keys():
    ways = [(other, code), (code, other)]
  found = next((way for way in ways if not wrong(source, way[0]) and not wrong(target, way[1])), ways[0])
  return source, target, *found


def _sound(item, source, target, code, tools):
  """The quality of a pair that nothing speaks against, None without a hook for it."""
  settings = tools.settings
  _refuse_rules(source, target, settings)
  _refuse_language(source, code, "source", tools)
  _refuse_language(target, item.target, "target", tools)
  for hook, reason in (("difficulty", "too easy"), ("quality", "quality")):
    score = yield from _score(item, hook, source, target, code, tools)
    if score is not None and score < settings[hook].least:
      raise Ended("dropped", reason, f"{score:g}, at least {settings[hook].least:g} expected")
  return score


def _refuse_rules(source, target, settings):
  if checks.copied(source, target):
    raise Ended("dropped", "a copy", target[:60])
  if (max(len(source), len(target)) >= checks.SHORT
      and checks.length_ratio(source, target) > settings.longest):
    raise Ended("dropped", "length", f"{len(source)} and {len(target)} characters")
  if checks.shared_digits(source, target) < settings.digits:
    raise Ended("dropped", "digits", f"{source[:60]} / {target[:60]}")
  if checks.urls(source) != checks.urls(target):
    raise Ended("dropped", "addresses", " ".join(checks.urls(source) + checks.urls(target))[:120])
  if checks.looped(source) or checks.looped(target):
    raise Ended("dropped", "repeated text", target[-60:])


def _refuse_language(text, code, side, tools):
  if why := tools.wrong(text, code):
    raise Ended("dropped", f"language of the {side}", why)


def _score(item, hook, source, target, code, tools):
  """The score that a hook gives, or None where the config names none."""
  settings = tools.settings[hook]
  if hook in tools.scores:
    name = item.name.removesuffix(f" from {item.code}") if item.back else item.name  # the original's
    score = tools.scores[hook].get(name, math.nan)
    if math.isnan(score):
      raise Ended("failed", hook, f"{settings.file} has no score of {name}")
    return score
  if not settings.endpoint and not settings.command:
    return None
  ((score, why),) = yield [rating_ask(hook, settings, source, target, code, item.target)]
  if why:
    raise Ended("failed", hook, why)
  return score


def rating_ask(hook, settings, source, target, source_code, target_code):
  """The Ask of a pair's score: of a model, or of the command called `hook`."""
  if settings.command:
    row = dict(source=source, target=target, source_lang=source_code, target_lang=target_code)
    return Ask(hook, row, float)
  asked = (prompts.translation_difficulty(source, source_code) if hook == "difficulty" else
           prompts.translation_quality(source, target, source_code, target_code))
  return Ask(settings.endpoint, _user(asked[0]), prompts.score)


def assay(item, tools):
  """The estimator's score of one translation of one text of the dev set; item.record has both."""
  source, endpoint = item.record["source"], item.record["endpoint"]
  content, mark = prompts.translation(source, [], item.code, item.target)
  (reply,) = yield [Ask(endpoint, _user(content))]
  text, settings = _text(reply, mark), tools.settings.estimator
  _refuse_translation(source, text, item.target, tools)
  ((score, why),) = yield [rating_ask("estimator", settings, source, text, item.code, item.target)]
  if why:
    raise Ended("failed", "estimator", why)
  return dict(score=score)


CUT = "cut short: the answer is longer than the endpoint's tokens"


def _text(reply, mark):
  text, why = reply
  if why == CUT:
    raise Ended("dropped", "cut short", why)
  if why:
    raise Ended("failed", "no answer", why)
  if not (text := prompts.without_marks(prompts.without_thoughts(text), mark)):
    raise Ended("dropped", "empty")
  return text


def _user(content):
  return dict(messages=[dict(role="user", content=content)])


def _until_user(messages):
  """The messages up to the last of the user."""
  return messages[:-1] if messages[-1]["role"] == "assistant" else messages
