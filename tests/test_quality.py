"""Bits per byte of each quantisation: our forward pass on decoded weights, and the table of it."""

import jax
import numpy as np
import pytest

from conftest import random_batch, random_params
from test_gguf import V, config, exported, tokenizer as _tokenizer
from tiny_aya_jax import axes, run
from tiny_aya_jax.data import loader
from tiny_aya_jax.export import gguf, quality
from tiny_aya_jax.model import bits, transformer

tokenizer = _tokenizer  # the fixture
LANGUAGES = ["deu_Latn", "hin_Deva", "tur_Latn"]


@pytest.fixture
def rows(tokenizer, monkeypatch):
  """Eight packed rows of three languages, where the loader would read them."""
  batch = random_batch(V, ((20,), (7, 13), (5, 15), (20,), (20,), (9, 9), (20,), (3,)), 20, seed=1)
  batch["source_B"] = np.array([0, 0, 1, 1, 2, 2, 2, -1], np.int32)
  manifests = [dict(language=code, rows=1, tokenizer_sha256=tokenizer.sha256) for code in LANGUAGES]
  monkeypatch.setattr(loader, "read_manifests", lambda folder: manifests)
  monkeypatch.setattr(loader, "every_row_once", lambda *_: iter([batch]))
  return batch


def test_a_file_that_rounds_nothing_loses_nothing(rows, tokenizer, tmp_path):
  cfg = config(L=1)
  params = random_params(cfg, seed=6)
  folder = exported(tmp_path, params, cfg, tokenizer)
  for kind in ("F32", "Q4_0"):
    gguf.write(tmp_path / kind, folder, kind)
  one = axes.mesh(devices=jax.devices()[:1])
  models = {kind: tmp_path / kind for kind in ("F32", "Q4_0")}
  found = quality.bits_per_byte(models, "rows", tokenizer, batch=8, chunk=5, mesh=one)
  score = bits.scorer(transformer.TinyAya(cfg), tokenizer.bytes_V, 3, chunk=5)
  expected = bits.evaluate(score, params, [rows], one, LANGUAGES)
  assert list(found) == ["F32", "Q4_0"] and list(found["F32"]) == LANGUAGES
  for code in LANGUAGES:
    assert found["F32"][code] == pytest.approx(expected[code]["bits_per_byte"], rel=1e-6)
    assert found["Q4_0"][code] != pytest.approx(found["F32"][code], rel=1e-4)


def test_rows_of_another_tokenizer_are_refused(rows, tokenizer, monkeypatch):
  monkeypatch.setattr(loader, "read_manifests", lambda folder: [dict(tokenizer_sha256="0" * 64)])
  with pytest.raises(run.Refused, match="packed with tokenizer 000000000000"):
    quality.bits_per_byte({}, "rows", tokenizer, batch=8, chunk=5)


def test_the_table_names_who_loses_most():
  found = dict(F16=dict(deu_Latn=1.0, hin_Deva=2.0, tur_Latn=3.0),
               Q4_0=dict(deu_Latn=1.5, hin_Deva=2.1, tur_Latn=2.9))
  files = {kind: dict(bytes=3_200_000, bits_per_weight=4.5, types=dict(Q4_0=28, F32=5)) for kind in found}
  made = quality.record(found, "F16", files)
  row = made["kinds"]["Q4_0"]
  assert row["mean"] == pytest.approx(6.5 / 3) and row["difference"] == pytest.approx(0.5 / 3)
  assert list(row["lost"]) == ["deu_Latn", "hin_Deva", "tur_Latn"] and row["lost"]["deu_Latn"] == pytest.approx(0.5)
  assert next(iter(row["worst"])) == "tur_Latn" and row["poorest"] == 2.9
  assert made["kinds"]["F16"]["difference"] == 0 and made["kinds"]["F16"]["lost"] == {}
  assert quality.markdown(made).split("\n")[3] == (
      "| Q4_0 | 3.2 | 4.50 | 28 Q4_0, 5 F32 | 2.1667 | 0.5735 | tur_Latn 2.9000 | +0.1667 | "
      "deu_Latn +0.5000, hin_Deva +0.1000, tur_Latn -0.1000 |")
  with pytest.raises(run.Refused, match="unknown unquantised kind 'F32'"):
    quality.table(found, "F32")
