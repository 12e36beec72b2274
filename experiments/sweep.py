"""A sweep of one field: the sampling temperature. Every field that a sweep has stands here.

  python -m tiny_aya_jax sweep --config=experiments/sweep.py --workdir=runs/sweep \\
      --config.rows=runs/data/train --config.validation=runs/data/validation \\
      --config.tokenizer=runs/vocab/tokenizer.model --config.dry_run=True

Expected: the table of all trials, what they read and cost; without dry_run also sweep.html,
sweep.json and a recommendation with its uncertainty. A killed sweep goes on with the same command; a
changed one runs what it does not have yet. The questions of a mixture are in experiments/sweeps/.
`full` is the report's protocol, 200B tokens with 40B of cooldown (2.2), at full size; `proxy` the same
with 3.1M parameters and 0.4M tokens, two minutes a trial on two cores: it reads rows of T 256 and at most
16,384 pieces.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run

VARIANTS = ("full", "proxy", "tiny")


def get_config(variant="full"):
  run.choose("variant", variant, VARIANTS)
  c = ConfigDict()
  c.title = "temperature"
  c.rows = config_dict.placeholder(str)  # DIR/<stage> of pack
  c.validation = config_dict.placeholder(str)  # held-out rows, measured at the end of each trial
  c.tokenizer = config_dict.placeholder(str)
  # A trial: a trunk and a cooldown forked from it, as configs of train.
  c.trunk, c.cooldown = "experiments/pretrain.py", "experiments/cooldown.py"
  c.tokens = 200_000_000_000  # of a trial, its cooldown included (report 2.2)
  c.cooldown_share = 0.2  # 40B of 200B (report 2.2); 0: no cooldown
  # Simulated epoching: sources are cut to tokens / imitate.tokens of their size, so that caps and
  # repeats are those of the run that is imitated. Not set: nothing is cut.
  c.imitate = ConfigDict(dict(
      tokens=config_dict.placeholder(float),
      sizes="rows",  # the imitated run's sources: rows (as packed), web (FineWeb-2), a JSON file
  ))
  c.imitate.tokens = 6e12  # report 2.2
  # What varies (tiny_aya_jax/sweep/space.py): the product of `arms` and `grid`; draws from `space`.
  c.search = "grid"  # or random, which adds draws; optuna, which asks for one trial after another
  c.arms = ()  # ((name, ((field, value), ...)), ...)
  c.grid = (("data.mixture.temperature", (1.0, 2.0, 3.33, 5.0, 100.0)),)  # ours: from proportional to equal
  c.space = ()  # ((field, "log", low, high), ...)
  c.draws = 24  # of random and optuna
  c.seeds = 1  # of every arm
  c.more_seeds = ()  # (("temperature 1.0", 3), ...)
  c.seed = 0  # the first seed; of the draws too
  c.x = config_dict.placeholder(str)  # the field along which plots are drawn
  c.x = "data.mixture.temperature"
  c.objective = "mean"  # of bits per byte over languages; worst, region (the worst one's mean), floor
  c.floor = config_dict.placeholder(float)  # floor: the mean where no language is above so many
  # Laws: loss of a language against shares (tiny_aya_jax/sweep/laws.py); needs many arms.
  c.law = ConfigDict(dict(
      fit=False,
      most_epochs=config_dict.placeholder(float),  # of a language, in the predicted optimum
      draws=20_000, best=50,  # mixtures that are simulated, and the best that are averaged (RegMix)
      confirm=0,  # seeds with which the predicted optimum is run
  ))
  c.law.most_epochs = 4.0  # up to here repeats are worth almost as much as new text (arXiv 2305.16264)
  # Who runs it: each trial is one or two processes of train.
  c.at_once = 1  # lanes
  # Words before each command: ("taskset", "-c", "{lane}"), {lane} being 0 .. at_once - 1; ("srun", "-N1").
  # Or around it: ("sbatch", "--wait", "--wrap={command}"), ("gcloud", ..., "ssh", "proxy-{lane}",
  # "--worker=all", "--command=cd tiny_aya_jax && {command}"), launch/trial.py; {key} names a run.
  c.prefix = ()
  c.python = config_dict.placeholder(str)  # the interpreter where they run; not set: this one
  c.detached = False  # the prefix puts the command into a queue and returns at once
  c.retries = 2  # of a run that crashed
  c.keep = True  # checkpoints of finished trials
  c.dry_run = False
  c.topology = config_dict.placeholder(str)  # dry run: v5e:4x4, of one lane
  c.price = config_dict.placeholder(float)  # USD a chip-hour, instead of chips.py's
  if variant != "full":
    small(c, variant)
  return c


def small(c, variant):
  """The protocol with a model that two cores train in minutes; every number ours."""
  c.trunk, c.cooldown = f"experiments/pretrain.py:{variant}", f"experiments/cooldown.py:{variant}"
  c.tokens, c.imitate.sizes = 400_000, "web"
  c.keep = variant == "tiny"
  if variant == "tiny":  # the embedded corpus: two cooldowns of one trunk; wiring, nothing of a language
    c.tokens = 122_880  # 24 + 6 steps
    c.imitate.tokens, c.imitate.sizes = 4e6, "rows"
    c.title = "temperature of the cooldown"
    c.x = "cooldown.data.mixture.temperature"
    c.grid = ((c.x, (1.0, 100.0)),)
