"""What a train config says against itself, found before jax starts; no files are looked at.

`door` and `plan` refuse by it. What needs the number of devices is `check_batch`, and axes.mesh.
"""

import math

from tiny_aya_jax import run

MODEL = ("D", "N", "K", "H", "F", "V", "L", "window", "rope_theta", "logit_scale", "norm_epsilon")
SHAPES = ("wsd", "cosine", "linear")
CUT_SIZES = ("rows", "web")
ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")


def check(config):
  """Raises Refused for a value that cannot be, and for two that cannot be together."""
  _fields(config)
  _sizes(config)


def _fields(config):
  run.choose_fields(config, "remat", "attention", "dtype", "matmul")
  run.choose("config.schedule.shape", config.schedule.shape, SHAPES)
  run.choose("config.loss.kind", config.loss.kind, ("next_token", "dpo", "ipo"))
  run.choose("config.init_what", config.init_what, ("params", "state"))
  least = {"data.batch": 1, "data.T": 2, "data.threads": 0, "data.prefetch": 1, "loss.chunk": 1,
           "loss.z_loss": 0, "schedule.warmup_steps": 0, "schedule.decay_steps": 0,
           "schedule.peak": 0, "schedule.final": 0, "guard.window": 2, "guard.hang_seconds": 1,
           "guard.save_seconds": 1, "guard.heartbeat_seconds": 1, "guard.not_finite": 1,
           "guard.failed_saves": 1, "evaluate_every": 0}
  least |= dict.fromkeys(
      ("accumulate", "save_every", "log_every", "keep", "unroll"), 1)
  if config.steps is None and config.epochs is None:
    raise run.Refused("config.steps is not set, nor is config.epochs: give one of them")
  least |= dict(steps=1) if config.steps is not None else {}
  for name, smallest in least.items():
    group, _, field = name.rpartition(".")
    value = (config[group] if group else config)[field]
    if not smallest <= value < math.inf:  # so, nan is refused too
      raise run.Refused(f"config.{name} is {value}, expected at least {smallest}")
  _optimizer(config.optimizer)
  _adapter(config.adapter)
  _cut(config.data)
  if not 0 < config.loss.beta < math.inf:
    raise run.Refused(f"config.loss.beta is {config.loss.beta}, expected more than 0")
  if config.loss.kind != "next_token" and config.loss.z_loss:
    raise run.Refused(f"config.loss.z_loss is {config.loss.z_loss}, and {config.loss.kind} has none: set it to 0")
  if config.loss.kind != "next_token" and config.loss.pairs < 1:
    raise run.Refused(f"config.loss.pairs is {config.loss.pairs}, expected at least 1: what pack was given")
  if not config.guard.sigma > 0:
    raise run.Refused(f"config.guard.sigma is {config.guard.sigma}, expected more than 0: how many "
                      "deviations make a spike; 'inf' applies every finite update")
  if config.show is not None and config.show < 1:
    raise run.Refused(f"config.show is {config.show} rows, expected at least 1")
  if config.export_every is not None and config.export_every < 1:
    raise run.Refused(f"config.export_every is {config.export_every} steps, expected at least 1")
  if config.export_every and not run.installed("safetensors"):
    raise run.Refused("config.export_every needs the safetensors package: "
                      "pip install 'tiny_aya_jax[export]'")
  if config.stop_after is not None and config.stop_after < 1:
    raise run.Refused(f"config.stop_after is {config.stop_after} seconds, expected at least 1")
  profile = tuple(config.profile)
  if profile and not (len(profile) == 2 and 0 <= profile[0] < profile[1]):
    raise run.Refused(f"config.profile is {profile}, expected () or (start, stop) steps")
  if config.init_what == "state" and not config.init_from:
    raise run.Refused("config.init_what is 'state' and config.init_from is not set: name the run "
                      "or checkpoint to fork from")
  if config.init_tokenizer:
    _init_tokenizer(config)
  warm, decay = config.schedule.warmup_steps, config.schedule.decay_steps
  if config.epochs is not None and not 0 < config.epochs < math.inf:
    raise run.Refused(f"config.epochs is {config.epochs}, expected more than 0")
  if config.steps is not None and warm + (decay if config.schedule.shape == "wsd" else 0) > config.steps:
    raise run.Refused(
        f"schedule: {warm} warm-up and {decay} decay steps do not fit into {config.steps} steps"
    )


