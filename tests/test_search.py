"""A search over merges: what is measured decides, is kept, and is explained in merge.json."""

import json

import jax
import ml_collections
import numpy as np
import pytest

from conftest import call, random_params
from tiny_aya_jax import axes, run
from tiny_aya_jax.data import loader, tokenizer as tokenizers
from tiny_aya_jax.model import bits
from tiny_aya_jax.model.transformer import TinyAya
from tiny_aya_jax.post import merge, search
from tiny_aya_jax.train import checkpoint, saved

CANDIDATES = "(('linear', 0.0), ('slerp', 0.5))"


@pytest.fixture(scope="module")
def pair(place, tmp_path_factory):
  """(Global, a region's): the checkpoint of `place`, and one that is as far from it as it is large."""
  meta, folder = saved.meta(place), tmp_path_factory.mktemp("models") / "region"
  cfg = ml_collections.ConfigDict(meta["model"])
  facts = {name: meta[name] for name in ("model", "tokenizer_sha256", "T")}
  checkpoint.save(folder, 0, dict(params=random_params(cfg, seed=8), meta=facts), keep=1)
  return str(place), str(folder)


@pytest.fixture(scope="module")
def safety(data, tmp_path_factory):
  """Packed pairs of two languages."""
  folder = tmp_path_factory.mktemp("safety")
  (folder / "text").mkdir()
  for code in ("deu_Latn", "wol_Latn"):
    (folder / "text" / f"{code}.jsonl").write_text("".join(json.dumps(dict(
        prompt=f"{number}?", chosen=f"{number} {code}", rejected=f"{number} nein")) + "\n" for number in range(9)))
  assert call("pack", "pack.py", folder, f"--config.text={folder / 'text'}", "--config.T=64",
              f"--config.tokenizer={data / 'tokenizer.model'}", "--config.packing=best_fit",
              "--config.pairs=2", "--config.stage=pairs") == 0
  return folder / "pairs"


def searched(workdir, pair, data, *more):
  return call("merge", "merge.py:tiny_fire", workdir, f"--config.checkpoints={pair}",
              f"--config.search.rows={data / 'rows/validation'}", "--config.search.batch=8",
              f"--config.tokenizer={data / 'tokenizer.model'}", "--config.search.languages=('all',)",
              f"--config.search.candidates={CANDIDATES}", *more)


def test_the_best_measured_candidate_is_merged_and_a_stopped_search_goes_on(
    pair, data, safety, tmp_path, capsys, monkeypatch):
  more = (f"--config.search.safety={safety}", "--config.search.tolerance=1.0",
          f"--config.search.probe={data / 'rows/validation'}", "--config.search.probe_tokens=200")
  measure, asked = search._measure, []

  def stopping(*arguments):
    measured = measure(*arguments)

    def one(tree):
      asked.append(tree)
      if len(asked) == 3:
        raise KeyboardInterrupt
      return measured(tree)

    return one

  monkeypatch.setattr(search, "_measure", stopping)
  with pytest.raises(KeyboardInterrupt):
    searched(tmp_path, pair, data, *more)
  assert not (tmp_path / "merge.json").exists() and not saved.steps(tmp_path)
  assert searched(tmp_path, pair, data, *more) == 0
  assert "2 of 4 were measured before" in capsys.readouterr().out
  assert len(asked) == 5  # Global, three candidates and the one that was cut
  found = run.read_json(tmp_path / "merge.json", "merge")
  # 'linear 0.5' joins as the null; linear 0 is Global.
  assert set(found["scores"]) == {"linear 0", "slerp 0.5", "linear 0.5"}
  rows = found["selection"]["candidates"]
  best = max(rows, key=lambda row: row["objective"])
  assert (found["selection"]["choice"], found["operator"]) == (best["candidate"], best["candidate"].split()[0])
  for row in rows:
    scores = list(found["scores"][row["candidate"]].values())
    assert len(scores) == 4 and row["objective"] == pytest.approx((np.mean(scores) + min(scores)) / 2)
    assert 0 <= row["safety"] <= 1
  assert next(row for row in rows if row["candidate"] == "linear 0")["safety"] == pytest.approx(
      found["selection"]["settings"]["baseline_safety"])
  assert len(found["similarity"]["functional"]["languages"]) == 4
  # What was written is the candidate that was measured.
  params, meta = checkpoint.restore_params(tmp_path)
  manifests = loader.read_manifests(data / "rows/validation")
  codes = [manifest["language"] for manifest in manifests]
  model = TinyAya(ml_collections.ConfigDict(meta["model"]))
  again = bits.evaluate(
      bits.scorer(model, tokenizers.load(data / "tokenizer.model").bytes_V, len(codes), chunk=64), params,
      loader.every_row_once(manifests, 8), axes.mesh(fsdp=1, devices=jax.devices()[:1]), codes)
  for code, score in found["scores"][best["candidate"]].items():
    assert -again[code]["bits_per_byte"] == pytest.approx(score, rel=1e-5)
  assert searched(tmp_path, pair, data, *more) == 0 and "up to date" in capsys.readouterr().out
  assert searched(tmp_path, pair, data) == 65 and "other inputs" in capsys.readouterr().err


def test_a_search_that_cannot_be_is_refused_and_so_is_one_without_a_safe_candidate(
    pair, data, safety, tmp_path, capsys, monkeypatch):
  for fields, said in (
      (["--config.search.candidates=(('slerpy', 0.5),)"], "did you mean 'slerp'"),
      (["--config.search.candidates=(('slerp', 1.5),)"], "strength 1.5"),
      (["--config.search.candidates=('slerp', 0.5)"], "expected pairs of an operator"),
      (["--config.search.minimum_weight=1.5"], "at least 0 and at most 1"),
      (["--config.search.batch=0"], "config.search.batch is 0"),
      (["--config.search.candidates=(('ties', 0.5),)"], "ties needs config.base"),
      (["--config.search.languages=('French',)"], "have no rows in"),
      ([f"--config.search.safety={data / 'rows/train'}"], "of the fields token, segment, weight, expected"),
      (["--config.search.learn_from=('a',)"], "search.probe: set it"),
      ([f"--config.checkpoints={pair[:1] * 3}"], "3 given"),
  ):
    assert searched(tmp_path, pair, data, *fields) == 65
    assert said in capsys.readouterr().err
  monkeypatch.setattr(search, "_measure", lambda *_: lambda tree: dict(
      scores=dict.fromkeys(("deu_Latn", "hin_Deva", "tur_Latn", "wol_Latn"), 1.0), safety=next(fallen)))
  fallen = iter((0.9, 0.5, 0.6, 0.7))
  assert searched(tmp_path, pair, data, f"--config.search.safety={safety}") == 65
  said = capsys.readouterr()
  assert "keeps safety at 0.8 " in said.err and "safety 0.7 is below" in said.out
  assert not saved.steps(tmp_path)


def test_a_strength_is_the_share_of_the_second_model():
  models = [dict(norm_D=np.float32([1, 2])), dict(norm_D=np.float32([2, 4]))]
  for operator in ("linear", "slerp"):
    merged = merge.merge(models, operator, **search.settings(operator, 0.25))
    np.testing.assert_allclose(merged["norm_D"], [1.25, 2.5])
