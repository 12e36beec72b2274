"""What a run proves before its first step, each in one line or a refusal.

That attention on these devices is what `reference` says, and that the compiled program, kept for
the next start, holds the kernels which the config asks for: a config is a wish.
"""

import contextlib
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from tiny_aya_jax import hlo, run
from tiny_aya_jax.axes import shard
from tiny_aya_jax.model import attention
from tiny_aya_jax.train import step

# Tokens for each device of context, so that documents cross from one to the next.
DOCUMENTS = (50, 64)  # padding up to T
T = 128  # one tile of splash, two blocks of chunked
WINDOWS = (32, None)  # one that ends inside a document, and that of full blocks


def keep_programs(workdir):
  """Compiled programs are read from and kept in $JAX_COMPILATION_CACHE_DIR, else in the workdir.

  A restart then loads its step instead of compiling it. Of an entry that it cannot read JAX warns,
  compiles, and leaves it there: remove the folder.
  """
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    folder = os.fspath(workdir.absolute() / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # a process that has compiled holds on to its folder, or none
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def check_attention(config, mesh):
  """Compares config.attention with `reference` on a row of two documents, under the current mesh.

  Forward and gradients, by the largest error over the largest value; says it, or refuses.
  """
  backend, context = config.attention, mesh.shape["context"]
  if backend == "reference":
    return
  N, K, H = config.model.N, config.model.K, config.model.H
  random = np.random.default_rng(0)
  rows = [random.normal(size=(T * context, heads, H)).astype(np.float32) for heads in (N, K, K, N)]
  compare = functools.partial(
      _error, backend=backend, dtype=jnp.dtype(config.dtype),
      B=mesh.shape["data"] * mesh.shape["fsdp"],
  )
  error, device = float(jax.jit(compare)(*rows)), mesh.devices.flat[0]
  # Measured: 3e-6 and 8e-3 on CPU. Off it, matmuls of float32 round their inputs by default. A
  # window that is one off, or a document that sees another, is an error above 0.1.
  allowed = 1e-4 if config.dtype == "float32" and device.platform == "cpu" else 3e-2
  if not error <= allowed:  # so, nan is refused too
    raise run.Refused(
        f"attention {backend!r} differs from 'reference' by {error:.1e} of the largest value on "
        f"{device.device_kind}, at most {allowed:.0e} expected: choose another config.attention"
    )
  run.say(f"attention {backend} equals reference up to {error:.1e}, forward and gradients")


def _error(q_TNH, k_TKH, v_TKH, d_TNH, *, backend, dtype, B):
  """The largest error of B rows made from one, over windows, the output and three gradients."""
  edges = np.cumsum((0, *DOCUMENTS)) * (len(q_TNH) // T)
  document_T = np.searchsorted(edges[1:], np.arange(len(q_TNH)), side="right")
  start_T = edges[document_T]
  segment_T = np.where(document_T < len(DOCUMENTS), document_T + 1, 0)
  segment_BT, position_BT = (
      jnp.asarray(np.tile(x, (B, 1)), jnp.int32) for x in (segment_T, np.arange(len(q_TNH)) - start_T)
  )
  row_B = jnp.arange(1, B + 1)[:, None, None, None]
  q, k, v, d = (
      shard((2 * jnp.sin(row_B * x)).astype(dtype), letters)  # as wide as x; no row like another
      for x, letters in ((q_TNH, "BTNH"), (k_TKH, "BTKH"), (v_TKH, "BTKH"), (d_TNH, "BTNH"))
  )

  def attend(backend, window, dtype):
    out, pull = jax.vjp(
        functools.partial(attention.attention, segment_BT=segment_BT, position_BT=position_BT,
                          window=window, backend=backend),
        q.astype(dtype), k.astype(dtype), v.astype(dtype),
    )
    return out, *pull(d.astype(dtype))

  errors = []
  for window in WINDOWS:
    ours = attend(backend, window, dtype)
    with jax.default_matmul_precision("highest"):
      theirs = attend("reference", window, jnp.float32)
    errors += [jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)) for x, y in zip(ours, theirs)]
  return jnp.max(jnp.stack(errors))


def program(config, mesh, rate, sources):
  """`step.compiled`, with one line on seconds, cache, memory and kernels; or a refusal."""
  begin = time.monotonic()
  with _cache_events() as events:
    compiled = step.compiled(config, mesh, rate, sources)
  seconds = time.monotonic() - begin
  held = kernels(compiled.as_text(), config.attention, config.matmul)
  cache = dict(
      cache_hits="cache hit", cache_misses=f"cache miss, kept in {jax.config.jax_compilation_cache_dir}"
  ).get(events[-1] if events else "", "not kept")
  peak = _peak(compiled, mesh.local_devices[0])
  run.say(f"compiled in {seconds:.1f} s ({cache}){peak}, {held}")
  return compiled


@contextlib.contextmanager
def _cache_events():
  """A list of "cache_hits" and "cache_misses", the step's last; JAX counts a miss as it is kept."""
  events = []

  def note(event, **_):
    folder, _, name = event.rpartition("/")
    if folder == "/jax/compilation_cache" and name in ("cache_hits", "cache_misses"):
      events.append(name)

  jax.monitoring.register_event_listener(note)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_listener(note)


# What the calls of a kernel have in their names, and which of them are of the backward pass: as
# JAX's splash_attention and cudnn/fused_attention_stablehlo name them.
NAMES = dict(splash=("splash_", "_dkv"), cudnn=("__cudnn$fmha", "Backward"))


def kernels(text, attention, matmul):
  """What the program with this HLO text attends and multiplies with, in words.

  Refuses a program without the kernels that config.attention and config.matmul ask for, or with
  another attention's.
  """
  calls = {kernel or target for target, kernel in hlo.custom_calls(text)}
  found = {backend: sorted(call for call in calls if mark in call)
           for backend, (mark, _) in NAMES.items()}
  ours = found.pop(attention, [])
  if others := sum(found.values(), []):
    raise run.Refused(f"config.attention is {attention!r} and the compiled program attends with "
                      f"{', '.join(others)}: set config.attention to what it is")
  if attention in NAMES:
    backward = [call for call in ours if NAMES[attention][1] in call]
    if not 0 < len(backward) < len(ours):
      raise run.Refused(
          f"config.attention is {attention!r} and the compiled program holds "
          f"{', '.join(ours) or 'no call'} of its kernels, expected one forward and one backward: "
          "choose another config.attention"
      )
  said = f"attention {attention}: {', '.join(ours) or 'XLA'}"
  if matmul == "fp8":
    if missing := [name for name in ("e4m3", "e5m2") if f"f8{name}" not in text]:
      raise run.Refused(f"config.matmul is 'fp8' and the compiled program holds no "
                        f"{' and no '.join(missing)}: choose 'dtype'")
    said += ", matmul fp8: e4m3, e5m2"
  return said


def _peak(compiled, device):
  """', peak X of Y GiB a device', as far as it is known."""
  memory, limit = compiled.memory_analysis(), (device.memory_stats() or {}).get("bytes_limit")
  if memory is None or memory.peak_memory_in_bytes < memory.temp_size_in_bytes:
    return ""  # the CPU's peak leaves temporaries out
  known = f" of {limit / hlo.GIB:.2f}" if limit else ""
  return f", peak {memory.peak_memory_in_bytes / hlo.GIB:.2f}{known} GiB a device"
