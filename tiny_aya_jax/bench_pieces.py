"""How long the parts of a training step take, and what they hold, beside named opponents.

attention, loss, block: forward and backward in this process. Sides take turns, because on a busy
machine only ratios within one run mean anything, and must give the same numbers first, or the
comparison is void. step, fp8, start: whole training steps, a process a side and turn, so that each
has the device's memory to itself and may take the largest batch that fits; every side's first steps
see one row, however often, so their losses must agree. Needs neither grain nor ml_collections:
launch/gpu_table.py runs it where they are not.

  python -m tiny_aya_jax.bench_pieces FIELDS.json RESULT.json    what `call` starts
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
import traceback
import types

import jax
import jax.numpy as jnp
import numpy as np

from tiny_aya_jax import axes, bench, flops, run
from tiny_aya_jax.model import losses
from tiny_aya_jax.model.attention import attention as attend
from tiny_aya_jax.model.transformer import Block, TinyAya, logits, remat_policy
from tiny_aya_jax.train import optimizer, step as steps

GIB = 2**30
FP8 = 1e-2  # of the first loss: what 8 bits may move the first losses
DOCUMENT = 700  # tokens of a packed document, the mean of an exponential, as bench_loader.py's
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


def main(config):
  """Runs the pieces named by config.pieces, each line as soon as it is measured."""
  config = Fields(config.to_dict())
  bench.keep_threads(config.threads)
  bench.keep_memory()
  device = jax.devices()[0]
  run.say(f"{bench.versions('jax', 'jaxlib')}; {device.device_kind}")
  cfg = config.model
  run.say(f"D {cfg.D}, F {cfg.F}, {cfg.N}/{cfg.K} heads of {cfg.H}, V {cfg.V}, window {cfg.window}, "
          f"{config.dtype}; {config.turns} turns of {config.steps}, medians; memory is what XLA allocates")
  for piece in config.pieces:
    PIECES[piece](config)


# --- In this process -------------------------------------------------------------------------------


def attention(config):
  """Full and windowed, one document a row and packed; -> {"T 8192, full": {side: (s, bytes)}}.

  Windowed only where the row is longer. With 'cudnn' also the public kernel that knows no documents.
  """
  cfg, dtype = config.model, jnp.dtype(config.dtype)
  cases = {}
  for T in config.lengths:
    q, k, v, d = (
        jax.random.normal(jax.random.key(seed), (config.batch, T, heads, cfg.H), dtype)
        for seed, heads in enumerate((cfg.N, cfg.K, cfg.K, cfg.N))
    )
    for window in (None, cfg.window) if cfg.window < T else (None,):
      for packed in (False, True):
        sides = {side: _attention(side, window) for side in (config.attention, "reference")}
        if config.attention == "cudnn" and not packed:
          sides["jax.nn cudnn"] = _without_documents(window)
        case = f"T {T}, {window and 'window' or 'full'}{', packed' * packed}"
        cases[case] = (q, k, v, d, *_rows(config.batch, T, packed)), sides
  found = _race("attention", cases, config)
  for T in config.lengths:
    full, window = (found.get(f"T {T}, {kind}", {}) for kind in ("full", "window"))
    if window:
      ratio = window[config.attention][0] / full[config.attention][0]
      pairs = flops.pairs(T, cfg.window) / flops.pairs(T)
      run.say(f"attention T {T}: windowed over full {ratio:.2f}; of the pairs it is {pairs:.2f}")
    run.say(f"attention T {T}: packing costs {packing(found, T, config.attention):+.1%}")
  return found


def packing(found, T, backend):
  """The worst overhead of `backend` that knows documents over one that does not, from `attention`.

  That is the public cuDNN kernel, where it was timed; elsewhere the same backend on one document.
  """
  def over(kind):
    alone = found[f"T {T}, {kind}"]
    times = [found[f"T {T}, {kind}, packed"][backend][0]]
    times += [alone[backend][0]] if "jax.nn cudnn" in alone else []
    return max(times) / alone.get("jax.nn cudnn", alone[backend])[0] - 1

  return max(over(kind) for kind in ("full", "window") if f"T {T}, {kind}" in found)


def loss(config):
  """The loss with its gradients; -> {"T 8192": {side: (seconds, bytes)}}."""
  cfg, cases = config.model, {}
  for T in config.lengths:
    shape = config.batch, T
    hidden_BTD = jax.random.normal(jax.random.key(0), (*shape, cfg.D), jnp.dtype(config.dtype))
    table_VD = 0.02 * jax.random.normal(jax.random.key(1), (cfg.V, cfg.D))
    target_BT = jax.random.randint(jax.random.key(2), shape, 0, cfg.V)
    settings = dict(logit_scale=cfg.logit_scale, chunk=config.loss_chunk)
    sides = {
        side: jax.value_and_grad(functools.partial(LOSSES[side], **settings), (0, 1))
        for side in config.losses
    }
    cases[f"T {T}"] = (hidden_BTD, table_VD, target_BT), sides
  return _race("loss", cases, config)


def block(config):
  """One sliding block by what it keeps (remat), beside naive attention and nothing recomputed."""
  cfg, T = config.model, config.lengths[0]
  x_BTD, d_BTD = (jax.random.normal(jax.random.key(seed), (config.batch, T, cfg.D), config.dtype)
                  for seed in range(2))
  rows = _rows(config.batch, T, packed=True)

  def side(backend, remat):
    module = Block(cfg, jnp.dtype(config.dtype), backend, cfg.window, config.matmul)

    def apply(params, x_BTD):
      return module.apply({"params": params}, x_BTD, *rows)

    apply = apply if remat == "none" else jax.checkpoint(apply, policy=remat_policy(remat))

    def forward_backward(params, x_BTD, d_BTD):
      out_BTD, back = jax.vjp(apply, params, x_BTD)
      return out_BTD, back(d_BTD)

    return module, forward_backward

  sides = {remat: side(config.attention, remat)[1] for remat in config.remats}
  module, sides["plain"] = side("reference", "none")
  params = module.init(jax.random.key(0), x_BTD, *rows)["params"]
  return _race("block", {f"T {T}": ((params, x_BTD, d_BTD), sides)}, config)


def _attention(backend, window):
  def forward_backward(q, k, v, d, segment_BT, position_BT):
    out, back = jax.vjp(lambda q, k, v: attend(
        q, k, v, segment_BT=segment_BT, position_BT=position_BT, window=window, backend=backend,
    ), q, k, v)
    return out, back(d)

  return forward_backward


def _without_documents(window):
  def forward_backward(q, k, v, d, *_):
    out, back = jax.vjp(lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=window and (window - 1, 0),
        implementation="cudnn",
    ), q, k, v)
    return out, back(d)

  return forward_backward


def _rows(B, T, packed):
  """(segment_BT, position_BT): one document a row, or documents of DOCUMENT tokens on average."""
  if not packed:
    return bench.inputs(np.zeros((B, T), np.int32))[1:]
  starts_BT = np.random.default_rng(0).random((B, T)) < 1 / DOCUMENT
  starts_BT[:, [0, T // 2]] = True  # two at least
  place_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  begin_BT = np.maximum.accumulate(np.where(starts_BT, place_BT, 0), axis=1)
  return np.cumsum(starts_BT, axis=1, dtype=np.int32), place_BT - begin_BT


def _fused(hidden_BTD, table_VD, target_BT, *, logit_scale, chunk):
  weight_BT = jnp.ones(target_BT.shape)
  return losses.next_token(
      hidden_BTD, table_VD, target_BT, weight_BT, logit_scale=logit_scale, chunk=chunk)[0]


def _materialised(hidden_BTD, table_VD, target_BT, *, logit_scale, chunk=None):
  """All logits at once: the definition."""
  cfg = types.SimpleNamespace(logit_scale=logit_scale)
  share_BTV = jax.nn.log_softmax(logits(dict(embedding_VD=table_VD), hidden_BTD, cfg))
  return -jnp.take_along_axis(share_BTV, target_BT[..., None], axis=-1).sum()


def _recompute_tile(hidden_BTD, table_VD, target_BT, *, logit_scale, chunk):
  """Tiles of as many tokens against the whole table; the backward pass makes the logits again from
  the saved logsumexp, four matmuls for three (marin's batched_xla.py, performance.md 2.4)."""
  head_VD = table_VD.astype(hidden_BTD.dtype)
  tile = min(chunk * hidden_BTD.shape[0], target_BT.size)
  tiles = hidden_BTD.reshape(-1, tile, hidden_BTD.shape[-1]), target_BT.reshape(-1, tile)
  return _tiles(*tiles, head_VD, logit_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tiles(hidden_MRD, target_MR, head_VD, logit_scale):
  return _tiles_forward(hidden_MRD, target_MR, head_VD, logit_scale)[0]


def _tiles_forward(hidden_MRD, target_MR, head_VD, logit_scale):
  def step(sum, tile):
    hidden_RD, target_R = tile
    logits_RV = _tile_logits(hidden_RD, head_VD, logit_scale)
    logsumexp_R = jax.nn.logsumexp(logits_RV, axis=-1)
    right_R = jnp.take_along_axis(logits_RV, target_R[:, None], axis=-1)[:, 0]
    return sum + (logsumexp_R - right_R).sum(), logsumexp_R

  sum, logsumexp_MR = jax.lax.scan(step, jnp.float32(0), (hidden_MRD, target_MR))
  return sum, (hidden_MRD, target_MR, head_VD, logsumexp_MR)


def _tiles_backward(logit_scale, kept, d_sum):
  *tiles, head_VD, logsumexp_MR = kept

  def step(d_head_VD, tile):
    hidden_RD, target_R, logsumexp_R = tile
    share_RV = jnp.exp(_tile_logits(hidden_RD, head_VD, logit_scale) - logsumexp_R[:, None])
    hit_RV = target_R[:, None] == jnp.arange(head_VD.shape[0])
    d_RV = ((share_RV - hit_RV) * (logit_scale * d_sum)).astype(head_VD.dtype)
    d_head_VD += jnp.matmul(d_RV.T, hidden_RD, preferred_element_type=jnp.float32)
    return d_head_VD, d_RV @ head_VD

  zero = jnp.zeros(head_VD.shape, jnp.float32)
  d_head_VD, d_hidden_MRD = jax.lax.scan(step, zero, (*tiles, logsumexp_MR))
  return d_hidden_MRD, None, d_head_VD.astype(head_VD.dtype)


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _tile_logits(hidden_RD, head_VD, logit_scale):
  return jnp.matmul(hidden_RD, head_VD.T, preferred_element_type=jnp.float32) * logit_scale


LOSSES = {"ours": _fused, "recompute tile": _recompute_tile, "materialised": _materialised}


def _race(what, cases, config):
  """{case: (arguments, {side: function})} -> {case: {side: (median seconds, peak bytes)}}.

  The first side of a case is ours. All cases take turns, so their ratios are of one run too.
  """
  calls, peaks = {}, {}
  for case, (arguments, sides) in cases.items():
    first = None
    for side, function in sides.items():
      compiled = jax.jit(function).lower(*arguments).compile()
      peaks[case, side] = _allocated(compiled)
      calls[case, side] = functools.partial(compiled, *arguments)
      out = calls[case, side]()
      first = out if first is None else first
      _same(f"{what} {case}: {side}", first, out, config.tolerance)
    del first, out
  seconds = {key: [] for key in calls}
  for _ in range(config.turns):
    for key, call in calls.items():
      jax.block_until_ready(call())  # untimed: the other's arrays leave the caches
      seconds[key] += [
          bench.timed(lambda: jax.block_until_ready(call())) for _ in range(config.steps)]
  found = {}
  for case, (_, sides) in cases.items():
    found[case] = {s: (statistics.median(seconds[case, s]), peaks[case, s]) for s in sides}
    (ours, (first, _)), *_ = found[case].items()
    run.say(f"{what} {case}: " + "; ".join(
        f"{side} {1000 * median:.4g} ms"
        + f" ({median / first:.2f} x {ours})" * (side != ours) + f", {peak / GIB:.3f} GiB"
        for side, (median, peak) in found[case].items()))
  return found


def _allocated(compiled):
  """Bytes of arguments, results and temporaries; XLA's own peak leaves out temporaries on CPU."""
  memory = compiled.memory_analysis()
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)


def _same(what, ours, theirs, tolerance):
  """Refuses arrays whose largest difference is more than tolerance of the largest element."""
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    apart = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a)))
    if not apart <= tolerance:  # also when it is not a number
      raise run.Refused(f"{what} differs from ours by {apart:.2e} of the largest element, more than "
                        f"{tolerance:.0e}: the times of different computations say nothing")


