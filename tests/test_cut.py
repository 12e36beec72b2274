"""Simulated epoching: a short run repeats each source as often as the long one that it imitates."""

import json
import math
import re

import numpy as np
import pytest

from conftest import call, fields as small_fields
from test_mixture import ALL, source, web

from tiny_aya_jax import run
from tiny_aya_jax.data import loader, mixture


def cut(sources, share, sizes="rows"):
  return mixture.cut(sources, share, mixture.cut_sizes(sources, sizes))


def passes(plan, rows):
  """How often a run of so many rows reads each source's tokens, cut or not."""
  drawn = mixture.counts(plan, rows)
  return {s["name"]: drawn[s["name"]] * s["tokens"] / s["rows"] / s.get("size", s["tokens"])
          for s in plan["sources"]}


@pytest.mark.parametrize("rule", [ALL, dict(kind="unimax", languages=("all",), epochs=2.0)])
def test_epochs_are_those_of_the_run_that_is_imitated(rule):
  sources = [source for source in web() if source["rows"] > 5000]
  rows, share = 4_000_000, 1 / 250
  def plan(sources, rows):
    return mixture.plan(sources, mixture.with_budget(rule, sources, rows))
  real = passes(plan(sources, rows), rows)
  short = passes(plan(cut(sources, share), int(rows * share)), int(rows * share))
  whole = passes(plan(sources, int(rows * share)), int(rows * share))
  for name, epochs in real.items():
    # A row is not divided: the largest of either run that a source of 20 rows may be off by.
    assert short[name] == pytest.approx(epochs, rel=0.06, abs=0.06), name
    assert whole[name] < 0.2 * epochs + 0.01  # what goes wrong without a cut


def test_a_cut_source_has_the_same_rows_for_every_seed_and_other_orders(data):
  manifests = loader.read_manifests(data / "rows/train")
  sources = cut(manifests, 0.05)
  plan, seen = mixture.plan(sources, ALL), []
  for seed in (0, 1):
    rows = loader.Loader(plan, seed, 16)
    seen.append([row for step in range(80) for row in rows.ids(step)])
  assert seen[0] != seen[1] and set(seen[0]) == set(seen[1])
  for one in [one for one in sources if one["name"].endswith("/cldr")]:
    mine = {row for row in seen[0] if row.startswith(one["name"] + ":")}
    assert len(mine) == one["rows"] == max(round(0.05 * one["of"]), 1)
    numbers = sorted(int(row.rpartition(":")[2]) for row in mine)
    assert numbers[-1] < one["of"] and (one["rows"] < 9 or numbers[-1] > one["rows"])  # not the first ones


def test_a_source_below_one_row_is_one_row_and_that_is_said():
  sources = [source("eng_Latn/text", 100_000), source("wol_Latn/text", 40), source("ibo_Latn/text", 10)]
  made = cut(sources, 1 / 1000)
  assert [one["rows"] for one in made] == [100, 1, 1]
  assert [one["size"] for one in made] == [50_000, 20, 5]
  lines = "\n".join(mixture.table(mixture.plan(made, ALL), 120))
  assert "cut to one row, which is more than their part" in lines
  assert "wol_Latn/text (0.04 of a row), ibo_Latn/text (0.01 of a row)" in lines


def test_a_source_with_fewer_rows_than_its_part_is_said():
  sources = [source("eng_Latn/text", 1000), source("wol_Latn/text", 100)]
  made = cut(sources, 0.5, dict(eng_Latn=500_000, wol_Latn=500_000))
  assert [one["rows"] for one in made] == [500, 100]
  assert "wol_Latn/text (100 rows of 500)" in "\n".join(mixture.table(mixture.plan(made, ALL), 120))


def test_shares_are_those_of_the_imitated_sizes_not_of_what_is_packed():
  sources = [source("eng_Latn/text", 1000), source("wol_Latn/text", 1000)]
  made = cut(sources, 0.1, dict(eng_Latn=9e5, wol_Latn=1e5))
  plan = mixture.plan(made, ALL | dict(temperature=1.0))
  assert dict(zip(("eng", "wol"), plan["segments"][0]["weights"])) == dict(eng=0.9, wol=0.1)


