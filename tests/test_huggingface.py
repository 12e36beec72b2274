"""Cohere2 folders: equal to transformers in both directions, bitwise where nothing is computed.

transformers and torch stand on one side of most tests here; they come with the parity extra, which
launch/check.sh installs. The refusals and the round trip need neither.
"""

import itertools
import json
import types

import jax
import ml_collections
import numpy as np
import pytest

from conftest import packed, random_params
from tiny_aya_jax import run
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.model import decode, transformer

safetensors_numpy = pytest.importorskip(
  "safetensors.numpy", reason="writing a Hugging Face folder needs the export extra"
)

# vocabulary, width, layers, heads, key heads, head width, feed-forward, window, tokens (beyond two
# windows), logit scale, epsilon, dtype, shard size
FIELDS = "V D layers N K H F window T logit_scale epsilon dtype shard".split()
MODELS = [
  (131, 40, 4, 6, 2, 10, 72, 7, 29, 0.7, 1e-5, "float32", "5GB"),
  (97, 24, 8, 4, 4, 6, 33, 5, 23, 0.0625, 1e-5, "bfloat16", "20KB"),
  (64, 51, 4, 3, 1, 16, 80, 64, 150, 1.0, 1e-3, "float32", "20KB"),
  (77, 36, 4, 5, 5, 4, 41, 16, 40, 3.0, 1e-5, "bfloat16", "5GB"),
  (211, 16, 4, 9, 3, 2, 7, 33, 77, 0.3, 1e-6, "float32", "9KB"),
  (50, 30, 12, 2, 1, 14, 19, 9, 31, 1.3, 1e-5, "float32", "5GB"),
  (59, 22, 4, 8, 4, 12, 90, 11, 30, 0.5, 1e-5, "bfloat16", "12KB"),
  (83, 64, 4, 7, 1, 8, 29, 6, 64, 2.0, 1e-4, "float32", "30KB"),
  (71, 20, 4, 5, 5, 4, 31, 8, 18, 0.9, 1e-5, "float16", "5GB"),
  (101, 28, 8, 7, 7, 4, 45, 5, 13, 1.0, 1e-5, "float16", "6KB"),
]


class Tokens:
  """The least a tokenizer is to `write`: a size, special ids and a text."""

  def __init__(self, size=12):
    self.size = size

  specials = {
    "<PAD>": 0,
    "<BOS_TOKEN>": 2,
    "<EOS_TOKEN>": 3,
    "<|END_OF_TURN_TOKEN|>": 6,
    "<|END_RESPONSE|>": 11,
  }

  def special(self, name):
    return self.specials[name]

  def json(self):
    return '{"version": "1.0"}'


@pytest.fixture(scope="module")
def torch():
  torch = pytest.importorskip("torch", reason="needs the parity extra")
  pytest.importorskip("transformers", reason="needs the parity extra")
  torch.set_num_threads(1)  # these models are smaller than a thread's start
  return torch


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: f"V={model[0]} {model[-2]}")
def foreign(request, torch, tmp_path_factory):
  """A folder made by transformers, what it was made with, and that model's logits."""
  asked = types.SimpleNamespace(**dict(zip(FIELDS, request.param)))
  folder = tmp_path_factory.mktemp("foreign")
  random_model(torch, asked).save_pretrained(folder, max_shard_size=asked.shard)
  # Loaded again in fp32: a model cast to bfloat16 has cast its rotary frequencies as well.
  model = load(torch, folder)
  token_BT = np.random.default_rng(0).integers(0, asked.V, (2, asked.T))
  return types.SimpleNamespace(
    folder=folder, asked=asked, token_BT=token_BT, logits_BTV=their_logits(torch, model, token_BT)
  )


