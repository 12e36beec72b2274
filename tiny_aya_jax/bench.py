"""VERB bench: how fast, beside what, on this machine; nothing is written.

`train_step` times one training step of ours beside the same step of `transformers` Cohere2 in
PyTorch, eager and compiled: same weights, same batch, same AdamW. The sides take turns, because on
a busy machine only ratios within one run mean anything, and they must agree on the loss of the
first steps, or the comparison is void. One segment a row on both sides: packed rows do not exist
over there. `pieces` is bench_pieces.py, `loader` bench_loader.py, `evaluation`
bench_evaluation.py, `population` bench_population.py. A config is any object with the
fields of experiments/bench.py.
"""

import contextlib
import ctypes
import importlib
import os
import platform
import statistics
import time

import numpy as np

BENCHES = ("train_step", "pieces", "loader", "evaluation", "population")
SIDES = dict(eager="PyTorch eager", compile="torch.compile")
AGREED_STEPS = 3  # 1: same forward; 2 and 3: same gradients, clipping and AdamW
PIECES = ("attention", "loss", "block", "step", "fp8", "start", "guards")


def main(config, workdir=None):
  """Runs the benchmark named by config.bench and prints its table; the workdir is not used."""
  from tiny_aya_jax import run

  bench = run.choose("bench", config.bench, BENCHES)
  if bench == "loader":
    from tiny_aya_jax import bench_loader

    bench_loader.main(config)
    return
  if bench == "evaluation":
    from tiny_aya_jax import bench_evaluation

    bench_evaluation.main(config)
    return
  run.choose_fields(config, "dtype", "attention", "remat", "matmul")
  for name in ("turns", "steps", "batch", "T", "threads"):
    if config[name] < 1:
      raise run.Refused(f"config.{name} is {config[name]}, expected at least 1")
  if config.model.N % config.model.K:
    raise run.Refused(f"{config.model.N} query heads do not share {config.model.K} key heads evenly")
  if bench == "pieces":
    for piece in config.pieces:
      run.choose("piece", piece, PIECES)
    if min(config.lengths, default=0) < 1:
      raise run.Refused(f"config.lengths is {config.lengths}, expected lengths of at least 1")
    from tiny_aya_jax import bench_pieces

    bench_pieces.main(config)
    return
  if bench == "population":
    from tiny_aya_jax import bench_population

    bench_population.main(config)
    return
  for side in config.against:
    run.choose("side", side, SIDES)
  train_step(config)


def train_step(config, say=print):
  """Times one training step of every side, in turns; returns {side: [seconds of each step]}.

  Refuses when another side's losses leave ours by more than config.tolerance, in nats.
  """
  keep_threads(config.threads)
  keep_memory()
  cfg = config.model
  say(versions("jax", "jaxlib", *(("torch", "transformers") if config.against else ())))
  say(f"{4 * cfg.L} layers, D {cfg.D}, F {cfg.F}, {cfg.N}/{cfg.K} heads of {cfg.H}, V {cfg.V}, "
      f"window {cfg.window}, batch {config.batch} x {config.T}, {config.dtype}")
  say(f"ours: attention {config.attention}, loss chunk {config.loss_chunk}, "
      f"remat {config.remat}, unroll {config.unroll}, matmul {config.matmul}")
  params, token_BT = _start(config)
  sides = dict(ours=_ours(config, params))
  for side in config.against:
    sides[side] = theirs(config, params, compiled=side == "compile")
  agree({side: [step(token_BT) for _ in range(AGREED_STEPS)] for side, step in sides.items()},
        config.tolerance, say)
  seconds = {side: [] for side in sides}
  for turn in range(config.turns):
    for side, step in sides.items():
      step(token_BT)  # untimed: the other side's arrays leave the caches, its threads go to sleep
      seconds[side] += [timed(step, token_BT) for _ in range(config.steps)]
    say(f"turn {turn + 1}/{config.turns}: " + _table(seconds, config.batch * config.T))
  return seconds


