"""Asks an OpenAI-compatible chat-completions endpoint many requests, and pays for each once.

For judges and for data made by other models. No streaming, no tools, one choice a request. An
answer is written to a cache as it comes: a run that was cut short asks only for what is missing.
Threads are daemons; those of a ThreadPoolExecutor would hold an interrupted process until the last
one's timeout.
"""

import collections
import email.utils
import errno
import http.client
import ipaddress
import json
import math
import os
import pathlib
import queue
import random
import threading
import time
from typing import NamedTuple
import urllib.parse
import urllib.request

from tiny_aya_jax import run

FIRST_WAIT = 1.0  # seconds before a second try; doubled for each after it
LONGEST_WAIT = 60.0  # seconds; also of a Retry-After
BUSY = (408, 409, 425, 429)  # with 5xx, worth another try
OF_THE_REQUEST = (400, 413, 422, 451)  # a filter, a text too long: the next request may do
SECRET = 20  # characters: a shorter key is a placeholder ("EMPTY"), and may be a word of an answer
ROW = ("key", "text", "finish_reason", "prompt_tokens", "completion_tokens")
CORRECTION = (
    "That reply cannot be used: {why}. Reply again to the same task with one JSON object in the "
    "form asked for, and with nothing before or after it."
)


class Answer(NamedTuple):
  """The reply to one request. Tokens are what it cost when it was asked, also of a cached one."""

  text: str | None  # None: it failed
  why: str | None  # a sentence, if it failed
  cached: bool  # cost nothing now: from the cache, or equal to an earlier request of the call
  prompt_tokens: int
  completion_tokens: int
  cut: bool = False  # the text ends where max_tokens did


