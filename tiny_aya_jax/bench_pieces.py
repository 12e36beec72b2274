"""How long the parts of a training step take, and what they hold, beside named opponents.

attention, loss, block: forward and backward, in this process. Sides take turns, because on a busy
machine only ratios within one run mean anything, and must give the same numbers first, or the
comparison is void. step, fp8, start: whole training steps, bench_steps.py. guards: what safety costs.

  python -m tiny_aya_jax.bench_pieces FIELDS.json RESULT.json    what bench_steps.call starts
"""

import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from tiny_aya_jax import bench, bench_steps, flops, run
from tiny_aya_jax.bench_steps import GIB, Fields, scaled_logits
from tiny_aya_jax.model import losses
from tiny_aya_jax.model.attention import attention as attend
from tiny_aya_jax.model.transformer import Block, remat_policy

FP8 = 1e-2  # of the first loss: what 8 bits may move the first losses
DOCUMENT = 700  # tokens of a packed document, the mean of an exponential, as bench_loader.py's


def main(config):
  """Runs the pieces named by config.pieces, each line as soon as it is measured."""
  config = Fields(config.to_dict())
  bench.keep_threads(config.threads)
  bench.keep_memory()
  device = jax.devices()[0]
  run.say(f"{bench.versions('jax', 'jaxlib')}; {device.device_kind}")
  cfg = config.model
  run.say(f"{4 * cfg.L} layers, D {cfg.D}, F {cfg.F}, {cfg.N}/{cfg.K} heads of {cfg.H}, "
          f"V {cfg.V}, window {cfg.window}, {config.dtype}; medians of {config.turns} turns of "
          f"{config.steps}; memory is what XLA allocates")
  for piece in config.pieces:
    PIECES[piece](config)


def attention(config):
  """Full and windowed, one document a row and packed; -> {"T 8192, full": {side: (s, bytes)}}.

  Windowed only where the row is longer. With 'cudnn' also the public kernel that has no documents.
  """
  cfg, ours, found = config.model, config.attention, {}
  for T in config.lengths:
    cases = {}
    d, *inputs = (
        jax.random.normal(
            jax.random.key(seed), (config.batch, T, heads, cfg.H), jnp.dtype(config.dtype))
        for seed, heads in enumerate((cfg.N, cfg.N, cfg.K, cfg.K))
    )
    for window in (None, cfg.window) if cfg.window < T else (None,):
      for packed in (False, True):
        sides = {side: _attend(side, window) for side in (ours, "reference")}
        if ours == "cudnn" and not packed:
          sides["jax.nn cudnn"] = _without_documents(window)
        case = f"T {T}, {'window' if window else 'full'}{', packed' * packed}"
        cases[case] = (d, _rows(config.batch, T, packed), *inputs), sides
    found |= _race("attention", cases, config)
    if cfg.window < T:
      pairs = flops.pairs(T, cfg.window) / flops.pairs(T)
      run.say(f"attention T {T}: windowed over full {windowed(found, T, ours):.2f}, with "
              f"{pairs:.2f} of the pairs")
    run.say(f"attention T {T}: packing costs {packing(found, T, ours):+.1%}")
  return found


def windowed(found, T, backend):
  """Time of windowed over full attention of one document, from what `attention` found."""
  return found[f"T {T}, window"][backend][0] / found[f"T {T}, full"][backend][0]


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
  cfg, found = config.model, {}
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
    found |= _race("loss", {f"T {T}": ((hidden_BTD, table_VD, target_BT), sides)}, config)
  return found


def block(config):
  """One sliding block by what it keeps (remat), beside naive attention and nothing recomputed."""
  cfg, T = config.model, config.lengths[0]
  x_BTD, d_BTD = (jax.random.normal(jax.random.key(seed), (config.batch, T, cfg.D), config.dtype)
                  for seed in range(2))
  rows = _rows(config.batch, T, packed=True)

  def module(backend):
    return Block(cfg, jnp.dtype(config.dtype), backend, cfg.window, config.matmul)

  def side(backend, remat):
    def apply(rows, params, x_BTD):
      return module(backend).apply({"params": params}, x_BTD, *rows)

    return _both_ways(apply if remat == "none" else jax.checkpoint(
        apply, policy=remat_policy(remat)))

  sides = {remat: side(config.attention, remat) for remat in config.remats}
  sides["plain"] = side("reference", "none")
  params = module("reference").init(jax.random.key(0), x_BTD, *rows)["params"]
  return _race("block", {f"T {T}": ((d_BTD, rows, params, x_BTD), sides)}, config)


