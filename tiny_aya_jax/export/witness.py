"""One other runtime asked what a model of ours says: a script of its own, run by its path.

  PYTHON witness.py RUNTIME MODEL REQUEST.json ANSWER.npz    RUNTIME: transformers, llama_cpp or mlx
  PYTHON witness.py quantize IN.gguf OUT.gguf KIND           by llama.cpp: Q4_K_M, Q6_K, ...

PYTHON need have no more than NumPy and that runtime: this file imports nothing of the package, which
asks through runtimes.py. All arithmetic is on the CPU and in fp32 where the file's weights are.

  REQUEST  tokens [[id]], texts [str], greedy {prompts [[id]], steps}, score [[id]],
           vocabulary_only; each may be left out
  ANSWER   logits_<i> float32 [T, V]; ids_<i> int32, no BOS, special tokens' names being text;
           greedy_<i> int32 [steps], nothing stops it; nats_<i> float64, the sum of -log p(next)
           over a row; versions, JSON
"""

import json
import os
import sys
import threading
import time

import numpy as np


def main(runtime, model, request, answer):
  with open(request, encoding="utf-8") as file:
    asked = json.load(file)
  opened = dict(transformers=transformers, llama_cpp=llama_cpp, mlx=mlx)[runtime]
  encode, predict, versions = opened(model, asked)
  found = {}
  for i, text in enumerate(asked.get("texts", ())):
    found[f"ids_{i}"] = np.asarray(encode(text), np.int32)
  for i, ids in enumerate(asked.get("tokens", ())):
    found[f"logits_{i}"] = np.asarray(predict(ids, fresh=True), np.float32)
  greedy = asked.get("greedy", dict(prompts=(), steps=0))
  for i, ids in enumerate(greedy["prompts"]):
    found[f"greedy_{i}"] = continued(predict, ids, greedy["steps"])
  for i, ids in enumerate(asked.get("score", ())):
    found[f"nats_{i}"] = np.float64(nats(predict(ids[:-1], fresh=True), ids[1:]))
  np.savez(answer, versions=np.array(json.dumps(dict(numpy=np.__version__, **versions))), **found)


def continued(predict, ids, steps):
  """The likeliest token, `steps` times, through the runtime's own cache."""
  tokens, last = [], predict(ids, fresh=True)[-1]
  for _ in range(steps):
    tokens.append(int(np.argmax(last)))
    if len(tokens) < steps:
      last = predict(tokens[-1:], fresh=False)[-1]
  return np.asarray(tokens, np.int32)


def nats(logits, targets):
  """Sum of -log softmax(logits)[targets], in float64."""
  total = 0.0
  for row, target in zip(logits, targets, strict=True):  # of one row at a time: V is large
    row = row.astype(np.float64)
    total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
  return total


def threads(path):
  """All cores, but one for a model that is smaller than what starting threads costs."""
  files = [path] if os.path.isfile(path) else [os.path.join(path, name) for name in os.listdir(path)]
  if sum(map(os.path.getsize, files)) < 1 << 26:
    return 1
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# Each of the following is (model, request) -> (text -> ids, (ids, fresh) -> logits [T, V], versions).
# `fresh` forgets what was predicted before; without it the ids go on from there.


