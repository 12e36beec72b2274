"""Which updates are not applied: those of a loss or gradient that is not finite, or of a spike.

A spike is a loss above mean + sigma * deviation of the last W finite losses (W 128, sigma 6, as OLMo's
trainer and Levanter have it). Decided on the devices, so the host waits for nothing: parameters and
moments stay bit for bit, the step and its rows count as done. A spike's loss is remembered like any
other, so a loss that has risen for good is taken for one at most 4 times in a row: k of W losses
that are equally far out are within 6 deviations as soon as (1 - k/W) / (k/W) < 36.
"""

import jax.numpy as jnp
import numpy as np

APPLIED, NOT_FINITE, SPIKE = 0, 1, 2  # a verdict
SAID = ("applied", "not finite", "a spike")


def fresh(window):
  """The state of a guard that has seen nothing: the last losses, how many came, how many failed."""
  return dict(loss_W=jnp.zeros(window), seen=jnp.int32(0), not_finite=jnp.int32(0))


def judge(guard, loss, grad_norm, sigma):
  """(verdict, the next guard) of a step; nothing is called a spike before W losses were seen.

  guard["not_finite"] counts how many steps in a row were not finite.
  """
  loss_W, seen = guard["loss_W"], guard["seen"]
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  # The tiny share of the mean is for equal losses, whose deviation is 0 and whose mean rounds.
  limit = loss_W.mean() * (1 + 1e-6) + sigma * loss_W.std()
  spike = (seen >= loss_W.size) & (loss > limit)
  verdict = jnp.where(finite, jnp.where(spike, SPIKE, APPLIED), NOT_FINITE)
  return verdict, dict(
      loss_W=jnp.where(finite, loss_W.at[seen % loss_W.size].set(loss), loss_W),
      seen=seen + finite, not_finite=jnp.where(finite, 0, guard["not_finite"] + 1),
  )


def keep(verdict, new, old):
  """A leaf of the next state. Counts of steps go on: the rate is that of the step."""
  if jnp.issubdtype(new.dtype, jnp.integer):
    return new
  return jnp.where(verdict == APPLIED, new, old)


def to_json(guard):
  """For `meta`: a float32 is exact as JSON."""
  return {name: np.asarray(value).tolist() for name, value in guard.items()}


def from_json(found, window):
  """The guard that `to_json` gave; a fresh one for another window, or a checkpoint without one."""
  if not found or len(found["loss_W"]) != window:
    return fresh(window)
  return dict(loss_W=jnp.asarray(found["loss_W"], jnp.float32), seen=jnp.int32(found["seen"]),
              not_finite=jnp.int32(found["not_finite"]))
