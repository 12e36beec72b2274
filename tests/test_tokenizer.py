import functools
import hashlib
import io
import itertools
import json
import random

import numpy as np
import pytest
import sentencepiece

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import tokenizer, toy, vocab

THAI = "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย"
NASTY = {
    "empty": "",
    "a lone space": " ",
    "several spaces": "  a    b     ",
    "tabs": "\ta\t\tb \t c",
    "CRLF": "one\r\ntwo\r\n\r\nthree\r",
    "newlines": "\n\n\na\n \nb\n",
    "NUL": "a\0b\0",
    "control characters": "\x01\x1f\x7f\x85",
    "byte order mark": "\ufeffa\ufeff b",
    "line separators": "a\u2028b\u2029c\u200bd\u00a0e\u3000f",
    "a family emoji": "👨‍👩‍👧‍👦 👍🏽 🇿🇦",
    "decomposed accents": "e\u0301 a\u030a\u0323 \u1100\u1161\u11a8 \u0301",
    "composed accents": "é ǻ 각",
    "replacement character": "\ufffd\ufffd a",
    "private and rare": "\ue000 𐎠 𠀀 \U0010ffff \ufffe",
    "special tokens": "<BOS_TOKEN><|END_OF_TURN_TOKEN|> <PAD><UNK><|START_RESPONSE|>x<MASK_TOKEN>",
    "byte pieces": "<0x41> <0x0A><0xFF> <unk> <s> </s>",
    "SentencePiece's unknown": "▅ \u2047 \u2585a",
    "digits": "3.14159 १२३४ ١٢٣ 一二三 ２０２６ 1,234,567",
    "equal letters": "a" * 5000,
    "equal spaces": " " * 5000,
    "Thai without spaces": THAI * (12_288 // len(THAI.encode()) + 1),
}


@pytest.fixture(scope="module")
def texts():
  """About 4,000 lines in the scripts of all 70 languages, as documents of several lines."""
  documents = []
  for language in languages.LANGUAGES:
    documents += toy.documents(language.code, "validation")
    for messages in itertools.islice(toy.documents(language.code, "instruct"), 5):
      documents += [message["content"] for message in messages]
  assert sum(document.count("\n") + 1 for document in documents) > 4000
  return documents


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
  """A trained tokenizer.model and the tokenizer.json made from it, in two folders."""
  folder = tmp_path_factory.mktemp("tokenizer")
  lines = [vocab.shape(line) for text in texts for line in vocab.lines(text)]
  write_pair(folder, vocab.train(lines, 5000, 0.999))
  return folder


def write_pair(folder, model):
  for name in ("model", "json"):
    (folder / name).mkdir()
  (folder / "model" / "tokenizer.model").write_bytes(model)
  made = tokenizer.load(folder / "model").json()
  (folder / "json" / "tokenizer.json").write_text(made, encoding="utf-8")


@pytest.fixture(scope="module")
def ours(folder):
  return tokenizer.load(folder / "model")


@pytest.fixture(scope="module")
def twin(folder):
  pytest.importorskip("tokenizers")
  return tokenizer.load(folder / "json")


def test_both_engines_give_equal_ids_in_all_scripts(ours, twin, texts):
  lines = [line for text in texts for line in text.split("\n")]
  for these in (lines, texts, ["\n\n".join(texts)]):
    wrong = [
        text
        for text, a, b in zip(these, ours.encode_many(these), twin.encode_many(these), strict=True)
        if a != b
    ]
    assert not wrong, f"{len(wrong)} of {len(these)}, the first: {wrong[0][:200]!r}"


@pytest.mark.parametrize("name", NASTY)
def test_both_engines_give_equal_ids_on_nasty_text(ours, twin, name):
  assert ours.encode(NASTY[name]) == twin.encode(NASTY[name])


@pytest.mark.parametrize("name", NASTY)
def test_text_comes_back_and_its_bytes_add_up(ours, twin, name):
  text = NASTY[name]
  for engine in (ours, twin):
    ids = engine.encode(text)
    assert engine.decode(ids) == text
    assert engine.bytes_V[ids].sum() == len(text.encode())
    assert not set(ids) & set(engine.specials.values())


def test_a_literal_u2581_becomes_a_space_with_equal_ids(ours, twin):
  text = "a\u2581b \u2581 c"
  assert ours.encode(text) == twin.encode(text) == ours.encode("a b   c")
  assert ours.decode(ours.encode(text)) == twin.decode(twin.encode(text)) == "a b   c"


def test_all_text_comes_back(ours, texts):
  for text, ids in zip(texts, ours.encode_many(texts), strict=True):
    assert ours.decode(ids) == text
    assert ours.bytes_V[ids].sum() == len(text.encode())


def test_decode_agrees_with_sentencepiece_and_tokenizers(folder, ours, texts):
  tokenizers = pytest.importorskip("tokenizers")
  reference = sentencepiece.SentencePieceProcessor(
      model_file=str(folder / "model" / "tokenizer.model")
  )
  other = tokenizers.Tokenizer.from_file(str(folder / "json" / "tokenizer.json"))
  for ids in ours.encode_many([*texts[::10], *NASTY.values()]):
    assert ours.decode(ids) == reference.decode(ids) == other.decode(ids)


def test_transformers_gives_bos_and_equal_ids(folder, ours, texts):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(folder / "json" / "tokenizer.json"), split_special_tokens=True
  )
  for text in [*texts[::10], *NASTY.values()]:
    assert theirs(text).input_ids == [tokenizer.SPECIALS["<BOS_TOKEN>"], *ours.encode(text)], text


