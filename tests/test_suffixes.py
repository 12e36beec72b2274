"""Suffixes cannot lie: every `name_LETTERS` in the model has that rank, and a letter is one size.

A profile hook looks at the locals of every function in tiny_aya_jax/model as it returns. The test
model gives every letter a size of its own, so a swapped letter is another size somewhere.
"""

import contextlib
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

from conftest import backends
from tiny_aya_jax import model
from tiny_aya_jax.model import attention, attention_splash, decode, divergence, losses, transformer
from tiny_aya_jax.model.transformer import TinyAya

MODEL = str(pathlib.Path(model.__file__).parent)
SUFFIXED = re.compile(r"[a-z0-9_]*_([A-Z]+)")


@contextlib.contextmanager
def checked(folder):
  """Collects (lies, names looked at) from every function below `folder` that returns inside."""
  lies, seen = [], set()

  def hook(frame, event, _):
    if event == "return" and frame.f_code.co_filename.startswith(folder):
      where = f"{pathlib.Path(frame.f_code.co_filename).name} {frame.f_code.co_qualname}"
      lies.extend(f"{where}: {lie}" for lie in lies_among(frame.f_locals, seen))

  before = sys.getprofile()
  sys.setprofile(hook)
  try:
    yield lies, seen
  finally:
    sys.setprofile(before)


def lies_among(names, seen):
  """A sentence for each name whose rank is not its letters or whose sizes contradict another's."""
  sizes = {}  # letter -> (size, the name it was first seen in)
  for name, value in names.items():
    suffix, shape = SUFFIXED.fullmatch(name), getattr(value, "shape", None)
    if not suffix or not isinstance(shape, tuple):
      continue
    seen.add(name)
    letters = suffix.group(1)
    if len(shape) != len(letters):
      yield f"{name} has shape {shape}"
      continue
    for letter, size in zip(letters, shape):
      known, other = sizes.setdefault(letter, (size, name))
      if size != known:
        yield f"{name} has {letter}={size}, {other} has {letter}={known}"


@pytest.mark.parametrize("backend", backends())
def test_no_suffix_lies_in_forward_loss_and_backward(cfg, params, batch, backend, monkeypatch):
  monkeypatch.setattr(attention, "CHUNK", 12)
  monkeypatch.setattr(attention_splash, "INTERPRET", True)
  jax.clear_caches()  # what another test traced before would not be traced, and not be seen

  def loss(params, batch):
    hidden_BTD = TinyAya(cfg, backend=backend, remat="full").apply(
      {"params": params}, batch["token_BT"], batch["segment_BT"], batch["position_BT"]
    )
    transformer.logits(params, hidden_BTD, cfg)
    return losses.next_token(
      hidden_BTD,
      params["embedding_VD"],
      batch["target_BT"],
      batch["weight_BT"],
      logit_scale=cfg.logit_scale,
      z_loss=1e-3,
      chunk=7,
    )[0]

  with checked(MODEL) as (lies, seen):
    jax.make_jaxpr(jax.grad(loss))(params, batch)
  assert not lies
  expected = {"x_BTD", "q_BTNH", "score_BKGTS", "gate_BTF", "logits_BTV", "d_head_VD"}
  assert expected - ({"score_BKGTS"} if backend == "splash" else set()) <= seen


def test_no_suffix_lies_in_divergence(cfg, params, batch):
  def compare(params, batch):
    hidden, _ = divergence.states(TinyAya(cfg), (params, params), batch)
    return divergence.predictions([cfg, cfg], (params, params), hidden, chunk=7)

  with checked(MODEL) as (lies, seen):
    jax.make_jaxpr(compare)(params, batch)
  assert not lies
  assert {"x_BTD", "head_VD", "a_BTV", "p_b_BTV", "log_BTV"} <= seen


def test_no_suffix_lies_in_decoding(cfg, params):
  rows = np.random.default_rng(0).integers(0, cfg.V, (3, 13)).tolist()
  with checked(MODEL) as (lies, seen):  # settings of no other test: nothing is traced already
    decode.generate(params, cfg, [*rows, rows[0][:3]], steps=7, temperature=1.7, top_p=0.9)
  assert not lies
  assert {"kept_LBTKH", "k_BSKH", "position_BS", "logits_BV", "stopped_B"} <= seen


def test_the_sizes_of_the_test_model_tell_the_letters_apart(cfg, batch):
  sizes = [cfg[letter] for letter in "DNKHFVL"] + [cfg.N // cfg.K, *batch["token_BT"].shape]
  assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(
  "shape, lie",
  [
    ((8, 20), "x_BTD has shape"),
    ((8, 32, 20), "T=32"),
    ((2, 8, 20, 32), "x_BTD has shape"),
  ],
)
def test_a_lie_is_found(shape, lie):
  def liar():
    token_BT = np.zeros((8, 20))
    x_BTD = np.zeros(shape)
    return token_BT, x_BTD

  with checked(str(pathlib.Path(__file__).parent)) as (lies, _):
    liar()
  assert len(lies) == 1 and lie in lies[0]
