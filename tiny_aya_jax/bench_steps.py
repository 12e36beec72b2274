"""Whole training steps of several sides, each in a process of its own, in turns.

So each side has the device's memory to itself, takes the largest batch that fits, and shows its own
peak. In its first steps every side sees one and the same row, as often as its batch is long: the
losses do not depend on the batch, and must agree, or the comparison is void. Needs neither grain
nor ml_collections: launch/gpu_table.py runs it where they are not.
"""

import functools
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tiny_aya_jax import axes, bench, flops, run
from tiny_aya_jax.model.transformer import TinyAya
from tiny_aya_jax.train import guard, optimizer, step

GIB = 2**30
PEAK = {  # dense bf16 operations a second, by device kind: NVIDIA's data sheets
    "NVIDIA H200": 989.4e12, "NVIDIA H100 80GB HBM3": 989.4e12,
}  # fmt: skip


class Unmeasured(Exception):
  """Why there is no figure, in one line."""


class Fields(types.SimpleNamespace):
  """A config without ml_collections: of a dict, whose dicts are Fields."""

  def __init__(self, values):
    super().__init__(**{
        name: Fields(value) if isinstance(value, dict) else value for name, value in values.items()
    })

  def to_dict(self):
    return {name: value.to_dict() if isinstance(value, Fields) else value
            for name, value in vars(self).items()}


def alternate(fields, sides, what, deadline=None):
  """Runs config.turns turns of sides; -> {side: result of `train`, its seconds of all turns}.

  The first side is set beside the others. fields: a config as a dict, whose `batches` are the sizes
  to try, largest first, {side: sizes} or one list.
  """
  found = {}
  for turn in range(fields["turns"]):
    for side in sides:
      batches = fields["batches"]
      batches = [found[side]["batch"]] if side in found else (
          batches[side] if isinstance(batches, dict) else batches)
      result = call(fields, deadline, side=side, batches=batches)
      if side in found:
        result["seconds"] += found[side]["seconds"]
      found[side] = result
      run.say(f"{what}, turn {turn + 1}/{fields['turns']}: {side} {describe(fields, result)}")
  ours, *others = sides
  losses = {side: found[side]["losses"] for side in sides}
  bench.agree(losses, fields["tolerance"] * losses[ours][0], run.say)
  for side in others:
    ratio = speed(fields, found[ours]) / speed(fields, found[side])
    run.say(f"{what}: {ours} / {side} {ratio:.2f} in tokens/s")
  return found


def speed(fields, result):
  """Tokens a second of a result of `train`."""
  return result["batch"] * fields["T"] / statistics.median(result["seconds"])


def utilisation(fields, result):
  """(operations a second by formula, their share of the device's peak or None if unknown)."""
  rate = speed(fields, result) * flops.per_token(Fields(fields["model"]), fields["T"])["total"]
  peak = PEAK.get(result["device"])
  return rate, peak and rate / peak


def describe(fields, result):
  """What is said of a result of `train`."""
  rate, share = utilisation(fields, result)
  milliseconds = 1000 * statistics.median(result["seconds"])
  return (f"{speed(fields, result):,.0f} tokens/s, {milliseconds:.4g} ms, "
          f"batch {result['batch']} x {fields['T']}, {rate / 1e12:.4g} TF/s"
          + (f", MFU {share:.1%}" if share else "")
          + f", peak {result['peak'] / GIB:.2f} GiB" * (result["peak"] > 0)
          + f", first step after {result['first']:.0f} s")


def call(fields, deadline=None, **changes):
  """Runs bench_pieces.py in a process of its own on a config given as a dict; -> what it found.

  Its lines go where ours go. Unmeasured if it fails, or is not done at `deadline` (time.monotonic).
  """
  left = None if deadline is None else deadline - time.monotonic()
  if left is not None and left <= 0:
    raise Unmeasured("the time is up")
  fields = fields | changes | dict(begun=time.time())
  environment = os.environ | dict(
      PYTHONPATH=os.pathsep.join([str(pathlib.Path(__file__).parents[1]),
                                  os.environ.get("PYTHONPATH", "")]),
      XLA_PYTHON_CLIENT_MEM_FRACTION="0.95",
  )
  if fields.get("side") in ("transformers", "tuned"):
    environment["JAX_PLATFORMS"] = "cpu"  # the GPU's memory is PyTorch's
  with tempfile.TemporaryDirectory(prefix="bench_call_") as folder:
    given, result = (pathlib.Path(folder, name) for name in ("fields.json", "result.json"))
    given.write_text(json.dumps(fields), encoding="utf-8")
    command = [sys.executable, "-m", "tiny_aya_jax.bench_pieces", str(given), str(result)]
    try:
      done = subprocess.run(command, env=environment, timeout=left, check=False)
    except subprocess.TimeoutExpired:
      raise Unmeasured(f"not done in the {left:.0f} s that were left") from None
    if not result.exists():
      raise Unmeasured(f"its process ended with code {done.returncode}")
    found = json.loads(result.read_text(encoding="utf-8"))
  if isinstance(found, dict) and "error" in found:
    raise Unmeasured(found["error"])
  return found


