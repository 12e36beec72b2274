"""The proof an export ends with: what was written is what was trained, whoever reads it.

1. Every tensor in the files is the checkpoint's, rounded to the folder's dtype, bit for bit.
2. Our own forward pass, reader.py's from the files alone, and that of every runtime that is there
   (runtimes.py) give the same logits and the same likeliest tokens on the same rows. llama.cpp's is
   compared with ours of the very weights in its file, which lie within their kind's rounding.
3. The tokenizer that was written, and each runtime's, gives the ids of the one trained with, on
   texts of all languages; the chat template the turns of chat.py.
What fails is Refused, and the folder never appears. Memory: a layer, or rows of the embedding.
"""

import itertools
import pathlib

import numpy as np

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import chat, template, tokenizer as tokenizers, toy
from tiny_aya_jax.export import cohere2, gguf, huggingface, reader, runtimes, tensors as files

TOLERANCE = 1e-4  # of logits in fp32, times the largest of them if that is above 1
TEXTS_A_LANGUAGE = 3
PROMPTS = ("eng_Latn", "hin_Deva", "arb_Arab")  # languages of the texts that are continued
# What tokenizers have been caught at: runs of spaces, line ends, digits, marks, joiners, the odd byte.
AWKWARD = ("", " ", "  a   b", "a\r\nb\tc\n\n", "1234567 and 12,345.678", "e\u0301 \u00e9 \u1e9b\u0323",
           "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u0967\u0968\u0969 \u06f1\u06f2", "\u00a0x\u3000y\u2009z",
           "\u0e01\u0e33\u0e25\u0e31\u0e07 \u1780\u1798\u17d2\u1796\u17bb\u1787\u17b6", "\ufeffx\u0000y", "don't I'LL")


def prove(folder, leaves, cfg, dtype, tokenizer, asked):
  """Compares a written folder with `leaves`, (path in our tree, leaf) one after the other.

  asked: config.proof. Returns what parity.json holds; refuses what differs.
  """
  cfg_back, _ = huggingface.describe(folder)
  if cfg_back.to_dict() != cfg.to_dict():
    raise run.Refused(f"{folder}: config.json reads back as {cfg_back.to_dict()}, not {cfg.to_dict()}")
  _same_bits(folder, leaves, cfg, dtype)
  written = tokenizers.load(pathlib.Path(folder) / "tokenizer.json")
  texts = sample()
  found = dict(tensors=len(cohere2.tensor_names(cfg)), dtype=dtype,
               tokenizer=_same_tokenizer(folder, tokenizer, written, texts))
  rows, prompts = probes(cfg, written, asked)
  steps = asked.greedy
  continued = reader.greedy(folder, prompts, steps)
  rows = rows + [prompt + ids for prompt, ids in zip(prompts, continued)]
  expected = ours(folder, cfg, rows)
  tails = [0] * (len(rows) - len(prompts)) + [steps] * len(prompts)
  readers = dict(numpy=dict(version=dict(numpy=np.__version__)) | _same_logits(
      "the NumPy reader", reader.forward(folder, rows), expected, tails))
  request = dict(tokens=rows, texts=texts)
  size = cohere2.size(cfg, "float32")
  for name in ("transformers", "mlx"):
    readers[name] = _witness(name, folder, asked, size, request, expected, tails, tokenizer)
  figures = [one["largest_logit_difference"] for one in readers.values() if isinstance(one, dict)]
  return found | dict(
      rows=[len(row) for row in rows], window=cfg.window, greedy_tokens=steps * len(prompts),
      largest_logit_difference=max(figures), readers=readers)


