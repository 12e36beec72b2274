"""GGUF files for llama.cpp: written from a finished Cohere2 folder, tensor by tensor, and read back.

Kinds are the gguf package's own: F32, F16, BF16, Q8_0 and Q4_0. K-quants are made of such a file by
llama.cpp itself (runtimes.quantize). llama.cpp's rotary pairs are interleaved here, as ours: no
matrix is permuted. Norms are F32 in every kind. The token embedding is the head too, and in Q4_0 it
is Q8_0: an error there falls on every logit at once, and llama.cpp's own Q4_0 keeps the head above 4
bits as well.
"""

import collections
import math
import os
import pathlib

import ml_collections
import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.export import cohere2, huggingface, vocabulary as vocabularies

# Our name in a block -> GGUF's.
BLOCK = dict(
    norm_D="attn_norm", q_DNH="attn_q", k_DKH="attn_k", v_DKH="attn_v", o_NHD="attn_output",
    gate_DF="ffn_gate", up_DF="ffn_up", down_FD="ffn_down",
)
KINDS = dict(
    F32="ALL_F32", F16="MOSTLY_F16", BF16="MOSTLY_BF16", Q8_0="MOSTLY_Q8_0", Q4_0="MOSTLY_Q4_0",
)
BYTES = dict(F32=4, F16=2, BF16=2, Q8_0=34 / 32, Q4_0=18 / 32)  # of a weight
BLOCKED = ("Q8_0", "Q4_0")
SIDE = 32  # weights that share a scale in BLOCKED, along a row
# The largest weight that a kind can hold: of blocks, what their float16 scale can.
HALF = 65504.0
LARGEST = dict(
    F32=math.inf, F16=HALF, BF16=3.3895313892515355e38, Q8_0=127 * HALF, Q4_0=8 * HALF,
)
AT_ONCE = 1 << 22  # weights that are encoded or decoded together
CONTEXT = 8192  # max_position_embeddings of transformers' class, where config.json is silent
EOT, EOM = "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>"


def check(cfg, kind):
  """Refuses a model that llama.cpp's cohere2 or this kind cannot hold; needs no jax."""
  run.choose("GGUF kind", kind, KINDS)
  if cfg.N * cfg.H != cfg.D:
    raise run.Refused(f"llama.cpp's cohere2 has heads that make up the width: {cfg.N} heads of "
                      f"{cfg.H} are {cfg.N * cfg.H}, D is {cfg.D}")
  odd = [f"{letter} = {cfg[letter]}" for letter in "DF" if kind in BLOCKED and cfg[letter] % SIDE]
  if odd:
    raise run.Refused(f"{kind} has one scale for {SIDE} weights of a row: {' and '.join(odd)} is no "
                      f"multiple of {SIDE}; write F16 or BF16")


def special_ids(config, V, where):
  """{"bos", "eos", "pad": id} of those that a folder's config.json names; needs no jax.

  Of a list it is the first; None and -1 are none. Refuses what is no id of V. where: for the refusal.
  """
  found = {}
  for name in ("bos", "eos", "pad"):
    given = config.get(f"{name}_token_id")
    id = given[0] if isinstance(given, list) and given else given
    if id in (None, -1):
      continue
    if type(id) is not int or not 0 <= id < V:
      raise run.Refused(f"{where}/config.json: {name}_token_id is {str(given)[:60]}, expected an id from 0 to "
                        f"{V - 1}, or null")
    found[name] = id
  return found


