"""client: against an endpoint on this machine that answers as a test says, badly as a rule."""

import collections
import contextlib
import email.utils
import http.server
import itertools
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from tiny_aya_jax import client, run

ROOT = pathlib.Path(__file__).parents[1]
KEY = "sk-test/0123456789abcdefghij"
Seen = collections.namedtuple("Seen", "time path headers body")


class Endpoint(http.server.ThreadingHTTPServer):
  """say(number of the request, its body) -> what `reply` makes; `seen` is all that came."""

  daemon_threads = True

  def __init__(self, say):
    super().__init__(("127.0.0.1", 0), Handler)
    self.say, self.seen, self.lock = say, [], threading.Lock()
    self.now = self.most = 0
    self.url = f"http://127.0.0.1:{self.server_port}/v1"
    self.leave = threading.Event()
    threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

  def handle_error(self, *_):  # a client that has hung up is part of the tests
    pass


class Handler(http.server.BaseHTTPRequestHandler):
  disable_nagle_algorithm = True  # else each reply waits 40 ms for an acknowledgement

  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with server.lock:
      number = len(server.seen)
      server.seen.append(Seen(time.monotonic(), self.path, dict(self.headers), body))
      server.now += 1
      server.most = max(server.most, server.now)
    said = server.say(number, body)
    server.leave.wait(said["seconds"])
    with server.lock:
      server.now -= 1  # before the reply: the next request may come at once
    self.send_response(said["status"])
    for name, value in said["headers"].items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(said["body"])))
    self.end_headers()
    for piece in said["pieces"] or [said["body"][: said["cut"]]]:
      self.wfile.write(piece)
      server.leave.wait(said["pause"])
    self.close_connection = True

  def log_message(self, *_):
    pass


def reply(body, status=200, seconds=0.0, cut=None, pieces=None, pause=0.0, **headers):
  """One of a script. `cut`: bytes sent of those announced; `pieces`: sent with pauses between."""
  body = body if isinstance(body, bytes) else json.dumps(body).encode()
  headers = {name.replace("_", "-"): value for name, value in headers.items()}
  return dict(body=body, status=status, seconds=seconds, cut=cut, pieces=pieces, pause=pause,
              headers=headers)