def _optimizer(optimizer):
  if not optimizer.clip > 0:
    raise run.Refused(f"config.optimizer.clip is {optimizer.clip}, expected more than 0: it is the "
                      "largest gradient norm; 'inf' leaves gradients as they are")
  adamw = optimizer.adamw
  for name in ("b1", "b2"):
    if not 0 <= adamw[name] < 1:
      raise run.Refused(f"config.optimizer.adamw.{name} is {adamw[name]}, expected 0 <= {name} < 1")
  run.choose("config.optimizer.adamw.mu_dtype", adamw.mu_dtype, run.CHOICES["dtype"])
  if not 0 < adamw.eps < math.inf or not 0 <= adamw.weight_decay < math.inf:
    raise run.Refused(f"config.optimizer.adamw has eps {adamw.eps} and weight_decay "
                      f"{adamw.weight_decay}, expected more than 0 and at least 0")


def _cut(data):
  found = data.cut
  if data.plan and found.share is not None:
    raise run.Refused("config.data.plan is followed as it is, and config.data.cut is not read with it: unset one")
  if found.share is None and found.sizes != "rows":
    raise run.Refused(f"config.data.cut.sizes is {found.sizes!r} and config.data.cut.share is not set: nothing "
                      "would be cut; give the share of the imitated run's tokens that this run has")
  if found.share is not None and not 0 < found.share <= 1:
    raise run.Refused(f"config.data.cut.share is {found.share}, expected more than 0 and at most 1")
  if found.sizes not in CUT_SIZES and not found.sizes.endswith(".json"):
    run.choose("config.data.cut.sizes (or a .json file)", found.sizes, CUT_SIZES)


def _init_tokenizer(config):
  given = f"config.init_tokenizer is {config.init_tokenizer}"
  if not config.init_from:
    raise run.Refused(f"{given} and config.init_from is not set: name the checkpoint or folder that it belongs to")
  if config.init_what != "params":
    raise run.Refused(f"{given} and config.init_what is {config.init_what!r}: moments and data counters are of the "
                      "old vocabulary; set config.init_what to 'params'")
  if config.adapter.rank is not None:
    raise run.Refused(f"{given} and config.adapter.rank is {config.adapter.rank}: adapters leave the embedding as it "
                      "is, and its new rows must be learnt; train all parameters first")
  if config.init_tokenizer == config.tokenizer:
    raise run.Refused(f"{given}, and so is config.tokenizer: there is nothing to remap; unset it")


def _adapter(found):
  if found.rank is None:
    return
  if found.rank < 1 or not 0 < found.alpha < math.inf:
    raise run.Refused(f"config.adapter has rank {found.rank} and alpha {found.alpha}, expected at least 1 "
                      "and more than 0")
  for name in found.matrices:
    run.choose("config.adapter.matrices", name, ADAPTED)
  if not found.matrices:
    raise run.Refused(f"config.adapter.matrices is empty, expected some of {', '.join(ADAPTED)}")


def adapter(config):
  """{"rank", "alpha", "matrices", "dtype" of what is frozen}; None where everything is trained."""
  found = config.adapter
  if found.rank is None:
    return None
  matrices = [name for name in ADAPTED if name in found.matrices]
  return dict(rank=found.rank, alpha=found.alpha, matrices=matrices, dtype=config.dtype)


def _sizes(config):
  model, mesh, batch = config.model, config.mesh, config.data.batch
  for name in MODEL:
    if model[name] <= 0:
      raise run.Refused(f"config.model.{name} is {model[name]}, expected more than 0")
  if model.N % model.K:
    raise run.Refused(f"{model.N} query heads (N) do not share {model.K} key heads (K) evenly")
  if model.H % 2:
    raise run.Refused(f"head width H={model.H} is odd; rotary positions turn pairs")
  for axis, size in mesh.items():
    if size < 1 and size != -1:
      raise run.Refused(f"config.mesh.{axis} is {size}, expected at least 1, or -1 for the rest")
  if list(mesh.to_dict().values()).count(-1) > 1:
    raise run.Refused(f"config.mesh is {mesh.to_dict()}: at most one size is -1, 'the rest'")
  for letter in "KNFV":
    if mesh.tensor > 1 and model[letter] % mesh.tensor:
      raise run.Refused(
          f"config.mesh.tensor={mesh.tensor} does not divide {letter}={model[letter]}"
      )
  if batch % config.accumulate:
    raise run.Refused(
        f"a batch of {batch} rows does not split into {config.accumulate} accumulated parts"
    )
  if mesh.context > 1 and config.data.T % mesh.context:
    raise run.Refused(f"config.mesh.context={mesh.context} does not divide T={config.data.T}")


def check_batch(config, mesh):
  """Refuses a batch or rows that the devices of `mesh` cannot share evenly."""
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = config.data.batch // config.accumulate
  if rows % devices:
    raise run.Refused(
        f"a batch of {config.data.batch} rows in {config.accumulate} parts leaves {rows} rows, which "
        f"do not split over {devices} devices of (data, fsdp)"
    )
  if config.data.T % mesh.shape["context"]:
    raise run.Refused(
        f"rows of T={config.data.T} do not split over {mesh.shape['context']} devices of 'context'"
    )
