"""Saves beside training: what became of a save is known at a later step, and a failed one is repeated.

A save that fails is tried again at once, then when the next is due; training goes on meanwhile.
After `failed_saves` in a row it ends, as it is working for nothing. One that does not end at all is
the watchdog's, and so is one that fails on one of several processes: the others wait for it in Orbax.
"""

import threading
import time

import jax

from tiny_aya_jax import processes, run
from tiny_aya_jax.train import checkpoint, saved


class Saver:
  """start(step, items), then failed() at every step, and finish() at the end.

  As a context it waits, also after an error, for a save that is being written.
  """

  def __init__(self, workdir, keep, guard, dog):
    self.workdir, self.keep, self.guard, self.dog = workdir, keep, guard, dog
    self.running, self.failures, self.again, self.saved = None, 0, False, None
    self._sweep()

  def start(self, step, items):
    """Starts to save `step`; waits for the save before it, if that is still being written."""
    self._collect()
    if self.failures:
      self._sweep()  # the threads of a failed save may have gone on writing for a moment
    try:
      wait = checkpoint.begin(self.workdir, step, items, seconds=self.guard.save_seconds)
    except Exception as error:
      self._failed(step, error)
    else:
      self.running = _Running(step, wait, self.dog.start(f"the save of step {step}",
                                                         self.guard.save_seconds),
                              self.workdir, self.keep)

  def failed(self):
    """Whether a save has failed since the last call, and is worth another try at once."""
    if self.running and not self.running.thread.is_alive():
      self._collect()
    again, self.again = self.again, False
    return again

  def finish(self, step, items):
    """Waits until `step` is saved, which was started before; tries as often as is allowed."""
    self._collect()
    while not processes.agreed(not self.failures):
      time.sleep(2 ** self.failures)  # room may be made meanwhile
      self.start(step, items)
      self._collect()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self.running:
      self.running.thread.join()
      self.running.unwatch()
    self._sweep()

  def _sweep(self):
    if jax.process_index() == 0:
      checkpoint.sweep(self.workdir)

  def _collect(self):
    running, self.running = self.running, None
    if running:
      running.thread.join()
      running.unwatch()
      if running.error is not None:
        self._failed(running.step, running.error)
      else:
        self.failures, self.saved = 0, running.step

  def _failed(self, step, error):
    self.failures += 1
    self._sweep()
    steps = saved.steps(self.workdir)
    run.say(f"the save of step {step} failed, {self.failures} of {self.guard.failed_saves} in a row, the "
            f"newest checkpoint is {steps[-1] if steps else 'none'}: {' '.join(str(error).split())[:300]}")
    if self.failures >= self.guard.failed_saves:
      raise error
    self.again = self.failures == 1


class _Running:
  """A save in its thread, and how it ended."""

  def __init__(self, step, wait, unwatch, workdir, keep):
    self.step, self.unwatch, self.error = step, unwatch, None

    def run_out():
      try:
        wait()
      except Exception as error:
        self.error = error
        return
      try:
        if jax.process_index() == 0:
          checkpoint.prune(workdir, keep)
      except OSError as error:
        run.say(f"older checkpoints than {step} stay, they cannot be deleted: {error}")

    self.thread = threading.Thread(target=run_out, name=f"save {step}")
    self.thread.start()