def test_many_small_alphabets_merge_in_the_same_order(tmp_path):
  """Overlapping merges of equal letters are where two BPE engines would part ways."""
  pytest.importorskip("tokenizers")
  sizes = {"ab": 600, "abc": 700, "ab ": 600, "a\n": 290, "aaab ": 600, "กข": 600}
  for seed, (letters, size) in enumerate(sizes.items()):
    draw = random.Random(seed)
    folder = tmp_path / str(seed)
    folder.mkdir()
    lines = ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(400)]
    write_pair(folder, vocab.train(lines, size, 1.0))
    model, twin = tokenizer.load(folder / "model"), tokenizer.load(folder / "json")
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(1000)]
    assert model.encode_many(texts) == twin.encode_many(texts), letters


def test_user_defined_pieces_are_equal_in_both_engines(tmp_path):
  pytest.importorskip("tokenizers")
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["some words == > and ==> more words x  y"] * 50),
      model_writer=model,
      model_type="bpe",
      vocab_size=300,
      byte_fallback=True,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      user_defined_symbols=["==>", "\n", "\u2581\u2581"],
      control_symbols=["<BOS_TOKEN>"],
      minloglevel=2,
  )
  write_pair(tmp_path, model.getvalue())
  model, twin = tokenizer.load(tmp_path / "model"), tokenizer.load(tmp_path / "json")
  for text in ("a==>b == > x", "====>>", "\n\nwords\n==>\n", "  x   y    z ", " ==> "):
    assert model.encode(text) == twin.encode(text), text
    assert model.decode(model.encode(text)) == twin.decode(twin.encode(text)) == text
  assert (model.bytes_V == twin.bytes_V).all()
  assert model.piece(model.encode("==>")[0]) == "==>"


def test_specials_have_their_ids_and_no_bytes(ours, twin):
  for engine in (ours, twin):
    assert engine.specials == tokenizer.SPECIALS
    assert not engine.bytes_V[: len(tokenizer.SPECIALS)].any()
    assert engine.bytes_V[len(tokenizer.SPECIALS) :].all()
    assert engine.bytes_V.dtype == np.int32 and engine.bytes_V.shape == (engine.size,) == (5000,)
    assert engine.decode([2, *engine.encode("x"), 3]) == "x"
    assert engine.piece(2) == "<BOS_TOKEN>"
  assert (ours.bytes_V == twin.bytes_V).all()
  with pytest.raises(run.Refused, match=r"did you mean '<BOS_TOKEN>'"):
    ours.special("<BOS>")


def test_half_a_character_decodes_to_the_replacement_character(ours, twin):
  first, *_ = ours.encode("\U0010ffff")
  assert ours.decode([first]) == twin.decode([first]) == "\ufffd"


def test_what_is_no_text_is_refused(ours, twin):
  for engine in (ours, twin):
    with pytest.raises(run.Refused, match=r"lone surrogate U\+D83D at character 2 of 4"):
      engine.encode("ab\ud83dc")
    with pytest.raises(run.Refused, match="only str can be encoded, given bytes"):
      engine.encode(b"ab")
    with pytest.raises(run.Refused, match="id 5000 is outside the vocabulary: expected 0 to 4999"):
      engine.decode([5000])
  assert ours.encode_many([]) == []


