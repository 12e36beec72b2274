"""What `train` refuses before jax is imported: a wrong run costs a second, not a compile.

Checks the config against itself and against the rows' manifests and the tokenizer. What needs the
devices (how many there are) is refused by axes.mesh, before anything is compiled.
"""

import math

from tiny_aya_jax import run
from tiny_aya_jax.data import loader, mixture, show, tokenizer as tokenizers
from tiny_aya_jax.train import begin as begins

MODEL = ("D", "N", "K", "H", "F", "V", "L", "window", "rope_theta", "logit_scale", "norm_epsilon")
SHAPES = ("wsd", "cosine", "linear")


def main(config, workdir):
  """The verb: checks, shows rows if config.show asks for them, else trains."""
  plan, validation, tokenizer = check(config)
  begin = begins.decide(config, workdir, plan, tokenizer)
  if config.show is not None:
    print(_next_rows(config, begin, tokenizer))
    return run.EXIT["done"]
  from tiny_aya_jax.train import train  # imports jax

  return train.main(config, workdir, plan, validation, tokenizer)


def check(config):
  """Returns (plan, validation manifests or [], tokenizer); raises Refused for anything wrong."""
  _fields(config)
  _sizes(config)
  manifests = loader.read_manifests(config.data.rows)
  tokenizer = tokenizers.load(config.tokenizer)
  validation = loader.read_manifests(config.data.validation) if config.data.validation else []
  for folder, found in ((config.data.rows, manifests), (config.data.validation, validation)):
    for manifest in found:
      loader.check_fields(manifest)
    for manifest in found[:1]:  # read_manifests refuses mixtures of T or tokenizer
      if manifest["T"] != config.data.T:
        raise run.Refused(
            f"{folder} holds rows of T={manifest['T']}, config.data.T is {config.data.T}: "
            "pack again, or set config.data.T"
        )
      if manifest["tokenizer_sha256"] != tokenizer.sha256:
        raise run.Refused(
            f"{folder} was packed with tokenizer {manifest['tokenizer_sha256'][:12]}, "
            f"{config.tokenizer} is {tokenizer.sha256[:12]}"
        )
  if tokenizer.size > config.model.V:
    raise run.Refused(
        f"{config.tokenizer} has {tokenizer.size} ids, config.model.V only {config.model.V} rows"
    )
  return plan(config, manifests), validation, tokenizer


def _next_rows(config, begin, tokenizer):
  """The first config.show rows that the run would train on next, as text."""
  rows = loader.Loader(begin.plan, config.data.seed, batch=1)
  names = [source["name"] for source in begin.plan["sources"]]
  first = begin.step * config.data.batch
  shown = [show.rows(rows[row], tokenizer, names, 1, row) for row in range(first, first + config.show)]
  return "\n".join(shown)


def plan(config, manifests):
  """The run's plan: config.data.plan, a file, or the rule of config.data.mixture over the rows."""
  if config.data.plan:
    given = run.read_json(config.data.plan, "config.data.plan")
    mixture.check(given, config.data.plan)
    for key, value in dict(T=config.data.T, tokenizer_sha256=manifests[0]["tokenizer_sha256"]).items():
      if given[key] != value:
        raise run.Refused(f"{config.data.plan} is for rows of {key} {given[key]}, these have {value}")
    places = {manifest["name"]: manifest["path"] for manifest in manifests}  # rows may have moved
    given["sources"] = [source | dict(path=places.get(source["name"], source["path"]))
                        for source in given["sources"]]
    loader.planned(given)
    run.say(f"config.data.plan is followed, {config.data.plan}: config.data.mixture is not read")
    return given
  return mixture.plan(manifests, begins.rule(config, manifests))


def _fields(config):
  run.choose_fields(config, "remat", "attention", "dtype", "matmul")
  run.choose("config.schedule.shape", config.schedule.shape, SHAPES)
  run.choose("config.init_what", config.init_what, ("params", "state"))
  if not config.data.rows:
    raise run.Refused("config.data.rows is not set: give the folder of packed rows")
  if not config.tokenizer:
    raise run.Refused("config.tokenizer is not set: give tokenizer.model or tokenizer.json")
  least = {"data.batch": 1, "data.T": 2, "data.threads": 0, "data.prefetch": 1, "loss.chunk": 1,
           "loss.z_loss": 0, "schedule.warmup_steps": 0, "schedule.decay_steps": 0,
           "schedule.peak": 0, "schedule.final": 0}
  least |= dict.fromkeys(
      ("steps", "accumulate", "save_every", "evaluate_every", "log_every", "keep", "unroll"), 1)
  for name, smallest in least.items():
    group, _, field = name.rpartition(".")
    value = (config[group] if group else config)[field]
    if not smallest <= value < math.inf:  # so, nan is refused too
      raise run.Refused(f"config.{name} is {value}, expected at least {smallest}")
  _optimizer(config.optimizer)
  if config.show is not None and config.show < 1:
    raise run.Refused(f"config.show is {config.show} rows, expected at least 1")
  if config.stop_after is not None and config.stop_after < 1:
    raise run.Refused(f"config.stop_after is {config.stop_after} seconds, expected at least 1")
  profile = tuple(config.profile)
  if profile and not (len(profile) == 2 and 0 <= profile[0] < profile[1]):
    raise run.Refused(f"config.profile is {profile}, expected () or (start, stop) steps")
  if config.init_what == "state" and not config.init_from:
    raise run.Refused("config.init_what is 'state' and config.init_from is not set: name the run "
                      "or checkpoint to fork from")
  warm, decay = config.schedule.warmup_steps, config.schedule.decay_steps
  if warm + (decay if config.schedule.shape == "wsd" else 0) > config.steps:
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
  if not 0 < adamw.eps < math.inf or not 0 <= adamw.weight_decay < math.inf:
    raise run.Refused(f"config.optimizer.adamw has eps {adamw.eps} and weight_decay "
                      f"{adamw.weight_decay}, expected more than 0 and at least 0")


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