class Client:
  """answers(requests), json_answers(requests, read) and spent().

  url: the base, to which "/chat/completions" is added. cache: a file of JSON lines, made if there
  is none. attempts: tries of a request in all. key_variable: the environment variable of the key,
  None or '' for none; it is read for every request and kept nowhere. price_in and price_out: money
  per million prompt and completion tokens.
  """

  def __init__(self, url, model, cache, *, concurrency, requests_per_minute, timeout_seconds,
               attempts, key_variable, price_in, price_out):
    _check_numbers(concurrency=concurrency, attempts=attempts, price_in=price_in,
                   requests_per_minute=requests_per_minute, timeout_seconds=timeout_seconds,
                   price_out=price_out)
    if not isinstance(model, str) or not model:
      raise run.Refused(f"model is {model!r}, expected the name that the endpoint knows it by")
    host = _check_url(url, secret=_key(key_variable) is not None)
    self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
    self.concurrency, self.attempts, self.timeout_seconds = concurrency, attempts, timeout_seconds
    self.prices = price_in, price_out
    self.cache, self.limiter = _Cache(cache), _Limiter(requests_per_minute)
    # What runs on this machine is never reached through a proxy, which would see the key in clear.
    proxies = [urllib.request.ProxyHandler({})] if _local(host) else []
    self.opener = urllib.request.build_opener(_Untouched, *proxies)
    self.lock, self.counts = threading.Lock(), collections.Counter()
    self.fruitless, self.fruitful = 0, False

  def answers(self, requests):
    """Dicts of body fields, "messages" among them -> a list of Answer, in their order.

    Equal requests are sent once. Tried again: no connection, a timeout, a broken reply, 408, 409,
    425, 429, 5xx. A failed Answer: when tries run out, an empty text (paid for, not cached), and
    400, 413, 422 and 451, which may concern that request alone. Refused at once: any other status,
    as of a wrong key; refused later: when one request after another fails (`_lost`).
    """
    requests = list(requests)
    keys = [self._fingerprint(number, request) for number, request in enumerate(requests)]
    found, unknown = {}, {}
    for key, request in zip(keys, requests):
      if key in self.cache.rows:
        found[key] = _answer(self.cache.rows[key], cached=True)
      else:
        unknown[key] = request
    with self.lock:
      self.counts.update(requests=len(requests), cached=len(requests) - len(unknown))
      self.fruitful = self.fruitful or bool(found)
    found.update(self._send(unknown))
    answers = []
    for key in keys:
      answers.append(found[key])
      if found[key].text is not None:
        found[key] = found[key]._replace(cached=True)
    return answers

  def json_answers(self, requests, read):
    """-> a list of (read(the reply's one JSON object), None), or (None, why), in their order.

    `read` raises ValueError for an object it cannot use. A request whose reply cannot be used is
    sent again, the reply and a correction added to its messages, up to `attempts` times in all.
    """
    found = [(None, None)] * len(requests := list(requests))
    pending = dict(enumerate(requests))
    for _ in range(self.attempts):
      for (index, request), answer in zip(tuple(pending.items()), self.answers(pending.values())):
        value, why = _value(answer, read)
        found[index] = value, why
        if why is None or answer.text is None:
          del pending[index]
        else:
          pending[index] = request | {"messages": [
              *request["messages"], {"role": "assistant", "content": answer.text},
              {"role": "user", "content": CORRECTION.format(why=why)},
          ]}
    return found

  def spent(self):
    """dict(requests, cached, failed, retried, prompt_tokens, completion_tokens, money), so far.

    cached: of the requests, those not sent. failed: of those sent, the ones without an answer.
    retried: tries beyond the first of each. A reply asked again by json_answers is a request more.
    """
    with self.lock:
      spent = {name: self.counts[name] for name in
               ("requests", "cached", "failed", "retried", "prompt_tokens", "completion_tokens")}
    tokens = spent["prompt_tokens"], spent["completion_tokens"]
    return spent | {"money": sum(n * price for n, price in zip(tokens, self.prices)) / 1e6}

  def _fingerprint(self, number, request):
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
      raise run.Refused(f"request {number} is not a dict with a list of \"messages\"")
    for field in ("model", "stream", "n"):  # the client's own, or a reply it does not read
      if field in request:
        raise run.Refused(f"request {number} sets {field!r}, the client's own: leave it out")
    try:
      json.dumps(request, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
      raise run.Refused(f"request {number} cannot be written as JSON ({error})") from None
    return run.fingerprint([self.url, self.model, request])

  def _send(self, requests):
    """{key: request} -> {key: Answer}, `concurrency` at a time; the first error ends all."""
    stop, waiting, done = threading.Event(), queue.SimpleQueue(), queue.SimpleQueue()
    for item in requests.items():
      waiting.put(item)
    for _ in range(min(self.concurrency, len(requests))):
      threading.Thread(target=self._work, args=(waiting, done, stop), daemon=True).start()
    answers = {}
    try:
      finished = (next_of(done) for _ in requests)
      for key, answer in run.progress(finished, f"asking {self.model}", total=len(requests)):
        if isinstance(answer, BaseException):
          raise answer
        answers[key] = answer
    finally:
      stop.set()
    return answers

  def _work(self, waiting, done, stop):
    while not stop.is_set():
      try:
        key, request = waiting.get_nowait()
      except queue.Empty:
        return
      try:
        done.put((key, self._ask(key, request, stop)))
      except BaseException as error:  # raised by the thread that waits for answers
        stop.set()
        done.put((key, error))

  def _ask(self, key, request, stop):
    """The Answer to one request after at most `attempts` tries, or None once `stop` is set."""
    for attempt in range(self.attempts):
      if not self.limiter.wait(stop):
        return None
      self._count(retried=int(attempt > 0))
      status, retry_after, text = self._post(request)
      if status and status < 300 and (row := _row(key, text)):
        return self._bought(row)
      said = self._said(text)
      why = f"{said!r} with status {status}" if status else f"no reply ({said})"
      if status in OF_THE_REQUEST:
        return self._lost(f"the endpoint declined the request: {why}", own=True)
      if status and 300 <= status < 500 and status not in BUSY:
        raise run.Refused(f"{self.url} answered {why}, expected status 200: check the url, the "
                          f"model {self.model!r} and the key ({self.key_variable or 'none'})")
      wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1)
      if status == 429 and retry_after:
        self.limiter.pause(retry_after)  # said of the key, not of this request: all wait
      if attempt + 1 < self.attempts and stop.wait(max(wait, retry_after)):
        return None
    return self._lost(f"no answer in {self.attempts} tries: {why}", own=False)

  def _post(self, request):
    """-> (status, seconds of Retry-After, body), or (None, 0.0, what failed) without a reply."""
    headers = {"Content-Type": "application/json", "Accept": "application/json",
               "User-Agent": "tiny_aya_jax"}  # some endpoints turn Python's own name away
    if (key := _key(self.key_variable)) is not None:
      headers["Authorization"] = f"Bearer {key}"
    body = json.dumps({"model": self.model} | request).encode()
    message = urllib.request.Request(f"{self.url}/chat/completions", body, headers, method="POST")
    deadline = time.monotonic() + self.timeout_seconds
    try:
      with self.opener.open(message, timeout=self.timeout_seconds) as response:
        text = _body(response, deadline).decode("utf-8", "replace")
        status, retry_after = response.status, _seconds(response.headers.get("Retry-After"))
    except (OSError, http.client.HTTPException) as error:
      return None, 0.0, f"{type(error).__name__}: {error}"
    if key and len(key) >= SECRET:
      text = _without(text, key)
    return status, retry_after, text

  def _said(self, text):
    """The first 200 characters of what was said, on one line, without the key."""
    key = _key(self.key_variable)
    return " ".join((_without(text, key) if key else text).split())[:200]

  def _bought(self, row):
    """The Answer of a row, which is in the cache when this returns."""
    self._count(prompt_tokens=row["prompt_tokens"], completion_tokens=row["completion_tokens"])
    answer = _answer(row, cached=False)
    if answer.text is None:
      return self._lost(answer.why, own=True)._replace(
          prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)
    self.cache.add(row)
    with self.lock:
      self.fruitless, self.fruitful = 0, True
    return answer

  def _lost(self, why, own):
    """A failed Answer; refused if too many failed in a row, with the last `why`.

    A request's `own` failure counts only until anything was answered: the wrong key of some
    endpoints is a 400 too, and later a filter may well decline many in a row.
    """
    limit = 20 + 2 * self.concurrency
    with self.lock:
      self.counts["failed"] += 1
      self.fruitless += not (own and self.fruitful)
      over = self.fruitless >= limit
    if over:
      raise run.Refused(f"{self.url}: {limit} requests in a row failed, the last so: {why}; see to "
                        "that and start again, answers so far are in the cache")
    return Answer(None, why, False, 0, 0)

  def _count(self, **counts):
    with self.lock:
      self.counts.update(counts)