def test_the_hash_is_of_the_file(folder, ours):
  content = (folder / "model" / "tokenizer.model").read_bytes()
  assert ours.sha256 == hashlib.sha256(content).hexdigest()


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
  with pytest.raises(run.Refused, match="holds neither"):
    tokenizer.load(tmp_path)
  with pytest.raises(run.Refused, match="does not exist"):
    tokenizer.load(tmp_path / "tokenizer.model")
  with pytest.raises(run.Refused, match=r"neither a \.model nor a \.json"):
    tokenizer.load(tmp_path / "tokenizer.txt")
  (tmp_path / "tokenizer.model").write_bytes(b"not a model")
  with pytest.raises(run.Refused, match="not a SentencePiece model"):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize("text, message", [
    ("[]", "a JSON list"), ("{", "is not JSON"), ('{"added_tokens": [{"id": 3}]}', "the added token"),
    ('{"added_tokens": null}', "is not a tokenizer.json"),
])  # fmt: skip
def test_a_json_file_that_is_no_tokenizer_is_refused(tmp_path, text, message):
  (tmp_path / "tokenizer.json").write_text(text)
  with pytest.raises(run.Refused, match=message):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(add_dummy_prefix=True), "adds or drops spaces"),
        (dict(remove_extra_whitespaces=True), "adds or drops spaces"),
        (dict(byte_fallback=False), "0 byte pieces, expected 256"),
    ],
)
def test_a_model_that_would_spoil_bits_per_byte_is_refused(tmp_path, change, message):
  options = dict(byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False)
  options |= dict(vocab_size=280 if change.get("byte_fallback", True) else 20, minloglevel=2)
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["ab  cd ab cd abcd"] * 9),
      model_writer=(model := io.BytesIO()),
      model_type="bpe",
      normalization_rule_name="identity",
      hard_vocab_limit=False,
      **options | change,
  )
  (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
  with pytest.raises(run.Refused, match=message):
    tokenizer.load(tmp_path)


@pytest.fixture
def released(tmp_path):
  """A byte-level tokenizer.json shaped like the released one, turn markers not all special."""
  tokenizers = pytest.importorskip("tokenizers")
  engine = tokenizers.Tokenizer(tokenizers.models.BPE())
  engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  engine.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=list(tokenizer.SPECIALS)[:10],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
  )
  engine.train_from_iterator(["naïve café здравствуй 你好 words and more words"] * 20, trainer)
  engine.add_tokens(["<|START_RESPONSE|>", "<|END_RESPONSE|>", "==дада=="])
  engine.enable_truncation(5)
  path = tmp_path / "tokenizer.json"
  engine.save(str(path))
  whole = json.loads(path.read_text(encoding="utf-8"))
  whole["added_tokens"][tokenizer.SPECIALS["<MASK_TOKEN>"]]["special"] = False
  path.write_text(json.dumps(whole), encoding="utf-8")
  return path


def test_a_released_byte_level_file_is_read_exactly(released):
  engine = tokenizer.load(released)
  for text in [*NASTY.values(), "naïve ==дада== café здравствуй 你好", "a\u2581b"]:
    ids = engine.encode(text)
    assert engine.decode(ids) == text
    assert engine.bytes_V[ids].sum() == len(text.encode())
    assert not set(ids) & set(engine.specials.values())
  assert engine.json() == released.read_text(encoding="utf-8")
  assert engine.special("<|START_RESPONSE|>") == engine.size - 3
  assert engine.bytes_V[-3:].tolist() == [0, 0, len("==дада==".encode())]


DIGITS = r"\d{1,3}(?=(?:\d{3})*\b)"  # tiny_aya.md 2.1
WORDS = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)


def sequence(*steps):
  return dict(type="Sequence", pretokenizers=list(steps))


def split(pattern):
  return dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)


@pytest.mark.parametrize("cut, back", [
    (dict(normalizer=dict(type="NFC"), pre_tokenizer=sequence(  # Command R's
        dict(type="Digits", individual_digits=True), BYTES | dict(use_regex=True))), "é 1234567"),
    (dict(pre_tokenizer=sequence(split(DIGITS), split(WORDS), BYTES)), "e\u0301 1234567"),
    (dict(pre_tokenizer=functools.reduce(lambda inner, _: sequence(inner), range(10), BYTES)), "e\u0301 1234567"),
    (dict(decoder=dict(type="Sequence", decoders=[dict(type="Sequence", decoders=[BYTES])])), "e\u0301 1234567"),
], ids=["command_r", "tiny_aya", "nested", "nested_decoder"])
def test_foreign_byte_level_files_give_the_packages_ids_and_the_bytes_of_what_comes_back(released, cut, back):
  import tokenizers

  whole = json.loads(released.read_text(encoding="utf-8")) | cut
  released.write_text(json.dumps(whole | dict(truncation=None)), encoding="utf-8")
  engine, theirs = tokenizer.load(released), tokenizers.Tokenizer.from_file(str(released))
  for text in (*NASTY.values(), "e\u0301 1234567"):
    if "<" not in text:
      assert engine.encode(text) == theirs.encode(text, add_special_tokens=False).ids
  ids = engine.encode("e\u0301 1234567")
  assert engine.decode(ids) == back and engine.bytes_V[ids].sum() == len(back.encode())


