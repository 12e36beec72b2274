"""Cohere2 folders of Hugging Face transformers, in and out, without torch, transformers or jax.

A folder is config.json, generation_config.json, model*.safetensors (with an index when sharded; the
files are tensors.py's) and the tokenizer's four files. What is called how there is cohere2.py's, how
a folder is spoken to data/template.py's; adapters are peft.py's.
"""

import contextlib
import functools
import os
import pathlib
import shutil

import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.data import chat, tokenizer as tokenizers
from tiny_aya_jax.export import cohere2, tensors as files

HEAD = "lm_head.weight"
# The class that uses tokenizer.json as it is: CohereTokenizerFast rebuilds it wrongly in
# transformers 5 (tiny_aya.md 2.4).
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# Everything a folder has besides weights and config.json.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # kept with what they are of
TEXTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "chat_template.jinja")


def read(folder):
  """Reads a Cohere2 folder: (params, cfg), fp32 NumPy arrays in our tree and a model ConfigDict.

  Refuses what this architecture is not: other model types or layer patterns, query/key norms,
  biases that are not zero, an untied head, and missing, extra or misshapen tensors, each by name.
  """
  shapes, read_leaf, cfg = leaves(folder)
  return cohere2.tree((path, read_leaf(path)) for path in shapes), cfg


def load(folder, placed):
  """Reads a Cohere2 folder into jax arrays: (params, cfg).

  placed: tree of fp32 jax.ShapeDtypeStruct -> the same with the dtypes and shardings that are wanted.
  Each device reads its own parts of the files; beside what was asked for, no more than one leaf's
  parts are in memory.
  """
  import jax

  held, cfg = open_folder(folder)
  shapes, groups = cohere2.leaf_shapes(cfg), _groups(cfg)
  wanted = placed(cohere2.tree((path, jax.ShapeDtypeStruct(shape, np.float32)) for path, shape in shapes.items()))

  def place(path):
    like = cohere2.leaf(wanted, path)

    @functools.cache  # copies of one part are read once
    def part(index):
      return _part(held, groups[path], shapes[path], path, like.dtype, index)

    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: part(tuple((one.start, one.stop) for one in index)))

  return cohere2.tree((path, place(path)) for path in shapes), cfg


def _part(held, group, shape, path, dtype, index):
  """The part of a leaf that `index` is, [(start, stop), ...], in dtype."""
  index = tuple(slice(*one) for one in index)
  if group[0][1] is None:
    return _mapped(held, group[0][0], shape, path)[index].astype(dtype)
  chosen = group[index[0]]
  part = np.empty((len(chosen), *(len(range(*one.indices(size)))
                                  for one, size in zip(index[1:], shape[1:]))), dtype)
  for place, (name, _) in zip(part, chosen):
    place[...] = _mapped(held, name, shape[1:], path)[index[1:]]
  return part


def _mapped(held, name, shape, path):
  return cohere2.ours(held[name].mapped(), shape, path[-1])


def leaves(folder):
  """({path in our tree: shape}, path -> its leaf as an fp32 NumPy array, cfg); nothing is kept."""
  held, cfg = open_folder(folder)
  shapes, groups = cohere2.leaf_shapes(cfg), _groups(cfg)

  def read_leaf(path):
    return _part(held, groups[path], shapes[path], path, np.float32, [(None, None)] * len(shapes[path]))

  return shapes, read_leaf, cfg


def _groups(cfg):
  """{path in our tree: [(HF tensor name, period), ...] by period}."""
  groups = {}
  for name, (path, period) in cohere2.tensor_names(cfg).items():
    groups.setdefault(path, []).append((name, period))
  return groups


