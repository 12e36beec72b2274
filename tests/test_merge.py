"""merge on trees and as a verb: checkpoints and folders alike, laws, refusals, reruns, faults."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from conftest import ROOT, call, random_params
from test_operators import elect, same, slerp, trim

from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.post import merge, operators
from tiny_aya_jax.train import checkpoint, saved

EMBEDDING = "model.embed_tokens.weight"


def flat(tree):
  return {"/".join(key.key for key in path): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def equal(x, y):
  assert jax.tree.structure(x) == jax.tree.structure(y)
  jax.tree.map(lambda a, b: same(np.asarray(a), np.asarray(b)), x, y)


def slices(tree, path):
  """The Hugging Face tensors of a leaf: a stack is one a period."""
  leaf = flat(tree)[path]
  return list(leaf) if path.startswith("periods") else [leaf]


@pytest.fixture(scope="module")
def models(cfg):
  return [random_params(cfg, seed) for seed in (1, 2)], random_params(cfg, 3)


# --- trees --------------------------------------------------------------------------------------


def test_a_stack_of_periods_is_merged_period_by_period(models):
  (x, y), base = models
  arc = flat(merge.merge([x, y], "slerp", t=0.3))
  ties = flat(merge.merge([x, y], "ties", base=base, weights=(0.3, 0.7), density=0.2))
  for path in ("embedding_VD", "norm_D", "periods/full/q_DNH", "periods/sliding_1/o_NHD"):
    path = path if path in arc else next(name for name in arc if name.endswith(path.split("/")[-1]))
    parts = list(arc[path]) if path.startswith("periods") else [arc[path]]
    trimmed = list(ties[path]) if path.startswith("periods") else [ties[path]]
    for found, kept, a, b, below in zip(
        parts, trimmed, *(slices(tree, path) for tree in (x, y, base)), strict=True):
      line = path == "norm_D" and np.dot(a, b) ** 2 > 0.9995**2 * np.dot(a, a) * np.dot(b, b)
      expected = 0.7 * a + 0.3 * b if line else slerp(a, b, 0.3)
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
      deltas = [trim(model - below, 0.2) for model in (a, b)]
      np.testing.assert_allclose(kept, below + elect(deltas, (0.3, 0.7)), rtol=1e-4, atol=1e-6)


def test_every_operator_keeps_what_is_the_same_everywhere(models):
  (x, _), _ = models
  for operator, reads in merge.READS.items():
    base = dict(base=x) if "base" in reads else {}
    equal(merge.merge([x, x], operator, t=0.3, density=0.5, **base), x)


def test_the_ends_of_slerp_are_the_models_and_weights_of_one_pick_one(models):
  (x, y), base = models
  for t, end in ((0, x), (1, y)):
    equal(merge.merge([x, y], "slerp", t=t), end)
    equal(merge.merge([x, y], "nuslerp", base=base, t=t), end)
    equal(merge.merge([x, y], "linear", weights=(1 - t, t)), end)


def test_weights_that_are_not_given_are_equal_shares(models):
  (x, y), base = models
  equal(merge.merge([x, y], "linear"), merge.merge([y, x], "linear", weights=(0.5, 0.5)))
  equal(merge.merge([x, y], "task_arithmetic", base=base),
        merge.merge([x, y], "task_arithmetic", base=base, weights=(0.5, 0.5)))


def test_normalize_is_as_the_operator_is_defined_unless_it_is_said(models):
  (x, y), base = models
  equal(merge.merge([x, y], "ties", base=base), merge.merge([x, y], "ties", base=base, normalize=True))
  for operator in ("task_arithmetic", "dare_ties"):
    plain = merge.merge([x, y], operator, base=base, weights=(1, 2))
    equal(plain, merge.merge([x, y], operator, base=base, weights=(1, 2), normalize=False))
    assert not np.array_equal(
        plain["norm_D"],
        merge.merge([x, y], operator, base=base, weights=(1, 2), normalize=True)["norm_D"])


def authors(base, models, density):
  """TIES as published: one flat vector a model, zero sums take the sign of the majority."""
  flats = np.stack([model - base for model in models])
  if density < 1:
    rank = flats.shape[1] - int(flats.shape[1] * density)
    kth = np.sort(np.abs(flats), axis=1)[:, rank - 1:rank]
    flats = flats * (np.abs(flats) >= kth)
  sign = np.sign(flats.sum(axis=0))
  sign[sign == 0] = np.sign(sign.sum())
  kept = flats * np.where(sign > 0, flats > 0, flats < 0)
  return base + kept.sum(axis=0) / np.maximum((kept != 0).sum(axis=0), 1)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("lean", [-1, 1])
def test_trimming_the_model_is_the_authors_code_on_the_flattened_model(models, density, lean):
  (x, y), base = models
  # Steps of 1/64: many equal magnitudes, and sums of exactly zero that the majority decides.
  base, x = (jax.tree.map(lambda a: np.round(a * 64) / 64, tree) for tree in (base, x))
  y = jax.tree.map(lambda a, b: 2 * b - a + lean * (np.arange(a.size).reshape(a.shape) % 3 == 0) / 64,
                   x, base)
  x, y, base = (jax.tree.map(lambda a: a.astype(np.float32), tree) for tree in (x, y, base))
  found = merge.merge([x, y], "ties", base=base, density=density, trimming="model")
  vector = lambda tree: np.concatenate([leaf.ravel() for leaf in flat(tree).values()])  # noqa: E731
  expected = authors(vector(base), [vector(x), vector(y)], density)
  np.testing.assert_allclose(vector(found), expected, rtol=1e-5, atol=1e-6)


def test_coins_differ_between_tensors_periods_models_and_seeds_and_fall_the_same_again(models):
  (x, _), _ = models
  ones, zeros = (jax.tree.map(lambda a: np.full_like(a, value), x) for value in (1, 0))

  def kept(weights, seed=0):
    return flat(merge.merge(
        [ones, ones], "dare_linear", base=zeros, weights=weights, density=0.5, seed=seed))

  first, again = kept((1, 0)), kept((1, 0))
  stack = next(name for name in first if name.endswith("q_DNH"))
  other = next(name for name in first if name.endswith("q_DNH") and name != stack)
  for name in first:
    same(first[name], again[name])
  patterns = (first[stack][0], first[stack][1], first[other][0], kept((0, 1))[stack][0],
              kept((1, 0), seed=1)[stack][0])
  assert len({pattern.tobytes() for pattern in patterns}) == len(patterns)
  assert all(abs((pattern != 0).mean() - 0.5) < 0.05 for pattern in patterns)


REFUSED = {
    "one model": (dict(models=1, operator="linear"), "1 models are given, expected at least 2"),
    "operator": (dict(operator="tise"), "did you mean 'ties'"),
    "three for slerp": (dict(models=3, operator="slerp"), "between 2 models, 3 are given"),
    "no base": (dict(operator="ties"), "ties needs the base"),
    "a base too many": (dict(operator="slerp", base=True), "slerp reads no base"),
    "weights": (dict(operator="linear", weights=(0.5, 0.3, 0.2)), "3 weights are given for 2 models"),
    "a sum": (dict(operator="linear", weights=(0.5, 0.6)), "sum to 1.1, expected 1"),
    "no sum": (dict(operator="linear", weights=(1, -1), normalize=True), "sum to 0: they cannot"),
    "no number": (dict(operator="ties", base=True, weights=(float("nan"), 1)), "expected numbers"),
    "t": (dict(operator="slerp", t=1.5), "t is 1.5"),
    "t is none": (dict(operator="slerp", t=float("nan")), "t is nan"),
    "density 0": (dict(operator="ties", base=True, density=0.0), "density is 0.0"),
    "density 2": (dict(operator="dare_ties", base=True, density=2.0), "density is 2.0"),
    "density of a norm": (dict(operator="ties", base=True, density=0.01), "none of the 32 numbers"),
    "scale": (dict(operator="ties", base=True, scale=float("inf")), "scale is inf"),
    "trimming": (dict(operator="ties", base=True, trimming="modle"), "did you mean 'model'"),
}


@pytest.mark.parametrize("settings, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused(models, settings, said):
  (x, y), base = models
  settings = dict(settings)
  trees = [x, y, y][:settings.pop("models", 2)]
  base = base if settings.pop("base", False) else None
  with pytest.raises(run.Refused, match=said):
    merge.merge(trees, settings.pop("operator"), base=base, **settings)


def test_other_shapes_and_numbers_that_are_none_are_refused_by_name(models):
  (x, y), base = models
  odd = x | dict(norm_D=x["norm_D"][:-1])
  with pytest.raises(run.Refused, match="model 1 differs from model 0 in 1 arrays, e.g. norm_D"):
    merge.merge([x, odd], "linear")
  broken = x | dict(norm_D=np.where(np.arange(x["norm_D"].size) == 7, np.nan, x["norm_D"]))
  with pytest.raises(run.Refused, match="model 1: norm_D has a number that is not finite"):
    merge.merge([x, broken], "linear")
  with pytest.raises(run.Refused, match="base: norm_D has a number"):
    merge.merge([x, y], "ties", base=broken)
  large = jax.tree.map(lambda a: a * np.float32(1e38), x)
  with pytest.raises(run.Refused, match="of the merge has a number"), np.errstate(over="ignore"):
    merge.merge([large, large], "task_arithmetic", base=x, weights=(9, 9))


# --- the verb -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(cfg, data, tmp_path_factory):
  """Two models as checkpoints and as folders, and a base, over the vocabulary of `data`."""
  import ml_collections

  root, cfg = tmp_path_factory.mktemp("merge"), ml_collections.ConfigDict(cfg.to_dict() | dict(V=600))
  tokens = tokenizer.load(data / "tokenizer.model")
  meta = dict(model=cfg.to_dict(), tokenizer_sha256=tokens.sha256)
  for seed, name in enumerate(("a", "b", "base")):
    tree = random_params(cfg, seed)
    checkpoint.save(root / name, 0, dict(params=tree, meta=meta | dict(T=32 + seed)), keep=1)
    huggingface.write(root / f"{name}_folder", tree, cfg, tokens)
  return root


def verb(data, workdir, checkpoints, *fields, experiment="merge.py"):
  return call("merge", experiment, workdir, f"--config.tokenizer={data / 'tokenizer.model'}",
              f"--config.checkpoints={tuple(map(str, checkpoints))}", *fields)


def test_checkpoints_folders_and_trees_give_the_same_bits(places, data, tmp_path):
  trees = [huggingface.read(places / f"{name}_folder")[0] for name in ("a", "b", "base")]
  settings = ["--config.weights=(0.3, 0.7)", "--config.density=0.3"]
  expected = merge.merge(trees[:2], "ties", base=trees[2], weights=(0.3, 0.7), density=0.3)
  for number, (a, b, base) in enumerate([("a", "b", "base"), ("a_folder", "b", "base_folder"),
                                         ("a_folder", "b_folder", "base_folder")]):
    workdir = tmp_path / str(number)
    assert verb(data, workdir, (places / a, places / b), f"--config.base={places / base}", *settings,
                experiment="merge.py:ties") == 0
    params, _ = checkpoint.restore_params(workdir)
    equal(params, expected)
  base = f"--config.base={places / 'base'}"
  assert verb(data, tmp_path / "folder", (places / "a", places / "b"), base, *settings,
              "--config.output=huggingface", experiment="merge.py:ties") == 0
  equal(huggingface.read(tmp_path / "folder/huggingface")[0], expected)


def test_a_merge_is_a_checkpoint_with_all_that_later_stages_read(places, data, tmp_path, capsys):
  workdir = tmp_path / "merged"
  assert verb(data, workdir, (places / "a", places / "b"), "--config.t=0.25",
              experiment="merge.py:slerp") == 0
  meta = saved.meta(workdir)
  assert (meta["step"], meta["T"]) == (0, 32)
  assert meta["tokenizer_sha256"] == tokenizer.load(data / "tokenizer.model").sha256
  assert {path.name for path in saved.find(workdir).iterdir()} >= {"params", "meta"}
  assert checkpoint.verify(workdir) == len(meta["fingerprints"]["params"])
  record = json.loads((workdir / "merge.json").read_text())
  assert (record["operator"], record["t"], "weights" in record) == ("slerp", 0.25, False)
  assert [one["path"] for one in record["checkpoints"]] == [str(saved.find(places / n)) for n in "ab"]
  assert record["seconds"] > 0 and record["versions"]["numpy"]
  assert not [path for path in (workdir / "checkpoints").iterdir() if path.name != "0"]


def test_a_damaged_input_is_found_where_it_is_read(places, data, tmp_path):
  import shutil

  shutil.copytree(places / "a", tmp_path / "a")
  facts = tmp_path / "a/checkpoints/0/meta/data.json"
  meta = {key: value for key, value in json.loads(facts.read_text()).items() if key != "sha256"}
  meta["fingerprints"]["params"]["norm_D"] = "00000000"
  facts.write_text(json.dumps(saved.signed(meta, None)))
  assert verb(data, tmp_path / "merged", (tmp_path / "a", places / "b")) == 65
  assert not saved.steps(tmp_path / "merged") and not (tmp_path / "merged/merge.json").exists()
  assert not list((tmp_path / "merged/checkpoints").iterdir())


def test_a_rerun_is_up_to_date_and_another_recipe_is_refused_unless_overwritten(
    places, data, tmp_path, capsys):
  a, b = places / "a", places / "b_folder"
  assert verb(data, tmp_path, (a, b)) == 0
  before = (tmp_path / "merge.json").read_bytes()
  assert verb(data, tmp_path, (a, b), "--config.t=0.1") == 0  # linear does not read it
  assert "up to date" in capsys.readouterr().out and (tmp_path / "merge.json").read_bytes() == before
  assert verb(data, tmp_path, (a, b), "--config.weights=(0.4, 0.6)") == 65
  assert "other inputs" in capsys.readouterr().err
  for output in ("huggingface", "checkpoint"):  # each takes the other's place
    fields = ("--config.weights=(0.4, 0.6)", f"--config.output={output}")
    assert verb(data, tmp_path, (a, b), *fields, "--config.overwrite=True") == 0
    assert verb(data, tmp_path, (a, b), *fields) == 0
    assert "up to date" in capsys.readouterr().out
    assert bool(saved.steps(tmp_path)) == (output == "checkpoint")
    assert (tmp_path / "huggingface").exists() == (output == "huggingface")
  (tmp_path / "checkpoints/0").rename(tmp_path / "elsewhere")
  assert verb(data, tmp_path, (a, b), *fields) == 0 and saved.steps(tmp_path) == [0]


def test_a_folder_has_the_texts_of_the_first_folder_and_the_dtype_asked_for(places, data, tmp_path):
  texts = places / "b_folder"
  (texts / "tokenizer_config.json").write_text('{"mine": 1}')
  assert verb(data, tmp_path, (places / "a", texts), "--config.output=huggingface",
              "--config.dtype=bfloat16") == 0
  folder = tmp_path / "huggingface"
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    assert (folder / name).read_bytes() == (texts / name).read_bytes()
  assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
  sizes = [(place / "model.safetensors").stat().st_size for place in (folder, texts)]
  assert sizes[0] < 0.6 * sizes[1]
  assert verb(data, tmp_path / "again", (folder, folder)) == 0
  equal(checkpoint.restore_params(tmp_path / "again")[0], huggingface.read(folder)[0])


def test_a_refusal_says_what_differs_and_writes_nothing(places, data, cfg, tmp_path, capsys):
  import ml_collections

  def refused(checkpoints, *fields):
    assert verb(data, tmp_path / "out", checkpoints, *fields) == 65
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err

  other = ml_collections.ConfigDict(cfg.to_dict() | dict(V=600, window=6))
  meta = dict(model=other.to_dict(), tokenizer_sha256="0" * 64, T=32)
  checkpoint.save(tmp_path / "window", 0, dict(params=random_params(other, 0), meta=meta), keep=1)
  same_model = meta | dict(model=other.to_dict() | dict(window=cfg.window))
  checkpoint.save(tmp_path / "tokens", 0, dict(params=random_params(other, 0), meta=same_model), keep=1)
  a, folder = places / "a", places / "a_folder"
  assert "is another model: window 6 (here 5)" in refused((a, tmp_path / "window"))
  assert "was trained with tokenizer 000000000000" in refused((a, tmp_path / "tokens"))
  assert "was trained with tokenizer 000000000000" in refused(
      (a, tmp_path / "tokens"), "--config.tokenizer=")
  assert "give config.tokenizer" in refused((a, folder), "--config.tokenizer=")
  assert "needs config.tokenizer" in refused(
      (a, places / "b"), "--config.tokenizer=", "--config.output=huggingface")
  assert "a checkpoint is float32" in refused((a, folder), "--config.dtype=bfloat16")
  assert "does not exist" in refused((a, tmp_path / "nowhere"))
  assert "is no checkpoint" in refused((a, tmp_path))
  changed = tmp_path / "changed"
  changed.mkdir()
  for file in folder.iterdir():
    (changed / file.name).write_bytes(file.read_bytes())
  text = json.loads((changed / "tokenizer.json").read_text())
  vocab = text["model"]["vocab"]
  one, other = list(vocab)[-2:]
  vocab[one], vocab[other] = vocab[other], vocab[one]
  (changed / "tokenizer.json").write_text(json.dumps(text))
  assert "another tokenizer than" in refused((folder, changed))
  assert verb(data, places / "a", (a, places / "b")) == 65
  assert "the checkpoints of another verb" in capsys.readouterr().err


def test_one_tokenizer_in_two_files_is_one(places, data, tmp_path):
  text = json.loads((places / "b_folder/tokenizer.json").read_text())
  other = tmp_path / "b"
  other.mkdir()
  for file in (places / "b_folder").iterdir():
    (other / file.name).write_bytes(file.read_bytes())
  (other / "tokenizer.json").write_text(json.dumps(text, indent=1))
  assert verb(data, tmp_path / "out", (places / "a_folder", other), "--config.tokenizer=") == 0


@pytest.mark.parametrize("output", ["checkpoint", "huggingface"])
@pytest.mark.parametrize("at", [0, 40])
def test_an_interruption_keeps_what_was_there_and_leaves_nothing_else(
    places, data, tmp_path, monkeypatch, output, at):
  checkpoints = (places / "a", places / "b_folder")
  fields = (f"--config.output={output}", "--config.operator=slerp")
  assert verb(data, tmp_path, checkpoints, *fields) == 0
  made, calls = result(tmp_path, output), iter(range(1000))
  finite = operators.finite

  def interrupted(tensor):
    if next(calls) == at:
      raise KeyboardInterrupt
    return finite(tensor)

  monkeypatch.setattr(operators, "finite", interrupted)
  with pytest.raises(KeyboardInterrupt):
    verb(data, tmp_path, checkpoints, *fields, "--config.t=0.2", "--config.overwrite=True")
  monkeypatch.undo()
  equal(result(tmp_path, output), made)
  assert json.loads((tmp_path / "merge.json").read_text())["t"] == 0.5
  if output == "huggingface":  # where a killed one wrote
    (tmp_path / "..huggingface.new.tmp1").mkdir()
  assert verb(data, tmp_path, checkpoints, *fields, "--config.t=0.2", "--config.overwrite=True") == 0
  assert not [path.name for path in (*tmp_path.iterdir(), *tmp_path.glob("checkpoints/*"))
              if path.name not in ("0", "checkpoints", "huggingface", "merge.json")]


def result(workdir, output):
  return checkpoint.restore_params(workdir)[0] if output == "checkpoint" else huggingface.read(
      workdir / "huggingface")[0]


def test_a_killed_merge_leaves_nothing_that_can_be_read_and_the_next_one_cleans_up(
    places, data, tmp_path):
  checkpoints = (places / "a", places / "b")
  arguments = ["merge", f"--config={ROOT / 'experiments/merge.py'}", f"--workdir={tmp_path}",
               f"--config.checkpoints={tuple(map(str, checkpoints))}"]
  program = f"""
import os, signal, sys
from tiny_aya_jax import __main__
from tiny_aya_jax.train import checkpoint
checkpoint.CHUNK_BYTES = 1000
save = checkpoint.ocp.partial.save
calls = iter(range(1000))
def killed(*arguments):
  save(*arguments)
  if next(calls) == 5:
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.ocp.partial.save = killed
__main__.main({arguments!r})
"""
  ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, check=False,
                         capture_output=True)
  assert ended.returncode == -signal.SIGKILL, ended.stderr[-500:]
  assert list((tmp_path / "checkpoints").iterdir()) and not saved.steps(tmp_path)
  with pytest.raises(run.Refused, match="is no checkpoint and holds none"):
    saved.find(tmp_path)
  assert verb(data, tmp_path, checkpoints) == 0
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]
