"""What `train` refuses before jax is imported: a wrong run costs a second, not a compile.

Checks the config against itself and against the rows' manifests and the tokenizer. What needs the
devices (how many there are) is refused by axes.mesh, before anything is compiled.
"""

from tiny_aya_jax import run
from tiny_aya_jax.data import loader, show, tokenizer as tokenizers
from tiny_aya_jax.train import begin as begins, fields, saved

SCORED_WITH = ("dtype", "attention", "matmul")  # what changes a log-probability beside the parameters


def main(config, workdir):
  """The verb: checks, shows rows if config.show asks for them, else trains."""
  plan, validation, tokenizer = check(config)
  try:
    begin = begins.decide(config, workdir, plan, tokenizer)
    _same_reference(config, begin, validation)
  except saved.Damaged:  # train falls back to an older one, once nobody else can be saving
    if config.show is not None or not saved.steps(workdir):
      raise
  if config.show is not None:
    print(_next_rows(config, begin, tokenizer))
    return run.EXIT["done"]
  from tiny_aya_jax.train import train  # imports jax

  return train.main(config, workdir, plan, validation, tokenizer)


def _same_reference(config, begin, validation):
  """Refuses pairs that were scored by another model than the one that is to be tuned, or otherwise."""
  if config.loss.kind == "next_token" or not begin.origin or config.data.accept_change:
    return
  ours = dict(params=begin.origin["params"], **{name: config[name] for name in SCORED_WITH})
  for manifest in (*loader.planned(begin.plan), *validation):
    theirs = manifest.get("reference", ours)
    if odd := [f"{name} {str(theirs.get(name))[:12]} (here {str(ours[name])[:12]})"
               for name in ours if theirs.get(name) != ours[name]]:
      raise run.Refused(f"{manifest['path']} was scored with another {', '.join(odd)}: score the pairs with "
                        "init_from and as it is trained, or accept it with --config.data.accept_change=True")


def check(config):
  """Returns (plan, validation manifests or [], tokenizer); raises Refused for anything wrong.

  Sets config.steps where only config.epochs is given.
  """
  fields.check(config)
  if not config.data.rows:
    raise run.Refused("config.data.rows is not set: give the folder of packed rows")
  if not config.tokenizer:
    raise run.Refused("config.tokenizer is not set: give tokenizer.model or tokenizer.json")
  manifests = loader.read_manifests(config.data.rows)
  tokenizer = tokenizers.load(config.tokenizer)
  validation = loader.read_manifests(config.data.validation) if config.data.validation else []
  kind = loader.FIELDS if config.loss.kind == "next_token" else loader.SCORED
  for folder, found in ((config.data.rows, manifests), (config.data.validation, validation)):
    for manifest in found:
      loader.check_fields(manifest, (kind,) if found is manifests else (kind, loader.FIELDS))
      if manifest["fields"] == loader.SCORED and manifest["pairs"] != config.loss.pairs:
        raise run.Refused(f"{manifest['path']} has at most {manifest['pairs']} pairs a row, "
                          f"config.loss.pairs is {config.loss.pairs}: set it to what pack was given")
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
  begins.settle_steps(config, manifests)
  return begins.plan(config, manifests), validation, tokenizer


def _next_rows(config, begin, tokenizer):
  """The first config.show rows that the run would train on next, as text."""
  rows = loader.Loader(begin.plan, config.data.seed, batch=1)
  names = [source["name"] for source in begin.plan["sources"]]
  first = begin.step * config.data.batch
  shown = [show.rows(rows[row], tokenizer, names, 1, row) for row in range(first, first + config.show)]
  return "\n".join(shown)