# Of a GGUF kind: how far a tensor may be from what it was made of (root mean square, of its own), and llama.cpp's
# logits from ours of the same weights (of the largest). Beside weights of 16 bits or fewer llama.cpp rounds
# what they are multiplied with too: measured up to 0.004 (F16) and 0.024 (BF16) on random models.
ROUNDING = dict(F32=0.0, F16=1e-3, BF16=4e-3, Q8_0=0.02, Q6_K=0.05, Q5_K=0.1, Q4_K=0.2, Q4_0=0.2, Q3_K=0.4, Q2_K=0.6)
AGREEMENT = dict(F32=1e-3, F16=0.05)
LOOSE = 0.2  # AGREEMENT of other kinds: measured up to 0.046 of random models


def prove_gguf(folder, paths, cfg, tokenizer, asked, python, differs):
  """Compares GGUF files, {kind: path}, with the folder they were made of: {kind: figures} for parity.json.

  python: of llama.cpp, or None. differs: in which texts its tokenizer is known to give other ids, '' for
  none: then they are counted.
  """
  found = {kind: dict(rounding=_rounding(folder, kind, path, cfg)) for kind, path in paths.items()}
  if python is None:
    return {kind: one | dict(llama_cpp="not installed") for kind, one in found.items()}
  texts = [text for text in sample() if "\0" not in text]  # llama.cpp's interface ends a text there
  rows, prompts = probes(cfg, tokenizer, asked)
  rows += prompts
  unquantised = ours(folder, cfg, rows)
  return {kind: one | dict(llama_cpp=_in_llama_cpp(
      kind, paths[kind], cfg, tokenizer, python, differs, texts, rows, unquantised)) for kind, one in found.items()}


def _in_llama_cpp(kind, path, cfg, tokenizer, python, differs, texts, rows, unquantised):
  """Figures of one file; refuses other ids, and other logits than ours of the very weights in it."""
  answer = runtimes.ask("llama_cpp", python, path, dict(tokens=rows, texts=texts))
  ids = [answer[f"ids_{at}"].tolist() for at in range(len(texts))]
  if not differs:
    _same_ids(f"llama.cpp on {path.name}", ids, tokenizer, texts)
  other = sum(theirs != mine for theirs, mine in zip(ids, tokenizer.encode_many(texts)))
  expected = forward(cfg, rows, gguf.leaf_reader(path, cfg))
  logits = [answer[f"logits_{at}"] for at in range(len(rows))]
  most = max(float(np.abs(one).max()) for one in expected)
  largest = max(float(np.abs(theirs - mine).max()) for theirs, mine in zip(logits, expected))
  if not largest <= AGREEMENT.get(kind, LOOSE) * max(1.0, most):
    raise run.Refused(f"llama.cpp computes other logits from {path.name} than we do: they differ by {largest:.1e}, of "
                      f"logits up to {most:.1f}")
  nats = np.mean(np.concatenate([_divergence(mine, theirs) for theirs, mine in zip(logits, unquantised)]))
  return dict(version=answer["versions"], largest_logit_difference=largest, largest_logit=most,
              divergence_from_folder_nats=float(nats), texts=len(texts), texts_of_other_ids=other)


def _rounding(folder, kind, path, cfg):
  """The largest root mean square of what a tensor lost, of the tensor's own; refuses more than its kind loses."""
  held, _ = huggingface.open_folder(folder)
  allowed = ROUNDING[kind[:4] if kind.startswith("Q") and "K" in kind else kind]
  worst = 0.0
  for name, value in gguf.decoded(path, cfg):
    one, lost, own = held[name].mapped(), 0.0, 0.0
    for first in range(0, len(value), 4096):
      part = one[first : first + 4096].astype(np.float32)
      lost += float(np.square(value[first : first + 4096] - part, dtype=np.float64).sum())
      own += float(np.square(part, dtype=np.float64).sum())
    apart = (lost / own) ** 0.5 if own else float(lost > 0)
    if not apart <= allowed:
      raise run.Refused(f"{path.name}: {name} is {apart:.2g} of itself away from the folder's, {kind} allows {allowed}")
    worst = max(worst, apart)
  return worst