def write(path, folder, kind, *, pre=None):
  """Writes the Cohere2 folder as the GGUF file `path`: all of it, or nothing.

  Returns facts(path) and "vocabulary": dict(model, pre, used, padding, joined, differs), as in
  vocabulary.Vocabulary. kind: of KINDS. pre: llama.cpp's name of a byte-level tokenizer's
  pre-tokenizer, where it is not recognised. No more than one tensor is in memory. Refuses what
  `check` and vocabulary.read do, and weights that the kind cannot hold.
  """
  gguf, path, folder = _package(), pathlib.Path(path), pathlib.Path(folder)
  tensors, cfg = huggingface.open_folder(folder)
  check(cfg, kind)
  vocabulary = vocabularies.read(folder / "tokenizer.json", cfg.V, pre)
  writer = gguf.GGUFWriter(None, "cohere2")
  _describe(writer, gguf, folder, cfg, vocabulary, kind)
  placed = names(cfg)
  for name, place in placed.items():
    _announce(writer, gguf, cfg, name, place, kind)
  parts = (_encoded(gguf, tensors[theirs].mapped(), _type(name, kind), name)
           for theirs, name in zip(cohere2.tensor_names(cfg), placed, strict=True))
  _stream(writer, path, parts)
  described = dict(
      model=vocabulary.model, pre=vocabulary.pre, used=vocabulary.used,
      padding=cfg.V - vocabulary.used, joined=vocabulary.joined, differs=vocabulary.differs,
  )
  return facts(path) | dict(vocabulary=described)


def names(cfg):
  """{GGUF's name: (path in our tree, period or None)}, in the order of cohere2.tensor_names."""
  named = {}
  for path, period in cohere2.tensor_names(cfg).values():
    if period is None:
      name = "token_embd" if path[-1] == "embedding_VD" else "output_norm"
    else:
      name = f"blk.{4 * period + cohere2.BLOCKS.index(path[1])}.{BLOCK[path[-1]]}"
    named[f"{name}.weight"] = (path, period)
  return named


def facts(path):
  """dict(kind, bytes, weights, bits_per_weight, types {type: tensors}) of a file, whoever wrote it."""
  gguf, path = _package(), pathlib.Path(path)
  reader = _open(gguf, path)
  types = collections.Counter(tensor.tensor_type.name for tensor in reader.tensors)
  weights = sum(tensor.n_elements for tensor in reader.tensors)
  kind = gguf.LlamaFileType(_field(reader, "general.file_type", path)).name
  return dict(
      kind=kind.removeprefix("MOSTLY_").removeprefix("ALL_"),
      bytes=path.stat().st_size, weights=weights,
      bits_per_weight=8 * sum(tensor.n_bytes for tensor in reader.tensors) / weights,
      types=dict(types.most_common()),
  )


def read(path):
  """A GGUF file of this architecture -> (params, cfg): fp32 NumPy in our tree, whatever its types.

  The file is mapped, and one tensor at a time decoded. Refuses other architectures, and missing,
  extra or misshapen tensors.
  """
  gguf, path = _package(), pathlib.Path(path)
  reader = _open(gguf, path)
  cfg = _config(reader, path)
  placed = names(cfg)
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  if tensors.keys() != placed.keys():
    odd = sorted(tensors.keys() ^ placed.keys())
    raise run.Refused(f"{path}: {len(odd)} tensors are missing or unknown, such as {odd[:3]}")
  leaves = {at: np.empty(shape, np.float32) for at, shape in cohere2.leaf_shapes(cfg).items()}
  for name, (at, period) in placed.items():
    leaf = leaves[at] if period is None else leaves[at][period]
    value = _decoded(gguf, tensors[name])
    if value.shape != _stored_shape(cfg, at[-1]):
      raise run.Refused(f"{path}: {name} has shape {value.shape}, expected "
                        f"{_stored_shape(cfg, at[-1])}")
    leaf[...] = cohere2.ours(value, leaf.shape, at[-1])
  return cohere2.tree(leaves.items()), cfg


def decoded(path, cfg):
  """(HF tensor name, fp32 in torch's shape) of a file that `write` made, one after the other."""
  gguf = _package()
  tensors = {tensor.name: tensor for tensor in _open(gguf, pathlib.Path(path)).tensors}
  for theirs, name in zip(cohere2.tensor_names(cfg), names(cfg), strict=True):
    yield theirs, _decoded(gguf, tensors[name])


def leaf_reader(path, cfg):
  """(path in our tree, period or None) -> its fp32 array, decoded when it is asked for."""
  gguf = _package()
  tensors = {tensor.name: tensor for tensor in _open(gguf, pathlib.Path(path)).tensors}
  where = {place: name for name, place in names(cfg).items()}

  def leaf(place, period=None):
    shape = cohere2.leaf_shapes(cfg)[place][period is not None:]
    return cohere2.ours(_decoded(gguf, tensors[where[place, period]]), shape, place[-1])

  return leaf


