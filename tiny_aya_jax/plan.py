"""VERB plan: does the run fit, how fast can it be, how long, for how much; before a chip is rented.

Compiles the very step that `train` runs for TPU slices that are not there: libtpu and no chip, some
minutes on two cores. Memory, kernels and wire are read from the compiled program; operations are
exact (flops.py); speed is a roofline, and says what is assumed. Nothing runs and nothing is written.
When a run does not fit, changes that an estimate lets fit are ranked, and the first is compiled.
"""

import importlib.metadata
import itertools
import math
import os
import re
import time
from typing import NamedTuple

from tiny_aya_jax import chips, flops, hlo, languages, run
from tiny_aya_jax.data import loader, mixture
from tiny_aya_jax.train import begin, fields

GIB = 2**30
PLANNED_MFU = 0.40  # no roofline is reached: what to count on until it was measured
HOST_BANDWIDTH = 1e9  # bytes a second that a host writes to storage; assumed
EXACT = ("parameters", "moments", "kept for the backward pass")  # of `estimate`
# Environment of a client without chips: no metadata server, no lock against other processes.
COMPILE_ONLY = dict(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_LOG_DIR="disabled", TPU_WORKER_HOSTNAMES="localhost",
)
TRIES = 3  # changes that are compiled, at most, to find one that fits


class Answer(NamedTuple):
  """What compiling said of one slice."""

  target: chips.Slice
  mesh: dict  # {axis: chips}
  fits: bool
  peak: float  # bytes a chip; of what does not fit, what it asks for
  parts: dict  # {what: bytes a chip}
  state: int  # bytes of a checkpoint's arrays
  seconds: float  # of compilation
  found: list  # hlo.Collective; none if it does not fit
  bandwidth: float  # bytes a second at which a chip gathers
  kernels: str  # what the program attends and multiplies with


def main(config, workdir=None):
  """Answers for each slice of config.topology as soon as it is compiled; 65 if none fits."""
  if not config.topology:
    raise run.Refused("config.topology is not set: give slices, for example v5e:4x4,v5p:2x2x4")
  targets = [chips.parse(name.strip()) for name in config.topology.split(",")]
  fields.check(config)
  if config.steps is None:
    if not config.data.rows:
      raise run.Refused(f"config.epochs is {config.epochs:g}: give config.data.rows, or config.steps")
    begin.settle_steps(config, loader.read_manifests(config.data.rows))
  if config.price is not None and not 0 < config.price < math.inf:
    raise run.Refused(f"config.price is {config.price}, expected USD a chip-hour, more than 0")
  _prepare()
  print(", ".join(f"{name} {importlib.metadata.version(name)}"
                  for name in ("jax", "jaxlib", "libtpu", "flax")))
  answers, fitting = [], 0
  for target in targets:
    planned = _covering(config, target)
    print(f"{target.name}: compiling for {target.size} chips {words(config, planned)}", flush=True)
    planned = _changed(config, planned)
    answers.append((planned, answer(planned, target)))
    print("\n".join(report(*answers[-1])), flush=True)
    fitting += answers[-1][1].fits
    if not answers[-1][1].fits:
      answers += _first_that_fits(config, target)
  if len(targets) > 1:
    print("\n".join(side_by_side(answers)), flush=True)
  print("\n".join(epochs(config)), flush=True)
  return run.EXIT["done" if fitting else "refused"]


def _prepare():
  """Refuses to go on without libtpu; else jax, when it is imported, has no chip to look for."""
  if not run.installed("libtpu"):
    version = importlib.metadata.version("jax")
    raise run.Refused(f"plan compiles with libtpu, which is not installed: pip install 'jax[tpu]=={version}'")
  os.environ.update(COMPILE_ONLY)


def answer(config, target):
  """Compiles the step of a config for a slice -> Answer; refuses a mesh or batch that cannot be."""
  import jax

  from tiny_aya_jax.train import proof, step

  mesh, began, text = mesh_of(config, target), time.monotonic(), None
  try:
    compiled = compile_for(config, mesh)
    peak, text = compiled.memory_analysis().peak_memory_in_bytes, compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    peak = _asked(error)
  state = jax.tree.leaves(jax.eval_shape(step.scratch(config)))
  parts = {name: bytes for name, bytes in estimate(config, mesh.shape).items() if name in EXACT}
  parts["gradients and what one layer and the loss work on"] = max(peak - sum(parts.values()), 0)
  return Answer(
      target, dict(mesh.shape), text is not None and peak <= target.chip.hbm_gib * GIB, peak, parts,
      sum(leaf.size * leaf.dtype.itemsize for leaf in state), time.monotonic() - began,
      hlo.collectives(text) if text else [], _bandwidth(target, mesh),
      proof.kernels(text, config.attention, config.matmul) if text else "",
  )


