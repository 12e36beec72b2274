"""Each operator beside its formula in the plainest NumPy, and at the points where formulas break."""

import itertools

import numpy as np
import pytest

from tiny_aya_jax.post import operators

SHAPE = (37, 11)


def draw(seed, count=3, shape=SHAPE):
  random = np.random.default_rng(seed)
  return [random.standard_normal(shape).astype(np.float32) for _ in range(count)]


@pytest.fixture(autouse=True, params=[64, 1 << 15], ids=["blocks", "whole"])
def block(request, monkeypatch):
  """Every test in blocks of 64 numbers, and in one."""
  monkeypatch.setattr(operators, "BLOCK", request.param)


def bits(x):
  assert x.dtype == np.float32
  return x.view(np.uint32)


def same(x, y):
  assert x.shape == y.shape
  np.testing.assert_array_equal(bits(x), bits(y))


def slerp(v0, v1, t):
  v0, v1 = v0.astype(np.float64), v1.astype(np.float64)
  angle = np.arccos((v0 * v1).sum() / np.sqrt((v0**2).sum() * (v1**2).sum()))
  return (np.sin((1 - t) * angle) * v0 + np.sin(t * angle) * v1) / np.sin(angle)


def trim(delta, density):
  order = np.argsort(-np.abs(delta).ravel(), kind="stable")
  kept = np.zeros(delta.size, bool)
  kept[order[:int(density * delta.size)]] = True
  return np.where(kept.reshape(delta.shape), delta, 0)


def elect(deltas, weights, normalize=True, zero=1):
  """Element by element, in Python."""
  mixed = np.zeros_like(deltas[0])
  for at in np.ndindex(mixed.shape):
    terms = [np.float32(weight) * delta[at] for weight, delta in zip(weights, deltas)]
    sign = np.sign(np.float32(sum(terms))) or zero
    agree = [(weight, term) for weight, term in zip(weights, terms) if np.sign(term) == sign]
    divisor = (sum(weight for weight, _ in agree) or 1) if normalize else 1
    mixed[at] = sum(term for _, term in agree) / divisor
  return mixed


def test_linear_is_the_weighted_average():
  x, y, z = draw(0)
  plain = np.float32(0.5) * x + np.float32(0.2) * y + np.float32(0.3) * z
  same(operators.linear([x, y, z], (0.5, 0.2, 0.3)), plain)
  np.testing.assert_allclose(
      operators.linear([x, y, z], (5, 2, 3), normalize=True), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed, t", [*itertools.product(range(3), (0.1, 0.5, 0.9))])
def test_slerp_follows_the_arc_and_nuslerp_the_arc_of_task_vectors(seed, t):
  x, y, base = draw(seed)
  np.testing.assert_allclose(operators.slerp(x, y, t), slerp(x, y, t), rtol=1e-5, atol=1e-6)
  expected = base + slerp(x - base, y - base, t)
  np.testing.assert_allclose(operators.nuslerp(base, x, y, t), expected, rtol=1e-5, atol=1e-5)


def test_slerp_of_siblings_is_a_line_and_nuslerp_is_not():
  x, y, _ = draw(1)
  sibling, base = x + np.float32(0.02) * y, x - np.float32(0.02) * y[::-1]
  line = np.float32(0.7) * x + np.float32(0.3) * sibling
  same(operators.slerp(x, sibling, 0.3), line)
  assert np.abs(operators.nuslerp(base, x, sibling, 0.3) - line).max() > 1e-4


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.013])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_trims_elects_and_averages(density, normalize):
  x, y, base = draw(2)
  z = (x + y) / 2
  weights = (0.5, 1.0, 0.25)
  deltas = [trim(m - base, density) for m in (x, y, z)]
  expected = base + np.float32(0.7) * elect(deltas, weights, normalize)
  found = operators.ties(base, [x, y, z], weights, density, 0.7, normalize)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.3, 0.7, 1.0])
def test_of_equal_magnitudes_the_first_are_kept_and_no_more_than_asked(density):
  signs = np.sign(draw(3, 1)[0])
  zero = np.zeros_like(signs)
  kept = operators.ties(zero, [signs], (1,), density)
  assert np.count_nonzero(kept) == int(density * signs.size)
  same(kept, trim(signs, density).astype(np.float32))


def test_task_arithmetic_adds_the_weighted_differences():
  x, y, base = draw(4)
  found = operators.task_arithmetic(base, [x, y], (0.4, 0.8), 0.5)
  np.testing.assert_allclose(
      found, base + 0.5 * (0.4 * (x - base) + 0.8 * (y - base)), rtol=1e-5, atol=1e-6)
  averaged = operators.task_arithmetic(base, [x, y], (1, 3), normalize=True)
  np.testing.assert_allclose(averaged, 0.25 * x + 0.75 * y, rtol=1e-5, atol=1e-5)


def test_weights_that_cancel_divide_by_nothing():
  x, y, base = draw(5)
  found = operators.task_arithmetic(base, [x, y], (1, -1), normalize=True)
  np.testing.assert_allclose(found, base + x - y, rtol=1e-5, atol=1e-5)


def test_dare_keeps_what_the_coin_says_over_the_density():
  zero, x = np.zeros((200, 300), np.float32), draw(6, 1, (200, 300))[0]
  kept = operators.dare_linear(zero, [x], (1,), 0.25, [7])
  assert set(np.unique((kept / x).round(5))) == {0, 4}
  assert abs(np.count_nonzero(kept) / x.size - 0.25) < 0.01
  same(kept, operators.dare_linear(zero, [x], (1,), 0.25, [7]))
  other = operators.dare_linear(zero, [x], (1,), 0.25, [8])
  assert 0.05 < np.count_nonzero((kept != 0) & (other != 0)) / x.size < 0.075