def train(config):
  """Trains config.side by the largest of config.batches that fits: the losses of the first steps,
  which see one row, then timed steps on random rows; config.learn steps on learnable rows between.

  -> dict(batch, losses, seconds, peak (bytes, 0: unknown), first (s since config.begun), device).
  """
  params = _params(config)
  for batch in config.batches:
    try:
      found = _train(config, params, batch)
      return found if batch == config.batches[0] else found | dict(peak=0)  # it was the failure's
    except Exception as error:  # of jaxlib or torch
      words = str(error)
      if batch == config.batches[-1] or not any(
          sign in words for sign in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")):
        raise
      run.say(f"{config.side}: batch {batch} does not fit")
    gc.collect()
    if "torch" in sys.modules:
      sys.modules["torch"].cuda.empty_cache()


def _train(config, params, batch):
  random = np.random.default_rng(config.seed)
  shape, V = (batch, config.T + 1), config.model.V
  row_BT = np.broadcast_to(random.integers(0, V, (1, config.T + 1), np.int32), shape)
  config.data = Fields(dict(batch=batch, T=config.T))  # what step.py reads of it
  advance, peak, device = SIDES[config.side](config, params)
  value = [advance(row_BT)]
  first = time.time() - config.begun
  value += [advance(row_BT) for _ in range(bench.AGREED_STEPS - 1)]
  found = dict(batch=batch, losses=value, first=first, device=device)
  if getattr(config, "learn", 0):
    learnt = [advance(_learnable(random, shape, V)) for _ in range(config.learn)]
    found["learnt"] = float(np.mean(learnt[-max(1, config.learn // 10) :]))
  token_BT = random.integers(0, V, shape, np.int32)
  advance(token_BT)
  seconds = [bench.timed(advance, token_BT) for _ in range(config.steps)]
  return found | dict(seconds=seconds, peak=peak())


def _params(config):
  """A tree of normal numbers as NumPy, norms 1. They repeat after a prime count: drawing 3.35B of
  them takes longer than a step is worth, and no two rows of a matrix begin alike."""
  row_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  tree = jax.eval_shape(TinyAya(config.model).init, jax.random.key(0), row_BT, row_BT, row_BT)
  normal = 0.02 * np.random.default_rng(config.seed).standard_normal(16_777_213, np.float32)
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: np.ones(leaf.shape, np.float32) if path[-1].key == "norm_D"
      else np.resize(normal[: leaf.size], leaf.shape), tree["params"])


def _learnable(random, shape, V):
  """Tokens [B, T + 1], three in four a fixed function of the one before: something to learn."""
  V = min(V, 4096)
  token_BT = random.integers(0, V, shape, np.int32)
  follows_BT = random.random(shape) < 0.75
  for t in range(1, shape[1]):
    token_BT[:, t] = np.where(follows_BT[:, t], (token_BT[:, t - 1] * 31 + 7) % V, token_BT[:, t])
  return token_BT


def _ours(config, params):
  """What `train` compiles and runs, on one device (train/step.py)."""
  fields, mesh = _train_config(config), axes.mesh(devices=jax.devices()[:1])
  compiled = step.compiled(fields, mesh, _rate(config), sources=1)
  with jax.set_mesh(mesh):
    copies = jax.tree.map(jnp.array, params)  # the state is donated
    state = _state(fields, jax.device_put(copies, axes.shardings(mesh, params)))
  return _advance(compiled, state, functools.partial(axes.place, mesh))


def _plain(config, params):
  """The same step and optimiser around what one writes first in Flax."""
  fields = _train_config(config, attention="reference", remat="full", unroll=1)
  model, scale = step.model(fields), config.model.logit_scale

  def loss(params, batch):
    hidden_BTD = model.apply(
        {"params": params}, *(batch[name] for name in ("token_BT", "segment_BT", "position_BT")))
    target_BT, weight_BT = batch["target_BT"], batch["weight_BT"]
    sum = materialised(hidden_BTD, params["embedding_VD"], target_BT, logit_scale=scale)
    return sum, weight_BT.sum(), {}

  tx = optimizer.adamw(fields.optimizer, _rate(config))
  advance = jax.jit(functools.partial(
      step.train_step, loss=loss, tx=tx, accumulate=1, sources=1, sigma=fields.guard.sigma), donate_argnums=0)
  state = _state(fields, jax.tree.map(jnp.array, params))
  batch = jax.tree.map(jnp.asarray, _batch(np.zeros((config.data.batch, config.T + 1), np.int32)))
  return _advance(advance.lower(state, batch).compile(), state, jax.device_put)


def materialised(hidden_BTD, table_VD, target_BT, *, logit_scale, chunk=None):
  """All logits at once: the definition."""
  del chunk
  logits_BTV = scaled_logits(hidden_BTD, table_VD.astype(hidden_BTD.dtype), logit_scale)
  share_BTV = jax.nn.log_softmax(logits_BTV)
  return -jnp.take_along_axis(share_BTV, target_BT[..., None], axis=-1).sum()


def scaled_logits(hidden, head_VD, logit_scale):
  """hidden [.., D] to fp32 logits [.., V]."""
  return jnp.matmul(hidden, head_VD.T, preferred_element_type=jnp.float32) * logit_scale


def _unguarded(config, params):
  """The step that applies every update, for what the guard costs."""
  with (mock.patch.object(guard, "keep", lambda verdict, new, old: new),
        mock.patch.object(guard, "judge", lambda guard, *_: (jnp.int32(0), guard))):
    return _ours(config, params)


def _fp8(config, params):
  config.matmul = "fp8"
  return _ours(config, params)


def _torch(config, params, tuned=False):
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  advance = bench.theirs(config, params, compiled=True, device=device, tuned=tuned)
  if device == "cpu":
    return advance, lambda: 0, "cpu"
  return advance, torch.cuda.max_memory_allocated, torch.cuda.get_device_name()


SIDES = dict(ours=_ours, unguarded=_unguarded, plain=_plain, fp8=_fp8, transformers=_torch,
             tuned=functools.partial(_torch, tuned=True))


def _train_config(config, **changes):
  """The fields of a train config that step.py reads, from those of a bench config."""
  adamw = config.optimizer.to_dict()
  own = dict(
      loss=dict(kind="next_token", chunk=config.loss_chunk, z_loss=0.0, pairs=0), accumulate=1,
      guard=dict(window=128, sigma=6.0), adapter=dict(rank=None),
      optimizer=dict(clip=adamw.pop("clip"),
                     adamw={n: v for n, v in adamw.items() if n != "learning_rate"}),
  )
  return Fields(config.to_dict() | own | changes)


def _rate(config):
  return lambda _: config.optimizer.learning_rate


def _state(fields, params):
  tx = optimizer.adamw(fields.optimizer, lambda _: 0.0)  # its state does not depend on the rate
  return dict(step=jnp.int32(0), params=params, optimizer=jax.jit(tx.init)(params),
              guard=guard.fresh(fields.guard.window))


def _advance(compiled, state, place):
  """(function of token_BT [B, T + 1] -> the loss before the step, peak bytes so far, device)."""
  held, device = [state], jax.devices()[0]

  def advance(token_BT):
    state, metrics = compiled(held.pop(), place(_batch(token_BT)))
    held.append(state)
    return float(jax.block_until_ready((state, metrics))[1]["loss"])

  def peak():
    used = device.memory_stats() or {}  # none on CPU
    return used.get("peak_bytes_in_use", allocated(compiled))

  return advance, peak, device.device_kind


def allocated(compiled):
  """Bytes of arguments, results and temporaries; XLA's own peak leaves out temporaries on CPU."""
  memory = compiled.memory_analysis()
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)


def _batch(token_BT):
  """One document a row, as the loader gives it."""
  token_BT, target_BT = token_BT[:, :-1], token_BT[:, 1:]
  _, segment_BT, position_BT = bench.inputs(token_BT)
  return dict(
      token_BT=token_BT, target_BT=target_BT, segment_BT=segment_BT, position_BT=position_BT,
      weight_BT=np.ones(target_BT.shape, np.float32), source_B=np.zeros(len(token_BT), np.int32),
      vote_P=np.zeros(1, np.int32),  # of one device
  )
