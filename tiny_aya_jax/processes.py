"""The processes of a run: how they find each other, and how they agree on a question."""

import glob
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from tiny_aya_jax import run

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join(heartbeat_seconds):
  """Joins the other processes of a run, before anything touches a device; nothing if it is alone.

  They are found by the variables NAMES (launch/local_pod.sh), by SLURM's under srun, or by the
  metadata of a TPU VM. A process that is silent for heartbeat_seconds ends the others: SIGABRT.
  """
  given = [name for name in NAMES if os.environ.get(name)]
  if given and len(given) < len(NAMES):
    raise run.Refused(f"{', '.join(given)} is set, expected all of {', '.join(NAMES)} or none")
  slurm = int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ
  if not (given or slurm or _on_tpu()):
    return
  # SIGTERM is counted in the step, with the clock of stop_after (train/step.py).
  jax.config.update("jax_enable_preemption_service", False)
  address, processes, process = (os.environ.get(name) for name in NAMES)
  place = dict(coordinator_address=address, num_processes=int(processes), process_id=int(process),
               cluster_detection_method="deactivate") if given else {}
  jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds,
                             shutdown_timeout_seconds=heartbeat_seconds, **place)


def _on_tpu():
  chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and run.installed("libtpu") and os.environ.get("JAX_PLATFORMS", "tpu") != "cpu"


def agreed(yes):
  """Whether every process of the run says yes; all call it together."""
  if jax.process_count() == 1:
    return yes
  return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


def told(numbers):
  """A list of whole numbers, as process 0 has it; all call it together."""
  if jax.process_count() == 1:
    return numbers
  count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
  padded = np.resize(np.array(numbers or [0], np.int32), count) if count else np.zeros(0, np.int32)
  return multihost_utils.broadcast_one_to_all(padded).tolist() if count else []


def gathered(tree):
  """Whole arrays in the memory of every host, of arrays that lie on the devices of all."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def first():
  """Whether this is process 0, which writes and speaks."""
  return jax.process_index() == 0
