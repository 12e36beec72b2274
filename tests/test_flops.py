"""FLOPs by formula equal a count over boolean masks and over the model's own weights."""

import pathlib

import numpy as np
import pytest

from tiny_aya_jax import flops, run

PRETRAIN = pathlib.Path(__file__).parents[1] / "experiments" / "pretrain.py"


@pytest.fixture(scope="module")
def full():
  """The 3.35B model's sizes."""
  return run.load_config(str(PRETRAIN)).model


def mask_TS(documents, T, window):
  """Visible pairs of one row, written as attention's rule is; padding sees and shows nothing."""
  segment_T = np.repeat(range(len(documents) + 1), [*documents, T - sum(documents)])
  position_T = np.arange(T)
  distance_TS = position_T[:, None] - position_T
  same_TS = (segment_T[:, None] == segment_T) & (segment_T < len(documents))
  return same_TS & (distance_TS >= 0) & (distance_TS < (window or T))


@pytest.mark.parametrize("window", [None, 1, 2, 5, 19, 20, 21, 1000])
@pytest.mark.parametrize("T", [1, 2, 5, 20, 63])
def test_pairs_equal_a_count_over_the_mask(T, window):
  assert flops.pairs(T, window) == mask_TS((T,), T, window).sum()


@pytest.mark.parametrize("documents", [(20,), (7, 13), (1, 2, 9), (5, 5, 5, 5), (16, 3), ()])
def test_packed_rows_equal_a_count_over_the_mask(cfg, documents):
  parts = flops.per_token(cfg, 20, documents)
  for name, window, blocks in (("attn_full", None, 1), ("attn_slide", 5, 3)):
    # Scores and values: H multiply-adds each, for every head, pair and layer.
    counted = 2 * 2 * 10 * 12 * mask_TS(documents, 20, window).sum() * blocks * 2
    assert parts[name] * 20 == pytest.approx(counted, rel=1e-12)


def test_matmuls_are_two_a_weight_of_the_model_itself(cfg, params):
  import jax

  weights = {
    jax.tree_util.keystr(path): leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  parts = flops.per_token(cfg, 20)
  attention = sum(size for name, size in weights.items() if "H" in name)
  feed_forward = sum(size for name, size in weights.items() if "F" in name)
  assert parts["attn_proj"] == 2 * attention and parts["ffn"] == 2 * feed_forward
  assert parts["lm_head"] == 2 * weights["['embedding_VD']"]
  assert flops.parameters(cfg) == sum(weights.values())


def test_training_is_three_forward_passes_of_the_parts(cfg):
  parts = flops.per_token(cfg, 20)
  total, forward = parts.pop("total"), parts.pop("forward")
  assert forward == sum(parts.values()) and total == 3 * forward


def test_the_full_model_has_its_parameters(full):
  assert flops.parameters(full) == 3_349_227_520  # tiny_aya.md 1.1


# The roofline's table: GFLOPs per token forward, and of training.
@pytest.mark.parametrize(
  "T, attn_full, attn_slide, forward, total",
  [
    (2048, 0.076, 0.227, 7.000, 21.00),
    (4096, 0.151, 0.453, 7.302, 21.91),
    (8192, 0.302, 0.680, 7.680, 23.04),
  ],
)
def test_the_full_model_costs_what_the_roofline_says(
  full, T, attn_full, attn_slide, forward, total
):
  parts = {name: value / 1e9 for name, value in flops.per_token(full, T).items()}
  expected = dict(
    attn_proj=0.755, ffn=4.870, lm_head=1.074, attn_full=attn_full, attn_slide=attn_slide,
    forward=forward, total=total,
  )  # fmt: skip
  for name, value in expected.items():
    assert round(parts[name], 2 if name == "total" else 3) == value, name


@pytest.mark.parametrize(
  "remat, again", [("full", 4.68), ("attn", 3.70), ("qkv", 3.25), ("minimal", 0), ("none", 0)]
)
def test_remat_does_again_what_the_roofline_says(full, remat, again):
  attention = sum(flops.per_token(full, 8192)[name] for name in ("attn_full", "attn_slide"))
  assert abs((flops.recomputed(full, 8192, remat) - attention / 2) / 1e9 - again) < 0.006


def test_every_remat_has_its_price(full):
  for remat in run.CHOICES["remat"]:
    assert flops.recomputed(full, 8192, remat) > 0


@pytest.mark.parametrize("documents", [(11, 10), (21,), (0, 5), (-1, 5)])
def test_documents_that_do_not_fit_the_row_are_refused(cfg, documents):
  with pytest.raises(ValueError, match="row of 20"):
    flops.per_token(cfg, 20, documents)
