"""What follows a step of training: an evaluation, an export. Each is done once, whatever is killed; an
export for which there is no room is not, and is said.

Whether a step's is done is read off what it leaves, a row of metrics or a folder, and off nothing else.
"""

import functools
import shutil
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from tiny_aya_jax import axes, processes, run
from tiny_aya_jax.data import loader
from tiny_aya_jax.evaluate import rollups
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.model import adapter, bits, preference
from tiny_aya_jax.train import fields, metrics


class Hook(NamedTuple):
  """Work that follows a step: due(start, step), done(step) by what it left, do(writer, step, params)."""

  name: str
  due: Callable
  done: Callable
  do: Callable


def evaluation(config, workdir, mesh, model, validation, tokenizer):
  """What the validation rows measure per language, at the start, at the end and between."""
  of_pairs = validation[0]["fields"] == loader.SCORED
  measure = _margins(config, mesh, model, validation) if of_pairs else _bits_per_byte(
      config, workdir, mesh, model, validation, tokenizer)

  def evaluate(writer, at, params):
    rows = config.data.batch // config.accumulate  # at once: what fits when training fits here
    batches = loader.every_row_once(validation, rows, axes.process_part(mesh))
    row, said = measure(params, batches)
    writer.write({"step": at, "from": config.init_from or "scratch"} | row)
    run.say(said)

  def due(start, at):
    every = config.evaluate_every
    return at == start + config.steps or every > 0 and (at - start) % every == 0

  return Hook("evaluate", due, functools.partial(metrics.evaluated, workdir), evaluate)


def _margins(config, mesh, model, validation):
  """(params, batches) -> the row and the words for pairs: loss, margin, accuracy beside the reference."""
  languages = [manifest["language"] for manifest in validation]
  add = jax.jit(functools.partial(
      preference.totals, model=model, config=config.loss, sources=len(languages)))

  def measure(params, batches):
    totals = None
    for batch in batches:
      totals = add(params, axes.place(mesh, batch), totals)
    sums = jax.tree.map(np.asarray, totals)
    found = metrics.by_language(languages, sums, "pairs")
    whole = metrics.by_language(["all"] * len(languages), sums, "pairs")["all"]
    said = ", ".join(f"{name} {whole[name]:.4f}" for name in ("loss", *metrics.OF_PAIRS))
    return dict(evaluation=found, summary=whole), f"{whole['pairs']:.0f} held-out pairs: {said}"

  return measure


def _bits_per_byte(config, workdir, mesh, model, validation, tokenizer):
  """(params, batches) -> the row and the words for text."""
  languages = [manifest["language"] for manifest in validation]
  score = bits.scorer(model, tokenizer.bytes_V, len(languages), chunk=config.loss.chunk)

  def measure(params, batches):
    found = bits.evaluate(score, params, batches, mesh, languages)
    column = {language: entry["bits_per_byte"] for language, entry in found.items()}
    summary = rollups.summary(column, "lower", metrics.first_evaluation(workdir))
    best, worst = min(column, key=column.get), max(column, key=column.get)
    said = (f"bits per byte: mean {summary['mean']:.4f} +- {summary['deviation']:.3f}, "
            f"{best} {column[best]:.3f} .. {worst} {column[worst]:.3f}"
            if not summary["missing"] else f"bits per byte: {summary['missing']} are not finite")
    return dict(evaluation=found, summary=summary), said

  return measure


def export(config, workdir, tokenizer):
  """WORKDIR/huggingface/<step>, which appears when it is whole."""
  parent = workdir / "huggingface"

  def write(_, at, params):
    whole = processes.gathered(params)
    if jax.process_index() == 0:
      try:
        for stale in parent.glob(".*.tmp*"):  # of an export that was killed
          shutil.rmtree(stale)
        whole = adapter.merged(whole, adapter.described(fields.adapter(config)))
        huggingface.write(parent / str(at), whole, config.model, tokenizer, dtype="bfloat16",
                          T=config.data.T)
        run.say(f"exported step {at} to {parent / str(at)}")
      except OSError as error:
        run.say(f"step {at} could not be exported: {error}")
    processes.agreed(True)

  def due(start, at):
    return at > start and (at - start) % config.export_every == 0

  return Hook("export", due, lambda at: (parent / str(at)).exists(), write)