def mesh_of(config, target):
  """The mesh of a config over the chips of a slice that is not there."""
  from tiny_aya_jax import axes

  mesh = axes.mesh(**config.mesh.to_dict(), devices=devices(target))
  fields.check_batch(config, mesh)
  return mesh


def compile_for(config, mesh):
  """jax.stages.Compiled of the step that `train` would run."""
  from tiny_aya_jax.train import optimizer, step

  rate = optimizer.schedule(config.schedule, config.steps)
  return step.compiled(config, mesh, rate, sources=len(languages.LANGUAGES))


def devices(target):
  """Devices of slices that are not there: something to compile for."""
  from jax.experimental import topologies

  settings = dict(chip_config_name="megacore") if target.chip.config_name == "megacore" else {}
  if target.chip.axes == 2 and any(target.wrap):
    settings["wrap"] = (*target.wrap, False)
  shape = "x".join(map(str, target.shape))
  return topologies.get_topology_desc(
      f"{target.chip.platform_name}:{shape}", "tpu", chips_per_host_bounds=(2, 2, 1),
      num_slices=target.slices, **settings
  ).devices


def _asked(error):
  """Bytes a chip that a program asked for which does not fit; any other error goes on."""
  size = r"([\d.]+)([KMGT])"  # two ways to say it; the second leaves out the state
  found = re.search(rf"Used {size} of [\d.]+[KMGT] hbm|temporaries \({size}\) exceeds", str(error))
  if "RESOURCE_EXHAUSTED" not in str(error) or not found:
    raise error
  number, unit = [group for group in found.groups() if group]
  return float(number) * 1024 ** (1 + "KMGT".index(unit))


def _bandwidth(target, mesh):
  """Bytes a second that a chip gathers over the torus axes its share of the state lies along."""
  group = mesh.devices[0, :, :, 0].flatten()
  lengths = [len({device.coords[axis] for device in group}) for axis in range(target.chip.axes)]
  return sum(
      target.chip.link * (2 if wrapped and length == whole else 1)
      for length, whole, wrapped in zip(lengths, target.shape, target.wrap) if length > 1
  ) or math.inf  # one chip moves nothing


def report(config, one):
  """Text lines about one slice."""
  cfg, T, limit = config.model, config.data.T, one.target.chip.hbm_gib * GIB
  verdict = "fits" if one.fits else "does NOT fit"
  sizes = ", ".join(f"{axis} {size}" for axis, size in one.mesh.items() if size > 1)
  yield (
      f"{one.target.name}: {verdict}. Mesh {sizes or 'of one chip'}; {_rows(config, one.mesh)} rows of "
      f"{T} a chip at a time, {config.accumulate} times a step; remat {config.remat}, attention "
      f"{config.attention}; compiled in {one.seconds:.0f} s"
  )
  room = f"{1 - one.peak / limit:.0%} free" if one.fits else f"{(one.peak - limit) / GIB:.2f} too much"
  yield (f"  memory      peak {one.peak / GIB:.2f} of {limit / GIB:.2f} GiB a chip, {room}: "
         + ", ".join(f"{name} {bytes / GIB:.2f}" for name, bytes in one.parts.items()))
  if not one.fits:
    return
  yield f"  program     {one.kernels}; told {', '.join(_options(one)) or 'nothing'}"
  exact, again = flops.per_token(cfg, T)["total"], flops.recomputed(cfg, T, config.remat)
  yield f"  operations  {exact / 1e9:.2f} GFLOP a token, and {again / 1e9:.2f} more done twice"
  wire, ideal = hlo.wire(one.found), 6 * flops.parameters(cfg) * config.accumulate
  yield (f"  wire        {wire / GIB:.2f} GiB a chip and step, {wire / ideal:.2f} of 6 N bytes each time; "
         f"{hlo.asynchronous_share(one.found):.0%} asynchronous")
  best, worst, planned = (speed(config, one, how) for how in ("hidden", "exposed", "planned"))
  yield (f"  speed       at most {best:,.0f} tokens/s (MFU {_mfu(config, one, best):.0%}), "
         f"{worst:,.0f} ({_mfu(config, one, worst):.0%}) if nothing hides synchronous transfers; "
         f"plan with {planned:,.0f} ({PLANNED_MFU:.0%}, assumed)")
  tokens = config.steps * config.data.batch * T
  days = {name: tokens / rate / 86_400 for name, rate in (("best", best), ("planned", planned))}
  price = one.target.chip.price if config.price is None else config.price
  yield (f"  the run     {tokens / 1e12:.3g}T tokens: {days['best']:,.1f} days at best, "
         f"{days['planned']:,.1f} to plan with; {_money(one, price, days['best'])} and "
         f"{_money(one, price, days['planned'])} at {price:.2f} a chip-hour"
         + (f" ({chips.PRICED})" if config.price is None else ""))
  hosts = math.ceil(one.target.size / chips.CHIPS_A_HOST)
  yield (f"  checkpoint  {one.state / GIB:.1f} GiB every {config.save_every} steps, {config.keep} kept; "
         f"{one.state / hosts / HOST_BANDWIDTH:.0f} s at {HOST_BANDWIDTH / 1e9:.0f} GB/s for each of "
         f"{hosts} hosts (assumed)")


