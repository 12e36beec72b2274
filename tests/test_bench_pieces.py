"""Sides of a piece compute the same, their lines say what was measured, no row ends the table."""

import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest

from tiny_aya_jax import bench, run

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "experiments" / "bench.py") + ":pieces"
TABLE = ROOT / "launch" / "gpu_table.py"
TINY = dict(
    lengths=(40,), turns=1, T=24, batches=(2,), batch=2, loss_chunk=8, threads=99, tolerance=1e-4,
    model=dict(D=16, N=2, K=1, H=8, F=24, V=48, L=1, window=32),
)


def config(**fields):
  config = run.load_config(CONFIG)
  config.update(TINY | fields)
  return config


@pytest.fixture(scope="module")
def pieces():
  from tiny_aya_jax import bench_pieces

  return bench_pieces


@pytest.fixture(scope="module")
def steps():
  from tiny_aya_jax import bench_steps

  return bench_steps


@pytest.fixture(scope="module")
def table():
  return runpy.run_path(str(TABLE))


def test_sides_of_attention_loss_and_block_agree_and_every_one_has_its_time_and_memory(capsys):
  bench.main(config(pieces=("attention", "loss", "block"), remats=("none", "full")))
  said = capsys.readouterr().out
  assert said.count("attention T 40, ") == 4
  assert "windowed over full" in said and "attention T 40: packing costs" in said
  for side in ("reference", "recompute tile", "materialised", "full", "plain"):
    assert f"; {side} " in said
  assert said.count(" GiB") == 4 * 2 + 3 + 3


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_every_loss_is_the_definition_with_its_gradients(pieces, scale):
  import jax

  random = np.random.default_rng(0)
  hidden_BTD, table_VD = random.normal(size=(2, 16, 5)), random.normal(size=(11, 5))
  inputs = np.float32(hidden_BTD), np.float32(table_VD), random.integers(0, 11, (2, 16), np.int32)
  found = {
      name: jax.value_and_grad(lambda *x: 3 * loss(*x, logit_scale=scale, chunk=4), (0, 1))(*inputs)
      for name, loss in pieces.LOSSES.items()
  }
  for theirs in found.values():
    for a, b in zip(jax.tree.leaves(found["materialised"]), jax.tree.leaves(theirs), strict=True):
      np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_sides_that_compute_something_else_are_refused(pieces, monkeypatch):
  monkeypatch.setitem(pieces.LOSSES, "materialised", lambda *x, **settings: 1.01 * pieces._fused(
      *x, **settings))
  with pytest.raises(run.Refused, match="loss T 40: materialised differs from ours by 9|1.0.e-02"):
    bench.main(config(pieces=("loss",)))


def test_steps_of_two_processes_take_turns_agree_and_are_said_as_measured(capfd):
  bench.main(config(pieces=("step",)))
  said = capfd.readouterr().out
  ours, plain = said.index("turn 1/1: ours "), said.index("turn 1/1: plain ")
  assert ours < plain < said.index("losses, plain: ") < said.index("step: ours / plain ")


def test_what_safety_costs_is_measured_against_a_step_that_differs_in_nothing_else(capfd, steps, ours):
  bench.main(config(pieces=("guards",)))
  said = capfd.readouterr().out
  assert "of one that applies every update" in said and "is committed after" in said
  assert losses(steps, "unguarded") == ours


def test_eight_bits_move_the_first_losses_little(pieces, steps, ours):
  found = losses(steps, "fp8")
  assert found != ours
  np.testing.assert_allclose(found, ours, rtol=pieces.FP8)


@pytest.mark.parametrize("side", ["tuned", "transformers"])
def test_the_steps_in_pytorch_are_ours(steps, ours, monkeypatch, side):
  torch = pytest.importorskip("torch")
  monkeypatch.setattr(torch, "compile", lambda function, **_: function)
  np.testing.assert_allclose(losses(steps, side), ours, rtol=2e-5)


@pytest.fixture(scope="module")
def ours(steps):
  return losses(steps, "ours")


def losses(steps, side):
  """Losses of a side's first steps, in this process; wide weights and three windows a row."""
  model = TINY["model"] | dict(window=8, logit_scale=0.7)
  given = steps.Fields(config(model=model).to_dict() | dict(side=side, begun=0))
  params = steps._params(given)
  for block in params["periods"].values():
    for weight in block.keys() - {"norm_D"}:
      block[weight] = block[weight] * 20
  return steps._train(given, params, 2)["losses"]


@pytest.mark.parametrize("fields, said", [
    (dict(pieces=("atention",)), "did you mean 'attention'"),
    (dict(turns=0), "config.turns is 0"),
    (dict(lengths=(0,)), "config.lengths is \\(0,\\)"),
    (dict(matmul="fp4"), "config.matmul 'fp4'"),
    (dict(attention="chunky"), "did you mean 'chunked'"),
])
def test_a_wrong_choice_is_refused(fields, said):
  with pytest.raises(run.Refused, match=said):
    bench.main(config(**fields))


def test_pieces_are_those_that_bench_names(pieces):
  assert tuple(pieces.PIECES) == bench.PIECES


def test_the_table_needs_neither_grain_nor_ml_collections():
  code = (f"import runpy, sys; runpy.run_path({str(TABLE)!r}); "
          "import tiny_aya_jax.bench; print({'grain', 'ml_collections'} & set(sys.modules))")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "set()"


def test_the_table_is_of_the_model_that_is_pretrained(table):
  pretrain = run.load_config(str(ROOT / "experiments" / "pretrain.py"))
  assert table["CONFIG"]["model"] == pretrain.model.to_dict()
  assert table["CONFIG"]["T"] == pretrain.data.T


def test_a_row_that_fails_says_why_and_has_no_figure(steps, table):
  def fails():
    raise steps.Unmeasured("no such kernel")

  fields = table["CONFIG"]
  line = table["row"]("G3", fails, fields, "NVIDIA H200")
  assert line.endswith("unmeasured: no such kernel |") and line.startswith("G3, 36 layers")
  line = table["row"]("G3", lambda: 1 / 0, fields, "NVIDIA H200")
  assert "unmeasured: ZeroDivisionError" in line


@pytest.mark.parametrize("name, figure, said", [
    ("G2", 1.5, "target met"), ("G2", 1.3, "must met, target missed"), ("G2", 1.2, "must missed"),
    ("G9", 62, "target met"), ("G9", 66, "must met, target missed"), ("G9", 71, "must missed"),
])
def test_a_verdict_is_for_the_goals_machine_and_sizes_only(table, name, figure, said):
  fields = table["CONFIG"]
  assert table["verdict"](name, figure, fields, "NVIDIA H200") == said
  assert "no verdict" in table["verdict"](name, figure, fields, "cpu")
  assert "no verdict" in table["verdict"](name, figure, fields | dict(T=128), "NVIDIA H200")


def test_a_side_that_fails_or_is_late_is_unmeasured(steps):
  with pytest.raises(steps.Unmeasured, match="KeyError: 'nobody'"):
    steps.call(config().to_dict(), side="nobody")
  with pytest.raises(steps.Unmeasured, match="the time is up"):
    steps.call(config().to_dict(), deadline=0)
