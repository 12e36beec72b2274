"""llama.cpp itself on our GGUF files: logits, greedy answers, token ids, quantised weights.

$LLAMA_PYTHON names a Python with llama-cpp-python 0.3.36, which takes some minutes to build; without
it nothing here runs. What the files say is test_gguf.py's.
"""

import json
import os
import re
import subprocess
import types
import unicodedata

import numpy as np
import pytest

from conftest import random_params
from test_gguf import config, exported
from test_tokenizer import NASTY
from tiny_aya_jax import languages
from tiny_aya_jax.data import tokenizer as tokenizers, toy, vocab
from tiny_aya_jax.export import gguf, runtimes, vocabulary as vocabularies

PYTHON = os.environ.get("LLAMA_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LLAMA_PYTHON: a Python with llama_cpp; check.sh full")
V, T = 620, 83  # tokens beyond two windows, in each model
MODELS = [  # heads make up the width, or llama.cpp cannot hold it; widths odd to blocks of 32
  dict(D=48, N=6, K=2, H=8, F=72, L=1, window=7),
  dict(D=40, N=5, K=5, H=8, F=33, L=2, window=33, logit_scale=0.0625),
  dict(D=60, N=3, K=1, H=20, F=101, L=1, window=4, rope_theta=10000.0, norm_epsilon=1e-3),
  dict(D=64, N=16, K=4, H=4, F=96, L=3, window=16, logit_scale=1.0),
]
CUT = dict(Q8_0=0.05, Q4_0=0.05, Q4_K_M=0.05, Q6_K=0.05)  # nats a token between llama.cpp and us


def ours(params, cfg, ids):
  """Logits [T, V] of our own forward pass, fp32."""
  from tiny_aya_jax.model.transformer import TinyAya, logits

  token_BT = np.array([ids], np.int32)
  rows = (token_BT, np.ones_like(token_BT), np.arange(len(ids), dtype=np.int32)[None])
  return np.asarray(logits(params, TinyAya(cfg).apply({"params": params}, *rows), cfg))[0]


@pytest.fixture(scope="module")
def texts():
  return [text for language in languages.LANGUAGES for text in toy.documents(language.code, "validation")]


@pytest.fixture(scope="module")
def lines(texts):
  return [vocab.shape(line) for text in texts for line in vocab.lines(text)]


