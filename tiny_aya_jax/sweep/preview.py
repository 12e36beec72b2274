"""A sweep before it runs: what every trial reads, what all of it costs, and what to know of it."""

from tiny_aya_jax import chips, flops
from tiny_aya_jax.data import mixture
from tiny_aya_jax.sweep import laws, protocol

PLANNED_MFU = 0.40  # as in plan: no roofline is reached
SHOWN = 7  # arms beside each other in a terminal


def lines(config, plans, ledger):
  """Text lines: every arm with what it reads, and what all of it costs."""
  arms = {}
  for planned in plans:
    arms.setdefault(planned.trial.arm, []).append(planned)
  first = plans[0]
  count = f"up to {config.draws}" if config.search == "optuna" else str(len(plans))
  yield f"{config.title}: {count} trials of {config.draws if config.search == 'optuna' else len(arms)} arms"
  if not config.rows:
    yield (f"  no rows given (config.rows): languages as large as FineWeb-2, {mixture.WEB_BYTES_A_TOKEN} bytes a "
           "token; before cleaning, so every real epoch is longer")
  for stage in first.stages:
    cfg = stage.config
    yield (f"  {stage.name:9} {stage.file}: {cfg.steps} steps of {cfg.data.batch} x {cfg.data.T}, "
           f"{protocol.tokens(stage):,} tokens, {flops.parameters(cfg.model):,} parameters")
  if config.imitate.tokens:
    sizes = dict(rows="packed rows", web="FineWeb-2 size").get(config.imitate.sizes, config.imitate.sizes)
    yield (f"  imitates {config.imitate.tokens:.3g} tokens: sources are cut to "
           f"{config.tokens / config.imitate.tokens:.3g} of their {sizes}")
  yield f"{'arm':32} {'seeds':>5} {'> 4 epochs':>11} {'none':>5}   most epochs"
  for arm, group in arms.items():
    epochs = group[0].epochs
    none = sum(not tokens for tokens in group[0].tokens.values())
    most = sorted(epochs, key=epochs.get, reverse=True)[:3]
    over = sum(value > mixture.MOST_EPOCHS for value in epochs.values())
    yield (f"{arm:32} {len(group):>5} {over:>11} {none:>5}   "
           + ", ".join(f"{code} {epochs[code]:.3g}" for code in most))
  if config.dry_run:
    yield from _epochs(arms)
  yield from _warnings(config, plans)
  yield from _cost(config, plans, ledger)


def _epochs(arms):
  """A line a language, most text first: epochs of the imitated run under the first arms."""
  shown = list(arms)[:SHOWN]
  codes = sorted(arms[shown[0]][0].sizes, key=arms[shown[0]][0].sizes.get, reverse=True)
  yield f"{'epochs':14}{'tokens':>10} " + "".join(f"{arm[-13:]:>14}" for arm in shown)
  for code in codes:
    cells = "".join(f"{arms[arm][0].epochs[code]:>14.3g}" for arm in shown)
    yield f"{code:14}{arms[shown[0]][0].sizes[code]:>10.3g} {cells}"
  if len(arms) > len(shown):
    yield f"  no room here for {len(arms) - len(shown)} other arms"


def _warnings(config, plans):
  """What is true of every arm in the same words is said once, of the others how many there are."""
  said, arms = {}, {planned.trial.arm for planned in plans}
  for planned in plans:
    for remark in planned.remarks:
      said.setdefault(remark, set()).add(planned.trial.arm)
  for remark, of in said.items():
    if of == arms:
      yield f"  {remark}"
  if some := set().union(*(of for of in said.values() if of != arms)):
    yield f"  warning: {len(some)} of {len(arms)} arms repeat some sources too often, see the columns above"
  if config.search != "optuna" and len(plans) == len(arms):
    yield "  warning: one seed an arm: nothing will tell an effect from noise (config.seeds, config.more_seeds)"
  least = max(laws.LEAST.values()) + 1  # one is left out
  if config.law.fit and config.search != "optuna" and len(arms) < least:
    yield f"  warning: laws need {least} arms, these are {len(arms)}"


def _cost(config, plans, ledger):
  """Of all runs, shared trunks once; what Optuna or the laws will ask for is taken to be like the first."""
  runs = {stage.key: stage for planned in plans for stage in planned.stages}
  more = [stage for planned in plans[:1] for stage in planned.stages] * (
      config.law.confirm + (config.draws - 1 if config.search == "optuna" else 0))
  every = [*runs.values(), *more]
  tokens, operations = (sum(map(count, every)) for count in (protocol.tokens, protocol.operations))
  left = [planned for planned in plans if not ledger.settled(planned)]
  asked = f", {len(more) // max(len(plans[0].stages), 1)} more are asked for later" if more else ""
  yield (f"  {len(every)} runs, {tokens / 1e9:.4g}B tokens, {operations:.3g} operations of training; "
         f"{len(left)} of {len(plans)} trials are left to run{asked}, {config.at_once} at once")
  if config.topology:
    slice = chips.parse(config.topology)
    hours = operations / (PLANNED_MFU * slice.chip.flops * slice.size) / 3600
    price = slice.chip.price if config.price is None else config.price
    yield (f"  on {slice.name} at {PLANNED_MFU:.0%} of its peak (assumed; small models stay far below): "
           f"{hours:,.1f} hours a slice in all, {hours / config.at_once:,.1f} with {config.at_once} slices, "
           f"{hours * slice.size * price:,.0f} USD at {price:.2f} a chip-hour")
  outcomes = ledger.outcomes()
  known = [(outcomes[planned.key]["seconds"], planned.operations) for planned in plans
           if outcomes.get(planned.key, {}).get("state") == "done"]
  if known and left:
    rate = sum(seconds for seconds, _ in known) / sum(count for _, count in known)
    hours = rate * sum(planned.operations for planned in left) / config.at_once / 3600
    yield f"  at the speed of the {len(known)} that ended: {hours:,.2f} hours to go"
  if config.keep:
    size = sum(12 * flops.parameters(stage.config.model) * stage.config.keep for stage in every)
    yield f"  checkpoints: {size / 2**30:,.1f} GiB (config.keep=False removes those of finished trials)"
