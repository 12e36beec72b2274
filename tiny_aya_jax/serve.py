"""What `talk --config.port` does: a model as an OpenAI-compatible chat-completions endpoint.

For synthesize, evaluate's judge and whoever speaks that protocol, on one machine. Not a server for
many users: answers are made one at a time, in the order in which requests came; no key is asked
for, so it listens on this machine alone unless config.host says otherwise. What a request asks for
and this does not do is answered with status 400, never ignored.

  GET /v1/models   POST /v1/chat/completions
"""

import http.server
import json
import math
import threading
import time
from typing import NamedTuple

from tiny_aya_jax import run
from tiny_aya_jax.data import template

LARGEST = 1 << 24  # bytes of a request
IDLE_SECONDS = 60  # after which a connection that says nothing is closed
# Fields that change nothing with these values, and are refused with others.
ONLY = dict(n=(1,), stream=(False,), frequency_penalty=(0,), presence_penalty=(0,),
            logprobs=(False,), response_format=({"type": "text"},), logit_bias=({},), tools=([],),
            store=(False,), user=None, metadata=None)
KNOWN = ("messages", "model", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop",
         "seed")


class Model(NamedTuple):
  """What answers: a checkpoint, its tokenizer and turns, and the config of talk for what a request leaves out."""

  name: str
  params: dict
  cfg: object
  tokenizer: object
  turns: template.Turns
  config: object
  T: int  # most tokens of a prompt and its answer


class Wrong(Exception):
  """A request that cannot be served: a status, a sentence, and the field that it is about."""

  def __init__(self, status, why, field=None):
    super().__init__(why)
    self.status, self.field = status, field


def serve(model, host, port):
  """Answers until interrupted."""
  try:
    server = Server((host, port), model)
  except (OSError, OverflowError) as error:
    raise run.Refused(f"config.host {host} and config.port {port} cannot be listened on: {error}") from None
  run.say(f"{model.name} answers on http://{host}:{server.server_port}/v1 (Ctrl-C ends it)")
  try:
    server.serve_forever()
  except KeyboardInterrupt:
    run.say("ended")
  finally:
    server.server_close()


