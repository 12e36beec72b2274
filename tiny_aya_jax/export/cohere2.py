"""The correspondence of Cohere2 in Hugging Face's words and in ours: names, shapes, config.json.

Layer 4l+j is period l of block BLOCKS[j]; a torch Linear is [out, in], so every matrix is its letters
flattened to two axes and transposed (tiny_aya.md 1.2). Files are huggingface.py's. No jax.
"""

import math

import ml_collections
import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.export import tensors as files

BLOCKS = ("sliding_0", "sliding_1", "sliding_2", "full")  # transformer.BLOCKS, without its jax
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
MOST_T = 8192  # of a folder that says more: what the released models were trained on (tiny_aya.md 1.1)


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


def torch_shapes(cfg):
  """{HF tensor name: its shape there}, in the order of a checkpoint."""
  return {name: _flat(_shape(cfg, path[-1]), path[-1]) for name, (path, _) in tensor_names(cfg).items()}


def size(cfg, dtype):
  """Bytes of a folder's weights."""
  return np.dtype(files.DTYPES[dtype]).itemsize * sum(map(math.prod, torch_shapes(cfg).values()))


def _shape(cfg, name):
  return tuple(getattr(cfg, letter) for letter in name.rpartition("_")[2])


def _flat(shape, name):
  """Our shape -> torch's: inputs are D (or N H, or F) first, and torch puts them last."""
  if len(shape) == 1 or name == "embedding_VD":
    return shape
  inputs = 2 if name == "o_NHD" else 1
  return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def ours(value, shape, name):
  """A matrix of torch's [out, in] -> our `shape` of the parameter `name`, without a copy."""
  return (value.T if value.ndim == 2 and name != "embedding_VD" else value).reshape(shape)


def theirs(value, name):
  """Our parameter `name`, one period of it -> torch's [out, in], without a copy."""
  flat = _flat(value.shape, name)
  return value.reshape(flat[::-1]).T if len(flat) == 2 and name != "embedding_VD" else value


def leaf(tree, path):
  """The leaf of a tree at a path."""
  for key in path:
    tree = tree[key]
  return tree


def tree(found):
  """(path, leaf) of every leaf -> the tree."""
  whole = {}
  for (*parents, name), leaf in found:
    node = whole
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return whole


ONLY = dict(  # what this architecture is, where config.json says anything of it
    use_qk_norm=False, use_parallel_block=True, hidden_act="silu", use_embedding_sharing=True,
    tie_word_embeddings=True, rotary_pct=1.0, rope_scaling=None, position_embedding_type="rope_gptj",
    use_gated_activation=True, quantization_config=None, auto_map=None,
)


def config_in(config, folder):
  """config.json of Cohere2 -> model ConfigDict; refuses what the architecture does not have."""
  def refuse(what):
    raise run.Refused(f"{folder}/config.json: {what}")

  def number(field, default=None, most=2**31, kinds=(int,)):
    given = config.get(field)
    value = default if given is None else given
    if type(value) not in kinds or not 0 < value <= most:  # a bool is no number here
      refuse(f"{field} is {given!r}, expected a {'whole ' * (kinds == (int,))}number above 0")
    return value

  if config.get("model_type") != "cohere2":
    refuse(f"model_type is {config.get('model_type')!r}, expected 'cohere2'")
  layers, pattern = number("num_hidden_layers", most=10_000), config.get("layer_types")
  if layers % 4 or (pattern and pattern != _layer_types(layers)) or (
      not pattern and config.get("sliding_window_pattern", 4) != 4):
    refuse(f"{layers} layers of {str(pattern or config.get('sliding_window_pattern')):.80}: expected "
           "periods of 3 sliding_attention and 1 full_attention")
  for field, only in ONLY.items():
    if config.get(field, only) != only:
      refuse(f"{field} is {config[field]!r:.80}, this architecture has {only!r}")
  rope = config.get("rope_parameters") or {}
  if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
    refuse(f"rope_parameters are {str(rope):.80}, expected those of all sliding layers")
  for field, only in dict(rope_type="default", partial_rotary_factor=1.0).items():
    if rope.get(field, only) != only:
      refuse(f"rope_parameters are {str(rope):.80}, expected {field} {only!r}")
  if len({float(one["rope_theta"]) for one in (config, rope) if isinstance(one.get("rope_theta"), (int, float))}) > 1:
    refuse(f"rope_theta is {config['rope_theta']} and {rope['rope_theta']}: transformers 4 reads the first, 5 the other")
  config = dict(rope_theta=10_000.0) | config | {name: rope[name] for name in ("rope_theta",) if name in rope}
  heads, D = number("num_attention_heads"), number("hidden_size")
  K, H = number("num_key_value_heads", heads), number("head_dim", D // heads or None)
  if heads % K or H % 2:
    refuse(f"{heads} query heads of width {H} on {K} key heads: expected a multiple, and an even width")
  real = dict(most=1e12, kinds=(int, float))
  return ml_collections.ConfigDict(dict(
      D=D, N=heads, K=K, H=H,
      F=number("intermediate_size"),
      V=number("vocab_size"),
      L=layers // 4,
      window=number("sliding_window"),
      rope_theta=float(number("rope_theta", **real)),
      logit_scale=float(number("logit_scale", 0.0625, **real)),  # the class's default
      norm_epsilon=float(number("layer_norm_eps", 1e-5, **real)),
  ))


def config_out(cfg, tokenizer, dtype, T):
  """Model ConfigDict -> config.json; T: the most tokens it was trained on."""
  return described(cfg) | dict(
      attention_dropout=0.0,
      bos_token_id=tokenizer.special("<BOS_TOKEN>"),
      eos_token_id=tokenizer.special("<EOS_TOKEN>"),
      pad_token_id=tokenizer.special("<PAD>"),
      initializer_range=0.02,
      max_position_embeddings=T,
      torch_dtype=dtype,
      use_cache=True,
  )


def described(cfg):
  """What of config.json describes the model, every field of it: transformers 4.57 and 5.x read it alike.

  4.57 and MLX read rope_theta, 5.x rope_parameters; 4.57 takes 10,000 where only 5.x's is there.
  """
  return dict(
      architectures=["Cohere2ForCausalLM"],
      model_type="cohere2",
      attention_bias=False,
      head_dim=cfg.H,
      hidden_act="silu",
      hidden_size=cfg.D,
      intermediate_size=cfg.F,
      layer_norm_eps=cfg.norm_epsilon,
      layer_types=_layer_types(4 * cfg.L),
      logit_scale=cfg.logit_scale,
      num_attention_heads=cfg.N,
      num_hidden_layers=4 * cfg.L,
      num_key_value_heads=cfg.K,
      rope_theta=cfg.rope_theta,
      rope_parameters=dict(rope_type="default", rope_theta=cfg.rope_theta),
      sliding_window=cfg.window,
      sliding_window_pattern=4,  # MLX reads this, and not layer_types
      tie_word_embeddings=True,
      vocab_size=cfg.V,
  )


def _layer_types(layers):
  return (["sliding_attention"] * 3 + ["full_attention"]) * (layers // 4)