def completion(text, prompt_tokens=7, completion_tokens=3, reason="stop", **kwargs):
  usage = dict(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
  choice = dict(message=dict(role="assistant", content=text), finish_reason=reason)
  return reply(dict(choices=[choice], usage=usage), **kwargs)


def echo(_, body):
  return completion("to " + body["messages"][-1]["content"])


def script(*replies):
  """Each request the next reply, then echoes."""
  return lambda number, body: replies[number] if number < len(replies) else echo(number, body)


def ask(text, **fields):
  return {"messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture
def endpoint():
  """endpoint(say) -> a running Endpoint."""
  started = []

  def start(say=echo):
    started.append(Endpoint(say))
    return started[-1]

  yield start
  for server in started:
    server.leave.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def connect(tmp_path, monkeypatch):
  """connect(endpoint, **what differs) -> a Client whose waits are short."""
  monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
  monkeypatch.setenv("TEST_KEY", KEY)
  monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # this machine is reached without it
  monkeypatch.delenv("no_proxy", raising=False)

  def make(url, **given):
    fields = dict(concurrency=2, requests_per_minute=60_000, timeout_seconds=5, attempts=3,
                  key_variable="TEST_KEY", price_in=2.0, price_out=10.0)
    cache = given.pop("cache", tmp_path / "cache")
    return client.Client(getattr(url, "url", url), "judge-1", cache, **fields | given)

  return make


def texts(answers):
  return [answer.text for answer in answers]


def test_answers_come_in_the_order_of_the_requests(endpoint, connect):
  def slow_first(number, body):
    return echo(number, body) | {"seconds": 0.2 * (body["messages"][0]["content"] == "0")}

  server = endpoint(slow_first)
  found = connect(server, concurrency=4).answers([ask(str(n), max_tokens=5) for n in range(6)])
  assert found == [client.Answer(f"to {n}", None, False, 7, 3) for n in range(6)]
  first = server.seen[0]
  assert first.path == "/v1/chat/completions"
  assert first.headers["Authorization"] == f"Bearer {KEY}"
  assert first.body["model"] == "judge-1" and first.body["max_tokens"] == 5


def test_without_a_key_none_is_sent(endpoint, connect):
  server = endpoint()
  connect(server, key_variable="").answers([ask("a")])
  assert "Authorization" not in server.seen[0].headers


@pytest.mark.parametrize("trouble", [
    reply({"error": "slow down"}, status=429), reply(b"<html>", status=500), reply(b"", status=503),
    reply({}, status=408), reply({}, status=409), reply({}, status=425), reply(b"<html>"),
    completion("whole", cut=40), reply({"error": {"message": "overloaded"}}), reply(b"[]"),
    reply({"choices": []}), reply({"choices": [{"message": None}]}), reply(b"[" * 100_000),
    reply({"choices": [{"message": {"content": [1]}}]}), reply(b"", cut=0),
    completion("late", seconds=1.0),
    reply(b" " * 50, pieces=[b" "] * 50, pause=0.05),  # keeps the connection alive, says nothing
])
def test_what_may_pass_is_tried_again(endpoint, connect, trouble):
  server = endpoint(script(trouble, trouble))
  late = trouble["seconds"] or trouble["pieces"]
  asker = connect(server, timeout_seconds=0.3 if late else 5)
  assert texts(asker.answers([ask("a")])) == ["to a"]
  assert len(server.seen) == 3
  assert not late or server.seen[1].time - server.seen[0].time < 0.8
  assert asker.spent()["retried"] == 2 and asker.spent()["failed"] == 0


def test_a_connection_that_fails_is_tried_again_and_is_then_a_failed_answer(endpoint, connect):
  server = endpoint()
  server.shutdown()
  server.server_close()
  asker = connect(server)
  (answer,) = asker.answers([ask("a")])
  assert answer.text is None and "3 tries" in answer.why and "refused" in answer.why
  assert asker.spent() == dict(requests=1, cached=0, failed=1, retried=2, prompt_tokens=0,
                               completion_tokens=0, money=0.0)


def test_waits_double(endpoint, connect, monkeypatch):
  monkeypatch.setattr(client, "FIRST_WAIT", 0.1)
  server = endpoint(script(*[reply({}, status=500)] * 3))
  connect(server, attempts=4).answers([ask("a")])
  waits = [late.time - early.time for early, late in itertools.pairwise(server.seen)]
  for wait, most in zip(waits, (0.1, 0.2, 0.4)):
    assert most / 2 <= wait < most + 0.3


@pytest.mark.parametrize("header", ["0.3", "60000", "date"])
def test_all_requests_obey_retry_after_up_to_a_bound(endpoint, connect, monkeypatch, header):
  monkeypatch.setattr(client, "LONGEST_WAIT", 0.3)
  if header == "date":
    header = email.utils.formatdate(time.time() + 30, usegmt=True)
  server = endpoint(script(reply({}, status=503, Retry_After=header)))
  connect(server, concurrency=1).answers([ask("a")])
  assert 0.28 < server.seen[1].time - server.seen[0].time < 1.5
  server = endpoint(script(reply({}, status=429, Retry_After=header)))
  connect(server, concurrency=4, requests_per_minute=600).answers([ask(str(n)) for n in range(4)])
  assert len(server.seen) == 5
  assert server.seen[1].time - server.seen[0].time > 0.28  # its turn was 0.1 s after the first


@pytest.mark.parametrize("header", ["soon", "-5", "nan", "", "Sun, 06 Nov 1994 08:49:37 GMT"])
def test_a_retry_after_that_says_nothing_is_no_wait(endpoint, connect, header):
  server = endpoint(script(reply({}, status=429, Retry_After=header)))
  began = time.monotonic()
  assert texts(connect(server).answers([ask("a")])) == ["to a"]
  assert time.monotonic() - began < 1


@pytest.mark.parametrize("status", [401, 402, 403, 404, 302, 307])
def test_a_status_that_will_not_change_ends_everything_at_once(endpoint, connect, status):
  told = f"no: your key {KEY} and {KEY.replace('/', chr(92) + '/')} " + "x" * 400
  server = endpoint(lambda *_: reply(told.encode(), status=status))
  asker = connect(server, concurrency=1)
  with pytest.raises(run.Refused, match=f"status {status}.*TEST_KEY") as error:
    asker.answers([ask(str(n)) for n in range(50)])
  assert len(server.seen) == 1
  assert KEY not in str(error.value) and "0123456789" not in str(error.value)
  assert "your key *** and ***" in str(error.value) and len(str(error.value)) < 500


def test_a_redirect_is_not_followed(endpoint, connect):
  other = endpoint()
  server = endpoint(lambda *_: reply({}, status=307, Location=other.url + "/chat/completions"))
  with pytest.raises(run.Refused, match="status 307"):
    connect(server).answers([ask("a")])
  assert not other.seen


@pytest.mark.parametrize("status", [400, 413, 422, 451])
def test_a_declined_request_is_a_failed_answer_among_good_ones(endpoint, connect, status):
  def decline(number, body):
    declined = body["messages"][0]["content"] == "b"
    return reply({"error": f"filtered {KEY}"}, status=status) if declined else echo(number, body)

  server = endpoint(decline)
  asker = connect(server)
  good, bad, also_good = asker.answers([ask("a"), ask("b"), ask("c")])
  assert (good.text, also_good.text) == ("to a", "to c")
  assert bad.text is None and f"status {status}" in bad.why and "filtered ***" in bad.why
  assert len(server.seen) == 3 and asker.spent()["failed"] == 1


def test_an_endpoint_that_only_ever_declines_is_refused(endpoint, connect):
  server = endpoint(lambda *_: reply({"error": "API key not valid"}, status=400))
  with pytest.raises(run.Refused, match="22 requests in a row failed.*API key not valid"):
    connect(server, concurrency=1).answers([ask(str(n)) for n in range(500)])
  assert len(server.seen) == 22


def test_a_filter_may_decline_many_in_a_row_where_others_were_answered(endpoint, connect):
  server = endpoint(lambda *given: reply({}, status=400) if given[0] else echo(*given))
  found = connect(server, concurrency=1).answers([ask(str(n)) for n in range(60)])
  assert sum(answer.text is None for answer in found) == 59
  server.say = lambda *_: reply({}, status=400)
  found = connect(server, concurrency=1).answers([ask(str(n)) for n in range(60)])
  assert found[0].cached and sum(answer.text is None for answer in found) == 59


def test_failures_with_answers_between_them_end_nothing(endpoint, connect):
  server = endpoint(lambda *given: reply({}, status=500) if given[0] % 10 else echo(*given))
  found = connect(server, concurrency=1, attempts=1).answers([ask(str(n)) for n in range(60)])
  assert sum(answer.text is None for answer in found) == 54


def test_an_endpoint_that_dies_is_refused_and_what_was_answered_is_kept(endpoint, connect):
  server = endpoint(lambda *given: echo(*given) if given[0] < 5 else reply({}, status=500))
  requests = [ask(str(n)) for n in range(200)]
  with pytest.raises(run.Refused, match="in a row failed"):
    connect(server, concurrency=1, attempts=1).answers(requests)
  assert len(server.seen) == 5 + 22
  server.say = echo
  asker = connect(server)
  assert texts(asker.answers(requests)) == [f"to {n}" for n in range(200)]
  assert asker.spent()["cached"] == 5


@pytest.mark.parametrize("text", ["", " \n", None])
def test_an_answer_without_text_fails_costs_and_is_not_kept(endpoint, connect, text):
  server = endpoint(script(completion(text, reason="length")))
  asker = connect(server)
  (answer,) = asker.answers([ask("a")])
  assert answer.text is None and "length" in answer.why
  assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)
  assert asker.spent() == dict(requests=1, cached=0, failed=1, retried=0, prompt_tokens=7,
                               completion_tokens=3, money=44e-6)
  assert texts(connect(server).answers([ask("a")])) == ["to a"]


def test_an_answer_that_ends_for_want_of_tokens_is_known_as_cut(endpoint, connect):
  server = endpoint(script(completion("a", reason="length")))
  for _ in range(2):  # the second time from the cache
    found = connect(server, concurrency=1).answers([ask("a"), ask("b")])
    assert [answer.cut for answer in found] == [True, False]


def test_concurrency_is_reached_and_never_exceeded(endpoint, connect):
  server = endpoint(lambda number, body: echo(number, body) | {"seconds": 0.05})
  connect(server, concurrency=5).answers([ask(str(n)) for n in range(30)])
  assert server.most == 5


def test_requests_start_no_faster_than_the_rate_and_in_no_burst(endpoint, connect):
  server = endpoint()
  connect(server, concurrency=8, requests_per_minute=1200).answers([ask(str(n)) for n in range(13)])
  starts = sorted(seen.time for seen in server.seen)
  assert 0.55 < starts[-1] - starts[0] < 3  # 12 intervals of 50 ms
  for first, sixth in zip(starts, starts[5:]):
    assert sixth - first > 0.15  # 0.25, less what a busy machine may shift


def test_tries_count_for_the_rate(endpoint, connect):
  server = endpoint(lambda *_: reply({}, status=500))
  connect(server, requests_per_minute=600, attempts=4).answers([ask("a")])
  assert server.seen[3].time - server.seen[0].time > 0.28


def test_an_answer_is_paid_for_once(endpoint, connect, tmp_path):
  server = endpoint()
  first = connect(server)
  assert texts(first.answers([ask("a"), ask("b")])) == ["to a", "to b"]
  again = first.answers([ask("b")])
  assert again == [client.Answer("to b", None, True, 7, 3)]
  second = connect(server)
  found = second.answers([ask("c"), ask("a"), ask("a", seed=1)])
  assert texts(found) == ["to c", "to a", "to a"]
  assert [answer.cached for answer in found] == [False, True, False]
  assert len(server.seen) == 4
  assert first.spent() == dict(requests=3, cached=1, failed=0, retried=0, prompt_tokens=14,
                               completion_tokens=6, money=(14 * 2 + 6 * 10) / 1e6)
  assert second.spent()["requests"] == 3 and second.spent()["prompt_tokens"] == 14
  rows = run.read_lines(tmp_path / "cache")
  assert len(rows) == 4 and all(row["finish_reason"] == "stop" for row in rows)


def test_another_model_or_url_is_another_request(endpoint, connect, tmp_path):
  server = endpoint()
  connect(server).answers([ask("a")])
  other = connect(server)
  other.model = "judge-2"
  other.answers([ask("a")])
  assert [seen.body["model"] for seen in server.seen] == ["judge-1", "judge-2"]
  elsewhere = endpoint()
  connect(elsewhere).answers([ask("a")])
  assert len(elsewhere.seen) == 1


def test_equal_requests_are_sent_once(endpoint, connect):
  server = endpoint()
  asker = connect(server)
  found = asker.answers([ask("a"), ask("b"), ask("a"), dict(reversed(ask("a", seed=1).items())),
                         ask("a", seed=1)])
  assert texts(found) == ["to a", "to b", "to a", "to a", "to a"]
  assert [answer.cached for answer in found] == [False, False, True, False, True]
  assert len(server.seen) == 3 and asker.spent()["cached"] == 2


def test_any_text_survives_the_cache(endpoint, connect, tmp_path):
  text = 'a\u2028b\x85c\x1c\r\n"\\ 你好 \U0001f600 \x00'
  server = endpoint(script(completion(text), completion("half \ud83d")))
  asker = connect(server, concurrency=1)
  assert texts(asker.answers([ask("a"), ask("b")])) == [text, "half ?"]
  assert texts(connect(server).answers([ask("a"), ask("b")])) == [text, "half ?"]
  lines = (tmp_path / "cache").read_text(encoding="ascii").splitlines()  # at U+2028 too
  assert len(server.seen) == 2 and len(lines) == 2


@pytest.mark.parametrize("keep", [-1, -20, 1])
def test_a_torn_last_line_is_asked_again_and_swallows_nothing(endpoint, connect, tmp_path, keep):
  server = endpoint()
  connect(server, concurrency=1).answers([ask("a"), ask("b")])
  cache = tmp_path / "cache"
  lines = cache.read_bytes().splitlines(keepends=True)
  cache.write_bytes(lines[0] + lines[1][:keep])
  if keep == -1:
    assert texts(connect(server).answers([ask("b"), ask("c")])) == ["to b", "to c"]
    assert len(server.seen) == 3  # only the end of the line was missing
  else:
    assert texts(connect(server).answers([ask("a"), ask("b")])) == ["to a", "to b"]
    assert len(server.seen) == 3
  asker = connect(server)
  asker.answers([ask("a"), ask("b")])
  assert asker.spent()["cached"] == 2


def test_other_lines_in_the_cache_are_no_answers(endpoint, connect, tmp_path):
  server = endpoint()
  key = run.fingerprint([server.url, "judge-1", ask("a")])
  (tmp_path / "cache").write_text(f'12\n{{"key": "{key}"}}\nnull\n[]\n', encoding="utf-8")
  assert texts(connect(server).answers([ask("a")])) == ["to a"]


INTERRUPTED = """
import sys
from tiny_aya_jax import client

fields = dict(concurrency=2, requests_per_minute=60000, timeout_seconds=60, attempts=3,
              key_variable="TEST_KEY", price_in=1, price_out=1)
asker = client.Client(sys.argv[1], "judge-1", sys.argv[2], **fields)
asker.answers([{"messages": [{"role": "user", "content": str(n)}]} for n in range(20)])
"""


def test_an_interrupted_run_ends_promptly_and_continues(endpoint, connect, tmp_path):
  server = endpoint(lambda number, body: echo(number, body) | {"seconds": 60.0 * (number >= 6)})
  asker = connect(server)  # sets the environment
  process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, server.url, tmp_path / "cache"],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  try:
    until(lambda: len(server.seen) == 8 and len(run.read_lines(tmp_path / "cache")) == 6)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    said, _ = process.communicate(timeout=5)
  finally:
    process.kill()
    process.wait()
  assert time.monotonic() - began < 2 and process.returncode != 0
  assert b"KeyboardInterrupt" in said and KEY.encode() not in said
  assert len(server.seen) == 8  # none of the others was begun
  server.say = echo
  asker = connect(server)
  assert texts(asker.answers([ask(str(n)) for n in range(20)])) == [f"to {n}" for n in range(20)]
  assert asker.spent()["cached"] == 6 and len(server.seen) == 8 + 14


