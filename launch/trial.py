"""One run of a sweep as a job of another scheduler, by a Spec; `config.prefix` of sweep calls it:

  ("python", "launch/trial.py", "slurm", "launch/mine.toml", "{key}", "{command}")    waits for the job
  ("python", "launch/trial.py", "xpk", "launch/mine.toml", "{key}", "{command}")      returns at once: with
                                                                                    config.detached

Set config.python to the interpreter there (xpk: python). The job is called NAME-KEY and runs the
sweep's command instead of the Spec's, in the sweep's workdir, which lies on a file system that both see.
Nothing here starts a job again: the sweep does, by its exit code.
"""

import dataclasses
import shlex
import subprocess
import sys
import time

import render
import spec as specs


def slurm(spec, command):
  """sbatch --wait: its exit code is the job's."""
  words = shlex.split(command)
  if words[1:3] != ["-m", "tiny_aya_jax"]:
    raise specs.Refused("slurm waits for its job by itself: set config.detached to False")
  (workdir,) = (word.partition("=")[2] for word in words if word.startswith("--workdir="))
  # Run once, and not put back into the queue: BRIEF is what counts as too short a run for that.
  return subprocess.run(
      ["sbatch", "--wait", f"--output={workdir}/log.txt", "--export=ALL,BRIEF=999999999"],
      input=render.slurm(spec, words[3:], attempts=0), text=True, check=False).returncode


def xpk(spec, command):
  """The command writes its exit code where the sweep looks for it."""
  if "echo $code" not in command:
    raise specs.Refused("xpk returns before its workload has run: set config.detached to True")
  return subprocess.run(shlex.split(render.xpk_line(spec, command, restarts=0)), check=False).returncode


def main(argv):
  """['slurm' or 'xpk', 'SPEC.toml', KEY, COMMAND] -> exit code."""
  try:
    if len(argv) != 4 or argv[0] not in ("slurm", "xpk"):
      raise specs.Refused("usage: python launch/trial.py slurm|xpk SPEC.toml KEY COMMAND")
    spec = specs.read(argv[1])
    # A workload of the same name may still be listed, from an earlier attempt.
    name = f"{spec.name[:20]}-{argv[2][:8]}-{int(time.time()) % 100_000}"
    return dict(slurm=slurm, xpk=xpk)[argv[0]](dataclasses.replace(spec, name=name), argv[3])
  except specs.Refused as error:
    print(f"refused: {error}", file=sys.stderr)
    return specs.REFUSED


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