# --- A process a side and turn ---------------------------------------------------------------------


def step(config):
  """The whole training step beside plain Flax: scanned, naive attention, all logits, full remat."""
  return alternate(config.to_dict(), ("ours", "plain"), "step")


def fp8(config):
  """The training step with 8-bit matmuls beside bfloat16's, or whatever config.dtype is."""
  return alternate(config.to_dict() | dict(tolerance=FP8), ("fp8", "ours"), "fp8")


def start(config, deadline=None):
  """Seconds from a process's start to its first step's end, nothing compiled before, then again."""
  fields = config.to_dict() | dict(steps=1)
  with tempfile.TemporaryDirectory(prefix="bench_cache_") as cache:
    cold, warm = (call(fields, deadline, side="ours", cache=cache)["first"] for _ in range(2))
  run.say(f"start: first step done {cold:.1f} s after the process began, {warm:.1f} s from the cache")
  return dict(cold=cold, warm=warm)


PIECES = dict(attention=attention, loss=loss, block=block, step=step, fp8=fp8, start=start)


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
  # Of the first loss, which random parameters put near log(V).
  bench.agree(dict(ours=found[ours]["losses"]) | {side: found[side]["losses"] for side in others},
              fields["tolerance"] * found[ours]["losses"][0], run.say)
  for side in others:
    run.say(f"{what}: {ours} / {side} {speed(fields, found[ours]) / speed(fields, found[side]):.2f} in "
            "tokens/s")
  return found


