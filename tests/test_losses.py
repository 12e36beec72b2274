"""next_token against materialised logits: values, both gradients, weights, chunks, dtypes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny_aya_jax.model import losses

B, T, D, V = 3, 13, 6, 17
SCALE = 0.7


@pytest.fixture(scope="module")
def arrays():
  random = np.random.default_rng(0)
  weight_BT = random.choice([0.0, 1.0, 0.25], (B, T)).astype(np.float32)
  weight_BT[0, 4:] = 0  # whole chunks of nothing
  return (
    jnp.asarray(random.normal(size=(B, T, D)), jnp.float32),
    jnp.asarray(random.normal(size=(V, D)), jnp.float32),
    random.integers(0, V, (B, T), dtype=np.int32),
    weight_BT,
  )


def plain(hidden_BTD, embedding_VD, target_BT, weight_BT, z_loss=0.0):
  """The definition, with all logits at once."""
  logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, embedding_VD) * SCALE
  total_BT = jax.nn.logsumexp(logits_BTV, -1)
  nats_BT = total_BT - jnp.take_along_axis(logits_BTV, target_BT[..., None], -1)[..., 0]
  return jnp.sum(weight_BT * (nats_BT + z_loss * total_BT**2)), weight_BT * nats_BT


def next_token(*arrays, **settings):
  return losses.next_token(*arrays, logit_scale=SCALE, **settings)


@pytest.mark.parametrize("z_loss", [0.0, 0.02])
@pytest.mark.parametrize("chunk", [1, 4, 13, 512])
def test_sum_and_gradients_equal_plain_logsumexp(arrays, z_loss, chunk):
  def ours(hidden_BTD, embedding_VD):
    return next_token(hidden_BTD, embedding_VD, *arrays[2:], z_loss=z_loss, chunk=chunk)[0]

  def theirs(hidden_BTD, embedding_VD):
    return plain(hidden_BTD, embedding_VD, *arrays[2:], z_loss=z_loss)[0]

  sum, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(*arrays[:2])
  expected, expected_gradients = jax.jit(jax.value_and_grad(theirs, (0, 1)))(*arrays[:2])
  np.testing.assert_allclose(sum, expected, rtol=1e-5)
  np.testing.assert_allclose(ours(*arrays[:2]), expected, rtol=1e-5)  # without a gradient asked
  for gradient, expected_gradient in zip(gradients, expected_gradients):
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [4, 512])
def test_count_is_the_weights_and_the_nats_of_every_position_add_up(arrays, chunk):
  sum, count, aux = next_token(*arrays, chunk=chunk)
  assert sum.dtype == aux["nats_BT"].dtype == jnp.float32
  np.testing.assert_allclose(count, arrays[3].sum(), rtol=1e-6)
  np.testing.assert_allclose(aux["nats_BT"].sum(), sum, rtol=1e-5)
  np.testing.assert_allclose(aux["nats_BT"], plain(*arrays)[1], rtol=1e-4, atol=1e-5)
  with_z_loss = next_token(*arrays, chunk=chunk, z_loss=0.5)
  np.testing.assert_allclose(with_z_loss[2]["nats_BT"], aux["nats_BT"])
  assert with_z_loss[0] > sum


def test_the_nats_carry_no_gradient(arrays):
  def sum_of_nats(hidden_BTD):
    return next_token(hidden_BTD, *arrays[1:])[2]["nats_BT"].sum()

  assert not np.asarray(jax.grad(sum_of_nats)(arrays[0])).any()


def test_positions_of_weight_zero_have_no_loss_and_no_gradient(arrays):
  hidden_BTD, embedding_VD, target_BT, weight_BT = arrays
  absent_BT = weight_BT == 0

  def loss(hidden_BTD, target_BT):
    return next_token(hidden_BTD, embedding_VD, target_BT, weight_BT, z_loss=0.1, chunk=4)[0]

  gradient_BTD = np.asarray(jax.grad(loss)(hidden_BTD, target_BT))
  assert not gradient_BTD[absent_BT].any()
  assert np.abs(gradient_BTD[~absent_BT]).max(-1).min() > 0
  elsewhere_BT = np.where(absent_BT, (target_BT + 5) % V, target_BT)
  assert loss(hidden_BTD, elsewhere_BT) == loss(hidden_BTD, target_BT)


def test_a_row_without_any_weight_is_zero_and_finite(arrays):
  def loss(hidden_BTD):
    return next_token(hidden_BTD, *arrays[1:3], np.zeros((B, T), np.float32), z_loss=0.1)[0]

  sum, gradient = jax.value_and_grad(loss)(arrays[0])
  assert sum == 0 and not np.asarray(gradient).any()


@pytest.mark.parametrize("which", [0, 1], ids=["hidden", "table"])
def test_gradients_equal_finite_differences(arrays, which):
  def loss(value):
    given = [*arrays]
    given[which] = value
    return next_token(*given, z_loss=0.02, chunk=4)[0]

  gradient, step = np.asarray(jax.grad(loss)(arrays[which])), 1e-2
  largest = np.argsort(np.abs(gradient), axis=None)[-4:]  # where fp32 differences are sharp
  for entry in zip(*np.unravel_index(largest, gradient.shape)):
    up, down = (loss(arrays[which].at[entry].add(by)) for by in (step, -step))
    assert (up - down) / (2 * step) == pytest.approx(gradient[entry], rel=5e-3)


def test_the_loss_scales_its_gradient_by_what_is_done_with_it(arrays):
  def third(hidden_BTD, embedding_VD):
    sum, count, _ = next_token(hidden_BTD, embedding_VD, *arrays[2:])
    return -3 * sum / count

  def plain_third(hidden_BTD, embedding_VD):
    return -3 * plain(hidden_BTD, embedding_VD, *arrays[2:])[0] / arrays[3].sum()

  for ours, theirs in zip(
    jax.grad(third, (0, 1))(*arrays[:2]), jax.grad(plain_third, (0, 1))(*arrays[:2])
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-4)


def test_bfloat16_hidden_states_keep_fp32_logits_and_an_fp32_table_gradient(arrays):
  hidden_BTD = (arrays[0] * 8).astype(jnp.bfloat16)
  rounded_VD = arrays[1].astype(jnp.bfloat16).astype(jnp.float32)
  graded = jax.value_and_grad(lambda h, e: next_token(h, e, *arrays[2:], chunk=4)[0], (0, 1))
  sum, (d_hidden_BTD, d_embedding_VD) = graded(hidden_BTD, arrays[1])
  # XLA on CPU keeps fp32 where the program rounds, so that the values alone would not tell.
  program = str(jax.make_jaxpr(graded)(hidden_BTD, arrays[1]))
  products = re.findall(r"(\w+)\[([\d,]+)\] = dot_general", program)
  assert len(products) == 3
  assert {dtype for dtype, shape in products if str(V) in shape.split(",")} == {"f32"}
  exact = jax.value_and_grad(lambda h, e: plain(h, e, *arrays[2:])[0], (0, 1))
  expected, (d_expected_BTD, d_expected_VD) = exact(hidden_BTD.astype(jnp.float32), rounded_VD)
  np.testing.assert_allclose(sum, expected, rtol=1e-5)
  assert (d_hidden_BTD.dtype, d_embedding_VD.dtype) == (jnp.bfloat16, jnp.float32)
  for ours, theirs in ((d_hidden_BTD, d_expected_BTD), (d_embedding_VD, d_expected_VD)):
    error = np.linalg.norm(ours.astype(jnp.float32) - theirs) / np.linalg.norm(theirs)
    assert error < 1e-2


def test_large_logits_do_not_overflow(arrays):
  sum, _, _ = next_token(arrays[0] * 1e3, *arrays[1:])
  np.testing.assert_allclose(sum, plain(arrays[0] * 1e3, *arrays[1:])[0], rtol=1e-5)