def _package():
  try:
    import gguf
  except ImportError:
    raise run.Refused("GGUF files need the gguf package: pip install 'tiny_aya_jax[export]'") from None
  return gguf


# --- writing ------------------------------------------------------------------------------------


def _describe(writer, gguf, folder, cfg, vocabulary, kind):
  """The file's keys; llama.cpp would guess some of them, and here it need not."""
  config = run.read_json(folder / "config.json", "Hugging Face folder")
  writer.add_type("model")
  writer.add_name(folder.resolve().name)
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
  writer.add_vocab_size(cfg.V)
  writer.add_context_length(config.get("max_position_embeddings", CONTEXT))
  writer.add_embedding_length(cfg.D)
  writer.add_block_count(4 * cfg.L)
  writer.add_feed_forward_length(cfg.F)
  writer.add_head_count(cfg.N)
  writer.add_head_count_kv(cfg.K)
  writer.add_key_length(cfg.H)
  writer.add_value_length(cfg.H)
  writer.add_layer_norm_eps(cfg.norm_epsilon)
  writer.add_sliding_window(cfg.window)
  writer.add_logit_scale(cfg.logit_scale)
  writer.add_rope_dimension_count(cfg.H)
  writer.add_rope_freq_base(cfg.rope_theta)
  writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
  _describe_tokenizer(writer, config, folder, vocabulary)


def _describe_tokenizer(writer, config, folder, vocabulary):
  writer.add_tokenizer_model(vocabulary.model)
  writer.add_tokenizer_pre(vocabulary.pre)
  writer.add_token_list(vocabulary.tokens)
  writer.add_token_types(vocabulary.types)
  if vocabulary.model == "llama":
    writer.add_token_scores(vocabulary.scores)
  else:
    writer.add_token_merges(vocabulary.merges)
  ids, specials = special_ids(config, len(vocabulary.tokens), folder), vocabulary.specials
  for write, id in ((writer.add_bos_token_id, ids.get("bos")),
                    (writer.add_eos_token_id, ids.get("eos")),
                    (writer.add_pad_token_id, ids.get("pad")),
                    (writer.add_unk_token_id, specials.get("<UNK>")),
                    (writer.add_eot_token_id, specials.get(EOT)),
                    (writer.add_eom_token_id, specials.get(EOM))):  # eos, eot, eom: it stops at each
    if id is not None:
      write(id)
  writer.add_add_bos_token(True)
  writer.add_add_eos_token(False)
  writer.add_add_space_prefix(False)
  if template := _template(folder):
    writer.add_chat_template(template)


def _template(folder):
  """The folder's chat template: a file of its own, or in tokenizer_config.json; None without one."""
  if (folder / "chat_template.jinja").exists():
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")
  if (folder / "tokenizer_config.json").exists():
    return run.read_json(folder / "tokenizer_config.json", "Hugging Face folder").get("chat_template")
  return None


def _stream(writer, path, parts):
  """Writes what was announced and `parts`, one a tensor, under another name until it is whole."""
  temporary = path.with_name(f".{path.name}.tmp")  # what a killed one leaves, the next writes over
  try:
    writer.write_header_to_file(temporary)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts:
      writer.write_tensor_data(part)
      del part  # before the next is made
    writer.fout[0].flush()
    os.fsync(writer.fout[0].fileno())
    writer.close()
    os.replace(temporary, path)
  except BaseException:
    writer.close()
    temporary.unlink(missing_ok=True)
    raise


def _type(name, kind):
  """The GGUF type of a tensor in a file of a kind."""
  if name.endswith("norm.weight"):
    return "F32"
  return "Q8_0" if kind == "Q4_0" and name == "token_embd.weight" else kind


def _announce(writer, gguf, cfg, name, place, kind):
  shape = _stored_shape(cfg, place[0][-1])
  type = gguf.GGMLQuantizationType[_type(name, kind)]
  block, stored = gguf.GGML_QUANT_SIZES[type]
  writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * stored,
                         raw_dtype=type)