def changed(whole, **token):
  whole["added_tokens"].append(whole["added_tokens"][0] | dict(id=len(whole["model"]["vocab"]) + 3, content="zz") | token)


def unnamed(whole):
  """The model of a file without the tokens behind its vocabulary, which one more piece would move."""
  del whole["added_tokens"][10:]
  return whole["model"]


@pytest.mark.parametrize("change, message", [
    (lambda whole: changed(whole, id=10**12), "is not a tokenizer.json|has id 1000000000000"),
    (lambda whole: changed(whole, id=4 * 10**9), "has id 4000000000, but is numbered"),
    (lambda whole: changed(whole, id=-1), "is not a tokenizer.json"),
    (lambda whole: changed(whole, id=True), "expected an id and content"),
    (lambda whole: changed(whole, content=""), "expected an id and content"),
    (lambda whole: changed(whole, id=50), "has id 50, but is numbered"),
    (lambda whole: changed(whole, content="<PAD>"), "but is numbered 0"),
    (lambda whole: whole["model"]["vocab"].update(qq=10**12), "is not a tokenizer.json"),
    (lambda whole: whole["model"]["vocab"].update(qq=-1), "is not a tokenizer.json"),
    (lambda whole: unnamed(whole)["vocab"].update(qq=50), "are both id 50"),
    (lambda whole: unnamed(whole)["vocab"].update(qq=4 * 10**9), "has id 4000000000, expected 0 to 4194303"),
    (lambda whole: whole["model"].update(ignore_merges=True) or whole.update(pre_tokenizer=BYTES),
     "makes a special token of the text '<PAD>'"),
    (lambda whole: whole["model"].update(dropout=0.1), "drops merges at random"),
    (lambda whole: whole.update(pre_tokenizer=BYTES | dict(add_prefix_space=True)), "turns 'a' into ' a'"),
    (lambda whole: whole.update(decoder=None), r"decodes by \[\]"),
    (lambda whole: whole.update(added_tokens=5), "the added token 5"),
    (lambda whole: whole.update(decoder=["a"]), r"has the decoder \['a'\], expected|is not a tokenizer.json"),
    (lambda whole: whole["model"].update(continuing_subword_prefix="##"), "subword_prefix '##', expected none"),
    (lambda whole: whole["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>', expected none"),
    (lambda whole: whole.update(normalizer=dict(type="Precompiled", precompiled_charsmap="AAAA")),
     "is not a tokenizer.json"),
])
def test_a_tokenizer_json_that_would_fool_us_is_refused_and_nothing_large_is_made(released, change, message):
  whole = json.loads(released.read_text(encoding="utf-8"))
  change(whole)
  released.write_text(json.dumps(whole), encoding="utf-8")
  with pytest.raises(run.Refused, match=message):
    tokenizer.load(released)


@pytest.mark.parametrize("decoder", [["a"], "a", dict(decoders=3), dict(decoders=["a"]), dict(type=["a"])], ids=str)
def test_a_decoder_of_another_shape_is_refused(decoder):
  with pytest.raises(run.Refused, match="has the decoder .*, expected an object with its type"):
    list(tokenizer._steps("tokenizer.json", decoder))


def test_a_tokenizer_json_whose_bytes_are_unknown_is_refused(released):
  whole = json.loads(released.read_text(encoding="utf-8"))
  decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
  released.write_text(json.dumps(whole | {"decoder": decoder}))
  with pytest.raises(run.Refused, match=r"decodes by \['WordPiece'\]"):
    tokenizer.load(released)
  del whole["model"]["vocab"]["Ġ"]
  whole["model"]["merges"] = []
  released.write_text(json.dumps(whole))
  with pytest.raises(run.Refused, match="lacks 1 of the 256 byte pieces"):
    tokenizer.load(released)
  released.write_text("{")
  with pytest.raises(run.Refused, match="is not JSON"):
    tokenizer.load(released)
