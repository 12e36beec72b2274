"""What other runtimes make of an exported folder, each asked in a child process of its own Python.

TRANSFORMERS4_PYTHON, TRANSFORMERS5_PYTHON and MLX_PYTHON name the interpreters; without them nothing
runs here. launch/check.sh full makes the three environments.
"""

import json
import os
import subprocess

import ml_collections
import numpy as np
import pytest

from conftest import packed, random_params
from tiny_aya_jax import languages
from tiny_aya_jax.data import chat, toy, tokenizer as tokenizers

PEERS = ("TRANSFORMERS4_PYTHON", "TRANSFORMERS5_PYTHON", "MLX_PYTHON")
STEPS = 64
# MLX-LM wants N H = D and one window for all; T is more than three windows.
SIZES = dict(D=32, N=4, K=2, H=8, F=28, V=600, L=2, window=16, rope_theta=50000.0, logit_scale=0.7,
             norm_epsilon=1e-5)
T = 57
ODD = ["", " ", "   a", "a   ", "a  b   c", "\ta\n\nb", "a\r\nb\rc", "a\0b", "0123456789 ٣٤٥ १२३", "👩‍👩‍👧‍👦👍🏽",
       "e\u0301 क्षि กำ่ \u0301", "a\u2581b \u2581", "\ufeffa\u200b\u00a0b", "<0x41>", "don't , . 's", "a" * 99]
SPECIAL = ["<BOS_TOKEN>", "a <|END_OF_TURN_TOKEN|> b<EOS_TOKEN>", "<PAD> <UNK>", "<|END_OF_TURN_TOKEN| >"]
CONVERSATIONS = [
    [dict(role="user", content="Guten Tag")],
    [dict(role="system", content="  kurz\n"), dict(role="user", content=""),
     dict(role="assistant", content="नमस्ते 😀"), dict(role="user", content=" 12 \r\n")],
]

# Both children: python -c CHILD folder request answer -> writes answer.json and answer.npy.
BEGIN = """
import json, sys
import numpy as np
folder, request, answer = sys.argv[1:]
asked = json.load(open(request))
def told(tokenizer, load):
  tokenizer.save_pretrained(answer + "_saved")
  again = load(answer + "_saved")
  ids = lambda found: list(found["input_ids"]) if hasattr(found, "keys") else list(found)
  split = dict(split_special_tokens=True)
  return dict(
      plain=[ids(tokenizer(text)) for text in asked["plain"]],
      split=[ids(tokenizer(text, **split)) for text in asked["texts"]],
      again=[ids(again(text, **split)) for text in asked["texts"]],
      decoded=[tokenizer.decode(row) for row in asked["ids"]],
      conversations=[ids(tokenizer.apply_chat_template(one, tokenize=True, add_generation_prompt=True))
                     for one in asked["conversations"]])
def write(found, logits_BTV):
  np.save(answer + ".npy", logits_BTV)
  json.dump(found, open(answer + ".json", "w"))
"""
TRANSFORMERS = BEGIN + """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder)
model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
found = told(tokenizer, AutoTokenizer.from_pretrained)
found.update(stops=model.generation_config.eos_token_id, unlike=[str(one) for one in loading.values() if one])
def greedy(**inputs):
  start = inputs["input_ids"].shape[1]
  return model.generate(**inputs, do_sample=False, min_new_tokens=asked["steps"],
                        max_new_tokens=asked["steps"])[0, start:].tolist()
found["greedy"] = [greedy(input_ids=torch.tensor([row])) for row in asked["prompts"]]
try:
  greedy(**tokenizer("abc", return_tensors="pt"))
  found["refused"] = ""
except ValueError as error:
  found["refused"] = str(error)
with torch.no_grad():
  write(found, model(torch.tensor(asked["token_BT"])).logits.numpy())
"""
MLX = BEGIN + """
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
model, tokenizer = load(folder)
model.set_dtype(mx.float32)
from transformers import AutoTokenizer
found = told(tokenizer._tokenizer, AutoTokenizer.from_pretrained)
found.update(stops=sorted(tokenizer.eos_token_ids), unlike=[], refused="")
stop_V = mx.array(np.isin(np.arange(model.args.vocab_size), found["stops"]))
def never(tokens, logits):
  return mx.where(stop_V, -1e9, logits)
found["greedy"] = [[int(token) for token, _ in generate_step(
    mx.array(row), model, max_tokens=asked["steps"], prefill_step_size=16, logits_processors=[never])]
    for row in asked["prompts"]]
token_BT, cache = mx.array(asked["token_BT"]), make_prompt_cache(model)
parts = [np.array(model(token_BT[:, at:at + 10], cache=cache)) for at in range(0, token_BT.shape[1], 10)]
whole = np.array(model(token_BT))
assert np.abs(np.concatenate(parts, 1) - whole).max() < 1e-4  # its rotating cache
write(found, whole)
"""