def _options(one):
  options = chips.compiler_options(one.target.chip.kinds[0])
  return [f"{name}={value}" for name, value in options.items()]


def speed(config, one, how):
  """Tokens a second of the slice. how: 'hidden', all transfers behind the matmuls; 'exposed', the
  synchronous ones beside them; 'planned', PLANNED_MFU."""
  cfg, T, peak = config.model, config.data.T, one.target.chip.flops * one.target.size
  exact = flops.per_token(cfg, T)["total"]
  if how == "planned":
    return PLANNED_MFU * peak / exact
  tokens = config.data.batch * T
  compute = tokens * (exact + flops.recomputed(cfg, T, config.remat)) / peak
  moved = [found.wire * (1 - 1 / found.group) / one.bandwidth for found in one.found]
  stalled = sum(seconds for seconds, found in zip(moved, one.found) if not found.asynchronous)
  return tokens / (max(compute, sum(moved)) if how == "hidden" else max(compute + stalled, sum(moved)))


def _mfu(config, one, rate):
  exact = flops.per_token(config.model, config.data.T)["total"]
  return rate * exact / (one.target.chip.flops * one.target.size)


def _money(one, price, days):
  return f"{one.target.size * 24 * days * price:,.0f} USD"


def side_by_side(answers):
  """Text lines: a row per slice; of those that do not fit, what was found to."""
  yield (f"{'':14} {'rows':>5} {'remat':>8} {'peak GiB':>9} {'of':>6} {'wire GiB':>9} {'async':>6} "
         f"{'tokens/s':>12} {'days':>8} {'kUSD':>8}")
  for config, one in answers:
    rate, price = speed(config, one, "planned"), config.price or one.target.chip.price
    days = config.steps * config.data.batch * config.data.T / rate / 86_400
    line = (f"{one.target.name:14} {_rows(config, one.mesh):5} {config.remat:>8} {one.peak / GIB:9.2f} "
            f"{one.target.chip.hbm_gib:6.2f} ")
    yield line + (
        f"{hlo.wire(one.found) / GIB:9.2f} {hlo.asynchronous_share(one.found):6.0%} {rate:12,.0f} "
        f"{days:8,.1f} {one.target.size * 24 * days * price / 1000:8,.0f}"
        if one.fits else "does not fit"
    )
  yield f"{'':14} tokens/s, days and money at {PLANNED_MFU:.0%} MFU, assumed"


def _rows(config, mesh):
  """Rows that a chip holds at a time."""
  return config.data.batch // config.accumulate // (mesh["data"] * mesh["fsdp"])


# What to change when it does not fit.


def estimate(config, mesh):
  """{what: bytes a chip} without compiling; within 13% of what XLA said at full size (tests).

  State and kept arrays are exact; the rest, about 24 bytes per token and column of F, was fitted.
  """
  from tiny_aya_jax.model.transformer import KEEP

  cfg, shards = config.model, mesh["fsdp"] * mesh["tensor"]
  tokens = _rows(config, mesh) * config.data.T // mesh["context"]
  size = 2 if config.dtype == "bfloat16" else 4
  adapter, N = fields.adapter(config), flops.parameters(cfg)
  trained = flops.adapters(cfg, adapter["rank"], adapter["matrices"]) if adapter else N
  widths = dict(attention=cfg.N * (cfg.H + 4 / size), q=cfg.N * cfg.H, k=cfg.K * cfg.H, v=cfg.K * cfg.H,
                gate=cfg.F, up=cfg.F)
  keep = KEEP["minimal"] if config.remat == "none" else KEEP.get(config.remat, ())
  width = cfg.D + sum(widths[name] for name in keep) / mesh["tensor"]
  width += (cfg.F + 3 * cfg.D if config.remat == "none" else 0)
  layer = flops.projections(cfg) + flops.feed_forward(cfg)
  return {
      "parameters": (size * N + 4 * trained if adapter else 4 * N) / shards,
      "moments": (8 if config.optimizer.adamw.mu_dtype == "float32" else 6) * trained / shards,
      "kept for the backward pass": 4 * cfg.L * tokens * width * size,
      "gradients": 4 * trained / shards * (2 if config.accumulate > 1 else 1),
      "working memory": 24 * tokens * cfg.F / mesh["tensor"] + 3 * layer * size,
  }


