"""The loader's benchmark runs, says what it compares, and leaves out who is not there."""

import pathlib

import pytest

from tiny_aya_jax import bench, bench_loader, run

CONFIG = str(pathlib.Path(__file__).parents[1] / "experiments" / "bench.py") + ":loader"


def config(**fields):
  config = run.load_config(CONFIG)
  config.update(dict(T=16, rows=2, batch=4, turns=2, batches=2, long=3) | fields)
  return config


def test_every_side_is_timed_once_a_turn_and_a_missing_one_is_named(capsys, monkeypatch):
  find = bench_loader.importlib.util.find_spec
  monkeypatch.setattr(bench_loader.importlib.util, "find_spec",
                      lambda name: None if name == "datasets" else find(name))
  speed = bench_loader.main(config())
  assert list(speed) == ["loader[step]", "loader.batches", "grain"]
  assert all(len(turns) == 2 and min(turns) > 0 for turns in speed.values())
  said = capsys.readouterr().out
  assert "datasets is not installed, so it is left out" in said and "grain 0." in said
  assert "210 sources of 2 rows of T 16" in said and "KiB a batch" in said
  assert said.count("of it") == 4


@pytest.mark.parametrize("fields, said", [
    (dict(turns=0), "config.turns is 0"),
    (dict(against=("grian",)), "did you mean 'grain'"),
    (dict(bench="loadr"), "did you mean 'loader'"),
])
def test_a_wrong_benchmark_is_refused(fields, said):
  with pytest.raises(run.Refused, match=said):
    bench.main(config(**fields))
