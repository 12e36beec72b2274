"""Trials trained together have the losses that they have apart, and both ways are timed."""

import pathlib

import numpy as np
import pytest

from tiny_aya_jax import bench, run

CONFIG = str(pathlib.Path(__file__).parents[1] / "experiments" / "bench.py") + ":population"
TINY = dict(
    populations=(4,), devices=2, turns=1, steps=1, T=24, batch=2, loss_chunk=8, threads=99,
    tokens=480,
    model=dict(D=16, N=2, K=1, H=8, F=24, V=48, L=1, window=8),
)


def config(**fields):
  config = run.load_config(CONFIG)
  config.update(TINY | fields)
  return config


def test_trials_of_other_data_and_rates_lose_the_same_together_and_apart(capsys, monkeypatch):
  from tiny_aya_jax.model import transformer

  monkeypatch.setattr(transformer, "BLOCKS", ("sliding_0", "full"))  # one of a kind compiles sooner
  bench.main(config())
  said = capsys.readouterr().out
  together, apart = (np.array(said.partition(f"losses, {side}: ")[2].splitlines()[0].split(), float)
                     for side in ("together", "apart"))
  assert len(set(apart)) == 4
  np.testing.assert_allclose(together, apart, rtol=1e-5)
  assert "2 x cpu" in said and said.count(" trials an hour;") == 2 and "together / apart " in said


@pytest.mark.parametrize("fields, said", [
    (dict(populations=(3,)), "populations \\(3,\\)"),
    (dict(batch=3), "a batch of 3"),
    (dict(devices=99), "config.devices is 99 of 8"),
    (dict(steps=0), "config.steps is 0"),
])
def test_what_cannot_be_compared_is_refused(fields, said):
  with pytest.raises(run.Refused, match=said):
    bench.main(config(**fields))