class Exported:
  """A folder of random parameters over a trained vocabulary, and our own answers about it."""

  def __init__(self, folder, tokenizer):
    from tiny_aya_jax.export import huggingface

    self.folder, self.tokenizer = folder, tokenizer
    self.cfg = ml_collections.ConfigDict(SIZES)
    self.params = random_params(self.cfg, seed=7)
    huggingface.write(folder, self.params, self.cfg, tokenizer)
    self.plain = [next(toy.documents(one.code, "validation")) for one in languages.LANGUAGES] + ODD
    self.texts = self.plain + SPECIAL
    self.ids = tokenizer.encode_many(self.texts)
    self.token_BT = np.random.default_rng(0).integers(0, self.cfg.V, (2, T))
    self.prompts = [row.tolist() for row in self.token_BT[:, :40]] + [
        chat.prompt(tokenizer, CONVERSATIONS[1])]

  def request(self):
    return dict(plain=self.plain, texts=self.texts, ids=self.ids, token_BT=self.token_BT.tolist(),
                prompts=self.prompts, conversations=CONVERSATIONS, steps=STEPS)

  def logits(self, token_BT):
    from tiny_aya_jax.model import transformer

    token_BT = np.asarray(token_BT)
    rows = packed([(token_BT.shape[1],)] * len(token_BT), token_BT.shape[1])
    hidden_BTD = transformer.TinyAya(self.cfg).apply({"params": self.params}, token_BT, *rows)
    return np.array(transformer.logits(self.params, hidden_BTD, self.cfg))


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
  tokenizer = tokenizers.load(data / "tokenizer.model")
  return Exported(tmp_path_factory.mktemp("peers") / "model", tokenizer)


@pytest.fixture(scope="module", params=PEERS)
def peer(request, tmp_path_factory):
  """(its answers, its logits_BTV); `exported` is asked for only where there is a peer."""
  python = os.environ.get(request.param)
  if not python:
    pytest.skip(f"{request.param} names no Python")
  exported = request.getfixturevalue("exported")
  answer = tmp_path_factory.mktemp("answer") / "answer"
  asked = answer.with_name("request.json")
  asked.write_text(json.dumps(exported.request()))
  child = MLX if request.param == "MLX_PYTHON" else TRANSFORMERS
  done = subprocess.run([python, "-c", child, exported.folder, asked, answer], capture_output=True,
                        text=True, cwd=answer.parent)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(answer.with_suffix(".json").read_text()), np.load(answer.with_suffix(".npy"))


def begun(exported, count=None):
  bos = exported.tokenizer.special("<BOS_TOKEN>")
  return [[bos, *row] for row in exported.ids[:count]]


def test_ids_are_equal_in_every_language_behind_one_bos(peer, exported):
  assert peer[0]["plain"] == begun(exported, len(exported.plain))


def test_ids_of_text_that_spells_specials_are_equal_when_asked_for(peer, exported):
  assert peer[0]["split"] == begun(exported)


def test_ids_are_equal_after_the_tokenizer_was_saved_and_loaded(peer, exported):
  assert peer[0]["again"] == begun(exported)


def test_decoding_gives_the_text_that_we_decode(peer, exported):
  assert peer[0]["decoded"] == [exported.tokenizer.decode(row) for row in exported.ids]


def test_a_conversation_is_our_prompt(peer, exported):
  assert peer[0]["conversations"] == [chat.prompt(exported.tokenizer, one) for one in CONVERSATIONS]


def test_logits_are_equal_beyond_three_windows(peer, exported):
  ours_BTV = exported.logits(exported.token_BT)
  difference = np.abs(peer[1] - ours_BTV).max()
  print(f"logits up to {np.abs(ours_BTV).max():.1f} differ by {difference:.1e} at most")
  assert T > 3 * exported.cfg.window and peer[0]["unlike"] == []
  assert difference < 1e-4 < np.abs(ours_BTV).max()


def test_every_greedy_token_is_our_best_that_does_not_stop(peer, exported):
  """Of two logits within 1e-4, either may be taken."""
  for prompt, spoken in zip(exported.prompts, peer[0]["greedy"], strict=True):
    logits_TV = exported.logits([prompt + spoken])[0, len(prompt) - 1 : -1]
    logits_TV[:, list(chat.stop_ids(exported.tokenizer))] = -np.inf
    taken_T = logits_TV[np.arange(STEPS), spoken]
    assert len(spoken) == STEPS and np.all(logits_TV.max(1) - taken_T < 1e-4)


def test_it_stops_at_our_stop_ids(peer, exported):
  assert sorted(peer[0]["stops"]) == sorted(chat.stop_ids(exported.tokenizer))


def test_what_its_tokenizer_returns_goes_into_its_model(peer):
  assert peer[0]["refused"] == ""