def until(true, seconds=10):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_the_key_is_in_no_file_message_or_object(endpoint, connect, tmp_path, capfd, monkeypatch):
  replies = [completion(f"your header was Bearer {KEY}"), reply({"error": KEY}, status=400)]
  server = endpoint(lambda number, _: (replies + [reply({"error": KEY}, status=500)] * 9)[number])
  asker = connect(server, concurrency=1, attempts=2)
  found = asker.answers([ask("a"), ask("b"), ask("c")])
  assert found[0].text == "your header was Bearer ***"
  said = "".join(capfd.readouterr())
  written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
  for text in (repr(asker), str(vars(asker)), str(found), said, written, str(asker.spent())):
    assert KEY not in text and "0123456789" not in text
  with pytest.raises(run.Refused) as error:
    monkeypatch.setenv("TEST_KEY", f"{KEY}\n{KEY}")
    connect(server)
  assert "0123456789" not in str(error.value)


def test_a_placeholder_for_a_key_is_not_cut_out_of_answers(endpoint, connect, monkeypatch):
  server = endpoint(lambda *_: completion("the EMPTY set"))
  asker = connect(server)
  monkeypatch.setenv("TEST_KEY", "EMPTY\n")  # as files end
  assert texts(asker.answers([ask("a")])) == ["the EMPTY set"]
  assert server.seen[0].headers["Authorization"] == "Bearer EMPTY"
  server.say = lambda *_: reply({"error": "no EMPTY here"}, status=401)
  with pytest.raises(run.Refused, match="no [*]{3} here"):
    asker.answers([ask("b")])


