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
  if config.export_every:
    tokenizer.json()  # refuses what has none that is exact
  validation = loader.read_manifests(config.data.validation) if config.data.validation else []
  begins.check_rows(config, manifests, validation, tokenizer)
  begins.settle_steps(config, manifests)
  return begins.plan(config, manifests), validation, tokenizer


def _next_rows(config, begin, tokenizer):
  """The first config.show rows that the run would train on next, as text."""
  rows = loader.Loader(begin.plan, config.data.seed, batch=1)
  names = [source["name"] for source in begin.plan["sources"]]
  first = begin.step * config.data.batch
  shown = [show.rows(rows[row], tokenizer, names, 1, row) for row in range(first, first + config.show)]
  return "\n".join(shown)