def next_of(done):
  """The next of a queue, in short waits: a signal just before a wait is seen only after it."""
  while True:
    try:
      return done.get(timeout=0.25)
    except queue.Empty:
      continue


class _Untouched(urllib.request.HTTPErrorProcessor):
  """Any status is a response, a redirect too: none is followed, so no other host sees the key."""

  def http_response(self, request, response):
    return response

  https_response = http_response


class _Limiter:
  """Starts evenly spaced over all threads, in the order of their calls: never a burst."""

  def __init__(self, per_minute):
    self.interval, self.lock = 60 / per_minute, threading.Lock()
    self.next = self.closed_until = time.monotonic()

  def wait(self, stop):
    """Sleeps until this thread's turn; False once `stop` is set."""
    while not stop.is_set():
      with self.lock:
        turn = max(time.monotonic(), self.next)
        self.next = turn + self.interval
      stop.wait(max(turn - time.monotonic(), 0))
      if turn >= self.closed_until:
        break
    return not stop.is_set()

  def pause(self, seconds):
    """No turn for so long, not even for those who have been given one."""
    with self.lock:
      self.closed_until = max(self.closed_until, time.monotonic() + seconds)
      self.next = max(self.next, self.closed_until)


class _Cache:
  """rows, {key: row of ROW}; add(row) also appends it to the file, flushed to disk.

  Escaped to ASCII: a text may hold characters at which readers of lines split.
  """

  def __init__(self, path):
    self.path, self.lock = pathlib.Path(path), threading.Lock()
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      open(self.path, "ab").close()
      rows = run.read_lines(self.path)
    except OSError as error:
      raise run.Refused(f"cache {path} cannot be written ({error.strerror})") from None
    self.rows = {row["key"]: row for row in rows
                 if isinstance(row, dict) and row.keys() >= set(ROW)}

  def add(self, row):
    line = json.dumps(row).encode() + b"\n"
    with self.lock:
      self.rows[row["key"]] = row
      try:
        with open(self.path, "a+b", buffering=0) as file:
          if _torn(file):  # else the rest of an older line would swallow this one
            line = b"\n" + line
          if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
          os.fsync(file.fileno())
      except OSError as error:
        raise run.Refused(f"cache {self.path} cannot be written ({error.strerror}): make room and "
                          "start again, its answers are kept") from None


def fields_of(text, field):
  """JSON text, the value of a config's `field`, -> dict of further fields of a request's body."""
  try:
    found = json.loads(text)
  except ValueError:
    found = None
  if not isinstance(found, dict):
    raise run.Refused(f"{field} is {text!r}, expected a JSON object")
  return found


def merged(fields, over):
  """The fields of a body, those of `over` instead of those of `fields`; None leaves one out."""
  return {name: value for name, value in (fields | over).items() if value is not None}


def _torn(file):
  """Whether a file ends within a line."""
  size = file.seek(0, os.SEEK_END)
  file.seek(max(size - 1, 0))
  return size > 0 and file.read(1) != b"\n"