def transformers(folder, asked):
  import tokenizers
  import torch
  import transformers as package

  torch.set_num_threads(threads(folder))
  tokenizer, kept = None, {}
  if asked.get("texts"):
    tokenizer = package.AutoTokenizer.from_pretrained(folder)
  if not asked.get("vocabulary_only"):
    model, loading = package.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    wrong = {name: sorted(keys)[:3] for name, keys in loading.items() if keys}
    if wrong:
      sys.exit(f"{folder}: transformers {package.__version__} does not load all of it: {wrong}")
    model.eval()

  def encode(text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

  @torch.no_grad()
  def predict(ids, fresh):
    cache = None if fresh else kept["cache"]
    found = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    kept["cache"] = found.past_key_values
    return found.logits[0].numpy()

  return encode, predict, dict(
      transformers=package.__version__, torch=torch.__version__, tokenizers=tokenizers.__version__)


def mlx(folder, asked):
  import mlx.core as mx
  import mlx_lm
  from mlx.utils import tree_map
  from mlx_lm.models.cache import make_prompt_cache

  mx.set_default_device(mx.cpu)
  model, tokenizer = mlx_lm.load(folder, lazy=True)
  model.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
  kept = {}

  def encode(text):
    found = tokenizer._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return found["input_ids"]

  def predict(ids, fresh):
    if fresh:
      kept["cache"] = make_prompt_cache(model)
    return np.array(model(mx.array([ids]), cache=kept["cache"])[0].astype(mx.float32))

  return encode, predict, dict(mlx=mx.__version__, mlx_lm=mlx_lm.__version__)


def llama_cpp(path, asked):
  import ctypes

  import llama_cpp as package

  api = package.llama_cpp
  quiet(api)
  api.llama_backend_init()
  options = api.llama_model_default_params()
  options.n_gpu_layers, options.vocab_only = 0, bool(asked.get("vocabulary_only"))
  model = api.llama_model_load_from_file(os.fsencode(path), options)
  if not model:
    sys.exit(f"{path}: llama.cpp does not load it: {said()}")
  vocabulary = api.llama_model_get_vocab(model)
  V, kept = api.llama_vocab_n_tokens(vocabulary), {}

  def encode(text):
    text = text.encode()
    room = len(text) + 8
    ids = (api.llama_token * room)()
    count = api.llama_tokenize(vocabulary, text, len(text), ids, room, False, False)
    return ids[:count]

  def predict(ids, fresh):
    if "context" not in kept:
      kept["context"] = opened(api, model, longest(asked), threads(path))
    context = kept["context"]
    if fresh:
      api.llama_memory_clear(api.llama_get_memory(context), True)
      kept["next"] = 0
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, id in enumerate(ids):
      batch.token[at], batch.pos[at], batch.logits[at] = id, kept["next"] + at, 1
      batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
    status = api.llama_decode(context, batch)
    api.llama_batch_free(batch)
    if status:
      sys.exit(f"{path}: llama_decode of {len(ids)} tokens is {status}: {said()}")
    kept["next"] += len(ids)
    flat = ctypes.cast(api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(flat, (len(ids), V)).copy()

  return encode, predict, dict(llama_cpp=package.__version__)


def longest(asked):
  """Tokens that the longest row needs room for."""
  greedy = asked.get("greedy", dict(prompts=(), steps=0))
  return max([len(ids) for ids in [*asked.get("tokens", ()), *asked.get("score", ())]]
             + [len(ids) + greedy["steps"] for ids in greedy["prompts"]])


def opened(api, model, tokens, threads):
  """A context in which nothing is rounded: keys and values in fp32, no flash attention."""
  options = api.llama_context_default_params()
  options.n_ctx = options.n_batch = options.n_ubatch = tokens + 1
  options.n_seq_max, options.type_k, options.type_v = 1, api.GGML_TYPE_F32, api.GGML_TYPE_F32
  options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
  options.offload_kqv = options.op_offload = False
  options.n_threads = options.n_threads_batch = threads
  context = api.llama_init_from_model(model, options)
  if not context:
    sys.exit(f"llama.cpp makes no context of {tokens} tokens: {said()}")
  return context


LINES = []  # what llama.cpp said


def end_with_parent():
  """A child of a killed export must not compute on for hours (run.end_with, which this file cannot import)."""
  parent = os.getppid()

  def watch():
    while os.getppid() == parent:
      time.sleep(0.5)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def quiet(api):
  """Keeps llama.cpp's log instead of printing it."""
  def keep(level, text, _):
    if level >= 3:  # warnings and errors
      LINES.append(text.decode(errors="replace").strip())

  quiet.callback = api.llama_log_callback(keep)  # C holds no reference
  api.llama_log_set(quiet.callback, None)


def said():
  return " ".join("; ".join(line for line in LINES[-3:] if line).split()) or "it says nothing"


def quantize(source, target, kind):
  import llama_cpp as package

  api = package.llama_cpp
  quiet(api)
  options = api.llama_model_quantize_default_params()
  options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
  status = api.llama_model_quantize(os.fsencode(source), os.fsencode(target), options)
  if status:
    sys.exit(f"{source}: llama.cpp cannot make {kind} of it: {said()}")


if __name__ == "__main__":
  end_with_parent()
  if sys.argv[1] == "quantize":
    quantize(*sys.argv[2:])
  else:
    main(*sys.argv[1:])
