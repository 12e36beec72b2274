"""serve: a checkpoint of random parameters over HTTP, asked by our own client and by hand."""

import json
import threading
import urllib.error
import urllib.request

import ml_collections
import pytest

from conftest import call
from tiny_aya_jax import client, run, serve
from tiny_aya_jax.data import template, tokenizer as tokenizers, vocab
from tiny_aya_jax.export import huggingface

CONFIG = ml_collections.ConfigDict(
    dict(tokens=8, temperature=0.0, top_p=0.95, seed=0, dtype="float32"))
HELLO = [dict(role="user", content="Hallo")]


@pytest.fixture(scope="module")
def model(place, data):
  from tiny_aya_jax.train import checkpoint, saved

  params, _ = checkpoint.restore_params(place)
  cfg = ml_collections.ConfigDict(saved.meta(place)["model"])
  tokenizer = tokenizers.load(data / "tokenizer.model")
  return serve.Model("random", params, cfg, tokenizer, template.turns(tokenizer), CONFIG, 40)


@pytest.fixture(scope="module")
def url(model):
  server = serve.Server(("127.0.0.1", 0), model)
  threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}/v1"
  server.shutdown()
  server.server_close()


def ask(url, **fields):
  """-> (status, the JSON of the reply)."""
  body = json.dumps(fields).encode() if fields else None
  try:
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
      return response.status, json.load(response)
  except urllib.error.HTTPError as error:
    return error.code, json.load(error)


def test_our_client_is_answered_and_told_what_it_cost(url, model, tmp_path):
  asker = client.Client(url, "random", tmp_path / "cache", concurrency=4, requests_per_minute=60_000,
                        timeout_seconds=60, attempts=1, key_variable=None, price_in=0, price_out=0)
  requests = [dict(messages=HELLO, max_tokens=8), dict(messages=HELLO, max_tokens=3)]
  whole, part = asker.answers(requests)
  assert whole.text.startswith(part.text) and len(part.text) < len(whole.text)
  assert (part.completion_tokens, whole.completion_tokens) == (3, 8) and part.cut and whole.cut
  assert part.prompt_tokens == len(model.turns.prompt(HELLO))
  assert ask(url + "/models")[1]["data"][0]["id"] == "random"


def said(url, **fields):
  status, found = ask(url + "/chat/completions", messages=HELLO, **fields)
  assert status == 200
  return found["choices"][0]["message"]["content"], found["choices"][0]["finish_reason"]


def test_sampling_is_as_asked_or_as_the_config_says(url, monkeypatch):
  from tiny_aya_jax.model import decode

  seen = []
  monkeypatch.setattr(decode, "generate_until", lambda *_, **given: seen.append(given) or [[]])
  assert said(url) == ("", "stop")
  said(url, temperature=1.5, top_p=0.5, seed=7)
  names = "temperature", "top_p", "seed"
  assert [[given[name] for name in names] for given in seen] == [[0.0, 0.95, 0], [1.5, 0.5, 7]]


def test_an_answer_ends_before_the_first_of_the_stops(url):
  greedy, _ = said(url)
  assert said(url, temperature=0, user="me", n=1, stream=False, stop=None) == (greedy, "length")
  middle = greedy[len(greedy) // 2]
  assert said(url, stop=["\x00", middle]) == (greedy.partition(middle)[0], "stop")
  assert said(url, stop=middle, max_completion_tokens=8) == (greedy.partition(middle)[0], "stop")


@pytest.mark.parametrize("fields, status, word", [
    (dict(messages=HELLO, stream=True), 400, "'stream'"), (dict(messages=HELLO, n=2), 400, "'n'"),
    (dict(messages=HELLO, tempratur=1), 400, "did you mean 'temperature'"),
    (dict(messages=HELLO, temperature=-1), 400, "0.001 to 2"), (dict(messages=HELLO, temperature="1"), 400, "'1'"),
    (dict(messages=HELLO, top_p=0), 400, "at most 1"), (dict(messages=HELLO, seed=1.5), 400, "whole number"),
    (dict(messages=HELLO, max_tokens=9), 400, "from 1 to 8"), (dict(messages=HELLO, max_tokens=True), 400, "True"),
    (dict(messages=HELLO, stop=[1]), 400, "'stop'"), (dict(messages=HELLO, stop=""), 400, "'stop'"),
    (dict(messages=HELLO, frequency_penalty=1), 400, "expected 0"), (dict(messages="Hallo"), 400, "list of messages"),
    (dict(messages=HELLO * 2), 400, "take turns"), (dict(seed=1), 400, "list of messages"),
    (dict(messages=[dict(role="assistant", content="x")]), 400, "expected user"),
    (dict(messages=HELLO, model="gpt"), 404, "only 'random'"),
    (dict(messages=[dict(role="user", content="wort " * 60)]), 400, "more than the 40"),
])
def test_what_is_not_done_is_refused_with_its_name(url, fields, status, word):
  found, said = ask(url + "/chat/completions", **fields)
  assert found == status and word in said["error"]["message"]


@pytest.mark.parametrize("path, body, status", [
    ("/chat/completions", b"nope", 400), ("/chat/completions", b"[" * 9999, 400),
    ("/chat/completions", b"[]", 400), ("/completions", b"{}", 404), ("/nothing", None, 404)])
def test_a_request_that_is_none_is_refused(url, path, body, status):
  with pytest.raises(urllib.error.HTTPError) as error:
    urllib.request.urlopen(urllib.request.Request(url + path, body), timeout=60)
  assert error.value.code == status and json.load(error.value)["error"]["message"]


def test_talk_speaks_to_a_hugging_face_folder_by_its_template(model, data, tmp_path, capsys):
  folder, word = tmp_path / "model", model.tokenizer.encode("Hallo")
  huggingface.write(folder, model.params, model.cfg, model.tokenizer)

  def talk(*more):
    code = call("talk", "talk.py:tiny", tmp_path, f"--config.checkpoint={folder}", "--config.prompt=Hallo",
                "--config.tokens=8", *more)
    return code, "".join(capsys.readouterr())

  code, ours = talk()
  assert code == 0 and "is spoken to by the turns of data/chat.py" in ours
  assert ours.split("\n", 1)[1].strip() == talk_answer(model, model.turns.prompt(HELLO)).strip()
  (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}<|CHATBOT_TOKEN|>")
  code, own = talk()
  assert code == 0 and "is spoken to by the folder's chat template" in own
  assert own.split("\n", 1)[1].strip() == talk_answer(
      model, [2, *word, 8], template.turns(model.tokenizer, folder)).strip()
  assert talk(f"--config.tokenizer={data / 'tokenizer.model'}") == (0, own)
  (tmp_path / "tokenizer.model").write_bytes(vocab.train(["andere Wörter"] * 9, 290, 1.0))
  code, said = talk(f"--config.tokenizer={tmp_path / 'tokenizer.model'}")
  assert code == 65 and "is another (600 ids and 290): leave config.tokenizer unset" in said


def talk_answer(model, ids, turns=None):
  from tiny_aya_jax.model import decode

  (answer,) = decode.generate(
      model.params, model.cfg, [ids], steps=8, stop_ids=model.turns.stop_ids, top_p=0.95,
      banned_ids=(model.turns if turns is None else turns).unspoken(model.tokenizer, model.cfg.V))
  return model.tokenizer.decode(answer)


def test_a_port_that_is_taken_or_none_is_refused(url, model):
  for port in (int(url.split(":")[2].partition("/")[0]), 70_000):
    with pytest.raises(run.Refused, match="cannot be listened on"):
      serve.serve(model, "127.0.0.1", port)
