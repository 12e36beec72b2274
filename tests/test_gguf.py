"""GGUF files: what they say, that they say it exactly, and what is refused; without llama.cpp.

What llama.cpp makes of them is test_llama.py's.
"""

import json
import shutil
import time
import tracemalloc

import ml_collections
import numpy as np
import pytest

from conftest import random_params
from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer as tokenizers, toy, vocab
from tiny_aya_jax.export import cohere2, gguf, huggingface, tensors, vocabulary as vocabularies

package = pytest.importorskip("gguf", reason="needs the export extra")
pytest.importorskip("tokenizers", reason="needs the export extra")

V, USED = 620, 600
SIZES = dict(D=64, N=4, K=2, H=16, F=96, V=V, L=2, window=5)
DIGITS, O200K = vocabularies.DIGITS, vocabularies.O200K


def config(**sizes):
  fields = dict(SIZES, rope_theta=50000.0, logit_scale=0.7, norm_epsilon=1e-5) | sizes
  return ml_collections.ConfigDict(fields)


def flat(params):
  """{path: array}, sorted."""
  import jax

  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A vocabulary of ours over some scripts."""
  texts = [text for code in ("deu_Latn", "hin_Deva", "tur_Latn") for text in toy.documents(code, "validation")]
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  path.write_bytes(vocab.train([vocab.shape(line) for text in texts for line in vocab.lines(text)], USED, 0.999))
  return tokenizers.load(path)


@pytest.fixture(scope="module")
def params():
  return random_params(config(), seed=4)


@pytest.fixture(scope="module")
def folder(tokenizer, params, tmp_path_factory):
  return exported(tmp_path_factory.mktemp("export"), params, config(), tokenizer)


def exported(where, params, cfg, tokenizer):
  huggingface.write(where / "folder", params, cfg, tokenizer)
  return where / "folder"


def changed(folder, where, change):
  """The path of the folder's tokenizer.json after change(its contents)."""
  whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
  change(whole)
  (where / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
  return where / "tokenizer.json"


def fields(path):
  return {key: field.contents() for key, field in package.GGUFReader(path).fields.items()}


def test_a_file_says_what_llama_cpp_needs_to_know(folder, tmp_path):
  found = gguf.write(tmp_path / "model.gguf", folder, "BF16")
  assert found["kind"] == "BF16" and found["types"] == {"BF16": 57, "F32": 9}
  assert found["bytes"] == (tmp_path / "model.gguf").stat().st_size
  assert found["vocabulary"] == dict(model="llama", pre="default", used=USED, padding=V - USED, joined=[], differs="")
  said = fields(tmp_path / "model.gguf")
  sizes = dict(context_length=8192, embedding_length=64, block_count=8, feed_forward_length=96, vocab_size=V,
               logit_scale=np.float32(0.7))
  assert {key: said[f"cohere2.{key}"] for key in sizes} == sizes
  attention = dict(head_count=4, head_count_kv=2, key_length=16, value_length=16, sliding_window=5,
                   layer_norm_epsilon=np.float32(1e-5))
  assert {key: said[f"cohere2.attention.{key}"] for key in attention} == attention
  rope = dict(dimension_count=16, freq_base=50000.0)
  assert {key: said[f"cohere2.rope.{key}"] for key in rope} == rope
  special = dict(bos_token_id=2, eos_token_id=3, padding_token_id=0, unknown_token_id=4, eot_token_id=6,
                 eom_token_id=11, add_bos_token=True, add_eos_token=False, add_space_prefix=False)
  assert {key: said[f"tokenizer.ggml.{key}"] for key in special} == special
  assert said["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("given", [-2, V, 1.5, 3.0, True, "x", {}, [], [1.5, 3]], ids=str)
def test_a_special_id_that_is_none_is_refused_by_its_name(given):
  with pytest.raises(run.Refused, match="^folder/config.json: eos_token_id is .*, expected an id from 0 to 619"):
    gguf.special_ids(dict(bos_token_id=2, eos_token_id=given), V, "folder")


def test_special_ids_may_be_absent_and_the_first_of_a_list_is_written(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "folder")
  config = json.loads((folder / "config.json").read_text()) | dict(
      bos_token_id=None, eos_token_id=[7, 3], pad_token_id=-1)
  assert gguf.special_ids(config, V, folder) == dict(eos=7)
  (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
  gguf.write(tmp_path / "model.gguf", tmp_path / "folder", "F16")
  said = fields(tmp_path / "model.gguf")
  assert said["tokenizer.ggml.eos_token_id"] == 7
  assert not {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id"} & said.keys()


def test_a_template_of_the_tokenizer_config_is_found(folder, tmp_path):
  (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}', encoding="utf-8")
  assert gguf._template(tmp_path) == "{{ messages }}"
  (tmp_path / "tokenizer_config.json").unlink()
  assert gguf._template(tmp_path) is None


@pytest.mark.parametrize("kind, dtype", [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")])
def test_what_is_read_back_is_the_weights_rounded_once(kind, dtype, folder, params, tmp_path):
  gguf.write(tmp_path / "model.gguf", folder, kind)
  back, cfg = gguf.read(tmp_path / "model.gguf")
  assert cfg.to_dict() == config().to_dict()
  written = flat(params)
  assert flat(back).keys() == written.keys()
  for path, value in flat(back).items():
    rounded = written[path] if path.endswith("norm_D") else written[path].astype(tensors.DTYPES[dtype])
    assert np.array_equal(value, rounded.astype(np.float32)), path


@pytest.mark.parametrize("kind, steps, most", [("Q8_0", 127, 0.5), ("Q4_0", 8, 1.0)])
def test_quantised_weights_are_within_a_step(kind, steps, most, folder, params, tmp_path):
  # The scale is a float16: its last bit moves the largest weight of a block by steps / 2048 of one.
  found = gguf.write(tmp_path / "model.gguf", folder, kind)
  back, written = flat(gguf.read(tmp_path / "model.gguf")[0]), flat(params)
  for path, value in written.items():
    if path.endswith("norm_D"):
      assert np.array_equal(back[path], value), path
      continue
    head = path == "embedding_VD"
    levels, allowed = (127, 0.5) if head else (steps, most)
    one, other = (blocks(x, path) for x in (value, back[path]))
    step = np.abs(one).max(-1, keepdims=True) / levels
    off = np.abs(one - other) / step
    assert off.max() <= allowed + levels / 2048 + 1e-3, path
    assert off.max() > allowed * 0.8, f"{path}: finer than {kind}"
  assert found["types"] == (dict(Q8_0=57, F32=9) if kind == "Q8_0" else dict(Q4_0=56, F32=9, Q8_0=1))


def blocks(value, path):
  """[..., 32]: the weights that share a scale, which lie along a row of torch's [out, in]."""
  name = path.rpartition("/")[2]
  if name == "embedding_VD":
    return value.reshape(-1, 32)
  return np.concatenate([cohere2.theirs(one, name).reshape(-1, 32) for one in value])


def test_every_token_has_one_place_and_padding_is_unused(folder, tokenizer):
  found = vocabularies.read(folder / "tokenizer.json", V)
  assert len(found.tokens) == len(found.types) == len(found.scores) == len(set(found.tokens)) == V
  assert found.tokens[USED:] == [f"[PAD{id}]" for id in range(USED, V)]
  counted = {kind: found.types.count(kind) for kind in set(found.types)}
  named = len(tokenizer.specials)
  assert counted == {vocabularies.UNKNOWN: 1, vocabularies.CONTROL: named - 1, vocabularies.BYTE: 256,
                     vocabularies.NORMAL: USED - named - 256, vocabularies.UNUSED: V - USED}
  assert all(found.types[id] in (vocabularies.CONTROL, vocabularies.UNKNOWN) for id in tokenizer.specials.values())


def test_joining_the_best_neighbours_is_what_the_merges_do(folder, tokenizer):
  found = vocabularies.read(folder / "tokenizer.json", V)
  ids = {token: id for id, token in enumerate(found.tokens)}
  for text in toy.documents("deu_Latn", "validation"):
    parts = list(text.replace(" ", tokenizers.SPACE))
    while True:  # llama.cpp's rule: the pair whose token has the best score, the leftmost of equals
      pairs = [(found.scores[ids[one + two]], -at) for at, (one, two) in enumerate(zip(parts, parts[1:]))
               if one + two in ids]
      if not pairs:
        break
      at = -max(pairs)[1]
      parts[at : at + 2] = [parts[at] + parts[at + 1]]
    pieces = [[ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts]
    assert sum(pieces, []) == tokenizer.encode(text)


@pytest.mark.parametrize("what", ["a merge missing", "merges of a token apart"])
def test_merges_that_llama_cpp_would_not_follow_are_refused(what, folder, tmp_path):
  def change(whole):
    merges = whole["model"]["merges"]
    tokens = ["".join(merge) for merge in merges]
    twice = next(at for at, (one, two) in enumerate(zip(tokens, tokens[1:])) if one == two)
    merge = merges.pop(twice)
    if what == "merges of a token apart":
      merges.append(merge)

  with pytest.raises(run.Refused, match="would encode otherwise"):
    vocabularies.read(changed(folder, tmp_path, change), V)


def test_reserved_tokens_that_text_can_spell_are_named(folder, tmp_path):
  def change(whole):
    whole["model"]["vocab"] |= {letter: 600 + n for n, letter in enumerate("<PAD>") if letter not in whole["model"]["vocab"]}
    whole["model"]["vocab"]["PAD>"] = 610

  assert vocabularies.read(folder / "tokenizer.json", V).joined == []
  assert vocabularies.read(changed(folder, tmp_path, change), V).joined == ["<PAD>"]


def byte_level(folder, where, normalizer, steps):
  """A tokenizer.json of byte-level BPE with one merge."""
  def change(whole):
    letters = list(tokenizers._byte_level_alphabet())
    specials = [token for token in whole["added_tokens"] if token["special"]]
    vocab = {token["content"]: token["id"] for token in specials} | {
        letter: len(specials) + n for n, letter in enumerate(letters)}
    whole["model"] = dict(type="BPE", vocab=vocab | {"ab": len(vocab)}, merges=["a b"])
    extra = dict(specials[0], id=len(vocab) + 1, content="two words", special=False)
    whole.update(normalizer=normalizer, pre_tokenizer=dict(type="Sequence", pretokenizers=steps),
                 decoder=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True),
                 added_tokens=[*specials, extra], post_processor=None)

  return changed(folder, where, change)


def split(pattern, behavior="Isolated", invert=False):
  return dict(type="Split", pattern=dict(Regex=pattern), behavior=behavior, invert=invert)


def level(use_regex):
  return dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


@pytest.mark.parametrize("name, normalizer, steps", [
    ("tiny_aya", None, [split(DIGITS), split(O200K), level(False)]),
    ("granite-embed-multi-97m", None, [split(O200K, "Removed", True), level(False)]),
    ("command-r", dict(type="NFC"), [dict(type="Digits", individual_digits=True), level(True)]),
    ("gpt-2", None, [level(True)]),
])  # fmt: skip
def test_byte_level_vocabularies_are_recognised(name, normalizer, steps, folder, tmp_path):
  found = vocabularies.read(byte_level(folder, tmp_path, normalizer, steps), V)
  assert (found.model, found.pre, found.merges, found.scores) == ("gpt2", name, ["a b"], [])
  assert found.types[found.tokens.index("two words")] == vocabularies.USER_DEFINED
  assert bool(found.differs) == (name in ("tiny_aya", "command-r"))


def test_another_pre_tokenizer_is_refused_unless_it_is_named(folder, tmp_path):
  path = byte_level(folder, tmp_path, None, [split(r"\p{N}{1,4}"), level(False)])
  with pytest.raises(run.Refused, match=r"N\}\{1,4\}.*config.gguf.pre"):
    vocabularies.read(path, V)
  assert vocabularies.read(path, V, pre="qwen2").pre == "qwen2"
  with pytest.raises(run.Refused, match="no pre-tokenizer to be named"):
    vocabularies.read(folder / "tokenizer.json", V, pre="qwen2")


@pytest.mark.parametrize("sizes, kind, said", [
    (dict(D=48), "F16", "64, D is 48"),
    (dict(D=80, H=20), "Q8_0", "D = 80 is no multiple of 32"),
    (dict(F=40), "Q4_0", "F = 40 is no multiple of 32"),
    (dict(), "Q4_K_M", "unknown GGUF kind"),
])  # fmt: skip
def test_what_a_file_cannot_hold_is_refused(sizes, kind, said):
  gguf.check(config(F=40), "BF16")
  with pytest.raises(run.Refused, match=said):
    gguf.check(config(**sizes), kind)


def test_a_vocabulary_larger_than_the_embedding_is_refused(folder):
  with pytest.raises(run.Refused, match="up to 599, the embedding only 599"):
    vocabularies.read(folder / "tokenizer.json", USED - 1)


def test_a_token_that_is_named_as_padding_is_refused_at_once():
  many = 40_000  # comparing each with each takes many seconds
  ids = {f"token {id}": (id, vocabularies.NORMAL) for id in range(many)} | {
      f"[PAD{many + 1}]": (many, vocabularies.NORMAL)}
  start = time.process_time()
  with pytest.raises(run.Refused, match=r"'\[PAD40001\]' would be two tokens of the GGUF file"):
    vocabularies._padded("tokenizer.json", ids, many + 2)
  assert time.process_time() - start < 2


def test_weights_beyond_float16_are_refused_and_leave_nothing(folder, params, tokenizer, tmp_path):
  huge = dict(params, embedding_VD=params["embedding_VD"].copy())
  huge["embedding_VD"][3, 5] = 70_000
  where = exported(tmp_path, huge, config(), tokenizer)
  with pytest.raises(run.Refused, match="token_embd.weight holds 7e[+]04, F16 at most 6.55e[+]04"):
    gguf.write(tmp_path / "model.gguf", where, "F16")
  assert [path.name for path in tmp_path.iterdir()] == ["folder"]
  gguf.write(tmp_path / "model.gguf", where, "BF16")


def test_a_write_that_is_cut_short_leaves_the_file_that_was_there(folder, tmp_path, monkeypatch):
  path, count = tmp_path / "model.gguf", iter(range(20))
  path.write_bytes(b"earlier")
  whole = gguf._encoded

  def encoded(*arguments):
    if next(count) == 19:
      raise KeyboardInterrupt
    assert (tmp_path / ".model.gguf.tmp").exists() and path.read_bytes() == b"earlier"
    return whole(*arguments)

  monkeypatch.setattr(gguf, "_encoded", encoded)
  with pytest.raises(KeyboardInterrupt):
    gguf.write(path, folder, "F32")
  assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


def test_a_file_larger_than_the_memory_is_written(tokenizer, tmp_path, monkeypatch):
  cfg = config(D=256, H=64, F=1024, L=1)
  folder = exported(tmp_path, random_params(cfg, seed=1), cfg, tokenizer)
  vocabulary = vocabularies.read(folder / "tokenizer.json", V)  # slow where memory is traced
  monkeypatch.setattr(vocabularies, "read", lambda *_: vocabulary)
  tracemalloc.start()
  try:
    gguf.write(tmp_path / "model.gguf", folder, "F32")
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert (tmp_path / "model.gguf").stat().st_size > 15e6
  assert peak < 5e6, f"{peak / 1e6:.1f} MB at once"


@pytest.mark.parametrize("what, said", [
    ("half of it", "not a whole GGUF file"), ("another architecture", "'llama', expected 'cohere2'"),
    ("no file", "does not exist"),
])  # fmt: skip
def test_files_of_something_else_are_refused(what, said, folder, tmp_path):
  path = tmp_path / "model.gguf"
  if what == "half of it":
    gguf.write(path, folder, "F16")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif what == "another architecture":
    writer = package.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
  with pytest.raises(run.Refused, match=said):
    gguf.read(path)


def test_a_file_that_lacks_a_tensor_is_refused(folder, tmp_path, monkeypatch):
  gguf.write(tmp_path / "model.gguf", folder, "F16")
  names = gguf.names
  monkeypatch.setattr(gguf, "names", lambda cfg: names(cfg) | {"blk.8.attn_q.weight": None})
  with pytest.raises(run.Refused, match="1 tensors are missing or unknown, such as .'blk.8.attn_q.weight'"):
    gguf.read(tmp_path / "model.gguf")


def test_a_tensor_of_another_shape_is_refused(folder, tmp_path, monkeypatch):
  gguf.write(tmp_path / "model.gguf", folder, "F16")
  monkeypatch.setattr(gguf, "_config", lambda *_: config(F=128))
  with pytest.raises(run.Refused, match=r"ffn_gate.weight has shape \(96, 64\), expected \(128, 64\)"):
    gguf.read(tmp_path / "model.gguf")