@pytest.fixture(scope="module")
def tokenizer(lines, tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  path.write_bytes(vocab.train(lines[:300], 600, 0.999))
  return tokenizers.load(path)


@pytest.fixture(scope="module", params=MODELS, ids=lambda sizes: f"D={sizes['D']}")
def model(request, tokenizer, tmp_path_factory):
  """A random model, its folder, and a row of its tokens."""
  return random_model(request.param, tokenizer, tmp_path_factory.mktemp("model"))


def random_model(sizes, tokenizer, where):
  cfg = config(**sizes)
  params = random_params(cfg, seed=2)
  ids = np.random.default_rng(0).integers(0, V, T).tolist()
  return types.SimpleNamespace(
    cfg=cfg, params=params, ids=ids, folder=exported(where, params, cfg, tokenizer), where=where)


def asked(model, kind, **request):
  """What llama.cpp says, and the weights it has, as we decode them."""
  path = model.where / f"{kind}.gguf"
  if kind in gguf.KINDS:
    gguf.write(path, model.folder, kind)
  else:
    gguf.write(model.where / "F32.gguf", model.folder, "F32")
    runtimes.quantize(PYTHON, model.where / "F32.gguf", path, kind)
  return runtimes.ask("llama_cpp", PYTHON, path, request), gguf.read(path)[0]


def test_logits_are_ours(model):
  # The most seen is 2.3e-6 of the largest logit (2.1e-5 of 9.0): sums in another order.
  found, _ = asked(model, "F32", tokens=[model.ids, model.ids[:3]])
  expected = ours(model.params, model.cfg, model.ids)
  largest = np.abs(expected).max()
  assert np.abs(found["logits_0"] - expected).max() < 2e-5 * largest
  assert np.abs(found["logits_1"] - expected[:3]).max() < 2e-5 * largest
  assert found["versions"]["llama_cpp"] == "0.3.36"


@pytest.mark.parametrize("kind, most", [("F16", 5e-3), ("BF16", 4e-2)])
def test_logits_of_half_precision_are_ours_as_far_as_llama_cpp_computes_in_it(kind, most, model):
  # It rounds what is multiplied with such weights to their type as well: 3.7e-3 and 2.4e-2 were seen.
  found, params = asked(model, kind, tokens=[model.ids])
  expected = ours(params, model.cfg, model.ids)
  assert np.abs(found["logits_0"] - expected).max() < most * np.abs(expected).max()


def test_greedy_answers_are_ours_but_for_near_ties(model):
  found, _ = asked(model, "F32", greedy=dict(prompts=[model.ids[:9]], steps=64))
  tokens = found["greedy_0"].tolist()
  logits = ours(model.params, model.cfg, [*model.ids[:9], *tokens])[8:-1]
  assert len(tokens) == 64
  assert (logits.max(-1) - logits[np.arange(64), tokens]).max() < 1e-3


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K"])
@pytest.mark.parametrize("width", [64, 256])
def test_quantised_weights_predict_what_they_predict_here(width, kind, tokenizer, tmp_path):
  sizes = dict(D=width, N=4, K=2, H=width // 4, F=width, L=1, window=9)
  model = random_model(sizes, tokenizer, tmp_path)
  found, params = asked(model, kind, tokens=[model.ids[:-1]], score=[model.ids])
  stored = gguf.facts(tmp_path / f"{kind}.gguf")
  assert stored["kind"] == kind
  if "K" in kind:  # rows that are no multiple of 256: llama.cpp takes another type by itself
    assert any(name.endswith("_K") for name in stored["types"]) == (width == 256)
  assert np.isfinite(found["logits_0"]).all()
  logits = ours(params, model.cfg, model.ids[:-1]).astype(np.float64)
  log_p = logits - logits.max(-1, keepdims=True)
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  nats = -log_p[np.arange(T - 1), model.ids[1:]].sum()
  assert abs(float(found["nats_0"]) - nats) / (T - 1) < CUT[kind]


def ids_of(where, folder, texts):
  gguf.write(where / "vocabulary.gguf", folder, "BF16")
  found = runtimes.ask("llama_cpp", PYTHON, where / "vocabulary.gguf", dict(texts=texts, vocabulary_only=True))
  return [found[f"ids_{i}"].tolist() for i in range(len(texts))]


def test_ids_of_our_vocabulary_are_ours_in_all_languages(texts, lines, tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(vocab.train(lines, 3000, 0.999))
  tokenizer = tokenizers.load(tmp_path / "tokenizer.model")
  cfg = config(V=3000)
  folder = exported(tmp_path, random_params(cfg, seed=2), cfg, tokenizer)
  tried = [*texts, *NASTY.values()]
  assert ids_of(tmp_path, folder, tried) == tokenizer.encode_many(tried)


BESIDE = re.compile(r"(?<=[^\W\d_])\d|\d(?=[^\W\d_])")  # digits that touch letters


@pytest.mark.parametrize("pre", ["tiny_aya", "granite-embed-multi-97m", "command-r", "gpt-2"])
def test_ids_of_byte_level_vocabularies_are_ours_but_where_it_is_said(pre, texts, tokenizer, tmp_path):
  cfg = config(V=4000)
  folder = exported(tmp_path, random_params(cfg, seed=2), cfg, tokenizer)
  byte_level(pre, texts, folder / "tokenizer.json")
  theirs = tokenizers.load(folder / "tokenizer.json")
  assert vocabularies.read(folder / "tokenizer.json", cfg.V).pre == pre
  numbers = " 1 12 123 1234 12345 1234567 1,234,567 3.14159265 -7 १२३४५ ١٢٣٤٥ "
  tried = [*texts, *NASTY.values(), numbers]
  differ = {"tiny_aya": BESIDE.search, "command-r": lambda text: not unicodedata.is_normalized("NFC", text)}
  odd = differ.get(pre, lambda text: False)
  same = [text for text in tried if not odd(text)]
  assert len(same) > 0.9 * len(tried)
  assert ids_of(tmp_path, folder, same) == theirs.encode_many(same)
  if pre in differ:  # if not, llama.cpp was mended, and vocabulary.py says too much
    text = "abc 2017年 1234567abc" if pre == "tiny_aya" else "e\u0301"
    assert ids_of(tmp_path, folder, [text])[0] != theirs.encode(text)


def byte_level(pre, texts, path):
  """Trains a byte-level tokenizer.json of 3,500 tokens with the pre-tokenizer of a name."""
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers as steps, trainers

  split = lambda pattern: steps.Split(Regex(pattern), "isolated")
  whole = steps.ByteLevel(add_prefix_space=False, use_regex=False)
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = steps.Sequence({
    "tiny_aya": [split(vocabularies.DIGITS), split(vocabularies.O200K), whole],
    "granite-embed-multi-97m": [split(vocabularies.O200K), whole],
    "command-r": [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)],
    "gpt-2": [steps.ByteLevel(add_prefix_space=False)],
  }[pre])  # fmt: skip
  if pre == "command-r":
    made.normalizer = normalizers.NFC()
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(texts, trainers.BpeTrainer(
    vocab_size=3500, special_tokens=list(tokenizers.SPECIALS), initial_alphabet=steps.ByteLevel.alphabet(),
    show_progress=False))
  made.save(str(path))


def test_special_tokens_stop_an_answer_and_come_first(tokenizer, tmp_path):
  """By llama-cpp-python's own interface, as users have it: BOS is put in front, ends are known."""
  model = random_model(MODELS[0], tokenizer, tmp_path)
  gguf.write(tmp_path / "model.gguf", model.folder, "F32")
  script = ("import json, sys, llama_cpp as l; m = l.Llama(sys.argv[1], verbose=False, vocab_only=True);"
            "v = l.llama_model_get_vocab(m.model);"
            "print(json.dumps([m.tokenize(b'<EOS_TOKEN>', special=True),"
            " [i for i in range(m.n_vocab()) if l.llama_vocab_is_eog(v, i)], 'chat' if m.metadata.get("
            "'tokenizer.chat_template') else '']))")
  said = subprocess.run(
      [PYTHON, "-c", script, tmp_path / "model.gguf"], capture_output=True, text=True, check=True)
  ids, ends, chat = json.loads(said.stdout)
  assert ids == [2, 3] and chat == "chat"
  assert set(ends) == {0, 3, 6, 11}  # "<PAD>" by its name