def test_sizes_of_the_web_are_shared_by_the_sources_of_a_language():
  sources = [source("wol_Latn/a", 10), source("wol_Latn/b", 30)]
  sources[1]["bytes"] *= 2  # of another kind of text
  found = mixture.cut_sizes(sources, "web")
  assert sum(found[one["name"]] * one["bytes"] / one["tokens"] for one in sources) == pytest.approx(
      mixture._WEB["wol_Latn"])
  assert found["wol_Latn/b"] == pytest.approx(3 * found["wol_Latn/a"])


@pytest.mark.parametrize("given, said", [
    (dict(wol_Latn=-1), "gives -1 tokens for wol_Latn/text"), ({}, "gives None tokens for wol_Latn/text"),
    (dict(wol_Latn=math.inf), "gives inf tokens"), (dict(wol_Latn="many"), "gives 'many' tokens"),
])
def test_sizes_that_are_no_numbers_are_refused(given, said):
  with pytest.raises(run.Refused, match=re.escape(said)):
    mixture.cut_sizes([source("wol_Latn/text", 10)], given)


def test_code_has_no_size_on_the_web():
  with pytest.raises(run.Refused, match="no size of code"):
    mixture.cut_sizes([source("code/text", 10)], "web")


def test_a_plan_of_cut_sources_is_json_and_another_cut_is_another_plan():
  sources = [source("eng_Latn/text", 1000), source("wol_Latn/text", 100)]
  plans = [mixture.plan(cut(sources, share), ALL) for share in (0.1, 0.2)]
  for plan in plans:
    mixture.check(json.loads(json.dumps(plan)), "it")
    assert json.loads(json.dumps(plan)) == plan
  whole = mixture.plan(sources, ALL)
  assert len({mixture.plan_sha256(plan) for plan in (*plans, whole)}) == 3
  with pytest.raises(run.Refused, match="100 of 1000 rows before, 200 of 1000 rows now"):
    mixture.append(plans[0], 50, ALL, plans[1]["sources"])
  plans[0]["sources"][0].pop("size")
  with pytest.raises(run.Refused, match="is no plan"):
    mixture.check(plans[0], "it")


@pytest.mark.parametrize("fields, said", [
    (["cut.sizes=web"], "cut.share is not set: nothing would be cut"),
    (["cut.share=0"], "expected more than 0"), (["cut.share=2"], "at most 1"),
    (["cut.share=0.5", "cut.sizes=wbe"], "did you mean 'web'?"),
    (["cut.share=0.5", "cut.sizes=none.json"], "none.json does not exist"),
    (["cut.share=0.5", "plan=plan.json"], "config.data.cut is not read with it"),
])
def test_a_cut_that_cannot_be_is_refused(data, tmp_path, capsys, fields, said):
  flags = [f"--config.data.{field}" for field in fields]
  assert call("train", "pretrain.py:tiny", tmp_path / "run", *small_fields(data, *flags)) == 65
  assert said in capsys.readouterr().err


def test_a_fork_goes_on_with_the_counters_of_a_cut_trunk():
  sources = cut([source("eng_Latn/text", 1000), source("wol_Latn/text", 100)], 0.05)
  trunk = mixture.plan(sources, ALL)
  forked = mixture.append(trunk, 77, ALL | dict(temperature=100.0), sources)
  before, after = mixture.counts(trunk, 77), mixture.counts(forked, 177)
  assert sum(after.values()) == 177 and all(after[name] >= before[name] for name in before)
  source_n, rank_n = mixture.locate_many(forked, 77, 100)
  for index, name in enumerate(before):
    mine = rank_n[source_n == index]
    np.testing.assert_array_equal(mine, before[name] + np.arange(len(mine)))
