"""Adapters as a folder of PEFT: adapter_config.json and adapter_model.safetensors."""

import pathlib

import jax
import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.export import cohere2, tensors as files
from tiny_aya_jax.model import adapter as adapters

WEIGHTS = "adapter_model.safetensors"


def write(folder, params, adapter):
  """Writes the adapters in params (our tree) as PEFT's files, fp32.

  PEFT counts a product lora_alpha / r times, as we do. The folder holds no base.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  modules = [cohere2.LAYER[name].split(".")[1] for name in adapters.factors(adapter)]
  run.write_json(folder / "adapter_config.json", dict(
      peft_type="LORA", task_type="CAUSAL_LM", r=adapter.R, lora_alpha=adapter.alpha, lora_dropout=0.0,
      target_modules=sorted(modules),
      bias="none", fan_in_fan_out=False, use_rslora=False, inference_mode=True,
      base_model_name_or_path=None,
  ))
  trained = tensors(params, adapter)
  files.write_file(folder / WEIGHTS, {name: value.shape for name, value in trained.items()}, trained.items())


def read(folder):
  """{PEFT's name: array} of a folder that `write` made."""
  return {name: one.read() for name, one in files.open_file(pathlib.Path(folder) / WEIGHTS).items()}


def tensors(params, adapter):
  """{PEFT's name: fp32 array} of the adapters in params: lora_A [R, in] and lora_B [out, R]."""
  trained, found = jax.device_get(adapters.split(params)[0]), {}
  for name, (first, second) in adapters.factors(adapter).items():
    for block, leaves in trained["periods"].items():
      for period, (one, other) in enumerate(zip(leaves[first], leaves[second])):
        layer = 4 * period + cohere2.BLOCKS.index(block)
        place = f"base_model.model.model.layers.{layer}.{cohere2.LAYER[name]}"
        found[f"{place}.lora_A.weight"] = np.ascontiguousarray(one.reshape(-1, adapter.R).T)
        found[f"{place}.lora_B.weight"] = np.ascontiguousarray(other.reshape(adapter.R, -1).T)
  return found