def _both_ways(function):
  """function(rows, *x) -> (d, rows, *x) to its value and the gradients of x where that has d."""
  def forward_backward(d, rows, *x):
    out, back = jax.vjp(functools.partial(function, rows), *x)
    return out, back(d)

  return forward_backward


def _attend(backend, window):
  return _both_ways(lambda rows, *qkv: attend(
      *qkv, segment_BT=rows[0], position_BT=rows[1], window=window, backend=backend))


def _without_documents(window):
  return _both_ways(lambda rows, *qkv: jax.nn.dot_product_attention(
      *qkv, is_causal=True, local_window_size=window and (window - 1, 0), implementation="cudnn"))


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


def _recompute_tile(hidden_BTD, table_VD, target_BT, *, logit_scale, chunk):
  """As many tokens at a time; the backward pass makes their logits again from the saved logsumexp:
  four matmuls for three (marin's batched_xla.py, performance.md 2.4)."""
  tile = min(chunk * hidden_BTD.shape[0], target_BT.size)
  return _tiles(hidden_BTD.reshape(-1, tile, hidden_BTD.shape[-1]), target_BT.reshape(-1, tile),
                table_VD.astype(hidden_BTD.dtype), logit_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tiles(hidden_MRD, target_MR, head_VD, logit_scale):
  return _tiles_forward(hidden_MRD, target_MR, head_VD, logit_scale)[0]


def _tiles_forward(hidden_MRD, target_MR, head_VD, logit_scale):
  def step(sum, tile):
    hidden_RD, target_R = tile
    logits_RV = scaled_logits(hidden_RD, head_VD, logit_scale)
    logsumexp_R = jax.nn.logsumexp(logits_RV, axis=-1)
    right_R = jnp.take_along_axis(logits_RV, target_R[:, None], axis=-1)[:, 0]
    return sum + (logsumexp_R - right_R).sum(), logsumexp_R

  sum, logsumexp_MR = jax.lax.scan(step, jnp.float32(0), (hidden_MRD, target_MR))
  return sum, (head_VD, (hidden_MRD, target_MR, logsumexp_MR))


def _tiles_backward(logit_scale, kept, d_sum):
  head_VD, tiles = kept

  def step(d_head_VD, tile):
    hidden_RD, target_R, logsumexp_R = tile
    share_RV = jnp.exp(scaled_logits(hidden_RD, head_VD, logit_scale) - logsumexp_R[:, None])
    hit_RV = target_R[:, None] == jnp.arange(head_VD.shape[0])
    d_RV = ((share_RV - hit_RV) * (logit_scale * d_sum)).astype(head_VD.dtype)
    d_head_VD += jnp.matmul(d_RV.T, hidden_RD, preferred_element_type=jnp.float32)
    return d_head_VD, d_RV @ head_VD

  d_head_VD, d_hidden_MRD = jax.lax.scan(step, jnp.zeros(head_VD.shape, jnp.float32), tiles)
  return d_hidden_MRD, None, d_head_VD.astype(head_VD.dtype)


_tiles.defvjp(_tiles_forward, _tiles_backward)


LOSSES = {
    "ours": _fused, "recompute tile": _recompute_tile, "materialised": bench_steps.materialised,
}  # fmt: skip


def _race(what, cases, config):
  """{case: (arguments, {side: function})} -> {case: {side: (median seconds, peak bytes)}}.

  The first side of a case is ours. The cases take turns too, so that ratios of one to another hold.
  """
  calls, peaks = {}, {}
  for case, (arguments, sides) in cases.items():
    first, arguments = None, jax.device_put(arguments)
    for side, function in sides.items():
      compiled = jax.jit(function).lower(*arguments).compile()
      peaks[case, side] = bench_steps.allocated(compiled)
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


def _same(what, ours, theirs, tolerance):
  """Refuses arrays whose largest difference is more than tolerance of the largest element."""
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    apart = float(jnp.max(jnp.abs(a - b)).astype(jnp.float32) / jnp.max(jnp.abs(a)))
    if not apart <= tolerance:  # also when it is not a number
      raise run.Refused(
          f"{what} differs from ours by {apart:.2e} of the largest element, more than "
          f"{tolerance:.0e}: the times of different computations say nothing")


def step(config):
  """The whole training step beside plain Flax: scanned, naive attention, all logits, full remat."""
  return bench_steps.alternate(config.to_dict(), ("ours", "plain"), "step")


def fp8(config):
  """The training step with 8-bit matmuls beside bfloat16's, or whatever config.dtype is."""
  return bench_steps.alternate(config.to_dict() | dict(tolerance=FP8), ("fp8", "ours"), "fp8")


def start(config, deadline=None):
  """Seconds from a process's start to its first step's end, nothing compiled before, then again."""
  fields = config.to_dict() | dict(steps=1)
  with tempfile.TemporaryDirectory(prefix="bench_cache_") as cache:
    cold, warm = (
        bench_steps.call(fields, deadline, side="ours", cache=cache)["first"] for _ in range(2))
  run.say(f"start: first step done {cold:.1f} s after the process began, {warm:.1f} s when "
          "compiled before")
  return dict(cold=cold, warm=warm)


def guards(config):
  """What guards, fingerprints and saves cost, in steps; sides in this process, step by step.

  -> dict(step, unguarded, fingerprints, stall, save: seconds): unguarded applies every update; stall
  is how long a save stops training, save how long it takes until it is committed.
  """
  from tiny_aya_jax.train import checkpoint, saved  # the table on a GPU has no Orbax

  fields = Fields(config.to_dict() | dict(data=dict(batch=config.batches[0], T=config.T)))
  params = bench_steps._params(fields)
  shape = config.batches[0], config.T + 1
  token_BT = np.random.default_rng(config.seed).integers(0, config.model.V, shape, np.int32)
  sides = {name: bench_steps.SIDES[name](fields, params)[0] for name in ("ours", "unguarded")}
  seconds = {name: [] for name in sides}
  for _ in range(config.turns * config.steps + 1):
    for name, advance in sides.items():
      seconds[name].append(bench.timed(advance, token_BT))
  step, unguarded = (statistics.median(times[1:]) for times in seconds.values())
  state = bench_steps._state(bench_steps._train_config(fields), jax.device_put(params))
  trees = {name: state[name] for name in checkpoint.TREES}
  checkpoint.fingerprints(trees["params"]), checkpoint.fingerprints(trees["optimizer"])  # compiles
  prints = bench.timed(lambda _: [checkpoint.fingerprints(tree) for tree in trees.values()], None)
  stalls, saves = [], []
  with tempfile.TemporaryDirectory(prefix="bench_saves_") as folder:
    for turn in range(config.turns + 1):
      began = time.monotonic()
      wait = checkpoint.begin(folder, turn, trees | dict(data={}, meta={}), seconds=600)
      stalls.append(time.monotonic() - began)
      wait()
      saves.append(time.monotonic() - began)
    assert len(saved.steps(folder)) == len(saves)
  stall, save = statistics.median(stalls[1:]), statistics.median(saves[1:])
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
  run.say(f"guards: a step {1000 * step:.4g} ms, {step / unguarded:.4f} of one that applies every update; "
          f"fingerprints {1000 * prints:.4g} ms, at save_every 1000 {prints / step / 1000:.3%} of the time; "
          f"a save of {size / GIB:.3f} GiB stops training for {1000 * stall:.4g} ms, {stall / step:.2f} "
          f"steps, and is committed after {1000 * save:.4g} ms")
  return dict(step=step, unguarded=unguarded, fingerprints=prints, stall=stall, save=save)


PIECES = dict(attention=attention, loss=loss, block=block, step=step, fp8=fp8, start=start, guards=guards)


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
    found = CALLS[config.piece](config) if hasattr(config, "piece") else (
        bench_steps.train(config))
  except Exception as error:  # whatever it is: the table goes on, and says it
    traceback.print_exc()
    found = dict(error=" ".join(f"{type(error).__name__}: {error}".split())[:200])
  run.write_json(result, found)


def about(_):
  """What a process sees of this machine."""
  device = jax.devices()[0]
  return dict(device=device.device_kind, platform=device.platform, jax=jax.__version__)


CALLS = dict(about=about, attention=attention, loss=loss)


if __name__ == "__main__":
  _answer(*sys.argv[1:])
