"""Eight simulated devices, one tiny model in which every letter has a size of its own, and rows.

jax is imported inside the fixtures only: tests of files that need no jax stay fast.
"""

import os
import pathlib
import sys
import tempfile

# Tests compile much and run little: level 0 halves the seconds.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORMS", "cpu")  # cuda: test_attention.py
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network that may not be there
# Tests and the processes they start compile each program once.
_cache = tempfile.TemporaryDirectory(prefix="jax_cache_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import ml_collections
import numpy as np
import pytest

# One size a letter, so that two swapped letters are an error (with G = 3, B = 8, T = 20); every
# letter divides over the meshes of test_transformer.py. T is four windows.
SIZES = dict(D=32, N=12, K=4, H=10, F=28, V=38, L=2)
B, T = 8, 20
DOCUMENTS = ((7, 13), (20,), (1, 2, 9), (11, 6, 3), (19,), (5, 5, 5, 5), (12, 8), (16, 3))


@pytest.fixture(scope="session")
def cfg():
  """A model config; small and odd."""
  return ml_collections.ConfigDict(
    dict(**SIZES, window=5, rope_theta=50000.0, logit_scale=0.7, norm_epsilon=1e-5)
  )


@pytest.fixture(scope="session")
def params(cfg):
  """Random parameters, norms included: nothing is 0 or 1 by accident."""
  return random_params(cfg, seed=0)


@pytest.fixture(scope="session")
def batch(cfg):
  """Packed rows as the loader gives them: documents, padding (segment 0), prompts of weight 0."""
  return random_batch(cfg.V, DOCUMENTS, T, seed=0)


def random_params(cfg, seed):
  """The model's tree, matrices normal with deviation 0.2, norms uniform in [0.5, 1.5], fp32."""
  import jax

  from tiny_aya_jax.model.transformer import TinyAya

  random = np.random.default_rng(seed)
  token_BT = np.zeros((1, 1), np.int32)
  tree = jax.eval_shape(TinyAya(cfg).init, jax.random.key(0), token_BT, token_BT, token_BT)

  def draw(path, leaf):
    if path[-1].key == "norm_D":
      return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    return random.normal(0, 0.2, leaf.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, tree["params"])


def random_batch(V, documents, T, seed):
  """Rows of T tokens packed with documents of the given lengths, the rest padding."""
  random = np.random.default_rng(seed)
  shape = (len(documents), T)
  token_BT = random.integers(0, V, shape, dtype=np.int32)
  segment_BT, position_BT = packed(documents, T)
  return dict(
    token_BT=token_BT,
    target_BT=random.integers(0, V, shape, dtype=np.int32),
    segment_BT=segment_BT,
    position_BT=position_BT,
    weight_BT=((segment_BT > 0) & (random.random(shape) < 0.8)).astype(np.float32),
  )


def backends():
  """The attention backends that run or are interpreted on a CPU, sorted."""
  from tiny_aya_jax.model import attention

  return sorted(set(attention.BACKENDS) - {"cudnn"})


def packed(documents, T):
  """Document lengths per row -> (segment_BT, position_BT), int32; the rest is segment 0."""
  segment_BT = np.zeros((len(documents), T), np.int32)
  position_BT = np.zeros((len(documents), T), np.int32)
  for row, lengths in enumerate(documents):
    start = 0
    for number, length in enumerate([*lengths, T - sum(lengths)], 1):
      stop = start + length
      segment_BT[row, start:stop] = number if number <= len(lengths) else 0
      position_BT[row, start:stop] = np.arange(length)
      start = stop
  return segment_BT, position_BT


ROOT = pathlib.Path(__file__).parents[1]
full = pytest.mark.skipif(not os.environ.get("FAULTS"), reason="FAULTS=1: half a minute; check.sh full")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  """A vocabulary and packed rows of four languages of the embedded corpus."""
  folder = tmp_path_factory.mktemp("data")
  some = "--config.languages=('deu_Latn', 'tur_Latn', 'hin_Deva', 'wol_Latn')"
  assert call("vocab", "vocab.py:tiny", folder, some, "--config.size=600",
              "--config.bytes=200000") == 0
  for variant in ("tiny", "tiny_instruct", "tiny_validation"):
    assert call("pack", f"pack.py:{variant}", folder / "rows", some, "--config.T=32",
                f"--config.tokenizer={folder / 'tokenizer.model'}") == 0
  return folder


@pytest.fixture(scope="session")
def place(cfg, data, tmp_path_factory):
  """A checkpoint of random parameters over the vocabulary of `data`: params and meta alone."""
  from tiny_aya_jax.data import tokenizer
  from tiny_aya_jax.train import checkpoint, saved

  folder = tmp_path_factory.mktemp("model") / "random"
  cfg = ml_collections.ConfigDict(cfg.to_dict() | dict(V=600))
  sha256 = tokenizer.load(data / "tokenizer.model").sha256
  meta = dict(model=cfg.to_dict(), tokenizer_sha256=sha256, T=32)
  checkpoint.save(folder, 0, dict(params=random_params(cfg, seed=3), meta=meta), keep=1)
  return saved.find(folder)


def call(verb, experiment, workdir, *fields):
  """Runs a verb in this process; a later --config.field wins over an earlier one."""
  from tiny_aya_jax import __main__

  last = dict(field.split("=", 1) for field in fields)
  return __main__.main(
      [verb, f"--config={ROOT / 'experiments' / experiment}", f"--workdir={workdir}",
       *(f"{name}={value}" for name, value in last.items())]
  )


def arguments(data, workdir, *more):
  """The words after `python -m tiny_aya_jax` of a small pretraining run; a later field wins."""
  last = dict(field.split("=", 1) for field in fields(data, *more))
  return ["train", f"--config={ROOT / 'experiments/pretrain.py'}:tiny", f"--workdir={workdir}",
          *(f"{name}={value}" for name, value in last.items())]


def command(data, workdir, *more):
  """The same as a command line, for another process."""
  return [sys.executable, "-m", "tiny_aya_jax", *arguments(data, workdir, *more)]


def fields(data, *more):
  """What makes experiments/pretrain.py:tiny smaller still."""
  small = dict(D=16, N=4, K=2, H=4, F=24, V=600, window=8)
  return [
      f"--config.tokenizer={data / 'tokenizer.model'}", f"--config.data.rows={data / 'rows/train'}",
      "--config.data.T=32", "--config.data.batch=16", "--config.log_every=2",
      "--config.save_every=4", "--config.evaluate_every=100", "--config.schedule.warmup_steps=2",
      *(f"--config.model.{name}={value}" for name, value in small.items()), *more,
  ]