def open_folder(folder):
  """({HF tensor name: tensors.Tensor}, cfg); refuses what `read` does, from the files' headers.

  Only tensors that are not ours are looked into: a head that is stored again must be the embedding,
  and biases must be zero; both are left out.
  """
  folder = pathlib.Path(folder)
  cfg, _ = describe(folder)
  held = files.open_folder(folder)
  if "embed_tokens.weight" in held:  # of the model without its head
    held = {f"model.{name}": one for name, one in held.items()}
  _drop_frequencies(folder, held, cfg)
  names = cohere2.tensor_names(cfg)
  if HEAD in held and names.keys() <= held.keys():  # some writers store the tied head again
    _same_head(folder, held.pop(HEAD), held["model.embed_tokens.weight"])
  biases = [name for name in held.keys() - names if name.endswith(".bias")
            and name.removesuffix("bias") + "weight" in names]
  for name in sorted(biases):
    if held.pop(name).read().any():
      raise run.Refused(f"{folder}: {name} is not zero, and this architecture has no biases")
  missing, extra = sorted(names.keys() - held), sorted(held.keys() - names)
  if missing or extra:
    raise run.Refused(
        f"{folder}: {len(missing)} tensors missing {missing[:3]}, {len(extra)} unknown {extra[:3]}"
    )
  for name, shape in cohere2.torch_shapes(cfg).items():
    if held[name].shape != shape:
      raise run.Refused(f"{folder}: {name} has shape {held[name].shape}, config.json says {shape}")
  if biases:
    run.say(f"{folder}: {len(biases)} biases are all zero and are left out")
  return held, cfg


def _drop_frequencies(folder, held, cfg):
  """Drops the rotary frequencies that some writers store, if they are what rope_theta makes them."""
  expected = cfg.rope_theta ** (-np.arange(0, cfg.H, 2) / cfg.H)
  for name in [name for name in held if name.endswith("rotary_emb.inv_freq")]:
    found = held.pop(name).read().astype(np.float32)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-2):
      raise run.Refused(f"{folder}: {name} is not what rope_theta {cfg.rope_theta} makes it")


def _same_head(folder, head, embedding):
  one, other = head.mapped(), embedding.mapped()
  if one.shape != other.shape or not all(
      np.array_equal(one[first : first + 4096], other[first : first + 4096])
      for first in range(0, len(one), 4096)):
    raise run.Refused(f"{folder}: {HEAD} differs from the embedding; heads here are tied")


def describe(folder):
  """(model ConfigDict, the most tokens it reads) of config.json."""
  facts = run.read_json(pathlib.Path(folder) / "config.json", "Hugging Face folder")
  most = facts.get("max_position_embeddings", cohere2.MOST_T)
  if type(most) is not int or most < 1:
    raise run.Refused(f"{folder}/config.json: max_position_embeddings is {most!r}, expected a number of tokens")
  return cohere2.config_in(facts, folder), min(most, cohere2.MOST_T)


def tokenizer_of(folder, given=None):
  """The Tokenizer of a folder; `given`, a path or None, must have the same ids.

  Refuses a vocabulary larger than the folder's embedding.
  """
  found, (cfg, _) = tokenizers.load(pathlib.Path(folder) / "tokenizer.json"), describe(folder)
  refuse_vocabulary(found, cfg)
  if given and (odd := found.difference(tokenizers.load(given))):
    raise run.Refused(f"{folder} has its own tokenizer, and {given} is another ({odd}): leave config.tokenizer "
                      "unset")
  return found


def is_folder(place):
  """Whether a path is a Hugging Face folder, and no checkpoint of ours."""
  return (pathlib.Path(place) / "config.json").exists()


def digests(folder):
  """SHA-256 of what a folder's model is made of: {file name: digest}."""
  weights = {held.path for held in files.open_folder(folder).values()}
  return {path.name: run.sha256(path)
          for path in sorted({pathlib.Path(folder) / "config.json", *weights})}


def write(folder, params, cfg, tokenizer, *, dtype="float32", T=cohere2.MOST_T, shard_bytes=files.SHARD_BYTES):
  """Writes params (our tree) and tokenizer as a Cohere2 folder; all of it, or nothing.

  dtype: 'bfloat16', 'float16' or 'float32'. T: the most tokens that the model was trained on. The folder must
  not exist yet. Refuses a vocabulary
  larger than the embedding, and values that dtype cannot hold.
  """
  folder = pathlib.Path(folder)
  run.choose("export dtype", dtype, files.DTYPES)
  if folder.exists():
    raise run.Refused(f"{folder} exists: remove it, or export to another folder")
  refuse_vocabulary(tokenizer, cfg)

  for path, shape in cohere2.leaf_shapes(cfg).items():
    if (found := cohere2.leaf(params, path).shape) != shape:
      raise run.Refused(f"{'/'.join(path)} has shape {found}, the model config says {shape}")
  found = ((path, np.asarray(cohere2.leaf(params, path))) for path in cohere2.leaf_shapes(cfg))
  with staged(folder) as temporary:
    write_leaves(temporary, found, cfg, dtype, shard_bytes)
    write_texts(temporary, cfg, tokenizer, dtype, T)


