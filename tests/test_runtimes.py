"""Other runtimes in processes of their own: asked, refused, ended; witness.py with a runtime of numbers."""

import ast
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import full
from tiny_aya_jax import run
from tiny_aya_jax.export import runtimes, witness

# A stand-in for a runtime: logits that count what was seen, in a module the child can import.
COUNTING = """
import numpy as np
V = 7

def runtime(model, asked):
  seen = []
  def predict(ids, fresh):
    if fresh:
      seen.clear()
    rows = []
    for id in ids:
      seen.append(id)
      rows.append(np.sin(np.arange(V) * (1.0 + sum(seen))))
    return np.array(rows)
  return (lambda text: [len(word) for word in text.split()]), predict, dict(counting="1")
"""


def counting():
  found = {}
  exec(COUNTING, found)
  return found["runtime"]


def test_the_witness_imports_nothing_but_numpy_and_the_runtime_it_is_asked_for():
  tree = ast.parse(pathlib.Path(witness.__file__).read_text(encoding="utf-8"))
  imported = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
  assert imported == {"json", "os", "sys", "threading", "time", "numpy"}
  assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (
      node.level or node.module.startswith("tiny_aya_jax"))]


def test_each_question_has_its_answer(tmp_path, monkeypatch):
  monkeypatch.setattr(witness, "mlx", counting())
  (tmp_path / "request.json").write_text(
      '{"tokens": [[1, 2, 3], [4]], "texts": ["a bc", ""], "score": [[1, 2, 3]],'
      ' "greedy": {"prompts": [[1, 2]], "steps": 3}}')
  witness.main("mlx", "model", tmp_path / "request.json", tmp_path / "answer.npz")
  found = np.load(tmp_path / "answer.npz")
  assert {key: (found[key].dtype.name, found[key].shape) for key in found.files if key != "versions"} == dict(
      logits_0=("float32", (3, 7)), logits_1=("float32", (1, 7)), ids_0=("int32", (2,)), ids_1=("int32", (0,)),
      nats_0=("float64", ()), greedy_0=("int32", (3,)))
  assert found["ids_0"].tolist() == [1, 2]
  row = lambda *ids: np.sin(np.arange(7) * (1.0 + sum(ids)))
  np.testing.assert_allclose(found["logits_0"], [row(1), row(1, 2), row(1, 2, 3)], rtol=1e-6)
  log_p = lambda row: row - np.log(np.exp(row).sum())
  np.testing.assert_allclose(found["nats_0"], -log_p(row(1))[2] - log_p(row(1, 2))[3])
  ids = [1, 2]
  for token in found["greedy_0"]:
    assert token == row(*ids).argmax()
    ids.append(token)


def fake(where, module, text):
  """-> the path of a Python that finds a module of this text."""
  (where / f"{module}.py").write_text(text, encoding="utf-8")
  (where / "python").write_text(f'#!/bin/sh\nPYTHONPATH={where} exec {sys.executable} "$@"\n')
  (where / "python").chmod(0o755)
  return where / "python"


def test_a_python_without_the_runtime_is_refused_with_what_it_said(tmp_path):
  python = fake(tmp_path, "llama_cpp", "raise ImportError('no such\\nlibrary')")
  with pytest.raises(run.Refused, match=f"{python} cannot import llama_cpp: library"):
    runtimes.find("llama_cpp", python)
  with pytest.raises(run.Refused, match="cannot be run: No such file"):
    runtimes.find("llama_cpp", "/nowhere/python")
  with pytest.raises(run.Refused, match="did you mean 'llama_cpp'"):
    runtimes.find("llama.cpp")


def test_this_python_without_the_runtime_is_none(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "executable", str(fake(tmp_path, "llama_cpp", "raise ImportError('no')")))
  monkeypatch.setattr(run, "installed", lambda package: True)
  assert runtimes.find("llama_cpp") is None


