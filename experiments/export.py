"""A checkpoint of any stage -> a Hugging Face folder, read back and compared.

  python -m tiny_aya_jax export --config=experiments/export.py --workdir=runs \\
      --config.checkpoint=runs/sft --config.tokenizer=runs/vocab/tokenizer.model --config.name=global

Expected: WORKDIR/NAME with config.json, model.safetensors, tokenizer.json, parity.json and a card;
with --config.form=adapter, adapter_config.json, adapter_model.safetensors, parity.json and a card.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "tiny"))
  c = ConfigDict()
  c.checkpoint = config_dict.placeholder(str)
  c.tokenizer = config_dict.placeholder(str)
  c.name = "huggingface"
  c.form = "merged"  # or "adapter": of a run with adapters, these alone, as float32 for PEFT
  c.dtype = "bfloat16" if variant == "full" else "float32"  # the released weights are bfloat16
  c.report = config_dict.placeholder(str)  # a workdir of evaluate: its page goes along, and its summary
  c.overwrite = False
  return c
