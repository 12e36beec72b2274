"""Cached generation, pure functions: a prompt in one pass, then one token a step.

The cache is {block: {k_BSKH, v_BSKH}} with L in front. Sliding blocks keep a ring of `window`
slots, full blocks one slot per position: position p lives in slot p % S, so the two are one code
path. Keys are stored after rotation; the positions a ring holds follow from the newest one.
Prompts are left-aligned; rows of different length decode together.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tiny_aya_jax import axes, processes, run
from tiny_aya_jax.model.attention import ring_positions
from tiny_aya_jax.model.transformer import TinyAya, logits

EVERY = 32  # tokens between two looks at whether a row's text has ended


def generate(
    params, cfg, prompts, *, steps, stop_ids=(), temperature=0.0, top_p=1.0, seed=0,
    dtype=jnp.float32, banned_ids=(),
):
  """Continues each prompt by at most `steps` tokens.

  prompts: list of non-empty lists of ids, each one document. temperature 0 is greedy, else ids are
  drawn from the smallest set of tokens whose mass reaches top_p. stop_ids end a row and are not
  returned; banned_ids (unused vocabulary rows) are never chosen. Returns a list of lists of ids.
  On a mesh (jax.set_mesh) rows are spread over its devices; all processes give the same prompts,
  and all get the answers.
  """
  return generate_until(params, cfg, prompts, None, steps=steps, stop_ids=stop_ids,
                        temperature=temperature, top_p=top_p, seed=seed, dtype=dtype,
                        banned_ids=banned_ids)


def generate_until(
    params, cfg, prompts, ended, *, steps, stop_ids=(), temperature=0.0, top_p=1.0, seed=0,
    dtype=jnp.float32, banned_ids=(), every=EVERY,
):
  """`generate`, with ended(ids so far) -> whether a row is done; asked after each `every` tokens.

  For ends that are text and no token, such as a line break: what stands behind them in the tokens
  until the next question is returned too, and is the caller's to cut.
  """
  if not prompts or not all(prompts):
    raise run.Refused("every prompt needs at least one token; give BOS to start from nothing")
  if steps < 1:
    raise run.Refused(f"steps is {steps}: expected at least one token to generate")
  odd = {token for prompt in prompts for token in prompt if not 0 <= token < cfg.V}
  if odd:  # a lookup would clamp them without a word
    raise run.Refused(f"prompts hold ids {sorted(odd)[:3]}, the table has rows 0 to {cfg.V - 1}")
  banned_V = np.zeros(cfg.V, bool)
  banned_V[list(banned_ids)] = True
  choice = Frozen(cfg), float(temperature), float(top_p), jnp.dtype(dtype)
  rows = _rows(prompts, prompt_slots(max(map(len, prompts))))
  carry = _first(params, rows["prompt_BS"], rows["length_B"], banned_V, jax.random.key(seed),
                 steps, *choice)
  done, ended_B = 0, np.zeros(rows["length_B"].shape, bool)
  while done < steps:
    done = steps if ended is None else min(done + every, steps)
    carry = _more(params, carry, rows["length_B"], ended_B, np.array(stop_ids, np.int32), banned_V,
                  done, *choice)
    token_BT, stopped_B = processes.gathered((carry["token_BT"], carry["stopped_B"]))
    answers = [_until(row, stop_ids) for row in token_BT[: len(prompts)].tolist()]
    if ended is not None:
      ended_B = np.resize([ended(answer) for answer in answers], ended_B.shape)
    if (stopped_B | ended_B)[: len(prompts)].all():
      break
  return answers


def prompt_slots(length):
  """The width to which prompts of this length are filled up: few widths, so few programs."""
  coarse = max(16, 1 << max(0, length.bit_length() - 3))  # quarters of the power of two below
  return -(-length // coarse) * coarse


def _rows(prompts, slots):
  """{"prompt_BS", "length_B"}: the prompts left-aligned, over the mesh if there is one."""
  mesh = jax.sharding.get_mesh()
  part, parts, each = 0, 1, len(prompts)
  if not mesh.empty:
    part, parts = axes.process_part(mesh)
    blocks = mesh.shape["data"] * mesh.shape["fsdp"]
    each = -(-len(prompts) // blocks) * blocks // parts
  mine = [prompts[row % len(prompts)] for row in range(part * each, (part + 1) * each)]
  prompt_BS = np.zeros((each, slots), np.int32)
  for row, prompt in enumerate(mine):
    prompt_BS[row, : len(prompt)] = prompt
  rows = dict(prompt_BS=prompt_BS, length_B=np.array([len(prompt) for prompt in mine], np.int32))
  return rows if mesh.empty else axes.place(mesh, rows)


def prefill(params, cfg, token_BT, length_B, capacity, dtype=jnp.float32):
  """Runs left-aligned prompts: (last logits [B, V], cache with `capacity` slots in full blocks)."""
  T = token_BT.shape[1]
  position_BT = jnp.broadcast_to(jnp.arange(T), token_BT.shape)
  segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
  hidden_BTD, state = TinyAya(cfg, dtype, "chunked").apply(
      {"params": params}, token_BT, segment_BT, position_BT, mutable=["cache"]
  )
  last_BD = jnp.take_along_axis(hidden_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
  cache = {
      block: {
          name: _ring(kept, length_B, capacity if block == "full" else min(cfg.window, capacity))
          for name, kept in blocks.items()
      }
      for block, blocks in state["cache"]["periods"].items()
  }
  return logits(params, last_BD[:, None], cfg)[:, 0], cache


def step(params, cfg, cache, token_B, position_B, dtype=jnp.float32):
  """One token per row at its own position: (logits [B, V], new cache)."""
  hidden_BTD, state = TinyAya(cfg, dtype).apply(
      {"params": params, "cache": {"periods": cache}},
      token_B[:, None], jnp.ones_like(token_B)[:, None], position_B[:, None], mutable=["cache"],
  )
  return logits(params, hidden_BTD, cfg)[:, 0], state["cache"]["periods"]


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _first(
    params, prompt_BS, length_B, banned_V, key, steps, frozen, temperature, top_p, dtype
):
  """The state before any token is given out: the first is chosen."""
  cfg, (B, S) = frozen.cfg, prompt_BS.shape
  logits_BV, cache = prefill(params, cfg, prompt_BS, length_B, S + steps, dtype)
  chosen_B = _choose(logits_BV, banned_V, jax.random.fold_in(key, steps), temperature, top_p)
  return _laid_out(dict(done=0, chosen_B=chosen_B, cache=cache, token_BT=jnp.full((B, steps), -1),
                        stopped_B=jnp.zeros(B, bool), key=key))


def _laid_out(carry):
  """Rows over the mesh, the same before and after: else the second call would be compiled anew."""
  laid = {name: axes.constrain(carry[name], axes.ACTIVATION["B"], *(None,) * (carry[name].ndim - 1))
          for name in ("chosen_B", "token_BT", "stopped_B")}
  return carry | laid


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10), donate_argnums=1)
def _more(
    params, carry, length_B, ended_B, stop_ids, banned_V, until, frozen, temperature, top_p, dtype
):
  """Gives out tokens up to number `until`, or until every row has stopped."""
  cfg = frozen.cfg

  def more(carry):
    return (carry["done"] < until) & ~carry["stopped_B"].all()

  def one(carry):
    done, chosen_B, stopped_B = carry["done"], carry["chosen_B"], carry["stopped_B"]
    token_BT = carry["token_BT"].at[:, done].set(jnp.where(stopped_B, -1, chosen_B))
    stopped_B |= jnp.isin(chosen_B, stop_ids)
    logits_BV, cache = step(params, cfg, carry["cache"], chosen_B, length_B + done, dtype)
    chosen_B = _choose(
        logits_BV, banned_V, jax.random.fold_in(carry["key"], done), temperature, top_p)
    return carry | dict(done=done + 1, chosen_B=chosen_B, cache=cache, token_BT=token_BT,
                        stopped_B=stopped_B)

  carry = jax.lax.while_loop(more, one, carry | dict(stopped_B=carry["stopped_B"] | ended_B))
  return _laid_out(carry)


def _choose(logits_BV, banned_V, key, temperature, top_p):
  logits_BV = jnp.where(banned_V, -jnp.inf, logits_BV)
  if temperature == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)
  logits_BV = logits_BV / temperature
  if top_p < 1:
    order_BV = jnp.flip(jnp.argsort(logits_BV, -1), -1)
    share_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, -1), -1)
    kept_BV = jnp.cumsum(share_BV, -1) - share_BV < top_p  # mass before it: the first always stays
    rank_BV = jnp.argsort(order_BV, -1)
    logits_BV = jnp.where(jnp.take_along_axis(kept_BV, rank_BV, -1), logits_BV, -jnp.inf)
  return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def _ring(kept_LBTKH, length_B, slots):
  """A prompt's keys [L, B, T, K, H] -> ring [L, B, slots, K, H]: slot s holds position p, p % slots == s."""
  T = kept_LBTKH.shape[2]
  position_BS = ring_positions(length_B - 1, slots)
  source_BS = jnp.clip(position_BS, 0, T - 1)
  return jnp.take_along_axis(kept_LBTKH, source_BS[None, :, :, None, None], axis=2)


def _until(ids, stop_ids):
  """The ids before the first stop id; -1 marks what was never generated."""
  ends = [at for at, token in enumerate(ids) if token in stop_ids or token < 0]
  return ids[: ends[0]] if ends else ids


class Frozen:
  """A config as a static argument of jit: equal text, equal program."""

  def __init__(self, cfg):
    self.cfg, self.text = cfg, str(cfg)

  def __hash__(self):
    return hash(self.text)

  def __eq__(self, other):
    return self.text == other.text