class Server(http.server.ThreadingHTTPServer):
  """A thread a connection, one answer at a time."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, address, model):
    super().__init__(address, _Handler)
    self.model, self.turn = model, threading.Lock()


class _Handler(http.server.BaseHTTPRequestHandler):
  timeout = IDLE_SECONDS

  def do_GET(self):
    name = self.server.model.name
    if self.path.rstrip("/") in ("/v1/models", f"/v1/models/{name}"):
      entry = dict(id=name, object="model", created=int(run.BEGAN), owned_by="tiny_aya_jax")
      whole = self.path.rstrip("/") == "/v1/models"
      self._send(200, dict(object="list", data=[entry]) if whole else entry)
    else:
      self._send(404, _error(Wrong(404, f"there is no {self.path[:100]} here")))

  def do_POST(self):
    try:
      request = self._request()
      with self.server.turn:
        found = completion(self.server.model, request)
      self._send(200, found)
    except Wrong as wrong:
      self._send(wrong.status, _error(wrong))
    except OSError:  # who asked has hung up
      self.close_connection = True
    except Exception as error:  # one request's trouble ends no others
      run.say(f"a request failed: {type(error).__name__}: {error}")
      self._send(500, _error(Wrong(500, type(error).__name__)))

  def _request(self):
    if self.path.rstrip("/") != "/v1/chat/completions":
      raise Wrong(404, f"there is no {self.path[:100]} here: expected /v1/chat/completions")
    try:
      length = int(self.headers["Content-Length"])
    except (TypeError, ValueError):
      raise Wrong(411, "a request needs a Content-Length") from None
    if not 0 <= length <= LARGEST:
      raise Wrong(413, f"{length} bytes are too many, at most {LARGEST} are read")
    try:
      return json.loads(self.rfile.read(length))
    except (ValueError, RecursionError) as error:
      raise Wrong(400, f"the body is not JSON ({error})") from None

  def _send(self, status, found):
    body = json.dumps(found).encode()
    try:
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)
    except OSError:
      self.close_connection = True

  def log_message(self, *_):
    pass


def _error(wrong):
  kind = "server_error" if wrong.status >= 500 else "invalid_request_error"
  return dict(error=dict(message=str(wrong), type=kind, param=wrong.field, code=wrong.status))


def completion(model, request):
  """The JSON object of a request -> that of its reply; raises Wrong for what cannot be served."""
  import jax.numpy as jnp

  from tiny_aya_jax.model import decode

  wanted, tokenizer = _wanted(model, request), model.tokenizer
  try:
    ids = model.turns.prompt(request.get("messages"))
  except run.Refused as refusal:
    raise Wrong(400, str(refusal), "messages") from None
  tokens = wanted["tokens"]
  if len(ids) + tokens > model.T:
    raise Wrong(400, f"a prompt of {len(ids)} tokens and an answer of {tokens} are more than the "
                f"{model.T} that the model reads", "messages")

  def ended(answer):
    return len(answer) >= tokens or _cut(tokenizer.decode(answer), wanted["stop"])[1]

  # Room for the most tokens, whatever is asked for: else each number of them is a program to compile.
  (answer,) = decode.generate_until(
      model.params, model.cfg, [ids], ended, steps=model.config.tokens,
      stop_ids=model.turns.stop_ids, temperature=wanted["temperature"], top_p=wanted["top_p"],
      seed=wanted["seed"], dtype=jnp.dtype(model.config.dtype),
      banned_ids=model.turns.unspoken(tokenizer, model.cfg.V))
  answer = answer[:tokens]
  said, stopped = _cut(tokenizer.decode(answer), wanted["stop"])
  reason = "length" if len(answer) == tokens and not stopped else "stop"
  usage = dict(prompt_tokens=len(ids), completion_tokens=len(answer), total_tokens=len(ids) + len(answer))
  choice = dict(index=0, message=dict(role="assistant", content=said), finish_reason=reason)
  return dict(id=f"chatcmpl-{time.time_ns():x}", object="chat.completion", created=int(time.time()),
              model=model.name, choices=[choice], usage=usage)


def _cut(text, stops):
  """-> (the text before the first of the stops, whether there was one)."""
  places = [at for stop in stops if (at := text.find(stop)) >= 0]
  return (text[: min(places)], True) if places else (text, False)


def _wanted(model, request):
  """The fields of a request, checked -> dict(tokens, temperature, top_p, seed, stop)."""
  if not isinstance(request, dict):
    raise Wrong(400, f"the body is a JSON {type(request).__name__}, expected an object")
  given = {field: value for field, value in request.items() if value is not None}
  for field, value in given.items():
    if field not in (*KNOWN, *ONLY):
      raise Wrong(400, f"{field!r} is not known here: {run.nearest(field, KNOWN)}", field)
    if ONLY.get(field) is not None and value not in ONLY[field]:
      expected = json.dumps(ONLY[field][0])
      raise Wrong(400, f"{field!r} is not done here, expected {expected} or nothing", field)
  if given.get("model", model.name) != model.name:
    raise Wrong(404, f"there is no model {str(given['model'])[:100]!r} here, only {model.name!r}", "model")
  config = model.config
  field = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
  return dict(
      tokens=_number(given, field, config.tokens, lambda n: 1 <= n <= config.tokens,
                     f"a whole number from 1 to {config.tokens}", whole=True),
      temperature=_number(given, "temperature", config.temperature,
                          lambda n: n == 0 or 1e-3 <= n <= 2, "0, or 0.001 to 2"),
      top_p=_number(given, "top_p", config.top_p, lambda n: 0 < n <= 1, "more than 0 and at most 1"),
      seed=_number(given, "seed", config.seed, lambda n: 0 <= n < 2**32,
                   "a whole number below 2^32", whole=True),
      stop=_stops(given.get("stop", [])))


def _number(given, field, default, good, expected, whole=False):
  number = given.get(field, default)
  kinds = (int,) if whole else (int, float)
  if type(number) not in kinds or not math.isfinite(number) or not good(number):
    raise Wrong(400, f"{field!r} is {repr(number)[:60]}, expected {expected}", field)
  return number


def _stops(given):
  stops = [given] if isinstance(given, str) else given
  if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
    raise Wrong(400, "'stop' is neither a text nor a list of texts", "stop")
  return stops
