"""Budgets of the full-size step: memory, wire, what overlaps, what must not exist. Compiled, not run.

  BUDGETS=1 python -m pytest tests/test_budgets.py       # libtpu, 4 GiB and some minutes a row

MaxText's peaks are of the same slices, rows and remat, compiled without options (performance.md 7).
"""

import os
import pathlib
import time

import pytest

from tiny_aya_jax import chips, hlo, plan, run

PRETRAIN = pathlib.Path(__file__).parents[1] / "experiments" / "pretrain.py"
GIB = 2**30

pytestmark = pytest.mark.skipif("BUDGETS" not in os.environ, reason="long: BUDGETS=1, check.sh full")


# peak: MaxText's, or the chip's memory where there is no such row.
@pytest.mark.parametrize("topology, rows, remat, peak", [
    ("v5e:4x4", 1, "full", 7.39), ("v5e:4x4", 2, "full", 15.75), ("v5e:4x4", 1, "attn", 9.36),
    ("v5p:2x2x4", 4, "minimal", 80.82), ("v6e:4x4", 2, "attn", 31.24),
    ("v6e:16x16", 2, "attn", 31.24), ("v6e:4x4", 1, "full", 7.16), ("v6e:4x4", 1, "minimal", 23.10),
    ("v6e:4x4", 2, "full", 10.63), ("v5p:2x2x4", 4, "full", 18.29), ("v5e:8x8", 1, "full", 15.75),
])
def test_the_full_step_keeps_its_budget(topology, rows, remat, peak):
  config, target = run.load_config(str(PRETRAIN)), chips.parse(topology)
  config.remat, config.data.batch = remat, rows * target.size
  began = time.monotonic()
  compiled = plan.compile_for(config, plan.mesh_of(config, target))
  memory, text = compiled.memory_analysis(), compiled.as_text()
  found = hlo.collectives(text)
  wire = hlo.wire(found)
  print(f"{topology} {rows} {remat}: peak {memory.peak_memory_in_bytes / GIB:.2f} GiB, wire "
        f"{wire / GIB:.2f} GiB, {hlo.asynchronous_share(found):.1%} asynchronous, compiled in "
        f"{time.monotonic() - began:.0f} s")
  assert memory.peak_memory_in_bytes <= peak * GIB
  assert wire <= 22 * GIB  # 6 N bytes are 18.7
  assert hlo.asynchronous_share(found) >= 0.8
  assert hlo.largest_arrays(text, config.model.V)[0].bytes <= 2 * GIB
  assert not any(array.shape.count(config.data.T) > 1 for array in hlo.largest_arrays(text, config.data.T))
  assert any("splash" in kernel for _, kernel in hlo.custom_calls(text))