def changes(config, target):
  """[(estimated bytes, slice, {field: value})] that should fit, the one to try first leading.

  The slice asked for before larger ones; on each, what computes least twice, then what gathers
  layers least often.
  """
  found = []
  for slice in _from(target):
    options = []
    for remat, accumulate in itertools.product(
        ("minimal", "qkv", "attn", "full"), _divisors(config.data.batch)
    ):
      values = dict(remat=remat, accumulate=accumulate, topology=slice.name, **_covering(config, slice))
      changed = _changed(config, values)
      sizes = _sizes(changed, slice.size)
      if sizes is None or changed.data.batch // accumulate % (sizes["data"] * sizes["fsdp"]):
        continue
      bytes = sum(estimate(changed, sizes).values())
      if bytes < 0.97 * slice.chip.hbm_gib * GIB:
        cost = flops.recomputed(config.model, config.data.T, remat), accumulate
        options.append((cost, bytes, slice, values))
    if options:
      found.append(min(options, key=lambda option: option[0])[1:])
  return found[:4]


def _from(target):
  """The slice and the larger ones of its chip."""
  kind = target.name.partition(":")[0]
  shapes = [chips.parse(f"{kind}:{shape}") for shape in chips.SHAPES[target.chip.axes]]
  return [target, *(shape for shape in shapes if shape.size > target.size)]


def _covering(config, target):
  """{"mesh.fsdp": chips} if the mesh as it is does not cover the slice and another fsdp does."""
  size = math.gcd(target.size, 16)
  if _sizes(config, target.size) or not _sizes(_changed(config, {"mesh.fsdp": size}), target.size):
    return {}
  return {"mesh.fsdp": size}


def _divisors(number):
  return [n for n in range(1, number + 1) if number % n == 0]


def _sizes(config, size):
  """{axis: chips} of a mesh over so many chips; None if its sizes do not divide them."""
  mesh = config.mesh.to_dict()
  fixed = math.prod(n for n in mesh.values() if n > 0)
  if size % fixed or (-1 not in mesh.values() and fixed != size):
    return None
  return {axis: n if n > 0 else size // fixed for axis, n in mesh.items()}


def _changed(config, values):
  changed = config.copy_and_resolve_references()
  for name, value in values.items():
    group, _, field = name.rpartition(".")
    (changed[group] if group else changed)[field] = value
  return changed


def _first_that_fits(config, target):
  """Prints the ranked changes and compiles from the top until one fits: [(config, Answer)] of it."""
  ranked = changes(config, target)
  print("  what to change, by estimate, the best first:" if ranked else
        "  no change of accumulation, remat or size of slice known here lets it fit")
  for bytes, slice, values in ranked:
    print(f"    {words(config, values)}   (about {bytes / GIB:.1f} of {slice.chip.hbm_gib} GiB)")
  for _, slice, values in ranked[:TRIES]:
    changed = _changed(config, values)
    print(f"  trying {words(config, values)}", flush=True)
    one = answer(changed, slice)
    print("\n".join(report(changed, one)), flush=True)
    if one.fits:
      return [(changed, one)]
  return []


def words(config, values):
  """The flags that make the changes; none for a value that is there already."""
  flags = []
  for name, value in values.items():
    group, _, field = name.rpartition(".")
    if (config[group] if group else config)[field] != value:
      flags.append(f"--config.{name}={value}")
  return " ".join(flags)


def epochs(config):
  """Text lines: tokens, share and epochs of each language; of rows, or of the web's size."""
  if config.data.rows:
    manifests = loader.read_manifests(config.data.rows)
    yield from mixture.table(begin.plan(config, manifests), config.steps * config.data.batch)
    return
  yield (f"no rows given (config.data.rows): languages as large as FineWeb-2, {mixture.WEB_BYTES_A_TOKEN} bytes a "
         "token; before cleaning, so every real epoch is longer")
  plan = begin.plan(config, mixture.web(config.data.T))
  yield from mixture.table(plan, config.steps * config.data.batch)