def _check_numbers(**given):
  for name, value in given.items():
    whole = name in ("concurrency", "attempts")
    if type(value) not in ((int,) if whole else (int, float)) or not math.isfinite(value):
      raise run.Refused(f"{name} is {value!r}, expected a {'whole ' * whole}number")
    least = 1 if whole else 0
    if value < least or value == 0 and not name.startswith("price"):
      bound = f"at least {least}" if whole or name.startswith("price") else "more than 0"
      raise run.Refused(f"{name} is {value}, expected {bound}")


def _check_url(url, secret):
  """The host of a base url; refuses what is none, and a key that would travel in clear."""
  expected = "expected a base such as 'https://host/v1'"
  try:
    parts = urllib.parse.urlsplit(url)
    host, _ = (parts.hostname or "").encode("idna").decode(), parts.port
  except (ValueError, TypeError, AttributeError):
    raise run.Refused(f"url is not one: {expected}") from None
  if parts.username is not None or parts.query or parts.fragment:  # may hold a secret: not shown
    raise run.Refused(f"url has a user, a query or a fragment: {expected}, the key in a variable")
  if not isinstance(url, str) or parts.scheme not in ("http", "https") or not host:
    raise run.Refused(f"url is {url!r}: {expected}")
  if not url.isascii() or not url.isprintable() or " " in url:
    raise run.Refused(f"url {url!r} has characters that no url has: {expected}")
  if parts.path.rstrip("/").endswith("/chat/completions"):
    raise run.Refused(f"url {url!r} ends with /chat/completions, which is added here: {expected}")
  if secret and parts.scheme == "http" and not _local(host):
    raise run.Refused(f"url {url!r} would send the key in clear: use https, or no key")
  return host


def _local(host):
  try:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:  # a name
    return False


def _key(variable):
  """The key in an environment variable, or None without one; no message shows it."""
  if not variable:
    return None
  key = os.environ.get(variable, "").strip()
  if not key:
    raise run.Refused(f"environment variable {variable} is not set, expected the endpoint's key")
  if not key.isascii() or not key.isprintable() or " " in key:
    raise run.Refused(f"environment variable {variable} holds characters that no key has")
  return key


def _without(text, key):
  return text.replace(key, "***").replace(key.replace("/", "\\/"), "***")  # as some write JSON


def _body(response, deadline):
  """All bytes; a timeout also if they come one by one for longer than the whole may take."""
  parts = []
  while part := response.read1(1 << 16):
    parts.append(part)
    if time.monotonic() > deadline:
      raise TimeoutError("the body took too long")
  return b"".join(parts)


def _seconds(retry_after):
  """A Retry-After header, seconds or a date -> seconds, 0 to LONGEST_WAIT; 0.0 for none."""
  try:
    seconds = float(retry_after)
  except (TypeError, ValueError):
    try:
      seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
      return 0.0
  return min(seconds, LONGEST_WAIT) if seconds > 0 else 0.0


def _row(key, text):
  """A chat completion as a row of the cache; None if the text is none, or was cut."""
  try:
    reply = json.loads(text)
    choice = reply["choices"][0]
    content, usage = choice["message"].get("content"), reply.get("usage") or {}
    tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    reason = choice.get("finish_reason")
  except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
    return None
  if not isinstance(content, str | None):
    return None
  content = (content or "").encode("utf-8", "replace").decode()  # half a character is not UTF-8
  return dict(zip(ROW, (key, content, reason, *(n if type(n) is int else 0 for n in tokens))))


def _answer(row, cached):
  empty = not row["text"].strip()
  why = f"an answer without text (finish_reason {row['finish_reason']!r})" if empty else None
  return Answer(None if empty else row["text"], why, cached, row["prompt_tokens"],
                row["completion_tokens"], cut=row["finish_reason"] == "length")


def _value(answer, read):
  """-> (value, None) or (None, why)."""
  if answer.text is None:
    return None, answer.why
  try:
    return read(_only_object(answer.text)), None
  except ValueError as error:
    return None, " ".join(str(error).split())[:200]


def _only_object(text):
  """The one JSON object in a text: bare, fenced or in prose; ValueError for none or several.

  Of several, one may be quoted from what was judged: which is meant is not guessed.
  """
  text = text.rpartition("</think>")[2]
  found, start, decoder = [], text.find("{"), json.JSONDecoder()
  while start >= 0:
    try:
      value, end = decoder.raw_decode(text, start)
      found += [value] if value else []
    except (ValueError, RecursionError):
      end = start + 1
    start = text.find("{", end)
  if not found or any(value != found[0] for value in found):
    raise ValueError(f"it holds {len(found)} JSON objects, expected one" if found
                     else "it holds no JSON object")
  return found[0]