def keep_threads(threads):
  """Keeps this process, and so XLA's and PyTorch's pools, on the first `threads` cores."""
  if hasattr(os, "sched_setaffinity"):  # Linux; before jax counts its cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def keep_memory():
  """Makes glibc keep freed memory for the next step, for every side; call it before jax starts.

  XLA on CPU frees all temporaries of a step and asks for them again at the next: 1.9 GiB and
  480,000 page faults a step here, 18% of its time. One arena, because others always use mmap.
  The price: the process stays at its peak. Does nothing on another libc or system.
  """
  trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
  if platform.libc_ver()[0] == "glibc":
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(arena_max, 1), mallopt(mmap_max, 0), mallopt(trim_threshold, -1)


def versions(*packages):
  """'jax 0.10.2, python 3.11.7, cores 2'."""
  found = {name: _package(name).__version__ for name in packages}
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  found |= dict(python=platform.python_version(), cores=cores)
  return ", ".join(f"{name} {version}" for name, version in found.items())


def _package(name):
  try:
    return importlib.import_module(name)
  except ImportError:
    from tiny_aya_jax import run

    raise run.Refused(
        f"bench against PyTorch needs {name}, which is not installed: pip install "
        "torch==2.13.0 transformers==5.17.0, or give --config.against='()'"
    ) from None


def _start(config):
  """Fresh parameters, as NumPy, and random tokens [batch, T + 1]."""
  import jax

  from tiny_aya_jax.model.transformer import TinyAya

  random = np.random.default_rng(config.seed)
  token_BT = random.integers(0, config.model.V, (config.batch, config.T + 1), np.int32)
  params = TinyAya(config.model).init(jax.random.key(config.seed), *inputs(token_BT[:1, :-1]))
  return jax.tree.map(np.asarray, params["params"]), token_BT


def inputs(token_BT):
  """(token_BT, segment_BT, position_BT) of rows that are one document each."""
  position_BT = np.broadcast_to(np.arange(token_BT.shape[1], dtype=np.int32), token_BT.shape)
  return token_BT, np.ones_like(token_BT), position_BT


def _ours(config, params):
  """A function of token_BT [batch, T + 1]: one step of this package, returning the loss before."""
  import jax
  import jax.numpy as jnp
  import optax

  from tiny_aya_jax.model import losses
  from tiny_aya_jax.model.transformer import TinyAya
  from tiny_aya_jax.train.optimizer import decay_mask

  cfg, adamw = config.model, config.optimizer
  model = TinyAya(
      cfg, jnp.dtype(config.dtype), config.attention, config.remat, config.unroll, config.matmul
  )
  tx = optax.chain(
      optax.clip_by_global_norm(adamw.clip),
      optax.adamw(
          adamw.learning_rate, adamw.b1, adamw.b2, adamw.eps,
          weight_decay=adamw.weight_decay, mask=decay_mask,
      ),
  )

  def loss(params, rows, target_BT):
    hidden_BTD = model.apply({"params": params}, *rows)
    sum, count, _ = losses.next_token(
        hidden_BTD, params["embedding_VD"], target_BT, jnp.ones(target_BT.shape, jnp.float32),
        logit_scale=cfg.logit_scale, chunk=config.loss_chunk,
    )
    return sum / count

  def update(params, moments, rows, target_BT):
    value, gradients = jax.value_and_grad(loss)(params, rows, target_BT)
    updates, moments = tx.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, value

  update = jax.jit(update, donate_argnums=(0, 1))
  state = jax.device_put(jax.tree.map(jnp.array, params))
  state = [state, tx.init(state)]

  def step(token_BT):
    *state[:], value = update(*state, inputs(token_BT[:, :-1]), token_BT[:, 1:])
    return float(jax.block_until_ready((state, value))[1])

  return step


def theirs(config, params, compiled, device="cpu", tuned=False):
  """The same step in PyTorch: fused AdamW, clip_grad_norm_, SDPA, the loss compiled with the model.

  tuned: the model and loss of bench_torch.py, instead of `transformers`' own.
  """
  torch = _package("torch")
  torch.set_num_threads(config.threads)
  adamw = config.optimizer
  if tuned:
    from tiny_aya_jax.bench_torch import Tuned

    loss = model = Tuned(config.model, params, config.T, getattr(torch, config.dtype), device)
  else:
    model, loss = _cohere2(config.model, params, device)
  matrices, rest = [], []
  for name, parameter in model.named_parameters():
    (rest if "norm" in name or "embed" in name else matrices).append(parameter)
  groups = [dict(params=matrices), dict(params=rest, weight_decay=0.0)]
  optimizer = torch.optim.AdamW(
      groups, adamw.learning_rate, (adamw.b1, adamw.b2), adamw.eps, adamw.weight_decay, fused=True
  )
  loss = torch.compile(loss, dynamic=False) if compiled else loss

  def step(token_BT):
    optimizer.zero_grad(set_to_none=True)
    token_BT = torch.tensor(token_BT.astype(np.int64), device=device)
    with _kernels(device), torch.autocast(
        device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
      value = loss(token_BT[:, :-1], token_BT[:, 1:])
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), adamw.clip)
    optimizer.step()
    return float(value.detach())

  return step


