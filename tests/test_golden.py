"""What must not move by accident: every experiment's fields, the first losses, and no dead options.

When a change here is meant, write the new values with
  GOLDEN=write python -m pytest tests/test_golden.py
and say in the commit what moved and why.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from conftest import random_batch, random_params
from test_run import CASES, leaves

from tiny_aya_jax import run
from tiny_aya_jax.model import attention_splash
from tiny_aya_jax.model.transformer import TinyAya
from tiny_aya_jax.train import fields, guard, optimizer, step

GOLDEN = pathlib.Path(__file__).parent / "golden"


def compare(name, text):
  path = GOLDEN / name
  if os.environ.get("GOLDEN") == "write":
    path.write_text(text, encoding="utf-8")
  assert path.read_text(encoding="utf-8") == text, (
      f"{path.name} moved: if that is meant, GOLDEN=write python -m pytest tests/test_golden.py"
  )


@pytest.mark.parametrize("path, variant", CASES, ids=lambda x: getattr(x, "stem", x))
def test_experiments_are_what_they_were(path, variant):
  config = run.load_config(f"{path}:{variant}")
  fields = sorted(f"{name} = {value!r}" for name, value in leaves(config))
  compare(f"{path.stem}_{variant}.txt", "\n".join(fields) + "\n")


def three_steps(cfg, **settings):
  model = TinyAya(cfg, **settings)
  loss = functools.partial(step.next_token_loss, model=model,
                           config=ml_collections.ConfigDict(dict(chunk=8, z_loss=1e-4)))
  params = random_params(cfg, seed=5)
  tx = optax.adamw(1e-2, mask=optimizer.decay_mask)
  state = dict(step=jnp.int32(0), params=params, optimizer=tx.init(params), guard=guard.fresh(128))
  advance = jax.jit(functools.partial(
      step.train_step, loss=loss, tx=tx, accumulate=1, sources=2, sigma=6.0))
  losses = []
  for seed in range(3):
    batch = random_batch(cfg.V, ((7, 13), (20,), (1, 2, 9), (11, 6, 3)), 20, seed)
    row_B = dict(source_B=np.array([0, 1, 0, 1], np.int32), vote_P=np.zeros(1, np.int32))
    state, report = advance(state, batch | row_B)
    losses.append(float(report["loss"]))
  return losses


def test_the_first_losses_are_golden(cfg):
  losses = three_steps(cfg)
  path = GOLDEN / "losses.txt"
  if os.environ.get("GOLDEN") == "write":
    path.write_text(" ".join(f"{loss:.6f}" for loss in losses) + "\n")
  np.testing.assert_allclose(
      losses, [float(word) for word in path.read_text().split()], rtol=1e-4,
      err_msg="if the model is meant to change: GOLDEN=write python -m pytest tests/test_golden.py",
  )


def test_no_choice_of_the_model_is_dead(cfg, params, batch, monkeypatch):
  rows = batch["token_BT"], batch["segment_BT"], batch["position_BT"]

  monkeypatch.setattr(attention_splash, "INTERPRET", True)

  def program(**settings):
    model = TinyAya(cfg, **settings)
    return jax.jit(jax.grad(lambda params: model.apply({"params": params}, *rows).sum())).lower(
        params).as_text()

  variants = [dict(backend=backend) for backend in run.CHOICES["attention"] if backend != "cudnn"]
  variants += [dict(remat=remat) for remat in run.CHOICES["remat"][1:]]
  variants += [dict(dtype=jnp.dtype(dtype)) for dtype in run.CHOICES["dtype"][1:]] + [dict(unroll=2)]
  variants += [dict(matmul=matmul) for matmul in run.CHOICES["matmul"][1:]]
  assert len({program(**settings) for settings in variants}) == len(variants)


def test_no_schedule_is_another_under_a_second_name():
  config = run.load_config(str(pathlib.Path(__file__).parents[1] / "experiments/pretrain.py")).schedule
  config.update(warmup_steps=5, decay_steps=20, peak=1.0)
  curves = set()
  for shape in fields.SHAPES:
    config.shape = shape
    rate = optimizer.schedule(config, steps=100)
    curves.add(tuple(float(rate(step)) for step in range(0, 100, 9)))
  assert len(curves) == len(fields.SHAPES)
