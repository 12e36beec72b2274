"""plan: what is said before chips are rented, against numbers that compiling gave."""

import math
import os
import pathlib
import types

import numpy as np
import pytest

from tiny_aya_jax import chips, hlo, plan, run

PRETRAIN = pathlib.Path(__file__).parents[1] / "experiments" / "pretrain.py"
# Even a tiny step takes libtpu two minutes, and this test compiles four.
long = pytest.mark.skipif("BUDGETS" not in os.environ, reason="long: BUDGETS=1, check.sh full")


def full(**values):
  """pretrain.py with some fields changed: full(remat="attn", **{"mesh.data": 2})."""
  return plan._changed(run.load_config(str(PRETRAIN)), values)


# Compiled with jax 0.10.2 and libtpu 0.0.42.1 (LOG.md 2026-11-25): GiB a chip.
@pytest.mark.parametrize("chips, rows, accumulate, remat, peak", [
    (16, 1, 1, "full", 6.01), (16, 4, 1, "minimal", 76.51), (16, 2, 1, "attn", 10.82),
    (8, 1, 32, "qkv", 14.39),
])
def test_the_estimate_is_near_what_compiling_found(chips, rows, accumulate, remat, peak):
  config = full(remat=remat, accumulate=accumulate, **{"data.batch": chips * rows * accumulate})
  found = sum(plan.estimate(config, dict(data=1, fsdp=chips, tensor=1, context=1)).values())
  assert abs(found / plan.GIB / peak - 1) < 0.13


def made(config, name="v5e:4x4", wire=((True, 12.0), (False, 2.0))):
  """An Answer as compiling would give it."""
  found = [
      hlo.Collective("c", "all-gather", int(gib * plan.GIB), 1, asynchronous, 16, "bf16[1]")
      for asynchronous, gib in wire
  ]
  mesh = dict(data=1, fsdp=16, tensor=1, context=1)
  return plan.Answer(
      chips.parse(name), mesh, True, 8 * plan.GIB, {"parameters": plan.GIB}, 40 * plan.GIB, 1.0, found,
      90e9, "attention splash",
  )


def test_speed_is_bounded_by_matmuls_and_by_the_wire():
  config = full(**{"data.batch": 16})
  one = made(config)
  hidden, exposed, planned = (plan.speed(config, one, how) for how in ("hidden", "exposed", "planned"))
  assert planned < exposed < hidden
  assert 0.7 < plan._mfu(config, one, hidden) < 1  # what is computed twice is not counted
  assert math.isclose(plan._mfu(config, one, planned), plan.PLANNED_MFU)
  slow = made(config, wire=((True, 1000.0),))
  tokens, seconds = 16 * 8192, 1000 * plan.GIB * 15 / 16 / 90e9
  assert math.isclose(plan.speed(config, slow, "hidden"), tokens / seconds, rel_tol=1e-6)


def test_the_wire_of_a_mesh_is_of_the_torus_axes_that_share_the_state():
  target = chips.parse("v6e:16x16")
  places = np.array([types.SimpleNamespace(coords=(x, y, 0)) for y in range(16) for x in range(16)])
  for context in (1, 4):  # fsdp lies along x, data and context along y
    mesh = types.SimpleNamespace(devices=places.reshape(16 // context, context, 16, 1).transpose(0, 2, 3, 1))
    assert plan._bandwidth(target, mesh) == 2 * target.chip.link


def test_the_report_has_money_days_and_headroom():
  config = full(price=2.0, **{"data.batch": 16})
  text = "\n".join(plan.report(config, made(config)))
  days = config.steps * 16 * 8192 / plan.speed(config, made(config), "planned") / 86_400
  assert f"{days:,.1f} to plan with" in text and f"{16 * 24 * days * 2:,.0f} USD at 2.00" in text
  assert "49% free" in text and "23.04 GFLOP a token" in text and "40.0 GiB every 1000 steps" in text
  assert chips.PRICED not in text and chips.PRICED in "\n".join(
      plan.report(full(**{"data.batch": 16}), made(config)))


def test_what_to_change_begins_with_the_slice_asked_for():
  config = full(topology="v5e:4x4", **{"data.batch": 64})  # four rows a chip
  ranked = plan.changes(config, chips.parse("v5e:4x4"))
  bytes, slice, values = ranked[0]
  assert slice.name == "v5e:4x4" and bytes < 15.75 * plan.GIB
  assert "--config.accumulate=" in plan.words(config, values)
  assert "topology" not in plan.words(config, values)
  sizes = [slice.size for _, slice, _ in ranked]
  assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_a_slice_too_small_for_the_state_is_answered_with_a_larger_one():
  ranked = plan.changes(full(topology="v5e:2x2"), chips.parse("v5e:2x2"))
  assert ranked[0][1].size > 4 and "--config.topology=v5e:" in plan.words(full(), ranked[0][2])


def test_a_mesh_that_does_not_cover_a_slice_gives_way_to_one_that_does():
  assert plan._covering(full(), chips.parse("v5e:2x4")) == {"mesh.fsdp": 8}
  assert plan._covering(full(), chips.parse("v5e:4x8")) == {}
  assert plan._covering(full(**{"mesh.tensor": 3}), chips.parse("v5e:2x4")) == {}


def test_what_a_program_asked_for_is_read_from_the_refusal_of_xla():
  error = RuntimeError("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Used 18.50G of 15.75G hbm. Exceeded")
  assert plan._asked(error) == 18.5 * plan.GIB
  error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                       "temporaries (128.5G) exceeds available HBM (15.75G).")
  assert plan._asked(error) == 128.5 * plan.GIB
  with pytest.raises(RuntimeError, match="another"):
    plan._asked(RuntimeError("another"))


def test_epochs_are_told_of_every_language_before_there_are_rows():
  text = "\n".join(plan.epochs(full()))
  assert "FineWeb-2" in text and text.count("_") > 70 and "Africa" in text


@long
def test_a_step_is_planned_and_when_it_does_not_fit_the_first_change_does(monkeypatch, capsys):
  small = dict(D=256, N=2, K=1, H=128, F=512, V=1024, L=1, window=128)
  config = full(**{f"model.{name}": value for name, value in small.items()},
                **{"data.batch": 64, "data.T": 512, "mesh.fsdp": -1, "mesh.data": 1, "loss.chunk": 128},
                topology="v5e:2x2,v5e:2x4", steps=1000)
  config.schedule.warmup_steps = 10
  assert plan.main(config) == 0
  said = capsys.readouterr().out
  assert "v5e:2x2: fits" in said and "v5e:2x4: fits" in said and "splash" in said and "tokens/s" in said
  peak = float(said.partition("peak ")[2].split()[0])
  monkeypatch.setitem(chips.CHIPS, "v5e", chips.CHIPS["v5e"]._replace(hbm_gib=0.7 * peak))
  config.topology = "v5e:2x2"
  assert plan.main(config) == 65
  said = capsys.readouterr().out
  assert "v5e:2x2: does NOT fit" in said
  first = said.partition("trying ")[2]
  assert "accumulate" in first.splitlines()[0] and ": fits" in first.splitlines()[1]
