"""Compiles the full-size training step for a TPU slice, on a machine without a TPU.

  pip install "jax[tpu]==0.10.2"
  PYTHONPATH=. python launch/tpu_lowering.py [--topology=v5e:4x4, 2xv5e:4x4: two slices] \
      [--rows=1] [--remat=full]

rows: sequences of 8,192 a chip. Prints versions, compile seconds, peak memory a chip, and the wire:
bytes of whole tensors that a chip moves in a step, by kind of collective (hlo.py). It proves that
the program compiles and fits; it does not run it, and says nothing about speed.
"""

import argparse
import os
import pathlib
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
from jax.experimental import topologies

from tiny_aya_jax import axes, chips, hlo, run
from tiny_aya_jax.train import optimizer, proof, step

PRETRAIN = str(pathlib.Path(__file__).parents[1] / "experiments" / "pretrain.py")
GIB = 2**30


def main():
  asked = parse()
  target = chips.parse(asked.topology)
  config = run.load_config(PRETRAIN)
  config.remat, config.data.batch = asked.remat, asked.rows * target.size
  config.mesh.fsdp, config.mesh.data = asked.fsdp, -1
  mesh = axes.mesh(**config.mesh.to_dict(), devices=devices(target))
  print(", ".join(f"{name} {importlib.metadata.version(name)}"
                  for name in ("jax", "jaxlib", "libtpu", "flax")))
  print(f"{target.name}, mesh {dict(mesh.shape)}, {asked.rows} x {config.data.T} a chip, "
        f"remat {config.remat}, attention {config.attention}", flush=True)
  begin = time.monotonic()
  sources = 70  # one a language
  rate = optimizer.schedule(config.schedule, config.steps)
  compiled = step.compiled(config, mesh, rate, sources)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  found = hlo.collectives(text)
  print(
      f"compiled in {time.monotonic() - begin:.0f} s; peak "
      f"{memory.peak_memory_in_bytes / GIB:.2f} of {target.chip.hbm_gib} GiB a chip, "
      f"{memory.argument_size_in_bytes / GIB:.2f} of it state; wire {hlo.wire(found) / GIB:.2f} GiB, "
      f"{hlo.asynchronous_share(found):.0%} asynchronous"
  )
  print(hlo.table(found))
  print(proof.kernels(text, config.attention, config.matmul))


def parse():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v5e:4x4")
  parser.add_argument("--rows", type=int, default=1, help="sequences a chip")
  parser.add_argument("--remat", default="full", choices=run.CHOICES["remat"])
  parser.add_argument("--fsdp", type=int, default=16, help="chips that share the state; data: the rest")
  return parser.parse_args()


def devices(target):
  """Devices of slices that are not there: something to compile for."""
  settings = dict(chip_config_name="megacore") if target.chip.config_name == "megacore" else {}
  if target.chip.axes == 2 and any(target.wrap):
    settings["wrap"] = (*target.wrap, False)
  shape = "x".join(map(str, target.shape))
  return topologies.get_topology_desc(
      f"{target.chip.platform_name}:{shape}", "tpu", chips_per_host_bounds=(2, 2, 1),
      num_slices=target.slices, **settings
  ).devices


if __name__ == "__main__":
  main()
