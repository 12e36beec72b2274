"""Other runtimes, asked in a process of their own: transformers, llama.cpp (llama_cpp), MLX (mlx).

Each may live in another environment: `find` gives the Python that has it, `ask` runs witness.py
there, which describes questions and answers. Nothing here needs jax.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from tiny_aya_jax import run

PACKAGES = dict(transformers="transformers, torch", llama_cpp="llama_cpp", mlx="mlx.core, mlx_lm")
# What llama.cpp makes and the gguf package cannot.
QUANTIZED = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
# What a child is given of the environment. Not PYTHONPATH: its packages are those of its own Python.
KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "TMPDIR", "LANG", "LC_ALL", "OMP_NUM_THREADS")
QUIET = dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
WITNESS = pathlib.Path(__file__).with_name("witness.py")


def find(name, python=None):
  """The absolute path of a Python that can import the runtime `name`; None where this one cannot.

  python: of another environment; one that cannot is Refused with what it said.
  """
  packages = PACKAGES[run.choose("runtime", name, PACKAGES)]
  if python is None and not all(run.installed(package.split(".")[0]) for package in packages.split(", ")):
    return None
  found = str(python or sys.executable)
  if "/" in found:  # `ask` runs it elsewhere; links are kept, or it would leave a venv
    found = os.path.abspath(found)
  wrong = _import_error(found, packages)
  if wrong is None:
    return found
  if python is None:
    return None
  raise run.Refused(f"{python} cannot import {packages}: {wrong}")


@functools.cache
def _import_error(python, packages):
  tried = _call([python, "-c", f"import numpy, {packages}"], where=None)
  return _last_line(tried) if tried.returncode else None


def ask(name, python, model, request):
  """{key: array} that the runtime `name` of `python` answers about `model`; `versions` is a dict.

  model: a Hugging Face folder, or for llama_cpp a GGUF file. Refuses what the runtime refuses.
  """
  run.choose("runtime", name, PACKAGES)
  with tempfile.TemporaryDirectory(prefix="tiny_aya_") as folder:
    asked, answer = pathlib.Path(folder, "request.json"), pathlib.Path(folder, "answer.npz")
    asked.write_text(json.dumps(request), encoding="utf-8")
    _run(python, folder, name, pathlib.Path(model).resolve(), asked, answer)
    with np.load(answer) as found:
      answers = {key: found[key] for key in found.files}
  return answers | dict(versions=json.loads(str(answers["versions"])))


def quantize(python, source, target, kind):
  """Makes the GGUF file `target` of `source` (F32, F16 or BF16) by llama.cpp; all of it, or nothing.

  Where a row is no multiple of 256, llama.cpp itself takes another type: gguf.facts tells.
  """
  run.choose("GGUF kind", kind, QUANTIZED)
  source, target = pathlib.Path(source).resolve(), pathlib.Path(target).resolve()
  temporary = target.with_name(f".{target.name}.tmp")
  with tempfile.TemporaryDirectory(prefix="tiny_aya_") as folder:
    try:
      _run(python, folder, "quantize", source, temporary, kind)
      with open(temporary, "rb") as file:
        os.fsync(file.fileno())
      os.replace(temporary, target)
    finally:
      temporary.unlink(missing_ok=True)


def _run(python, where, *arguments):
  done = _call([python, WITNESS, *arguments], where)
  if done.returncode:
    raise run.Refused(f"{arguments[0]} of {python}: {_last_line(done)}")


def _call(command, where):
  """Runs a child to its end, without network and without this process's environment, in which keys
  may stand; witness.py ends itself when this process is gone."""
  kept = {name: os.environ[name] for name in KEPT if name in os.environ}
  try:
    return subprocess.run(
        [str(word) for word in command], cwd=where, env=kept | QUIET, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace")
  except OSError as error:
    raise run.Refused(f"{command[0]} cannot be run: {error.strerror}") from None


def _last_line(done):
  """What a child said last, or how it ended."""
  lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
  return lines[-1] if lines else f"it ended with {done.returncode} and said nothing"
