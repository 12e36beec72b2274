"""Plays recipes: the asks of all items, endpoint by endpoint side by side, round after round.

Not a scheduler: a round ends when its slowest endpoint has answered, and there are as many rounds as
the longest recipe has steps (four). What a killed run had been answered lies in the clients' caches,
so a new run plays the same rounds and pays only for what is missing.
"""

import collections
import json
import queue
import shlex
import subprocess
import threading

from tiny_aya_jax import client, run
from tiny_aya_jax.post import recipes


def play(works, askers):
  """{name: generator of recipes.py} -> {name: (what it returned or its Ended, {endpoint: asks})}."""
  outcomes, asked, replies = {}, {name: collections.Counter() for name in works}, dict.fromkeys(works)
  while replies:
    waiting = {}
    for name, found in replies.items():
      try:
        waiting[name] = works[name].send(found)
      except StopIteration as stop:
        outcomes[name] = stop.value, dict(asked[name])
      except recipes.Ended as ended:
        outcomes[name] = ended, dict(asked[name])
    flat = [ask for asks in waiting.values() for ask in asks]
    answers, replies = iter(answered(flat, askers)), {}
    for name, asks in waiting.items():
      asked[name].update(ask.endpoint for ask in asks)
      replies[name] = [next(answers) for _ in asks]
  return {name: outcomes[name] for name in works}


def answered(asks, askers):
  """[Ask] -> [(text or value, None) or (None, why)], in their order; the first error ends all."""
  groups = collections.defaultdict(lambda: collections.defaultdict(list))
  for index, ask in enumerate(asks):
    groups[ask.endpoint][ask.read].append(index)
  found, done = [None] * len(asks), queue.SimpleQueue()
  for endpoint, readers in groups.items():
    # Daemons: an interrupted process does not wait for them.
    threading.Thread(target=_ask_all, args=(askers[endpoint], readers, asks, done),
                     daemon=True).start()
  for _ in groups:
    answers = client.next_of(done)
    if isinstance(answers, BaseException):
      raise answers
    for index, answer in answers:
      found[index] = answer
  return found


def _ask_all(asker, readers, asks, done):
  try:
    done.put([pair for read, indices in readers.items()
              for pair in zip(indices, asker([asks[at].request for at in indices], read))])
  except BaseException as error:  # raised by the thread that waits
    done.put(error)


class Endpoint:
  """A client and what is added to each of its requests: called, it answers a list of them."""

  def __init__(self, asker, fields, borrowed=frozenset()):
    """asker: a client.Client; fields: of a request's body; borrowed: keys of answers in its cache
    that others have paid for."""
    self.client, self.fields, self.borrowed = asker, fields, borrowed

  def __call__(self, requests, read):
    requests = [client.merged(self.fields, request) for request in requests]
    if read:
      return self.client.json_answers(requests, read)
    return [(None, recipes.CUT) if answer.cut else (answer.text, answer.why)
            for answer in self.client.answers(requests)]

  def paid(self):
    """Tokens and money of all answers that this part has paid for, now and in earlier runs."""
    rows = [row for key, row in self.client.cache.rows.items() if key not in self.borrowed]
    tokens = [sum(row[name] for row in rows) for name in ("prompt_tokens", "completion_tokens")]
    money = sum(n * price for n, price in zip(tokens, self.client.prices)) / 1e6
    return dict(answers=len(rows), prompt_tokens=tokens[0], completion_tokens=tokens[1], money=money)


class Command:
  """A program that scores: called, it is run once with all requests.

  It reads JSON lines {"source", "target", "source_lang", "target_lang"} and prints a number a line,
  higher for better (of `difficulty`: for harder). For estimators that need their own environment.
  """

  def __init__(self, line):
    self.words = shlex.split(line)

  def __call__(self, requests, read):
    text = "".join(json.dumps(request) + "\n" for request in requests)
    try:
      done = subprocess.run(self.words, input=text, capture_output=True, text=True, check=False)
    except OSError as error:
      raise run.Refused(f"{self.words[0]} cannot be run: {error.strerror}") from None
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(requests):
      said = " ".join(done.stderr.split())[-200:]
      raise run.Refused(f"{' '.join(self.words)} gave {len(lines)} lines for {len(requests)} and "
                        f"ended with {done.returncode}: {said}")
    return [_number(line, read) for line in lines]


def _number(line, read):
  try:
    number = read(line)
  except ValueError:
    return None, f"the command printed {line[:60]!r}, expected a number"
  return (number, None) if number == number else (None, "the command printed nan")