def speed(fields, result):
  """Tokens a second of a result of `train`."""
  return result["batch"] * fields["T"] / statistics.median(result["seconds"])


def utilisation(fields, result):
  """(operations a second by formula, their share of the device's peak or None if that is unknown)."""
  rate = speed(fields, result) * flops.per_token(Fields(fields["model"]), fields["T"])["total"]
  peak = PEAK.get(result["device"])
  return rate, peak and rate / peak


def describe(fields, result):
  rate, share = utilisation(fields, result)
  return (f"{speed(fields, result):,.0f} tokens/s, {1000 * statistics.median(result['seconds']):.4g} ms, "
          f"batch {result['batch']} x {fields['T']}, {rate / 1e12:.4g} TF/s"
          + (f", MFU {share:.1%}" if share else "")
          + f", peak {result['peak'] / GIB:.2f} GiB" * (result["peak"] > 0)
          + f", first step after {result['first']:.0f} s")


def call(fields, deadline=None, **changes):
  """Runs this file in a process of its own on a config given as a dict; -> what it found.

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


def _answer(given, result):
  """The other end of `call`: runs fields["piece"], or trains fields["side"]."""
  config = Fields(json.loads(pathlib.Path(given).read_text(encoding="utf-8")))
  try:
    if config.threads:
      bench.keep_threads(config.threads)
      bench.keep_memory()
    if getattr(config, "cache", None):
      jax.config.update("jax_compilation_cache_dir", config.cache)
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
      jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    found = CALLS[config.piece](config) if hasattr(config, "piece") else train(config)
  except Exception as error:  # whatever it is: the table goes on, and says it
    traceback.print_exc()
    found = dict(error=" ".join(f"{type(error).__name__}: {error}".split())[:200])
  run.write_json(result, found)


def about(_):
  """What a process sees of this machine."""
  device = jax.devices()[0]
  return dict(device=device.device_kind, platform=device.platform, jax=jax.__version__)


CALLS = dict(about=about, attention=attention, loss=loss)


def train(config):
  """Trains config.side by the largest of config.batches that fits: the losses of the first steps,
  which see one row, then timed steps on random rows, or config.learn steps on rows to learn from.

  -> dict(batch, losses, seconds, peak (bytes), first (s since config.begun), device[, learnt]).
  """
  params = _params(config)
  for batch in config.batches:
    try:
      return _train(config, params, batch)
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
      else np.resize(normal, leaf.shape), tree["params"])


def _learnable(random, shape, V):
  """Tokens [B, T + 1], three in four a fixed function of the one before: there is a loss to reach."""
  V = min(V, 4096)
  token_BT = random.integers(0, V, shape, np.int32)
  follows_BT = random.random(shape) < 0.75
  for t in range(1, shape[1]):
    token_BT[:, t] = np.where(follows_BT[:, t], (token_BT[:, t - 1] * 31 + 7) % V, token_BT[:, t])
  return token_BT


def _ours(config, params):
  """What `train` compiles and runs, on one device (train/step.py)."""
  fields, mesh = _train_config(config), axes.mesh(devices=jax.devices()[:1])
  compiled = steps.compiled(fields, mesh, _rate(config), sources=1)
  with jax.set_mesh(mesh):
    state = _state(fields, jax.device_put(params, axes.shardings(mesh, params)))
  return _advance(compiled, state, functools.partial(axes.place, mesh))


def _plain(config, params):
  """The same step and optimiser around what one writes first in Flax."""
  fields = _train_config(config, attention="reference", remat="full", unroll=1)
  model = steps.model(fields)

  def loss(params, batch):
    hidden_BTD = model.apply(
        {"params": params}, *(batch[name] for name in ("token_BT", "segment_BT", "position_BT")))
    sum = _materialised(
        hidden_BTD, params["embedding_VD"], batch["target_BT"], logit_scale=config.model.logit_scale)
    return sum, batch["weight_BT"].sum(), dict(nats_BT=jnp.zeros(batch["target_BT"].shape))

  tx = optimizer.adamw(fields.optimizer, _rate(config))
  advance = jax.jit(functools.partial(
      steps.train_step, loss=loss, tx=tx, accumulate=1, sources=1), donate_argnums=0)
  state = _state(fields, jax.device_put(params))
  batch = jax.tree.map(jnp.asarray, _batch(np.zeros((config.data.batch, config.T + 1), np.int32)))
  return _advance(advance.lower(state, batch).compile(), state, jax.device_put)


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


SIDES = dict(ours=_ours, plain=_plain, fp8=_fp8, transformers=_torch,
             tuned=functools.partial(_torch, tuned=True))


def _train_config(config, **changes):
  """The fields of a train config that step.py reads, from those of a bench config."""
  adamw = config.optimizer.to_dict()
  own = dict(
      loss=dict(chunk=config.loss_chunk, z_loss=0.0), accumulate=1,
      optimizer=dict(clip=adamw.pop("clip"),
                     adamw={n: v for n, v in adamw.items() if n != "learning_rate"}),
  )
  return Fields(config.to_dict() | own | changes)


def _rate(config):
  return lambda step: config.optimizer.learning_rate


def _state(fields, params):
  tx = optimizer.adamw(fields.optimizer, lambda step: 0.0)  # its state does not depend on the rate
  return dict(step=jnp.int32(0), params=params, optimizer=jax.jit(tx.init)(params))


def _advance(compiled, state, place):
  """(function of token_BT [B, T + 1] -> the loss before the step, peak bytes so far, device)."""
  held, device = [state], jax.devices()[0]

  def advance(token_BT):
    state, metrics = compiled(held.pop(), place(_batch(token_BT)))
    held.append(state)
    return float(jax.block_until_ready((state, metrics))[1]["loss"])

  def peak():
    used = device.memory_stats() or {}  # none on CPU
    return used.get("peak_bytes_in_use", _allocated(compiled))

  return advance, peak, device.device_kind


def _batch(token_BT):
  """One document a row, as the loader gives it."""
  token_BT, target_BT = token_BT[:, :-1], token_BT[:, 1:]
  _, segment_BT, position_BT = bench.inputs(token_BT)
  return dict(
      token_BT=token_BT, target_BT=target_BT, segment_BT=segment_BT, position_BT=position_BT,
      weight_BT=np.ones(target_BT.shape, np.float32), source_B=np.zeros(len(token_BT), np.int32),
  )


if __name__ == "__main__":
  _answer(*sys.argv[1:])
