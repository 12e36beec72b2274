"""Cohere2 folders of Hugging Face transformers, in and out, without torch or transformers.

A folder is config.json, generation_config.json, model*.safetensors (with an index when sharded)
and the tokenizer's four files. Layer 4l+j is period l of block BLOCKS[j]; a torch Linear is
[out, in], so every matrix is its letters flattened to two axes and transposed (tiny_aya.md 1.2).
An adapter is a folder of PEFT: adapter_config.json and adapter_model.safetensors.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil

import jax
import ml_collections
import ml_dtypes
import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.data import chat
from tiny_aya_jax.model import adapter as adapters
from tiny_aya_jax.model.transformer import BLOCKS

# Our name in a block: (HF name in a layer, letters the torch [out, in] matrix flattens).
LAYER = dict(
    norm_D="input_layernorm",
    q_DNH="self_attn.q_proj",
    k_DKH="self_attn.k_proj",
    v_DKH="self_attn.v_proj",
    o_NHD="self_attn.o_proj",
    gate_DF="mlp.gate_proj",
    up_DF="mlp.up_proj",
    down_FD="mlp.down_proj",
)
DTYPES = dict(bfloat16=ml_dtypes.bfloat16, float16=np.float16, float32=np.float32)
STORED = dict(BF16=ml_dtypes.bfloat16, F16=np.float16, F32=np.float32, F64=np.float64)
SHARD_BYTES = 4 << 30  # below the 5 GB at which transformers itself shards


def read(folder):
  """Reads a Cohere2 folder: (params, cfg), fp32 NumPy arrays in our tree and a model ConfigDict.

  Refuses what this architecture is not: other model types or layer patterns, biases, query/key
  norms, an untied head, and missing, extra or misshapen tensors, each by name.
  """
  tensors, cfg = open_folder(folder)
  leaves = {}
  for name, (path, period) in tensor_names(cfg).items():
    shape = _shape(cfg, path[-1])
    value = ours(tensors[name](), shape, path[-1])
    if period is None:
      leaves[path] = value
    else:
      stacked = leaves.setdefault(path, np.empty((cfg.L, *shape), np.float32))
      stacked[period] = value
  return _tree(leaves), cfg


def open_folder(folder):
  """({HF tensor name: function that reads it, fp32 in torch's shape}, cfg); refuses what `read` does.

  Nothing is read before it is asked for, or kept.
  """
  folder = pathlib.Path(folder)
  cfg = config_in(run.read_json(folder / "config.json", "Hugging Face folder"), folder)
  tensors = _open(folder)
  if "lm_head.weight" in tensors:  # some writers store the tied head again
    head, embedding = tensors.pop("lm_head.weight")(), tensors["model.embed_tokens.weight"]()
    if not np.array_equal(head, embedding):
      raise run.Refused(f"{folder}: lm_head.weight differs from the embedding; heads here are tied")
  names = tensor_names(cfg)
  missing, extra = sorted(names.keys() - tensors), sorted(tensors.keys() - names)
  if missing or extra:
    raise run.Refused(
        f"{folder}: {len(missing)} tensors missing {missing[:3]}, {len(extra)} unknown {extra[:3]}"
    )

  def read_one(name, path):
    value, flat = tensors[name](), _flat(_shape(cfg, path[-1]), path[-1])
    if value.shape != flat:
      raise run.Refused(f"{folder}: {name} has shape {value.shape}, config.json says {flat}")
    return value.astype(np.float32, copy=False)

  return {name: functools.partial(read_one, name, path) for name, (path, _) in names.items()}, cfg


def write(folder, params, cfg, tokenizer, *, dtype="float32", shard_bytes=SHARD_BYTES):
  """Writes params (our tree) and tokenizer as a Cohere2 folder; all of it, or nothing.

  dtype: 'bfloat16', 'float16' or 'float32'. The folder must not exist yet. Refuses a vocabulary
  smaller than the tokenizer's.
  """
  folder = pathlib.Path(folder)
  run.choose("export dtype", dtype, DTYPES)
  if folder.exists():
    raise run.Refused(f"{folder} exists: remove it, or export to another folder")
  if tokenizer.size > cfg.V:
    raise run.Refused(f"the tokenizer has {tokenizer.size} ids, the embedding only {cfg.V} rows")
  tensors = ((name, _tensor(params, cfg, *place)) for name, place in tensor_names(cfg).items())
  with staged(folder) as temporary:
    write_tensors(temporary, tensors, cfg, dtype=dtype, shard_bytes=shard_bytes)
    write_texts(temporary, cfg, tokenizer, dtype)


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


def write_texts(folder, cfg, tokenizer, dtype):
  """All that a folder has besides its weights."""
  stop_ids = sorted({tokenizer.special("<EOS_TOKEN>"), *chat.stop_ids(tokenizer)})
  specials = dict(
      bos_token="<BOS_TOKEN>", eos_token="<EOS_TOKEN>", pad_token="<PAD>", unk_token="<UNK>"
  )
  run.write_json(folder / "config.json", config_out(cfg, tokenizer, dtype))
  run.write_json(folder / "generation_config.json", dict(
      bos_token_id=tokenizer.special("<BOS_TOKEN>"), eos_token_id=stop_ids,
      pad_token_id=tokenizer.special("<PAD>"), do_sample=True, temperature=0.3, top_p=0.95,
  ))
  (folder / "tokenizer.json").write_text(tokenizer.json(), encoding="utf-8")
  # The class that uses tokenizer.json as it is: CohereTokenizerFast rebuilds it wrongly in
  # transformers 5 (tiny_aya.md 2.4).
  run.write_json(folder / "tokenizer_config.json", dict(
      tokenizer_class="PreTrainedTokenizerFast", model_max_length=8192,
      clean_up_tokenization_spaces=False, **specials,
  ))
  run.write_json(folder / "special_tokens_map.json", specials)
  (folder / "chat_template.jinja").write_text(chat.TEMPLATE, encoding="utf-8")


def write_adapter(folder, params, adapter):
  """Writes the adapters in params (our tree) as PEFT's files into a new folder, fp32.

  PEFT counts a product lora_alpha / r times, as we do. The folder holds no base.
  """
  from safetensors.numpy import save_file

  folder = pathlib.Path(folder)
  folder.mkdir(parents=True)
  run.write_json(folder / "adapter_config.json", dict(
      peft_type="LORA", task_type="CAUSAL_LM", r=adapter.R, lora_alpha=adapter.alpha, lora_dropout=0.0,
      target_modules=sorted(LAYER[name].split(".")[1] for name in adapters.factors(adapter)),
      bias="none", fan_in_fan_out=False, use_rslora=False, inference_mode=True,
      base_model_name_or_path=None,
  ))
  save_file(adapter_tensors(params, adapter), folder / "adapter_model.safetensors",
            metadata=dict(format="pt"))


def adapter_tensors(params, adapter):
  """{PEFT's name: fp32 array} of the adapters in params: lora_A [R, in] and lora_B [out, R]."""
  trained, tensors = jax.device_get(adapters.split(params)[0]), {}
  for name, (first, second) in adapters.factors(adapter).items():
    for block, leaves in trained["periods"].items():
      for period, (one, other) in enumerate(zip(leaves[first], leaves[second])):
        layer = 4 * period + BLOCKS.index(block)
        place = f"base_model.model.model.layers.{layer}.{LAYER[name]}"
        tensors[f"{place}.lora_A.weight"] = np.ascontiguousarray(one.reshape(-1, adapter.R).T)
        tensors[f"{place}.lora_B.weight"] = np.ascontiguousarray(other.reshape(adapter.R, -1).T)
  return tensors


def config_in(config, folder):
  """config.json of Cohere2 -> model ConfigDict; refuses what the architecture does not have."""
  def refuse(what):
    raise run.Refused(f"{folder}/config.json: {what}")

  if config.get("model_type") != "cohere2":
    refuse(f"model_type is {config.get('model_type')!r}, expected 'cohere2'")
  for field in ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
                "num_hidden_layers", "sliding_window"):
    if not isinstance(config.get(field), int):
      refuse(f"{field} is {config.get(field)!r}, expected a whole number")
  layers, pattern = config["num_hidden_layers"], config.get("layer_types")
  if layers % 4 or (pattern and pattern != _layer_types(layers)) or (
      not pattern and config.get("sliding_window_pattern", 4) != 4):
    refuse(f"{layers} layers of {pattern or config.get('sliding_window_pattern')}: expected "
           "periods of 3 sliding_attention and 1 full_attention")
  for field, only in dict(
      attention_bias=False, use_qk_norm=False, use_parallel_block=True, hidden_act="silu",
      use_embedding_sharing=True, tie_word_embeddings=True, rotary_pct=1.0, rope_scaling=None,
      position_embedding_type="rope_gptj", use_gated_activation=True,
  ).items():
    if config.get(field, only) != only:
      refuse(f"{field} is {config[field]!r}, this architecture has {only!r}")
  rope = config.get("rope_parameters") or {}
  if rope.get("rope_type", "default") != "default":
    refuse(f"rope_type is {rope['rope_type']!r}, expected 'default'")
  heads = config["num_attention_heads"]
  return ml_collections.ConfigDict(dict(
      D=config["hidden_size"],
      N=heads,
      K=config.get("num_key_value_heads") or heads,
      H=config.get("head_dim") or config["hidden_size"] // heads,
      F=config["intermediate_size"],
      V=config["vocab_size"],
      L=layers // 4,
      window=config["sliding_window"],
      rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
      logit_scale=float(config.get("logit_scale", 0.0625)),  # the class's default
      norm_epsilon=float(config.get("layer_norm_eps", 1e-5)),
  ))


def config_out(cfg, tokenizer, dtype):
  """Model ConfigDict -> config.json that transformers 4.57 and 5.x read alike."""
  return dict(
      architectures=["Cohere2ForCausalLM"],
      model_type="cohere2",
      attention_bias=False,
      attention_dropout=0.0,
      bos_token_id=tokenizer.special("<BOS_TOKEN>"),
      eos_token_id=tokenizer.special("<EOS_TOKEN>"),
      pad_token_id=tokenizer.special("<PAD>"),
      head_dim=cfg.H,
      hidden_act="silu",
      hidden_size=cfg.D,
      initializer_range=0.02,
      intermediate_size=cfg.F,
      layer_norm_eps=cfg.norm_epsilon,
      layer_types=_layer_types(4 * cfg.L),
      logit_scale=cfg.logit_scale,
      max_position_embeddings=8192,  # the released models' (tiny_aya.md 1.1)
      num_attention_heads=cfg.N,
      num_hidden_layers=4 * cfg.L,
      num_key_value_heads=cfg.K,
      rope_theta=cfg.rope_theta,
      rope_parameters=dict(rope_type="default", rope_theta=cfg.rope_theta),
      sliding_window=cfg.window,
      tie_word_embeddings=True,
      torch_dtype=dtype,
      use_cache=True,
      vocab_size=cfg.V,
  )


def _layer_types(layers):
  return (["sliding_attention"] * 3 + ["full_attention"]) * (layers // 4)


def tensor_names(cfg):
  """{HF tensor name: (path in our tree, period or None)}, in the order of a checkpoint."""
  names = {"model.embed_tokens.weight": (("embedding_VD",), None)}
  for layer in range(4 * cfg.L):
    for ours, theirs in LAYER.items():
      path = ("periods", BLOCKS[layer % 4], ours)
      names[f"model.layers.{layer}.{theirs}.weight"] = (path, layer // 4)
  return names | {"model.norm.weight": (("norm_D",), None)}


def leaf_shapes(cfg):
  """{path in our tree: shape}, stacked leaves with their L."""
  return {path: (*(() if period is None else (cfg.L,)), *_shape(cfg, path[-1]))
          for path, period in tensor_names(cfg).values()}


def _shape(cfg, name):
  return tuple(getattr(cfg, letter) for letter in name.rpartition("_")[2])


def _flat(shape, name):
  """Our shape -> torch's: inputs are D (or N H, or F) first, and torch puts them last."""
  if len(shape) == 1 or name == "embedding_VD":
    return shape
  inputs = 2 if name == "o_NHD" else 1
  return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))


def ours(value, shape, name):
  """A matrix of torch's [out, in] -> our `shape` of the parameter `name`, without a copy."""
  return (value.T if value.ndim == 2 and name != "embedding_VD" else value).reshape(shape)


def theirs(value, name):
  """Our parameter `name`, one period of it -> torch's [out, in], without a copy."""
  flat = _flat(value.shape, name)
  return value.reshape(flat[::-1]).T if len(flat) == 2 and name != "embedding_VD" else value


def _tree(leaves):
  tree = {}
  for (*parents, name), value in leaves.items():
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree


def _open(folder):
  """{tensor name: function returning its array} over every shard; file names are plain basenames."""
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError:
    raise run.Refused(f"{folder} needs the safetensors package: pip install 'tiny_aya_jax[export]'"
                      ) from None

  index = folder / "model.safetensors.index.json"
  if index.exists():
    where = run.read_json(index, "safetensors index").get("weight_map", {})
    files = sorted(set(where.values()))
  else:
    files, where = ["model.safetensors"], None
  tensors = {}
  for name in files:
    if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
      raise run.Refused(f"{index} names the file {name!r}: expected a plain *.safetensors name")
    if not (folder / name).is_file():
      raise run.Refused(f"{folder} has no {name}")
    try:
      with safe_open(folder / name, framework="numpy"):
        pass
    except SafetensorError as error:
      raise run.Refused(f"{folder / name} is not a whole safetensors file ({error})") from None
    tensors |= _stored(folder / name)
  if where is not None and tensors.keys() != where.keys():
    odd = sorted(tensors.keys() ^ where.keys())
    raise run.Refused(f"{index} and its shards disagree about {len(odd)} tensors, e.g. {odd[0]}")
  return tensors


def _stored(path):
  """{tensor name: function that reads it} of one file, not mapped: what was read can be freed."""
  with open(path, "rb") as file:
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
  header.pop("__metadata__", None)
  for name, entry in header.items():
    if entry["dtype"] not in STORED:
      raise run.Refused(f"{path}: {name} is {entry['dtype']}, expected one of {', '.join(STORED)}")

  def read_one(dtype, shape, data_offsets):
    begin, end = data_offsets
    dtype = np.dtype(STORED[dtype])
    count = (end - begin) // dtype.itemsize
    return np.fromfile(path, dtype, count, offset=8 + size + begin).reshape(shape)

  return {name: functools.partial(read_one, **entry) for name, entry in header.items()}


def write_tensors(folder, tensors, cfg, *, dtype="float32", shard_bytes=SHARD_BYTES):
  """Writes model.safetensors, or model-0000x-of-0000n.safetensors and their index.

  tensors: all (HF tensor name, value in torch's shape), in any order; each goes to its place in its
  file when it comes, so that no more than one need be in memory.
  """
  names = tensor_names(cfg)
  item = np.dtype(DTYPES[dtype]).itemsize
  sizes = {name: item * int(np.prod(_shape(cfg, path[-1]))) for name, (path, _) in names.items()}
  shards = [[]]
  for name in names:
    if shards[-1] and sum(sizes[kept] for kept in shards[-1]) + sizes[name] > shard_bytes:
      shards.append([])
    shards[-1].append(name)
  where, places = {}, {}
  for number, shard in enumerate(shards, 1):
    file = "model.safetensors" if len(shards) == 1 else (
        f"model-{number:05d}-of-{len(shards):05d}.safetensors")
    places |= _lay_out(folder / file, {name: sizes[name] for name in shard}, names, cfg, dtype)
    where |= dict.fromkeys(shard, file)
  for name, value in tensors:
    path, offset = places.pop(name)
    with open(path, "r+b") as file:
      file.seek(offset)
      file.write(np.ascontiguousarray(value.astype(DTYPES[dtype], copy=False)).reshape(-1).view(np.uint8))
  if places:
    raise ValueError(f"{len(places)} tensors were not given, e.g. {next(iter(places))}")
  if len(shards) > 1:
    run.write_json(folder / "model.safetensors.index.json", dict(
        metadata=dict(total_size=sum(sizes.values())), weight_map=where))


def _lay_out(path, sizes, names, cfg, dtype):
  """Writes a safetensors file's header; {name: (path, where its bytes begin)}."""
  stored = next(name for name, kept in STORED.items() if kept == DTYPES[dtype])
  header, at = {"__metadata__": dict(format="pt")}, 0
  for name, size in sizes.items():
    leaf = names[name][0][-1]
    shape = list(_flat(_shape(cfg, leaf), leaf))
    header[name] = dict(dtype=stored, shape=shape, data_offsets=[at, at + size])
    at += size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + at)
  return {name: (path, 8 + len(text) + header[name]["data_offsets"][0]) for name in sizes}


def _tensor(params, cfg, path, period):
  leaf = params
  for key in path:
    leaf = leaf[key]
  value = np.asarray(jax.device_get(leaf if period is None else leaf[period]), np.float32)
  shape = _shape(cfg, path[-1])
  if value.shape != shape:
    raise run.Refused(f"{'/'.join(path)} has shape {value.shape}, the model config says {shape}")
  return theirs(value, path[-1])