def read(reply):
  if reply.get("score") not in range(1, 8):
    raise ValueError(f"score is {reply.get('score')!r}")
  return reply["score"]


@pytest.mark.parametrize("text", [
    '{"score": 5}', '```json\n{"score": 5}\n```', 'Here it is: {"score": 5}. Good luck!',
    'for {x} I say\n{"why": "{braces} in \\"text\\"", "score": 5}', '{"score": 5} {"score": 5}',
    '<think>maybe {"score": 2}</think>\n{"score": 5}', 'f() {} gives {"score": 5}',
    "\ufeff" + '{"score": 5}',
])
def test_the_object_of_a_reply_is_found(endpoint, connect, text):
  server = endpoint(script(completion(text)))
  assert connect(server).json_answers([ask("a")], read) == [(5, None)]
  assert len(server.seen) == 1


@pytest.mark.parametrize("text", [
    "five", '{"score": 5', '{"score": 9}', '["score"]', '{"score": 5} or {"score": 6}', "{" * 1200,
    '{"a":' * 1200, '{"score": ' + "9" * 5000 + "}", "{}",
])
def test_a_reply_that_cannot_be_used_is_asked_again_with_what_was_wrong(endpoint, connect, text):
  server = endpoint(script(completion("fine: {\"score\": 3}"), completion(text), completion(text),
                           completion('{"score": 4}')))
  asker = connect(server, concurrency=1)
  assert asker.json_answers([ask("a", seed=3), ask("b")], read) == [(3, None), (4, None)]
  messages = [seen.body["messages"] for seen in server.seen]
  assert [len(turns) for turns in messages] == [1, 1, 3, 5]
  assert messages[3][:3] == messages[2]
  assert messages[2][1] == {"role": "assistant", "content": text}
  assert "cannot be used" in messages[2][2]["content"]
  assert asker.spent()["requests"] == 4


