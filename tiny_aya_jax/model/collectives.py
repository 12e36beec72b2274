"""How weights, their gradients and sums move between devices while matmuls run.

Shardings alone leave the choice of collectives to the partitioner. Where its choice stops the
matmuls, or costs memory, the model says here what is to happen; measured in experiments/LOG.md.
"""

import functools

import jax
import jax.numpy as jnp

from tiny_aya_jax.axes import ACTIVATION, PARAMETER, axis_size, constrain

REPLICAS = ("data", "context")  # axes that split activations and no parameter


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(weight, letters, dtype):
  """A parameter, fp32 on its shards -> in dtype and whole over fsdp: [copies, ..].

  letters: of its dimensions, 'DNH'. There is one copy for each place along REPLICAS.
  Cast first, so that half the bytes travel. Left to itself the partitioner moves the shards of a
  weight one by one through the matmul. Backward, each copy's gradient goes to its shards round a
  ring of fsdp in dtype, while the matmul that makes it runs; then the shards of all copies are
  summed in fp32. From one weight for all, the partitioner makes one sum over everyone, and nothing
  runs meanwhile.
  """
  weight = jnp.broadcast_to(weight.astype(dtype), (copies(), *weight.shape))
  return constrain(weight, REPLICAS, *(ACTIVATION.get(letter) for letter in letters))


def _gather_forward(weight, letters, dtype):
  return gather(weight, letters, dtype), None


def _gather_backward(letters, dtype, _, gradient):
  shards = [PARAMETER.get(letter) for letter in letters]
  gradient = constrain(gradient, REPLICAS, *shards)
  return (constrain(gradient.astype(jnp.float32).sum(0), *shards),)  # parameters are fp32


gather.defvjp(_gather_forward, _gather_backward)


def copies():
  """How many groups of devices with whole parameters, fsdp x tensor, the current mesh has."""
  return axis_size("data") * axis_size("context")


def to_copies(x):
  """[B, T, W] -> [copies, tokens, W]: the tokens beside the copy of the parameters they meet."""
  (B, T, W), data, context = x.shape, axis_size("data"), axis_size("context")
  return x.reshape(data, B // data, context, T // context, W).swapaxes(1, 2).reshape(copies(), -1, W)


def from_copies(x, B, T):
  """The way back of `to_copies`."""
  data, context = axis_size("data"), axis_size("context")
  return x.reshape(data, context, B // data, T // context, -1).swapaxes(1, 2).reshape(B, T, -1)


@jax.custom_vjp
def settle(weights, x):
  """(weights, x) as they are; backward, x's gradient goes on when the weights' are on their shards.

  Else the scheduler puts the weights' gradients off, and every block of a period keeps what they
  are made of: 0.5 GiB a block and sequence at full size.
  """
  return weights, x


def _settle_backward(_, gradients):
  return gradients if axis_size("fsdp") == 1 else jax.lax.optimization_barrier(gradients)


settle.defvjp(lambda weights, x: ((weights, x), None), _settle_backward)


def ring_sum(part, axis, dtype):
  """Inside shard_map: the sum of part(own place) over the devices of `axis`; it travels in dtype.

  part(place) is this device's addend, fp32, for the device at `place` of the axis. The sum for
  another device is on the way while this one's next addend is made. Over anything but whole rows
  of a torus psum_scatter is compiled to an all-reduce: twice the bytes, and nothing runs meanwhile.
  """
  n = axis_size(axis)
  if n == 1:
    return part(0).astype(dtype)

  def hop(sum, step):
    came = jax.lax.ppermute(sum, axis, [(one, (one + 1) % n) for one in range(n)])
    return (came + part((place - 2 - step) % n)).astype(dtype), None

  place = jax.lax.axis_index(axis)
  return jax.lax.scan(hop, part((place - 1) % n).astype(dtype), jnp.arange(n - 1))[0]
