"""Rows of two processes make one batch, also where the axis context goes from one to the other."""

import socket
import subprocess
import sys

import pytest

WORKER = """
import sys
import jax, numpy as np
port, process, sizes = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{port}", 2, process)
from tiny_aya_jax import axes
from tiny_aya_jax.data import loader

mesh = axes.mesh(**sizes)
whole_BT = np.arange(16 * 8, dtype=np.int32).reshape(16, 8)
index, count = axes.process_part(mesh)
own_BT = whole_BT[loader._slice(16, (index, count))]
placed = axes.place(mesh, dict(token_BT=own_BT, source_B=own_BT[:, 0]))
assert placed["token_BT"].shape == (16, 8) and placed["source_B"].shape == (16,)
for name, whole in dict(token_BT=whole_BT, source_B=whole_BT[:, 0]).items():
  for piece in placed[name].addressable_shards:
    np.testing.assert_array_equal(piece.data, whole[piece.index])
print("part", index, "of", count)
"""


@pytest.mark.parametrize("sizes, said", [
    (dict(fsdp=8), ["part 0 of 2", "part 1 of 2"]),
    (dict(data=2, fsdp=2, tensor=2), ["part 0 of 2", "part 1 of 2"]),
    (dict(fsdp=4, context=2), ["part 0 of 1", "part 0 of 1"]),
    (dict(data=2, fsdp=2, context=2), ["part 0 of 2", "part 1 of 2"]),
    (dict(fsdp=1, context=4, tensor=2), ["part 0 of 1", "part 0 of 1"]),
], ids=str)
def test_what_two_processes_read_is_one_batch(sizes, said):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  workers = [
      subprocess.Popen([sys.executable, "-c", WORKER, str(port), str(process), str(sizes)],
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for process in range(2)
  ]
  ends = [worker.communicate(timeout=120) for worker in workers]
  assert [worker.returncode for worker in workers] == [0, 0], ends[0][1][-2000:] + ends[1][1][-2000:]
  assert [out.splitlines()[-1] for out, _ in ends] == said