def random_model(torch, asked):
  """A Cohere2 of transformers with weights of deviation 0.3 and norms of 0.5 to 1.5."""
  import transformers

  torch.manual_seed(0)
  model = transformers.Cohere2ForCausalLM(
    transformers.Cohere2Config(
      vocab_size=asked.V,
      hidden_size=asked.D,
      num_hidden_layers=asked.layers,
      num_attention_heads=asked.N,
      num_key_value_heads=asked.K,
      head_dim=asked.H,
      intermediate_size=asked.F,
      sliding_window=asked.window,
      rope_theta=50000.0,
      logit_scale=asked.logit_scale,
      layer_norm_eps=asked.epsilon,
      bos_token_id=2,
      eos_token_id=3,
      pad_token_id=0,
    )
  )
  for weight in model.parameters():
    weight.data.normal_(0, 0.3) if weight.ndim > 1 else weight.data.uniform_(0.5, 1.5)
  return model.to(getattr(torch, asked.dtype)).eval()


def load(torch, folder):
  """The folder as transformers sees it, in fp32 arithmetic; nothing missing, nothing unexpected."""
  import transformers

  model, loading = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  assert isinstance(model, transformers.Cohere2ForCausalLM)
  assert not loading["missing_keys"] and not loading["unexpected_keys"]
  return model.eval()


def their_logits(torch, model, token_BT):
  with torch.no_grad():
    return model(torch.tensor(token_BT)).logits.numpy()


def our_logits(params, cfg, token_BT, documents=None):
  T = token_BT.shape[1]
  segment_BT, position_BT = packed(documents or [(T,)] * len(token_BT), T)

  @jax.jit
  def logits(params):
    model = transformer.TinyAya(cfg)
    hidden_BTD = model.apply({"params": params}, token_BT, segment_BT, position_BT)
    return transformer.logits(params, hidden_BTD, cfg)

  return np.asarray(logits(params))


def stored(folder):
  """{tensor: (dtype, shape, bytes)} of every shard, read by the format's own description."""
  tensors = {}
  for path in folder.glob("*.safetensors"):
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:start]).items():
      if name != "__metadata__":
        first, last = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], raw[start + first : start + last])
  return tensors


# --- against transformers -----------------------------------------------------------------------


def assert_close(one_BTV, other_BTV, what):
  """Shows the figure (pytest -s), and holds it below 1e-4."""
  difference = np.abs(one_BTV - other_BTV).max()
  print(f"{what}: logits up to {np.abs(other_BTV).max():.1f} differ by {difference:.1e} at most")
  assert difference < 1e-4


def test_logits_of_a_model_made_by_transformers_are_equal(foreign):
  params, cfg = huggingface.read(foreign.folder)
  assert foreign.asked.T > 2 * cfg.window
  assert (foreign.asked.shard == "5GB") == (len(list(foreign.folder.glob("*.safetensors"))) == 1)
  ours_BTV = our_logits(params, cfg, foreign.token_BT)
  assert_close(ours_BTV, foreign.logits_BTV, "read")
  assert np.abs(foreign.logits_BTV).max() > 0.1


def test_transformers_computes_the_same_logits_from_what_we_write(torch, foreign, tmp_path):
  params, cfg = huggingface.read(foreign.folder)
  huggingface.write(tmp_path / "out", params, cfg, Tokens(), shard_bytes=20_000)
  theirs_BTV = their_logits(torch, load(torch, tmp_path / "out"), foreign.token_BT)
  assert_close(theirs_BTV, foreign.logits_BTV, "read and written")


def test_reading_and_writing_in_the_same_dtype_leaves_every_byte_of_every_tensor(foreign, tmp_path):
  params, cfg = huggingface.read(foreign.folder)
  huggingface.write(tmp_path / "out", params, cfg, Tokens(), dtype=foreign.asked.dtype)
  assert stored(tmp_path / "out") == stored(foreign.folder)


def test_parameters_of_ours_give_transformers_our_logits(torch, cfg, params, batch, tmp_path):
  huggingface.write(tmp_path / "out", params, cfg, Tokens(), shard_bytes=10_000)
  theirs_BTV = their_logits(torch, load(torch, tmp_path / "out"), batch["token_BT"])
  assert np.abs(theirs_BTV - our_logits(params, cfg, batch["token_BT"])).max() < 1e-4


