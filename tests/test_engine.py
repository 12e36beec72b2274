"""Log-likelihoods and answers of lists of any length, against the full forward pass of each row."""

import jax
import ml_collections
import numpy as np
import pytest

from tiny_aya_jax import axes, run
from tiny_aya_jax.data import tokenizer as tokenizers
from tiny_aya_jax.evaluate import engine as engines
from tiny_aya_jax.model import decode, transformer
from tiny_aya_jax.model.transformer import TinyAya
from tiny_aya_jax.train import checkpoint

TEXTS = ("Montag, Dienstag", "Pazartesi", "a", "Freitag, Samstag, Sonntag, Montag, Dienstag")


@pytest.fixture(scope="module")
def tokenizer(data):
  return tokenizers.load(data / "tokenizer.model")


def load(place, tokenizer, T=32, dtype="float32", batch=8, **mesh):
  settings = ml_collections.ConfigDict(dict(batch=batch, dtype=dtype, attention="chunked"))
  return engines.load(place, tokenizer, axes.mesh(**mesh), settings, T)


@pytest.fixture(scope="module")
def engine(place, tokenizer):
  return load(place, tokenizer, data=1, fsdp=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def requests(tokenizer):
  """Contexts of any length, one of them empty, with continuations of any length, some in common."""
  random, found = np.random.default_rng(1), []
  for number in range(21):
    context = random.integers(12, 600, (0, 3, 9, 14)[number % 4]).tolist()
    found += [(context, random.integers(12, 600, length).tolist()) for length in (1, 1, 1 + number % 7)]
  return found


def expected(engine, requests):
  """[(sum of log-probabilities, all likeliest)] by one whole forward pass over rows of one width."""
  bos = engine.tokenizer.special("<BOS_TOKEN>")
  rows = [[bos, *context, *rest][-engine.T - 1:] for context, rest in requests]
  token_BT = np.array([row[:-1] + [0] * (engine.T + 1 - len(row)) for row in rows], np.int32)
  position_BT = np.broadcast_to(np.arange(engine.T, dtype=np.int32), token_BT.shape)
  segment_BT = (position_BT < [[len(row) - 1] for row in rows]).astype(np.int32)
  hidden_BTD = jax.jit(TinyAya(engine.cfg).apply)(
      {"params": engine.params}, token_BT, segment_BT, position_BT)
  share_BTV = np.asarray(jax.nn.log_softmax(transformer.logits(engine.params, hidden_BTD, engine.cfg)))
  found = []
  for row, (_, rest), share_TV in zip(rows, requests, share_BTV):
    share_TV = share_TV[len(row) - 1 - len(rest) : len(row) - 1]
    found.append((share_TV[np.arange(len(rest)), rest].sum(), (share_TV.argmax(-1) == rest).all()))
  return found


def test_a_likelihood_is_that_of_the_whole_forward_pass(engine, requests):
  found = engines.likelihoods(engine, requests, "test")
  assert len(found) == len(requests)
  for request, result, (nats, greedy) in zip(requests, found, expected(engine, requests)):
    assert result.nats == pytest.approx(nats, abs=2e-4) and result.greedy == greedy
    assert result.tokens == len(request[1])


def test_the_likeliest_continuation_is_said_to_be_greedy(engine, tokenizer):
  (prompt,) = tokenizer.encode_many(["Montag, "])
  bos = tokenizer.special("<BOS_TOKEN>")
  (ids,) = decode.generate(engine.params, engine.cfg, [[bos, *prompt]], steps=4)
  right, wrong = engines.likelihoods(
      engine, [(prompt, ids), (prompt, [*ids[:3], (ids[3] + 1) % 600])], "test")
  assert right.greedy and not wrong.greedy and right.nats > wrong.nats


@pytest.mark.parametrize("sizes", [dict(data=8, fsdp=1), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_mesh_finds_what_one_device_does(place, tokenizer, engine, requests, sizes):
  spread = load(place, tokenizer, **sizes)
  for one, other in zip(engines.likelihoods(engine, requests, "test"),
                        engines.likelihoods(spread, requests, "test")):
    assert other.nats == pytest.approx(one.nats, abs=2e-4) and other[1:] == one[1:]
  prompts = [[2, *tokenizer.encode(text)] for text in TEXTS]
  assert engines.answers(spread, prompts, tokens=9, what="test") == engines.answers(
      engine, prompts, tokens=9, what="test")


def test_logits_in_chunks_are_the_logits(place, tokenizer, engine, requests, monkeypatch):
  monkeypatch.setattr(engines.likelihood, "CHUNK_BYTES", 8 * 600 * 4 * 3)  # three positions at a time
  engines._programs.cache_clear()
  chunked = load(place, tokenizer, data=1, fsdp=1, devices=jax.devices()[:1])
  for one, other in zip(engines.likelihoods(engine, requests, "test"),
                        engines.likelihoods(chunked, requests, "test")):
    assert other.nats == pytest.approx(one.nats, abs=1e-4)


def test_equal_inputs_are_computed_once(engine, tokenizer, monkeypatch):
  batches = []
  monkeypatch.setattr(engines, "_on_mesh", lambda engine, arrays: batches.append(arrays) or (
      np.zeros(arrays["place_BE"].shape), np.zeros(arrays["place_BE"].shape, bool)))
  engines.likelihoods(engine, [([20, 30], [letter]) for letter in (40, 41, 42, 43)], "test")
  (arrays,) = batches
  assert (arrays["segment_BT"] > 0).sum() == 3  # BOS and two tokens, for four letters
  assert sorted(arrays["target_BE"][0].tolist())[-4:] == [40, 41, 42, 43]


def test_packed_rows_hold_every_input_once_and_waste_little():
  random = np.random.default_rng(0)
  inputs = sorted(((number,) * int(length) for number, length in enumerate(
      random.integers(1, 300, 1000))), key=len)
  batches = engines.pack(inputs, 8)
  assert sorted(ids for rows in batches for row in rows for ids in row) == sorted(inputs)
  widths = [engines.row_width(len(rows[0][0])) for rows in batches]
  assert all(sum(map(len, row)) <= width for rows, width in zip(batches, widths) for row in rows)
  held = sum(width * len(rows) for rows, width in zip(batches, widths))
  assert held < 1.08 * sum(map(len, inputs)) and len(set(widths)) <= 6


def test_a_request_that_is_too_long_loses_its_beginning_and_says_so(engine, capsys):
  long = list(range(20, 80))
  (found,) = engines.likelihoods(engine, [(long, [90, 91])], "name of the task")
  assert found.nats == pytest.approx(expected(engine, [(long, [90, 91])])[0][0], abs=2e-4)
  assert "name of the task: 1 of 1 are longer than 32 tokens" in capsys.readouterr().out
  with pytest.raises(run.Refused, match="has 40 tokens, expected 1 to 32"):
    engines.likelihoods(engine, [([], list(range(40)))], "test")
  with pytest.raises(run.Refused, match="has 0 tokens"):
    engines.likelihoods(engine, [([20], [])], "test")


def test_matrices_in_bfloat16_change_no_bit_of_a_bfloat16_forward_pass(place, tokenizer, requests):
  engine = load(place, tokenizer, dtype="bfloat16", data=1, fsdp=1, devices=jax.devices()[:1])
  assert engine.params["embedding_VD"].dtype == "bfloat16" and engine.params["norm_D"].dtype == "float32"
  assert engine.params["periods"]["full"]["norm_D"].dtype == "float32"
  params, _ = checkpoint.restore_params(place)
  whole = engine._replace(params=params)
  assert engines.likelihoods(engine, requests, "t") == engines.likelihoods(whole, requests, "t")


def test_an_answer_ends_at_an_end_and_no_special_token_is_ever_said(engine, tokenizer, monkeypatch):
  prompts = [[2, *tokenizer.encode(text)] for text in TEXTS]
  whole = engines.answers(engine, prompts, tokens=20, what="test")
  end = whole[0][0][len(whole[0][0]) // 2]
  cut = engines.answers(engine, prompts, tokens=20, what="test", ends=(end,))
  for (text, ended), (before, _) in zip(cut, whole):
    assert text == before.partition(end)[0]
    assert ended or end not in before
  given, generate = [], decode.generate_until
  monkeypatch.setattr(engines.decode, "generate_until", lambda *rest, **more: given.append(more) or generate(
      *rest, **more))
  engines.answers(engine, prompts, tokens=20, what="test")
  assert set(tokenizer.specials.values()) == {*given[0]["banned_ids"], *given[0]["stop_ids"]}


def test_a_prompt_that_is_too_long_keeps_its_first_token(engine, tokenizer, capsys):
  long = [2, *range(20, 60)]
  short = [2, *long[-22:]]
  assert engines.answers(engine, [long], tokens=9, what="test") == engines.answers(
      engine, [short], tokens=9, what="test")
  assert "1 of 1 are longer than 23 tokens" in capsys.readouterr().out
  with pytest.raises(run.Refused, match="leaves no room"):
    engines.answers(engine, [long], tokens=31, what="test")


def test_a_pair_is_cut_where_the_context_ends_and_its_spaces_go_on(tokenizer):
  for context, continuation in (("Montag,", " Dienstag"), ("Montag, ", "Dienstag"), ("", "Montag")):
    before, rest = engines.pair(tokenizer, context, continuation)
    assert before == tokenizer.encode(context.rstrip())
    assert tokenizer.decode([*before, *rest]) == context + continuation and rest