def _kernels(device):
  """On a GPU, what SDPA may use, cuDNN first; it chooses by itself elsewhere."""
  from torch.nn.attention import SDPBackend, sdpa_kernel

  if device == "cpu":
    return contextlib.nullcontext()
  names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
  return sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def _cohere2(cfg, params, device):
  """transformers' model of the same shape and numbers (tiny_aya.md 1.2), and its loss."""
  import torch

  from tiny_aya_jax.model.transformer import BLOCKS

  transformers = _package("transformers")
  config = transformers.Cohere2Config(
      vocab_size=cfg.V, hidden_size=cfg.D, intermediate_size=cfg.F, num_hidden_layers=4 * cfg.L,
      num_attention_heads=cfg.N, num_key_value_heads=cfg.K, logit_scale=cfg.logit_scale,
      layer_norm_eps=cfg.norm_epsilon, sliding_window=cfg.window, pad_token_id=None,
      bos_token_id=None, eos_token_id=None,
      rope_parameters=dict(rope_type="default", rope_theta=cfg.rope_theta),
  )
  with torch.device(device):
    model = transformers.Cohere2ForCausalLM(config).train()

  def copy(module, value, columns=None):
    flat = value if columns is None else value.reshape(columns, -1).T
    module.weight.data.copy_(torch.tensor(np.ascontiguousarray(flat)))

  copy(model.model.embed_tokens, params["embedding_VD"])
  copy(model.model.norm, params["norm_D"])
  for number, layer in enumerate(model.model.layers):
    block = params["periods"][BLOCKS[number % 4]]
    block = {name: stacked[number // 4] for name, stacked in block.items()}
    copy(layer.input_layernorm, block["norm_D"])
    for name in ("q_DNH", "k_DKH", "v_DKH"):
      copy(getattr(layer.self_attn, f"{name[0]}_proj"), block[name], cfg.D)
    copy(layer.self_attn.o_proj, block["o_NHD"], cfg.N * cfg.H)
    copy(layer.mlp.gate_proj, block["gate_DF"], cfg.D)
    copy(layer.mlp.up_proj, block["up_DF"], cfg.D)
    copy(layer.mlp.down_proj, block["down_FD"], cfg.F)

  def loss(token_BT, target_BT):
    logits = model(input_ids=token_BT, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), target_BT.flatten())

  return model, loss


def agree(losses, tolerance, say):
  """Refuses unless all sides' losses {side: [of each step]} are the first side's, ours, within
  `tolerance` nats."""
  ours = next(iter(losses.values()))
  for side, theirs in losses.items():
    say(f"losses, {side}: " + " ".join(f"{value:.6f}" for value in theirs))
    apart = max(abs(a - b) for a, b in zip(ours, theirs))
    if not apart <= tolerance:  # also when a loss is not a number
      from tiny_aya_jax import run

      raise run.Refused(
          f"the losses of {side} are {apart:.2e} nats from ours, more than {tolerance:.0e}: "
          "the sides do not compute the same step, so their times cannot be compared"
      )


def timed(step, *arguments):
  """Seconds of step(*arguments), which returns when it is done."""
  begin = time.perf_counter()
  step(*arguments)
  return time.perf_counter() - begin


def _table(seconds, tokens):
  """'ours 4000 tokens/s (1024 ms); eager 3000 tokens/s (1365 ms), ours is 1.33 of it', medians."""
  median = {side: statistics.median(steps) for side, steps in seconds.items()}
  return "; ".join(
      f"{side} {tokens / median[side]:.0f} tokens/s ({1000 * median[side]:.0f} ms)"
      + (f", ours is {median[side] / median['ours']:.2f} of it" if side != "ours" else "")
      for side in median
  )
