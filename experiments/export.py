"""A checkpoint of any stage, or a Hugging Face folder -> a Hugging Face folder, and GGUF files; with proof.

  python -m tiny_aya_jax export --config=experiments/export.py --workdir=runs \\
      --config.checkpoint=runs/sft --config.tokenizer=runs/vocab/tokenizer.model --config.name=global \\
      --config.gguf.kinds="('BF16', 'Q8_0', 'Q4_0')" --config.gguf.rows=runs/data/validation

Expected: WORKDIR/NAME with config.json, model.safetensors, tokenizer.json, parity.json, a card, and
NAME-<kind>.gguf; with --config.form=adapter, adapter_config.json, adapter_model.safetensors,
parity.json and a card. parity.json is the proof (export/proof.py).
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "tiny"))
  c = ConfigDict()
  c.checkpoint = config_dict.placeholder(str)  # a workdir, a checkpoint, or a Hugging Face folder
  c.tokenizer = config_dict.placeholder(str)  # not of a folder, which has its own
  c.name = "huggingface"
  c.form = "merged"  # or "adapter": of a run with adapters, these alone, as float32 for PEFT
  c.dtype = "bfloat16" if variant == "full" else "float32"  # the released weights are bfloat16
  c.gguf = ConfigDict(dict(
      kinds=(),  # F32, F16, BF16, Q8_0, Q4_0; with llama.cpp also Q4_K_M and its like
      rows=config_dict.placeholder(str),  # packed validation rows: bits per byte of each kind
      batch=32, chunk=512 if variant == "full" else 64,  # rows at a time, positions whose logits exist at a time
      pre=config_dict.placeholder(str),  # llama.cpp's name of a byte-level pre-tokenizer that is not recognised
  ))
  c.proof = ConfigDict(dict(
      tokens=64 if variant == "full" else 256,  # of a row, at most: ours; 131 are two windows of the tiny model
      greedy=8,  # tokens that are continued
      # Pythons that have these; not set: this one, if it does
      transformers=config_dict.placeholder(str), mlx=config_dict.placeholder(str),
      llama_cpp=config_dict.placeholder(str),
      bytes=4e9,  # of fp32 weights that transformers and mlx may load: they hold the whole model
  ))
  c.report = config_dict.placeholder(str)  # a workdir of evaluate: its page goes along, and its summary
  c.overwrite = False
  return c