def _divergence(mine, theirs):
  """KL of each position, nats."""
  mine, theirs = (one - np.log(np.exp(one - one.max(-1, keepdims=True)).sum(-1, keepdims=True))
                  - one.max(-1, keepdims=True) for one in (mine.astype(np.float64), theirs.astype(np.float64)))
  return (np.exp(mine) * (mine - theirs)).sum(-1)


def sample():
  """Texts of every language, and those that tokenizers have been caught at."""
  texts = [text for language in languages.LANGUAGES
           for text in itertools.islice(toy.documents(language.code, "validation"), TEXTS_A_LANGUAGE)]
  return [text for text in texts if isinstance(text, str)] + list(AWKWARD)


def probes(cfg, tokenizer, asked):
  """(rows of token ids: random ones, beyond two windows if that is not too long; prompts to go on from)."""
  random = np.random.default_rng(0)
  lengths = (min(2 * cfg.window + 3, asked.tokens), 17)
  rows = [random.integers(0, cfg.V, length).tolist() for length in lengths]
  bos = tokenizer.specials.get("<BOS_TOKEN>")
  prompts = [([] if bos is None else [bos]) + tokenizer.encode(next(toy.documents(code, "validation")))[:12]
             for code in PROMPTS]
  return rows, prompts


def _same_bits(folder, leaves, cfg, dtype):
  held, _ = huggingface.open_folder(folder)
  expected = files.DTYPES[dtype]
  for name, value in huggingface.named(leaves, cfg):
    one = held[name].mapped()
    first = 0
    for part in files.rounded(value, dtype):
      stored = one[first : first + len(part)]
      if stored.dtype != expected or part.tobytes() != stored.tobytes():
        raise run.Refused(f"{folder}: {name} differs from the checkpoint after reading back")
      first += len(part)
    del value


def ours(folder, cfg, rows):
  """Logits of our own forward pass of a folder, fp32 [T, V] a row."""
  held, _ = huggingface.open_folder(folder)
  where = {place: name for name, place in cohere2.tensor_names(cfg).items()}

  def leaf(path, period=None):
    shape = cohere2.leaf_shapes(cfg)[path][period is not None:]
    return cohere2.ours(held[where[path, period]].mapped(), shape, path[-1])

  return forward(cfg, rows, leaf)