def test_packed_rows_equal_transformers_run_on_each_document(torch, tmp_path):
  asked = types.SimpleNamespace(**dict(zip(FIELDS, MODELS[0])))
  model = random_model(torch, asked)
  model.save_pretrained(tmp_path)
  params, cfg = huggingface.read(tmp_path)
  documents = ((17, 9, 14), (1, 30, 5))  # and four tokens of padding in the second row
  token_BT = np.random.default_rng(1).integers(0, asked.V, (2, 40))
  ours_BTV = our_logits(params, cfg, token_BT, documents)
  for row, lengths in enumerate(documents):
    for start, length in zip(np.cumsum([0, *lengths]), lengths):
      document = slice(start, start + length)
      theirs_BTV = their_logits(torch, model, token_BT[row : row + 1, document])
      assert np.abs(ours_BTV[row, document] - theirs_BTV[0]).max() < 1e-4


def test_greedy_continuations_equal_those_of_transformers(torch, tmp_path):
  """20 prompts by 64 tokens. Only a near tie (top-2 gap below 1e-4) may go the other way."""
  asked = types.SimpleNamespace(**dict(zip(FIELDS, MODELS[0])))
  model = random_model(torch, asked)
  model.save_pretrained(tmp_path)
  params, cfg = huggingface.read(tmp_path)
  model.generation_config.eos_token_id = None  # nothing stops
  random = np.random.default_rng(2)
  groups = [random.integers(0, asked.V, (5, length)) for length in (1, 6, 17, 30)]
  theirs = [
    row[group.shape[1] :].tolist()
    for group in groups
    for row in model.generate(
      torch.tensor(group),
      attention_mask=torch.ones(group.shape, dtype=torch.long),
      do_sample=False,
      max_new_tokens=64,
    )
  ]
  prompts = [row.tolist() for group in groups for row in group]
  ours = decode.generate(params, cfg, prompts, steps=64)
  assert {len(row) for row in theirs} == {64} and len(theirs) == 20
  ties = 0
  for prompt, mine, their in zip(prompts, ours, theirs):
    at = next((at for at in range(64) if mine[at] != their[at]), None)
    if at is not None:
      top = np.sort(their_logits(torch, model, np.array([prompt + their[:at]]))[0, -1])
      assert top[-1] - top[-2] < 1e-4, f"token {at}: {mine[at]} is not {their[at]}"
      ties += 1
  print(f"{ties} of 20 continuations part at a near tie")
  assert ties <= 2


# --- without transformers -----------------------------------------------------------------------


@pytest.fixture
def folder(cfg, params, tmp_path):
  """A sound folder in several shards, to be spoiled."""
  huggingface.write(tmp_path / "sound", params, cfg, Tokens(), shard_bytes=20_000)
  return tmp_path / "sound"


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 1 << 30])
def test_writing_and_reading_is_identity(cfg, params, tmp_path, shard_bytes):
  huggingface.write(tmp_path / "out", params, cfg, Tokens(), shard_bytes=shard_bytes)
  back, back_cfg = huggingface.read(tmp_path / "out")
  assert back_cfg.to_dict() == cfg.to_dict()
  assert jax.tree.structure(back) == jax.tree.structure(params)
  for mine, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
    assert mine.dtype == np.float32
    np.testing.assert_array_equal(mine, theirs)


def test_a_folder_has_the_files_and_tensors_of_a_release(cfg, params, tmp_path):
  huggingface.write(tmp_path / "out", params, cfg, Tokens())
  assert {path.name for path in (tmp_path / "out").iterdir()} == {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
  }
  tensors = stored(tmp_path / "out")
  assert len(tensors) == 4 * cfg.L * 8 + 2
  assert tensors["model.layers.3.self_attn.k_proj.weight"][1] == [cfg.K * cfg.H, cfg.D]
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["layer_types"][:4] == ["sliding_attention"] * 3 + ["full_attention"]
  generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert generation["eos_token_id"] == [3, 6, 11]


