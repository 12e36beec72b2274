"""Learning-rate schedules and AdamW over a tree whose names say what is decayed.

Schedules are functions of the step counted from the start of the run or fork, and reach exactly
`peak` and `final` (tiny_aya.md 5.3). The moments are sharded like the parameters because their
leaves bear the same names (axes.py).
"""

import jax
import jax.numpy as jnp
import optax

from tiny_aya_jax.axes import letters_of


def schedule(config, steps, start=0):
  """optax schedule: step -> learning rate, for `steps` steps that begin at optimiser step `start`.

  Warm-up rises linearly over warmup_steps. Then 'cosine' and 'linear' fall from peak to final over
  the rest; 'wsd' stays at peak and falls linearly over the last decay_steps.
  """
  peak, final = config.peak, config.final
  decay_steps = config.decay_steps if config.shape == "wsd" else steps - config.warmup_steps

  def rate(step):
    step = step - start
    warm = (step + 1) / max(config.warmup_steps, 1)
    done = jnp.clip((step - (steps - decay_steps)) / max(decay_steps, 1), 0, 1)
    left = (1 + jnp.cos(jnp.pi * done)) / 2 if config.shape == "cosine" else 1 - done
    return jnp.where(step < config.warmup_steps, peak * warm, final + (peak - final) * left)

  return rate


def adamw(config, rate):
  """Clip by the global norm, then AdamW; weight decay on matrices only.

  config.adamw.mu_dtype is of the first moment. The second stays fp32: it moves by (1 - b2) of a
  difference, which bfloat16's 8 bits lose once that is below 1/256 of it, and it divides the rate.
  """
  return optax.chain(
      optax.clip_by_global_norm(config.clip),
      optax.adamw(rate, mask=decay_mask, **config.adamw.to_dict()),
  )


def decay_mask(params):
  """True where weight decay applies: not on the embedding, not on norms (tiny_aya.md 5.4, 5.6)."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: len(letters_of(path)) > 1 and "V" not in letters_of(path), params
  )