def forward(cfg, rows, leaf):
  """Logits of our own blocks, fp32 [T, V] a row; a layer's weights in memory at a time.

  leaf: (path in our tree, period or None) -> its array. The blocks are the model's (transformer.Block), the loop
  over them is here: whole, 3.35B parameters would be 13 GB. Matmuls in full fp32, on any device.
  """
  import jax
  import jax.numpy as jnp

  from tiny_aya_jax.model import transformer

  B, T = len(rows), max(map(len, rows))
  token_BT = np.zeros((B, T), np.int32)
  for b, row in enumerate(rows):
    token_BT[b, : len(row)] = row
  position_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  segment_BT = (position_BT < np.array([[len(row)] for row in rows])).astype(np.int32)

  @jax.jit
  def sliding(weights, x_BTD):
    return block(weights, x_BTD, cfg.window)

  @jax.jit
  def full(weights, x_BTD):
    return block(weights, x_BTD, None)

  def block(weights, x_BTD, window):
    layer = transformer.Block(cfg, jnp.float32, "reference", window, "dtype")
    return layer.apply({"params": weights}, x_BTD, segment_BT, position_BT)

  with jax.default_matmul_precision("highest"):  # else bfloat16 passes on TPUs, TF32 on GPUs
    embedding_VD = leaf(("embedding_VD",))
    x_BTD = jnp.asarray(embedding_VD[token_BT].astype(np.float32))
    for period in range(cfg.L):
      for name in cohere2.BLOCKS:
        weights = {key: np.ascontiguousarray(leaf(("periods", name, key), period), np.float32)
                   for key in cohere2.LAYER}
        x_BTD = (full if name == "full" else sliding)(weights, x_BTD)
    hidden_BTD = transformer.layer_norm(x_BTD, np.float32(leaf(("norm_D",))), cfg)
    parts = [transformer.logits(dict(embedding_VD=jnp.asarray(part.astype(np.float32))), hidden_BTD, cfg)
             for part in np.array_split(embedding_VD, max(cfg.V // reader.HEAD_ROWS, 1))]
  logits_BTV = np.concatenate(parts, -1)
  return [logits_BTV[b, : len(row)] for b, row in enumerate(rows)]


def _same_logits(who, found, expected, tails):
  """Figures of one reader; refuses logits beyond TOLERANCE, and other likeliest tokens but at a tie."""
  most = max(float(np.abs(one).max()) for one in expected)
  allowed, largest, ties = TOLERANCE * max(1.0, most), 0.0, 0
  for theirs, mine, tail in zip(found, expected, tails):
    apart = float(np.abs(theirs - mine).max()) if theirs.shape == mine.shape else np.inf
    if not apart <= allowed:
      raise run.Refused(f"{who} computes other logits than we do: they differ by {apart:.1e}, at most "
                        f"{allowed:.1e} was expected")
    largest = max(largest, apart)
    chosen, top = theirs.argmax(-1)[-tail - 1 : -1], mine[-tail - 1 : -1]
    ties += int((chosen != top.argmax(-1)).sum()) if tail else 0
  return dict(largest_logit_difference=largest, largest_logit=most, near_ties=ties)


def _same_tokenizer(folder, tokenizer, written, texts):
  """Of the tokenizer.json that was written, and the template beside it."""
  if difference := tokenizer.difference(written):
    raise run.Refused(f"{folder}: tokenizer.json is another tokenizer than the checkpoint's: {difference}")
  _same_ids(f"{folder}: tokenizer.json", written.encode_many(texts), tokenizer, texts)
  found = dict(texts=len(texts), languages=len(languages.LANGUAGES))
  made = template.load(folder, written)
  if made and (pathlib.Path(folder) / "chat_template.jinja").read_text(encoding="utf-8") == chat.TEMPLATE:
    for messages in CONVERSATIONS:
      if made.prompt(messages) != chat.prompt(tokenizer, messages):
        raise run.Refused(f"{folder}: the chat template gives other ids than training had, of {messages}")
    found["conversations"] = len(CONVERSATIONS)
  return found


CONVERSATIONS = (
    [dict(role="user", content=" Two spaces  and\n\na line ")],
    [dict(role="system", content="S"), dict(role="user", content="1"), dict(role="assistant", content=" 2"),
     dict(role="user", content="<|END_OF_TURN_TOKEN|> \u0928\u092e\u0938\u094d\u0924\u0947")],
)


def _same_ids(who, found, tokenizer, texts):
  for text, theirs, mine in zip(texts, found, tokenizer.encode_many(texts)):
    if list(theirs) != list(mine):
      at = next((at for at, pair in enumerate(itertools.zip_longest(theirs, mine)) if pair[0] != pair[1]))
      raise run.Refused(f"{who} gives other ids than training had, from token {at} of {text[:60]!r}: "
                        f"{list(theirs)[at : at + 3]}, expected {list(mine)[at : at + 3]}")


def _witness(name, folder, asked, size, request, expected, tails, tokenizer):
  """What another runtime finds, or why it was not asked."""
  python = runtimes.find(name, asked[name])
  if python is None:
    return "not installed"
  if size > asked.bytes:
    run.say(f"{name} is not asked: the model is {size:,} bytes in fp32, config.proof.bytes {asked.bytes:,.0f}")
    return f"not asked: {size:,} bytes in fp32"
  answer = runtimes.ask(name, python, folder, request)
  found = _same_logits(name, [answer[f"logits_{at}"] for at in range(len(expected))], expected, tails)
  texts = request["texts"]
  _same_ids(name, [answer[f"ids_{at}"].tolist() for at in range(len(texts))], tokenizer, texts)
  return found | dict(version=answer["versions"], texts=len(texts))