def test_shards_hold_what_the_index_says_and_no_more_than_asked(folder):
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  paths = sorted(folder.glob("*.safetensors"))
  assert len(paths) > 3
  for path in paths:
    held = safetensors_numpy.load_file(path)
    assert {name for name, file in index["weight_map"].items() if file == path.name} == set(held)
    assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 20_000
  assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in stored(folder).values())


def spoil_tensors(folder, change):
  """Applies `change` to the tensors of the first shard, and puts the index right."""
  path = sorted(folder.glob("*.safetensors"))[0]
  tensors = safetensors_numpy.load_file(path)
  change(tensors)
  safetensors_numpy.save_file(tensors, path)
  spoil_json(
    folder / "model.safetensors.index.json",
    lambda index: index.update(
      weight_map={
        **{name: file for name, file in index["weight_map"].items() if file != path.name},
        **dict.fromkeys(tensors, path.name),
      }
    ),
  )


def spoil_json(path, change):
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))


EMBEDDING = "model.embed_tokens.weight"
TENSORS = {
  "missing": (lambda t: t.pop(EMBEDDING), r"1 tensors missing.*embed_tokens"),
  "extra": (
    lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": t[EMBEDDING]}),
    r"1 unknown.*q_norm",
  ),
  "bias": (
    lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": t[EMBEDDING][0]}),
    r"layers.1.self_attn.q_proj.bias is not zero",
  ),
  "misshapen": (
    lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1]}),
    r"embed_tokens.weight has shape \(37, 32\), config.json says \(38, 32\)",
  ),
  "transposed": (
    lambda t: t.update({EMBEDDING: np.ascontiguousarray(t[EMBEDDING].T)}),
    r"embed_tokens.weight has shape \(32, 38\)",
  ),
  "untied": (lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}), "lm_head.weight differs"),
}


@pytest.mark.parametrize("change, sentence", TENSORS.values(), ids=TENSORS)
def test_a_wrong_tensor_is_refused_by_name(folder, change, sentence):
  spoil_tensors(folder, change)
  with pytest.raises(run.Refused, match=sentence):
    huggingface.read(folder)


def test_a_tied_head_that_is_stored_again_is_read(cfg, params, folder):
  spoil_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING]}))
  np.testing.assert_array_equal(huggingface.read(folder)[0]["embedding_VD"], params["embedding_VD"])


