"""Runs a verb with faults in it: python inject.py FAULT=VALUE ... -- VERB --config=...

A fault is put where the world would put it, around a function of ours or a library's; the verb, its
process and its files are real. Each says on stderr that it has happened.
"""

import os
import sys
import time


def main(argv):
  cut = argv.index("--")
  sys.modules["torch"] = None  # TensorBoard's writer would import it: two seconds a start
  from tiny_aya_jax import __main__

  for word in argv[:cut]:
    name, _, value = word.partition("=")
    FAULTS[name](value)
  sys.argv[1:] = argv[cut + 1 :]
  __main__.console()


def _happened(what):
  print(f"injected: {what}", file=sys.stderr, flush=True)


def _wrap(owner, name, around):
  """owner.name becomes around(the original)."""
  setattr(owner, name, around(getattr(owner, name)))


def _batches(change):
  """change(step, batch) of every batch that is read; a step is counted from 0."""
  from tiny_aya_jax.data import loader

  def around(read):
    def changed(self, step):
      batch = read(self, step)
      change(int(step), batch)
      return batch
    return changed

  _wrap(loader.Loader, "__getitem__", around)


def not_finite(steps):
  """The loss of these steps is NaN: '3,4'."""
  wanted = set(map(int, steps.split(",")))

  def change(step, batch):
    if step in wanted:
      _happened(f"NaN in step {step}")
      batch["weight_BT"] = batch["weight_BT"] * float("nan")

  _batches(change)


def spike(steps):
  """The targets of these steps are what no model expects: one token, the rarest."""
  wanted = set(map(int, steps.split(",")))

  def change(step, batch):
    if step in wanted:
      _happened(f"a spike in step {step}")
      batch["target_BT"] = batch["target_BT"] * 0 + 599

  _batches(change)


def hang(where):
  """'data:5' or 'step:5': the fifth step's batch, or its placing on the devices, never comes."""
  place, _, number = where.partition(":")
  if place == "data":
    return _batches(lambda step, batch: step == int(number) and _sleep(where))
  from tiny_aya_jax import axes

  placed = []

  def around(place):
    def hanging(mesh, batch):
      placed.append(1)
      if len(placed) == int(number):
        _sleep(where)
      return place(mesh, batch)
    return hanging

  _wrap(axes, "place", around)


def _sleep(where, seconds=10_000):
  _happened(f"{where} sleeps")
  time.sleep(seconds)


def slow_compile(seconds):
  """The program takes so long to compile."""
  from tiny_aya_jax.train import proof

  def around(program):
    def slowly(*arguments):
      _sleep("the compiler", float(seconds))
      return program(*arguments)
    return slowly

  _wrap(proof, "program", around)


def slow_first_evaluation(seconds):
  """The program of the first evaluation takes so long to compile."""
  from tiny_aya_jax.model import bits

  def around(scorer):
    def slow(*arguments, **settings):
      score, waited = scorer(*arguments, **settings), []
      def first(*arguments):
        if not waited:
          waited.append(_sleep("the compiler", float(seconds)))
        return score(*arguments)
      return first
    return slow

  _wrap(bits, "scorer", around)


def die(where):
  """'STAGE:STEP': the process ends at once in the save of that step.

  before: nothing is written; started: being written; written: all but the commit; committed: before older
  ones are deleted; pruning: between the renaming of an older one and its deletion.
  """
  stage, _, step = where.partition(":")
  from orbax.checkpoint._src.path import atomicity

  from tiny_aya_jax.train import checkpoint

  def end():
    _happened(where)
    os._exit(9)

  def begin(begin):
    def dying(workdir, at, items, **more):
      if at == int(step) and stage == "before":
        end()
      wait = begin(workdir, at, items, **more)
      if at != int(step):
        return wait
      if stage == "started":
        end()
      if stage == "written":
        _wrap(atomicity, "on_commit_callback", lambda _: lambda *_, **__: end())
      if stage == "committed":
        checkpoint.prune = lambda *_: end()
      if stage == "pruning":
        checkpoint.shutil.rmtree = lambda *_, **__: end()
      return wait
    return dying

  _wrap(checkpoint, "begin", begin)


def no_memory(_):
  """The devices have no room for the program."""
  import jax

  from tiny_aya_jax.train import proof

  def none(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123456789 bytes.")

  proof.program = none


def uncommitted(_):
  """The first save fails as it is committed, which process 0 alone does."""
  from orbax.checkpoint._src.path import atomicity

  failed = []

  def around(commit):
    async def once(*arguments, **more):
      if not failed:
        failed.append(1)
        _happened("no commit")
        raise OSError(28, "No space left on device")
      return await commit(*arguments, **more)
    return once

  _wrap(atomicity, "on_commit_callback", around)


def unreadable(step):
  """The disk has an error where this step's arrays lie."""
  from tiny_aya_jax.train import checkpoint

  def around(load):
    def failing(path, *arguments):
      if path.name == step:
        raise OSError(5, "Input/output error")
      return load(path, *arguments)
    return failing

  _wrap(checkpoint.ocp, "load_checkpointables", around)


def slow_save(seconds):
  """Every save takes so long to be written."""
  from tiny_aya_jax.train import checkpoint

  def around(begin):
    def slowly(*arguments, **more):
      wait = begin(*arguments, **more)
      def waits():
        time.sleep(float(seconds))
        wait()
      return waits
    return slowly

  _wrap(checkpoint, "begin", around)


def error(step):
  """Reading this step's batch raises."""
  def change(at, _):
    if at == int(step):
      raise RuntimeError("injected: the reader broke")

  _batches(change)


def full_until(step):
  """No file may grow from the third step on until this one is read: writing fails as on a full disk."""
  import resource
  import signal

  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

  def change(at, _):
    if 2 <= at < int(step):
      resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if at == int(step):
      resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
      _happened("room again")

  _batches(change)


def dies_exporting(_):
  """The process ends when half of a Hugging Face folder is written."""
  from tiny_aya_jax.export import cohere2

  def end(*_):
    time.sleep(3)  # the save that began before it is committed
    _happened("killed in an export")
    os._exit(9)

  cohere2.config_out = end


def dies_evaluating(number):
  """The process ends in its evaluation of this number, counted from 1."""
  from tiny_aya_jax.model import bits

  counted = []

  def around(evaluate):
    def dying(*arguments):
      counted.append(1)
      if len(counted) == int(number):
        time.sleep(3)  # the save that began before it is committed
        _happened("killed in an evaluation")
        os._exit(9)
      return evaluate(*arguments)
    return dying

  _wrap(bits, "evaluate", around)


FAULTS = {function.__name__: function for function in (
    not_finite, spike, hang, slow_compile, slow_first_evaluation, die, no_memory, slow_save, error, full_until,
    uncommitted, unreadable, dies_evaluating, dies_exporting)}

if __name__ == "__main__":
  main(sys.argv[1:])
