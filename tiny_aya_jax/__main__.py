"""python -m tiny_aya_jax VERB --config=FILE[:variant] --workdir=DIR [--config.field=value ...]"""

import contextlib
import importlib
import os
import sys
import traceback

from tiny_aya_jax import run

# verb: (module with main(config, workdir), what it does)
VERBS = dict(
    clean=("tiny_aya_jax.data.clean", "raw text -> identified, filtered, deduplicated; a report"),
    vocab=("tiny_aya_jax.data.vocab", "weighted text -> SentencePiece model, tokenizer.json, fairness report"),
    pack=("tiny_aya_jax.data.pack", "documents, conversations or pairs -> rows of T+1 tokens, manifest"),
    train=("tiny_aya_jax.train.door", "rows -> checkpoints: pretraining, cooldown, SFT and preference alike"),
    score=("tiny_aya_jax.train.score", "packed pairs -> with a reference's log-probabilities"),
    merge=("tiny_aya_jax.post.merge", "checkpoints and Hugging Face folders -> one model: linear, slerp, TIES"),
    synthesize=("tiny_aya_jax.post.synthesize", "other models -> translated prompts, fused answers, pairs"),
    evaluate=("tiny_aya_jax.evaluate.evaluate", "checkpoints -> bits per byte and tasks per language, a page"),
    sweep=("tiny_aya_jax.sweep.sweep", "many short runs over mixtures -> what each does to every language"),
    export=("tiny_aya_jax.export.export", "checkpoint -> Hugging Face folder"),
    talk=("tiny_aya_jax.talk", "chat with a checkpoint in the terminal"),
    plan=("tiny_aya_jax.plan", "does a run fit a TPU slice, how fast, how long, for how much"),
    bench=("tiny_aya_jax.bench", "times a training step, its pieces or the loader beside others"),
    verify=("tiny_aya_jax.train.verify", "compares a checkpoint, or packed rows, with their digests"),
)
WITHOUT_WORKDIR = ("plan", "bench", "verify")


def console():
  """Runs the verb of the command line and ends the process with its exit code.

  One of several processes that fails does not wait for the others to say goodbye: they are waiting
  for it in a collective.
  """
  try:
    code = main()
  except Exception:
    with contextlib.suppress(OSError):
      traceback.print_exc()
    code = 1
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:  # a log on a full disk: Python would try again, and end with a code of its own
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
  jax = sys.modules.get("jax")
  if code not in (run.EXIT["done"], run.EXIT["preempted"]) and jax and jax.distributed.is_initialized():
    os._exit(code)
  sys.exit(code)


def main(argv=None):
  """Runs one verb; returns its exit code (run.EXIT)."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] == "help" or {"--help", "-h"} & set(argv):
    print(__doc__ + "\n\n" + "\n".join(f"  {verb:10} {what}" for verb, (_, what) in VERBS.items()))
    print("\nFILE is one of experiments/*.py: its head says how it is called, its fields what can be changed.")
    return 0
  try:
    run.choose("verb", argv[0], VERBS)
    config, workdir = run.parse(argv, WITHOUT_WORKDIR)
    return importlib.import_module(VERBS[argv[0]][0]).main(config, workdir) or run.EXIT["done"]
  except run.Refused as refusal:
    return _refused(refusal)
  except (AttributeError, KeyError) as error:
    if not _from_config(error):
      raise
    field = str(error).strip('"')
    return _refused(f"the config lacks the field {field}, which {argv[0]} reads: is it a config of "
                    "another verb?")


def _refused(why):
  with contextlib.suppress(OSError):  # a log on a full disk changes no exit code
    print(f"refused: {why}", file=sys.stderr, flush=True)
  return run.EXIT["refused"]


def _from_config(error):
  """Whether a ConfigDict raised it: the config was asked for a field that it does not have."""
  *_, (frame, _) = traceback.walk_tb(error.__traceback__)
  return frame.f_globals["__name__"].startswith("ml_collections")


if __name__ == "__main__":
  console()