def test_a_reply_that_never_can_be_used_has_a_reason(endpoint, connect):
  server = endpoint(lambda *_: completion('{"score": 9}'))
  assert connect(server).json_answers([ask("a")], read) == [(None, "score is 9")]
  assert len(server.seen) == 3
  # The same again costs nothing.
  asker = connect(server)
  assert asker.json_answers([ask("a")], read) == [(None, "score is 9")]
  assert len(server.seen) == 3 and asker.spent()["money"] == 0


def test_a_failed_answer_is_not_asked_for_its_json_again(endpoint, connect):
  server = endpoint(script(reply({"error": "filtered"}, status=400)))
  ((value, why),) = connect(server).json_answers([ask("a")], read)
  assert value is None and "filtered" in why and len(server.seen) == 1


def test_of_nothing_nothing_is_asked(endpoint, connect):
  asker = connect(endpoint())
  assert asker.answers([]) == [] and asker.json_answers([], read) == []
  assert asker.spent()["requests"] == 0


@pytest.mark.parametrize("url, message", [
    ("judge.example/v1", "expected a base"), ("ftp://judge.example", "expected a base"),
    ("", "expected a base"), (None, "expected a base"), ("https://", "expected a base"),
    ("https://judge.example:port/v1", "expected a base"), ("https://a..b/v1", "expected a base"),
    ("https://judge.example/v 1", "characters"), ("https://judge.example/v1?key=secret", "a query"),
    ("https://me:secret@judge.example/v1", "a user"),
    ("https://judge.example/v1/chat/completions", "added here"),
    ("http://judge.example/v1", "in clear"), ("http://127.0.0.1.example/v1", "in clear"),
    ("http://10.0.0.1/v1", "in clear"), ("http://localhost.example/v1", "in clear"),
])
def test_a_url_that_will_not_do_is_refused(connect, url, message):
  with pytest.raises(run.Refused, match=message) as error:
    connect(url)
  assert "secret" not in str(error.value)