def _stored_shape(cfg, leaf):
  """[out, in], as torch's; a row is what the matrix multiplies."""
  if leaf == "norm_D":
    return (cfg.D,)
  inputs = cfg.N * cfg.H if leaf == "o_NHD" else cfg.F if leaf == "down_FD" else cfg.D
  return math.prod(cfg[letter] for letter in leaf.rpartition("_")[2]) // inputs, inputs


def _encoded(gguf, value, type, name):
  """[out, in] or [D] of any float -> its bytes in a GGUF type, by the gguf package, some rows at a time."""
  largest = max(float(value.max()), -float(value.min()))
  if not largest <= LARGEST[type] or not math.isfinite(largest):
    raise run.Refused(f"{name} holds {largest:.4g}, {type} at most {LARGEST[type]:.4g}: write "
                      "another kind")
  type = gguf.GGMLQuantizationType[type]
  if type == gguf.GGMLQuantizationType.F32:
    return value.astype(np.float32)
  encode = lambda rows: gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), type)
  return _by_rows(encode, value, np.float16 if type == gguf.GGMLQuantizationType.F16 else np.uint8)


def _decoded(gguf, tensor):
  """A tensor of the reader -> fp32 in torch's shape."""
  decode = lambda rows: gguf.quants.dequantize(rows, tensor.tensor_type)
  try:
    return _by_rows(decode, tensor.data, np.float32)
  except NotImplementedError as error:
    raise run.Refused(f"{tensor.name} is {tensor.tensor_type.name}: {error}") from None


def _by_rows(function, value, dtype):
  """`function` over groups of rows, into one array: what it needs besides is small."""
  if value.ndim == 1:
    return function(value).astype(dtype, copy=False)
  rows = max(1, AT_ONCE // value.shape[1])
  first = function(value[:rows])
  whole = np.empty((len(value), *first.shape[1:]), dtype)
  whole[:rows] = first
  for start in range(rows, len(value), rows):
    whole[start : start + rows] = function(value[start : start + rows])
  return whole


# --- reading ------------------------------------------------------------------------------------


def _open(gguf, path):
  """The package's reader without lists of texts: those of 262,144 tokens take 12 s and 850 MB."""
  class Reader(gguf.GGUFReader):
    def _get_field_parts(self, begin, kind):
      texts = gguf.GGUFValueType.STRING
      if kind != gguf.GGUFValueType.ARRAY or self._get(begin, np.uint32)[0] != texts:
        return super()._get_field_parts(begin, kind)
      view, at = memoryview(self.data), begin + 12  # behind the type and the count
      for _ in range(int(self._get(begin + 4, np.uint64)[0])):
        at += 8 + int.from_bytes(view[at : at + 8], "little")
      return at - begin, [], [], [gguf.GGUFValueType.ARRAY, texts]

  try:
    return Reader(path)
  except FileNotFoundError:
    raise run.Refused(f"{path} does not exist") from None
  except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
    raise run.Refused(f"{path} is not a whole GGUF file ({error})") from None


def _field(reader, key, path):
  field = reader.fields.get(key)
  if field is None:
    raise run.Refused(f"{path} has no {key}")
  return field.contents()


def _config(reader, path):
  """The keys -> a model ConfigDict."""
  architecture = _field(reader, "general.architecture", path)
  if architecture != "cohere2":
    raise run.Refused(f"{path} is of architecture {architecture!r}, expected 'cohere2'")
  of = lambda key: _field(reader, f"cohere2.{key}", path)
  if of("block_count") % 4:
    raise run.Refused(f"{path} has {of('block_count')} layers, expected periods of 4")
  fields = dict(
      D=of("embedding_length"), N=of("attention.head_count"), K=of("attention.head_count_kv"),
      H=of("attention.key_length"), F=of("feed_forward_length"), V=of("vocab_size"),
      L=of("block_count") // 4, window=of("attention.sliding_window"),
  )
  # Stored as float32: 1e-5 comes back as 9.99999974e-06, whose shortest name is 1e-5 again.
  shortest = lambda key: float(str(np.float32(of(key))))
  return ml_collections.ConfigDict(dict(
      **{name: int(value) for name, value in fields.items()}, rope_theta=shortest("rope.freq_base"),
      logit_scale=shortest("logit_scale"), norm_epsilon=shortest("attention.layer_norm_epsilon"),
  ))
