"""Cached generation against the full forward, cache sizes, stop and banned ids, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny_aya_jax import axes, run
from tiny_aya_jax.model import decode, transformer
from tiny_aya_jax.model.transformer import TinyAya

STEPS = 18  # more than three windows of 5
LENGTHS = (3, 13, 1, 8)  # below one window, beyond two, one token


@pytest.fixture(scope="module")
def prompts(cfg):
  random = np.random.default_rng(0)
  return [random.integers(0, cfg.V, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def greedy(cfg, params, prompts):
  return decode.generate(params, cfg, prompts, steps=STEPS)


def full_logits(cfg, params, rows):
  """Logits [B, T, V] of whole rows of ids, each a document, without a cache."""
  T = max(map(len, rows))
  token_BT = np.array([row + [0] * (T - len(row)) for row in rows])
  position_BT = np.broadcast_to(np.arange(T), token_BT.shape)
  segment_BT = (position_BT < np.array([[len(row)] for row in rows])).astype(np.int32)
  hidden_BTD = jax.jit(TinyAya(cfg).apply)({"params": params}, token_BT, segment_BT, position_BT)
  return np.asarray(transformer.logits(params, hidden_BTD, cfg))


def test_cached_greedy_decoding_equals_the_full_forward_over_three_windows(
  cfg, params, prompts, greedy
):
  logits_BTV = full_logits(cfg, params, [p + out for p, out in zip(prompts, greedy)])
  for prompt, out, logits_TV in zip(prompts, greedy, logits_BTV):
    predicted = logits_TV[len(prompt) - 1 : len(prompt) + STEPS - 1].argmax(-1)
    assert out == predicted.tolist()
  assert len({tuple(out) for out in greedy}) == len(greedy)  # four stories, not one


def test_cached_logits_equal_the_full_forward_at_every_step(cfg, params, prompts, greedy):
  rows = [prompt + out for prompt, out in zip(prompts, greedy)]
  logits_BTV = full_logits(cfg, params, rows)
  length_B = np.array(LENGTHS)
  token_BT = np.zeros((len(prompts), max(LENGTHS)), np.int32)
  for row, prompt in enumerate(prompts):
    token_BT[row, : len(prompt)] = prompt
  step = jax.jit(lambda *rest: decode.step(params, cfg, *rest))
  prefill = jax.jit(lambda *rest: decode.prefill(params, cfg, *rest, max(LENGTHS) + STEPS))
  logits_BV, cache = prefill(token_BT, length_B)
  for done in range(STEPS):
    expected_BV = logits_BTV[np.arange(len(rows)), length_B + done - 1]
    np.testing.assert_allclose(logits_BV, expected_BV, atol=2e-4)
    token_B = np.array([out[done] for out in greedy])
    logits_BV, cache = step(cache, token_B, length_B + done)


def test_a_row_does_not_depend_on_its_neighbours(cfg, params, prompts, greedy):
  others = [[7] * len(prompt) for prompt in prompts]
  for row, prompt in enumerate(prompts):
    mixed = [*others[:row], prompt, *others[row + 1 :]]
    assert decode.generate(params, cfg, mixed, steps=STEPS)[row] == greedy[row]
  assert decode.generate(params, cfg, [prompts[0]], steps=STEPS)[0] == greedy[0]


@pytest.mark.parametrize("prompt, steps, slots", [(13, 18, 5), (2, 2, 4), (3, 2, 5)])
def test_sliding_blocks_keep_exactly_window_slots_and_full_blocks_every_position(
  cfg, params, prompt, steps, slots
):
  token_BT = jax.ShapeDtypeStruct((3, prompt), jnp.int32)
  length_B = jax.ShapeDtypeStruct((3,), jnp.int32)
  _, cache = jax.eval_shape(
    lambda token_BT, length_B: decode.prefill(params, cfg, token_BT, length_B, prompt + steps),
    token_BT,
    length_B,
  )
  for block, kept in cache.items():
    expected = (cfg.L, 3, prompt + steps if block == "full" else slots, cfg.K, cfg.H)
    assert {name: leaf.shape for name, leaf in kept.items()} == dict(
      k_BSKH=expected, v_BSKH=expected
    )
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  assert held == 2 * cfg.L * 3 * (3 * slots + prompt + steps) * cfg.K * cfg.H * 4
  token_B = jax.ShapeDtypeStruct((3,), jnp.int32)
  _, after = jax.eval_shape(lambda *rest: decode.step(params, cfg, *rest), cache, token_B, token_B)
  assert after == cache  # a step keeps every shape


def test_the_cache_has_the_dtype_of_the_activations(cfg, params):
  token_BT, length_B = np.zeros((1, 4), np.int32), np.array([4])
  _, cache = jax.eval_shape(
    lambda: decode.prefill(params, cfg, token_BT, length_B, 9, jnp.bfloat16)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}


def test_a_stop_id_ends_its_row_only_and_is_not_returned(cfg, params, prompts, greedy):
  stop = greedy[0][4]
  out = decode.generate(params, cfg, prompts, steps=STEPS, stop_ids=(stop,))
  for row, whole in zip(out, greedy):
    assert row == (whole[: whole.index(stop)] if stop in whole else whole)
  assert len(out[0]) <= 4 < max(map(len, out))


def test_banned_ids_are_never_chosen(cfg, params, prompts, greedy):
  banned = sorted({token for row in greedy for token in row})[::2]
  for settings in (dict(), dict(temperature=1.0)):
    out = decode.generate(params, cfg, prompts, steps=STEPS, banned_ids=banned, **settings)
    assert not {token for row in out for token in row} & set(banned)
    assert {len(row) for row in out} == {STEPS}


@pytest.mark.parametrize(
  "prompts, steps, sentence",
  [
    ([], 1, "at least one token"),
    ([[1], []], 1, "at least one token"),
    ([[1]], 0, "steps is 0"),
    ([[1, 38], [-2]], 1, r"ids \[-2, 38\], the table has rows 0 to 37"),
  ],
)
def test_what_cannot_be_continued_is_refused(cfg, params, prompts, steps, sentence):
  with pytest.raises(run.Refused, match=sentence):
    decode.generate(params, cfg, prompts, steps=steps)


def test_a_tiny_top_p_is_greedy(cfg, params, prompts, greedy):
  out = decode.generate(params, cfg, prompts, steps=STEPS, temperature=1.0, top_p=1e-6)
  assert out == greedy


def test_equal_seeds_give_equal_samples_and_other_seeds_others(cfg, params, prompts):
  def sample(seed):
    return decode.generate(params, cfg, prompts, steps=STEPS, temperature=1.0, seed=seed)

  assert sample(1) == sample(1)
  assert sample(1) != sample(2)


@pytest.mark.parametrize(
  "temperature, top_p, shares",
  [
    (1.0, 1.0, (0.6, 0.3, 0.1)),
    (0.5, 0.9, (0.8, 0.2, 0)),  # squared and normalised 0.78, 0.20, 0.02: two tokens reach 0.9
    (0.5, 0.7, (1, 0, 0)),  # the temperature comes first: before it, one token has but 0.6
  ],
)
def test_samples_have_the_frequencies_of_the_distribution(cfg, temperature, top_p, shares):
  """Three tokens of known probability; the second draw must not repeat the first."""
  params = known_distribution(cfg, {4: 0.6, 9: 0.3, 2: 0.1})
  rows = 3000
  out = decode.generate(
    params,
    cfg,
    [[0]] * rows,
    steps=2,
    temperature=temperature,
    top_p=top_p,
    banned_ids=set(range(cfg.V)) - {4, 9, 2},
  )
  first, second = np.array(out).T
  for drawn in (first, second):
    found = [np.mean(drawn == token) for token in (4, 9, 2)]
    np.testing.assert_allclose(found, shares, atol=0.03)  # three deviations of the widest
  assert np.mean(first == second) == pytest.approx(np.square(shares).sum(), abs=0.04)


def known_distribution(cfg, probabilities):
  """Parameters under which every token is followed by the same distribution.

  No block writes anything, and a spike at coordinate 0 of every embedding makes the final norm
  forget the rest: coordinate 1 becomes -1 / sqrt(D - 1), whatever the token.
  """
  token_BT = np.zeros((1, 1), np.int32)
  shapes = jax.eval_shape(TinyAya(cfg).init, jax.random.key(0), token_BT, token_BT, token_BT)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes["params"])
  embedding_VD, norm_D = params["embedding_VD"], params["norm_D"]
  embedding_VD[:, 0] = 1000
  for token, probability in probabilities.items():
    embedding_VD[token, 1] = np.log(probability)
  norm_D[1] = -np.sqrt(cfg.D - 1) / cfg.logit_scale
  return params


@pytest.mark.parametrize("sizes", [dict(data=8, fsdp=1), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_mesh_generates_what_one_device_does(params, cfg, prompts, greedy, sizes):
  mesh = axes.mesh(**sizes)
  placed = jax.device_put(params, axes.shardings(mesh, params))
  with jax.set_mesh(mesh):  # four prompts over eight and four places
    assert decode.generate(placed, cfg, prompts, steps=STEPS) == greedy


def test_rows_whose_text_has_ended_are_not_continued(params, cfg, prompts, greedy):
  asked = []

  def ended(ids):
    asked.append(len(ids))
    return len(ids) >= 4

  found = decode.generate_until(params, cfg, prompts, ended, steps=STEPS, every=4)
  assert found == [row[:4] for row in greedy] and asked == [4] * len(prompts)