@pytest.mark.parametrize("url, variable", [
    ("https://judge.example/v1", "TEST_KEY"), ("http://localhost:8000/v1/", "TEST_KEY"),
    ("http://[::1]:8000/v1", "TEST_KEY"), ("http://10.0.0.1/v1", None),
])
def test_a_url_that_will_do_is_taken(connect, url, variable):
  assert connect(url, key_variable=variable).url == url.rstrip("/")


@pytest.mark.parametrize("field, value", [
    ("concurrency", 0), ("concurrency", 1.5), ("concurrency", True), ("requests_per_minute", 0),
    ("requests_per_minute", float("inf")), ("timeout_seconds", 0),
    ("timeout_seconds", float("nan")),
    ("attempts", 0), ("price_in", -1), ("price_out", None), ("attempts", "3"),
])
def test_a_number_that_will_not_do_is_refused(connect, field, value):
  with pytest.raises(run.Refused, match=f"{field} is {value!r}, expected"):
    connect("https://judge.example/v1", **{field: value})


def test_a_price_may_be_nothing(connect):
  assert connect("https://judge.example/v1", price_in=0, price_out=0).spent()["money"] == 0


def test_a_key_that_is_not_there_or_is_none_is_refused(connect, monkeypatch):
  for value in ("", " "):
    monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(run.Refused, match="TEST_KEY is not set"):
      connect("https://judge.example/v1")
  for value in ("Bearer sk-1", "sk\n1", "sk-\u00e9"):
    monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(run.Refused, match="TEST_KEY holds characters"):
      connect("https://judge.example/v1")
  monkeypatch.delenv("TEST_KEY")
  with pytest.raises(run.Refused, match="TEST_KEY is not set"):
    connect("https://judge.example/v1")