def test_a_python_of_a_relative_path_is_found_from_everywhere(tmp_path, monkeypatch):
  python = fake(tmp_path, "llama_cpp", "")
  monkeypatch.chdir(tmp_path)
  assert runtimes.find("llama_cpp", "./python") == str(python)


def test_a_runtime_does_not_see_the_keys_of_this_process(monkeypatch, tmp_path):
  python = fake(tmp_path, "llama_cpp", "import os\nraise ImportError(sorted(os.environ))")
  monkeypatch.setenv("ODD_API_KEY", "secret")
  monkeypatch.setenv("OMP_NUM_THREADS", "1")
  with pytest.raises(run.Refused, match="'OMP_NUM_THREADS'") as refused:
    runtimes.find("llama_cpp", python)
  assert "ODD_API_KEY" not in str(refused.value) and "'PATH'" in str(refused.value)


def test_a_runtime_that_fails_is_refused_with_its_last_line(tmp_path):
  python = fake(tmp_path, "llama_cpp", "print('first')\nraise RuntimeError('the last line')")
  with pytest.raises(run.Refused, match="llama_cpp of .*: RuntimeError: the last line"):
    runtimes.ask("llama_cpp", python, tmp_path, dict(texts=["a"]))
  with pytest.raises(run.Refused, match="quantize of .*: RuntimeError: the last line"):
    runtimes.quantize(python, tmp_path / "in", tmp_path / "out", "Q6_K")
  assert not list(tmp_path.glob("*out*"))
  with pytest.raises(run.Refused, match="did you mean 'Q4_K_M'"):
    runtimes.quantize(python, tmp_path / "in", tmp_path / "out", "Q4_KM")


def test_a_child_ends_with_its_parent(tmp_path):
  python = fake(tmp_path, "llama_cpp", f"""
import os, time
open({str(tmp_path / "child")!r} + "new", "w").write(str(os.getpid()))
os.replace({str(tmp_path / "child")!r} + "new", {str(tmp_path / "child")!r})
time.sleep(60)
""")
  script = ("from tiny_aya_jax.export import runtimes;"
            f"runtimes.ask('llama_cpp', {str(python)!r}, '.', {{}})")
  mine = dict(os.environ, PYTHONPATH=str(pathlib.Path(runtimes.__file__).parents[2]))
  parent = subprocess.Popen([sys.executable, "-c", script], env=mine)
  child = int(waited(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text()))
  parent.send_signal(signal.SIGKILL)
  parent.wait()
  assert waited(lambda: not pathlib.Path(f"/proc/{child}").exists() or state(child) == "Z")


def state(process):
  return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def waited(what):
  end = time.monotonic() + 30
  while time.monotonic() < end:
    if found := what():
      return found
    time.sleep(0.05)
  return None


@full
def test_transformers_in_another_process_says_what_we_say(place, data, tmp_path):
  from test_llama import ours
  from tiny_aya_jax.data import tokenizer as tokenizers
  from tiny_aya_jax.export import huggingface
  from tiny_aya_jax.train import checkpoint, saved
  import ml_collections

  python = runtimes.find("transformers")
  if python is None:
    pytest.skip("needs the parity extra")
  params, cfg = checkpoint.restore_params(place)[0], ml_collections.ConfigDict(saved.meta(place)["model"])
  tokenizer = tokenizers.load(data / "tokenizer.model")
  huggingface.write(tmp_path / "folder", params, cfg, tokenizer)
  ids, text = list(range(2, 30)), "Guten Tag <EOS_TOKEN> 12"
  found = runtimes.ask("transformers", python, tmp_path / "folder", dict(
      tokens=[ids], texts=[text], greedy=dict(prompts=[ids], steps=9)))
  np.testing.assert_allclose(found["logits_0"], ours(params, cfg, ids), atol=1e-3)
  assert found["ids_0"].tolist() == tokenizer.encode(text)
  assert len(found["greedy_0"]) == 9 and set(found["versions"]) == {"numpy", "transformers", "torch", "tokenizers"}