def refuse_vocabulary(tokenizer, cfg):
  """Refuses a tokenizer with more ids than the embedding has rows."""
  if tokenizer.size > cfg.V:
    raise run.Refused(f"the tokenizer has {tokenizer.size} ids, the embedding only {cfg.V} rows")


def write_leaves(folder, found, cfg, dtype, shard_bytes=files.SHARD_BYTES):
  """Writes the weights' files from (path in our tree, leaf), in any order, a leaf at a time."""
  files.write(folder, cohere2.torch_shapes(cfg), named(found, cfg), dtype=dtype, shard_bytes=shard_bytes)


def named(found, cfg):
  """(path in our tree, leaf) one after the other -> (HF tensor name, its value in torch's shape)."""
  groups = _groups(cfg)
  for path, leaf in found:
    for name, period in groups[path]:
      yield name, cohere2.theirs(leaf if period is None else leaf[period], path[-1])
    del leaf  # before the next is made


@contextlib.contextmanager
def staged(folder):
  """A folder beside `folder` to write into; it becomes `folder` at the end, or is gone."""
  folder = pathlib.Path(folder)
  temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
  temporary.mkdir(parents=True)
  try:
    yield temporary
    os.replace(temporary, folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def write_texts(folder, cfg, tokenizer, dtype, T):
  """All that a folder has besides its weights."""
  stop_ids = sorted({tokenizer.special("<EOS_TOKEN>"), *chat.stop_ids(tokenizer)})
  specials = dict(
      bos_token="<BOS_TOKEN>", eos_token="<EOS_TOKEN>", pad_token="<PAD>", unk_token="<UNK>"
  )
  run.write_json(folder / "config.json", cohere2.config_out(cfg, tokenizer, dtype, T))
  run.write_json(folder / "generation_config.json", dict(
      bos_token_id=tokenizer.special("<BOS_TOKEN>"), eos_token_id=stop_ids,
      pad_token_id=tokenizer.special("<PAD>"), do_sample=True, temperature=0.3, top_p=0.95,
  ))
  run.write_text(folder / "tokenizer.json", tokenizer.json())
  run.write_json(folder / "tokenizer_config.json", dict(
      tokenizer_class=TOKENIZER_CLASS, model_max_length=T,
      model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids, and refuses them
      clean_up_tokenization_spaces=False, **specials,
  ))
  run.write_json(folder / "special_tokens_map.json", specials)
  run.write_text(folder / "chat_template.jinja", chat.TEMPLATE)


def copy_texts(folder, cfg, source, dtype):
  """All that a folder has besides its weights, as another has it; but what describes the model is
  written anew, and see TOKENIZER_CLASS."""
  source = pathlib.Path(source)
  licences = (path.name for pattern in LICENCES for path in source.glob(pattern))
  for name in (*TEXTS, *licences):
    if (source / name).is_file():
      shutil.copyfile(source / name, folder / name)
  facts = run.read_json(source / "config.json", "Hugging Face folder")
  old = [name for name in ("torch_dtype", "dtype") if name in facts]  # of transformers 4, of 5
  run.write_json(folder / "config.json",
                 facts | dict.fromkeys(old or ["torch_dtype"], dtype) | cohere2.described(cfg))
  if not (folder / "tokenizer_config.json").exists():
    return
  facts = run.read_json(folder / "tokenizer_config.json", "Hugging Face folder")
  kept = {name: value for name, value in facts.items() if name != "auto_map"}  # code of its own
  if str(facts.get("tokenizer_class")).startswith("Cohere"):
    kept["tokenizer_class"] = TOKENIZER_CLASS
    run.say(f"tokenizer_class {facts['tokenizer_class']} is written as {TOKENIZER_CLASS}, which uses tokenizer.json "
            "as it is")
  if kept != facts:
    run.write_json(folder / "tokenizer_config.json", kept)