def test_a_cache_that_cannot_be_written_is_refused(endpoint, connect, tmp_path):
  for path in (tmp_path, tmp_path / "file" / "cache"):
    (tmp_path / "file").touch()
    with pytest.raises(run.Refused, match="cannot be written"):
      connect("https://judge.example/v1", cache=path)


class Full:
  """A file with room for ten more bytes."""

  def __init__(self, file):
    self.file = file

  def write(self, line):
    return self.file.write(line[:10])

  def __getattr__(self, name):
    return getattr(self.file, name)


@contextlib.contextmanager
def open_full(*arguments, **named):
  with open(*arguments, **named) as file:
    yield Full(file)


def test_a_full_disk_ends_the_run_and_the_next_continues(endpoint, connect, monkeypatch):
  server = endpoint()
  asker = connect(server, concurrency=1)
  asker.answers([ask("a")])
  with monkeypatch.context() as patch:
    patch.setattr(client, "open", open_full, raising=False)
    with pytest.raises(run.Refused, match="cannot be written .No space left"):
      asker.answers([ask("b"), ask("c")])
  again = connect(server)
  assert texts(again.answers([ask("a"), ask("b")])) == ["to a", "to b"]
  assert again.spent()["cached"] == 1
  assert connect(server).answers([ask("b")])[0].cached


@pytest.mark.parametrize("bad, message", [
    ("hello", "not a dict"), ({}, "not a dict"), ({"messages": "hello"}, "not a dict"),
    (ask("a", stream=True), "'stream'"), (ask("a", model="x"), "'model'"), (ask("a", n=2), "'n'"),
    (ask("a", temperature=float("nan")), "JSON"), (ask("a", tools={1, 2}), "JSON"),
])
def test_a_request_that_will_not_do_is_refused_before_any_is_sent(endpoint, connect, bad, message):
  server = endpoint()
  with pytest.raises(run.Refused, match=f"request 1.*{message}"):
    connect(server).answers([ask("a"), bad])
  assert not server.seen
