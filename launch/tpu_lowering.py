"""Lowers and compiles the full-size forward pass for a TPU pod slice, on a machine without a TPU.

  pip install "jax[tpu]==0.10.2"
  PYTHONPATH=. python launch/tpu_lowering.py [--topology=v5e:4x4] [--batch=16] [--T=8192]

Prints versions, shapes, compile seconds, peak memory a chip and the collectives of the optimised
program. It proves that the program compiles and fits; it does not run it, and says nothing about
speed. One sequence a chip (batch 16, fsdp 16) is how a pretraining step sees the forward pass.
"""

import argparse
import collections
import os
import pathlib
import re
import time

# A compile-only client: no metadata server, no chip, no lock against other processes.
os.environ.update(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  TPU_LOG_DIR="disabled",
  TPU_WORKER_HOSTNAMES="localhost",
)

import importlib.metadata

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from tiny_aya_jax import axes, run
from tiny_aya_jax.model import transformer

PRETRAIN = str(pathlib.Path(__file__).parents[1] / "experiments" / "pretrain.py")
COLLECTIVES = (
  r"= \S.*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
GIB = 2**30


def main():
  asked = parse()
  topology = topologies.get_topology_desc(asked.topology, "tpu", chips_per_host_bounds=(2, 2, 1))
  mesh = axes.mesh(fsdp=-1, devices=topology.devices)
  for package in ("jax", "jaxlib", "libtpu", "flax"):
    print(package, importlib.metadata.version(package))
  if asked.batch % mesh.shape["fsdp"]:
    raise run.Refused(f"--batch={asked.batch} does not split over {mesh.shape['fsdp']} chips")
  print("topology", asked.topology, topology.devices[0].device_kind, "mesh", dict(mesh.shape))
  with jax.set_mesh(mesh):
    start = time.monotonic()
    lowered = lower(mesh, asked.batch, asked.T)
    print(f"lower {time.monotonic() - start:.1f} s", flush=True)
    start = time.monotonic()
    compiled = lowered.compile()
    print(f"compile {time.monotonic() - start:.1f} s")
  report(compiled)


def parse():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v5e:4x4")
  parser.add_argument("--batch", type=int, default=16, help="sequences")
  parser.add_argument("--T", type=int, default=8192, help="tokens of a sequence")
  return parser.parse_args()


def lower(mesh, B, T):
  """tokens [B, T] -> hidden states [B, T, D] in bfloat16, parameters fp32 and sharded by name."""
  model = transformer.TinyAya(run.load_config(PRETRAIN).model, dtype=jnp.bfloat16, backend="chunked")
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  token_BT = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows)
  params = jax.eval_shape(  # the key inside: these devices cannot run anything
    lambda *batch: model.init(jax.random.key(0), *batch), token_BT, token_BT, token_BT
  )["params"]
  params = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    params,
    axes.shardings(mesh, params),
  )
  print("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}", "tokens", (B, T))

  @jax.jit
  def forward(params, token_BT, segment_BT, position_BT):
    return model.apply({"params": params}, token_BT, segment_BT, position_BT)

  return forward.lower(params, token_BT, token_BT, token_BT)


def report(compiled):
  memory = compiled.memory_analysis()
  print(
    f"a chip holds {memory.argument_size_in_bytes / GIB:.2f} GiB of arguments, "
    f"{memory.temp_size_in_bytes / GIB:.2f} GiB of temporaries, "
    f"peak {memory.peak_memory_in_bytes / GIB:.2f} GiB"
  )
  output = jax.tree.leaves(compiled.out_info)[0]
  print("hidden_BTD", output.shape, output.dtype, compiled.output_shardings.spec)
  print("collectives", dict(collections.Counter(re.findall(COLLECTIVES, compiled.as_text()))))


if __name__ == "__main__":
  main()