CONFIGS = {
  "other model": (dict(model_type="cohere"), "model_type is 'cohere'"),
  "all full": (dict(layer_types=["full_attention"] * 8), "periods of 3"),
  "full first": (
    dict(layer_types=(["full_attention"] + ["sliding_attention"] * 3) * 2),
    "periods of 3",
  ),
  "seven layers": (dict(num_hidden_layers=7, layer_types=None), "7 layers"),
  "other pattern": (dict(layer_types=None, sliding_window_pattern=2), "8 layers of 2"),
  "code of its own": (dict(auto_map={"AutoModel": "model.Model"}), "auto_map is"),
  "quantised": (dict(quantization_config=dict(bits=4)), "quantization_config is"),
  "a width of True": (dict(hidden_size=True), "hidden_size is True"),
  "a negative width": (dict(intermediate_size=-4), "intermediate_size is -4"),
  "a billion layers": (dict(num_hidden_layers=10**9, layer_types=None), "num_hidden_layers is 1000000000"),
  "an odd head": (dict(head_dim=9), "query heads of width 9"),
  "heads that do not divide": (dict(num_key_value_heads=5), "on 5 key heads"),
  "no scale": (dict(logit_scale=0), "logit_scale is 0"),
  "a scale in words": (dict(logit_scale="1"), "logit_scale is '1'"),
  "partial rotation": (dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary"),
  "rotation by kind of layer": (dict(rope_parameters=["default"]), "rope_parameters are"),
  "query norm": (dict(use_qk_norm=True), "use_qk_norm is True"),
  "untied": (dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
  "gelu": (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
  "scaled rope": (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "rope_scaling"),
  "scaled rope of transformers 5": (dict(rope_parameters=dict(rope_type="yarn")), "'yarn'"),
  "no width": (dict(hidden_size=None), "hidden_size is None"),
  "no layers": (dict(num_hidden_layers=None), "num_hidden_layers is None"),
  "no window": (dict(sliding_window="all"), "sliding_window is 'all'"),
}


@pytest.mark.parametrize("change, sentence", CONFIGS.values(), ids=CONFIGS)
def test_a_config_of_another_architecture_is_refused_by_field(folder, change, sentence):
  spoil_json(folder / "config.json", lambda config: config.update(change))
  with pytest.raises(run.Refused, match=sentence):
    huggingface.read(folder)


@pytest.mark.parametrize(
  "name", ["../model.safetensors", "/etc/model.safetensors", "model.bin", "a/b.safetensors"]
)
def test_an_index_that_points_outside_the_folder_is_refused(folder, name):
  spoil_json(
    folder / "model.safetensors.index.json",
    lambda index: index["weight_map"].update({EMBEDDING: name}),
  )
  with pytest.raises(run.Refused, match="expected a plain"):
    huggingface.read(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(folder):
  spoil_json(
    folder / "model.safetensors.index.json",
    lambda index: index["weight_map"].update(
      {"model.layers.99.mlp.up_proj.weight": "model-00001-of-00009.safetensors"}
    ),
  )
  with pytest.raises(run.Refused):
    huggingface.read(folder)


def test_a_missing_and_a_truncated_shard_are_refused_by_name(folder):
  path = sorted(folder.glob("*.safetensors"))[1]
  whole = path.read_bytes()
  path.write_bytes(whole[:-10])
  with pytest.raises(run.Refused, match=path.name):
    huggingface.read(folder)
  path.unlink()
  with pytest.raises(run.Refused, match=path.name):
    huggingface.read(folder)


def test_a_folder_without_a_config_is_refused(tmp_path):
  with pytest.raises(run.Refused, match="config.json does not exist"):
    huggingface.read(tmp_path)


def test_an_existing_folder_a_large_tokenizer_and_an_unknown_dtype_are_refused_before_writing(
  cfg, params, tmp_path
):
  (tmp_path / "there").mkdir()
  with pytest.raises(run.Refused, match="exists"):
    huggingface.write(tmp_path / "there", params, cfg, Tokens())
  with pytest.raises(run.Refused, match="39 ids, the embedding only 38 rows"):
    huggingface.write(tmp_path / "out", params, cfg, Tokens(39))
  with pytest.raises(run.Refused, match="did you mean 'bfloat16'"):
    huggingface.write(tmp_path / "out", params, cfg, Tokens(), dtype="bfloat")
  assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_parameters_of_another_config_are_refused_even_when_they_have_as_many_numbers(tmp_path):
  sizes = dict(D=8, F=6, V=13, L=1, window=3, rope_theta=1e4, logit_scale=1.0, norm_epsilon=1e-5)
  cfg = ml_collections.ConfigDict(dict(sizes, N=4, K=2, H=6))
  other = ml_collections.ConfigDict(dict(sizes, N=6, K=3, H=4))
  with pytest.raises(run.Refused, match=r"q_DNH has shape \(1, 8, 6, 4\)"):
    huggingface.write(tmp_path / "out", random_params(other, 0), cfg, Tokens())
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_write_leaves_nothing(cfg, params, tmp_path, monkeypatch, after):
  calls = itertools.count()
  write_json = run.write_json

  def interrupted(*arguments):
    if next(calls) == after:
      raise KeyboardInterrupt
    write_json(*arguments)

  monkeypatch.setattr(run, "write_json", interrupted)
  with pytest.raises(KeyboardInterrupt):
    huggingface.write(tmp_path / "out", params, cfg, Tokens())
  assert not list(tmp_path.iterdir())