def test_dare_ties_elects_among_what_the_coins_kept():
  x, y, base = draw(7)
  dropped = [operators.dare_linear(np.zeros_like(m), [m - base], (1,), 0.5, [seed])
             for seed, m in enumerate((x, y))]
  for normalize in (True, False):
    found = operators.dare_ties(base, [x, y], (0.6, 0.4), 0.5, [0, 1], 1.0, normalize)
    expected = base + elect(dropped, (0.6, 0.4), normalize)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_coin_does_not_depend_on_the_size_of_a_block(monkeypatch):
  zero, x = np.zeros(1000, np.float32), draw(8, 1, (1000,))[0]
  found = operators.dare_linear(zero, [x], (1,), 0.5, [3])
  monkeypatch.setattr(operators, "BLOCK", 98)
  same(found, operators.dare_linear(zero, [x], (1,), 0.5, [3]))


# --- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("t", [0.1, 0.3, 0.5])
def test_a_tensor_merged_with_itself_is_itself(seed, t):
  x, base, _ = draw(seed)
  for scale in (1, 1e-12, 1e12):
    z = x * np.float32(scale)
    same(operators.linear([z, z], (1 - t, t)), z)
    same(operators.linear([z, z, z], (3, 5, 6), normalize=True), z)
    same(operators.slerp(z, z, t), z)
    same(operators.nuslerp(base, z, z, t), z)
    same(operators.ties(z, [z, z], (1 - t, t), 0.5), z)
    same(operators.task_arithmetic(z, [z, z], (1 - t, t)), z)


def test_the_ends_of_slerp_are_the_models():
  x, y, base = draw(9)
  for first, second in ((x, y), (x, -x), (x, x * np.float32(1.01)), (np.zeros_like(x), y)):
    for t, end in ((0, first), (1, second), (0.0, first), (1.0, second)):
      same(operators.slerp(first, second, t), end)
      same(operators.nuslerp(base, first, second, t), end)


def test_linear_and_ties_do_not_ask_who_comes_first():
  x, y, base = draw(10)
  same(operators.linear([x, y], (0.3, 0.7)), operators.linear([y, x], (0.7, 0.3)))
  same(operators.ties(base, [x, y], (0.3, 0.7), 0.4), operators.ties(base, [y, x], (0.7, 0.3), 0.4))
  same(operators.slerp(x, y, 0.25), operators.slerp(y, x, 0.75))


def test_density_one_trims_and_drops_nothing():
  x, y, base = draw(11)
  plain = operators.task_arithmetic(base, [x, y], (0.3, 0.7))
  same(operators.dare_linear(base, [x, y], (0.3, 0.7), 1, [0, 1]), plain)
  same(operators.dare_ties(base, [x, y], (0.3, 0.7), 1, [0, 1], normalize=True),
       operators.ties(base, [x, y], (0.3, 0.7), 1))


def test_zero_tensors_stay_finite():
  x, y, _ = draw(12)
  zero = np.zeros_like(x)
  np.testing.assert_allclose(operators.slerp(zero, x, 0.5), x * np.sqrt(0.5), rtol=1e-6)
  same(operators.slerp(zero, zero, 0.5), zero)
  same(operators.nuslerp(zero, zero, zero, 0.5), zero)
  np.testing.assert_allclose(operators.nuslerp(x, x, y, 0.5), x + (y - x) * np.sqrt(0.5), rtol=1e-4,
                             atol=1e-6)
  same(operators.ties(zero, [zero, zero], (0.5, 0.5), 0.5), zero)
  same(operators.ties(zero, [zero, x], (0.5, 0.5), 1), x)


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_vectors_that_point_apart_are_interpolated_on_the_line(t):
  x, _, _ = draw(13)
  zero = np.zeros_like(x)
  for scale in (1, 2.5):
    expected = (1 - t - t * scale) * x
    for found in (operators.slerp(x, -x * np.float32(scale), t),
                  operators.nuslerp(zero, x, -x * np.float32(scale), t)):
      np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_sum_of_zero_counts_as_up_or_as_it_is_told():
  zero, x = np.zeros(6, np.float32), np.array([1, -1, 2, -2, 3, -3], np.float32)
  same(operators.ties(zero, [x, -x], (1, 1), 1), np.abs(x))
  same(operators.ties(zero, [x, -x], (1, 1), 1, zeros_up=False), -np.abs(x))
  everything = operators.Cut(np.float32(-1), -1)
  assert operators.elected(zero, [x, -x], (1, 1), [everything] * 2) == 0
  assert operators.elected(zero, [x, x - 4], (1, 1), [everything] * 2) == -3


def test_a_norm_of_many_numbers_is_right_where_fp32_is_not():
  x = np.full(1 << 22, 3e-3, np.float32)
  y = x.copy()
  y[::2] = 0
  assert abs(operators._cosine(x, y) - np.sqrt(0.5)) < 1e-9


def test_numbers_that_are_none_are_seen_wherever_they_stand():
  x = draw(14, 1)[0]
  assert operators.finite(x)
  for at, value in ((0, np.nan), (-1, np.inf), (63, -np.inf), (64, np.nan)):
    broken = x.copy().reshape(-1)
    broken[at] = value
    assert not operators.finite(broken)
