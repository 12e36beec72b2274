import pytest

from tiny_aya_jax import run
from tiny_aya_jax.data import chat, tokenizer, vocab

SYSTEM = {"role": "system", "content": "Answer in  Welsh.\n"}
ASK = {"role": "user", "content": " Beth yw prifddinas Cymru?\n\n"}
TELL = {"role": "assistant", "content": "\nCaerdydd. "}
CONVERSATIONS = dict(
    one_question=[ASK],
    one_answer=[ASK, TELL],
    with_system=[SYSTEM, ASK, TELL],
    several_turns=[ASK, TELL, ASK, TELL, ASK],
    chatbot=[ASK, TELL | {"role": "chatbot"}],
    empty_text=[SYSTEM | {"content": ""}, ASK | {"content": ""}, TELL | {"content": ""}],
    markup=[ASK | {"content": "{{ x }} {% if %} <b>&amp;\t\r\n 你好 ١٢"}, TELL],
)
REFUSED = {
    "message 1 is from user, expected assistant": [ASK, ASK],
    "message 0 is from assistant, expected user": [TELL],
    "message 1 is from system, expected assistant": [ASK, SYSTEM],
    "message 1 is from system, expected user": [SYSTEM, SYSTEM, ASK],
    "message 2 is from assistant, expected user": [ASK, TELL, TELL],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("chat") / "tokenizer.model"
  lines = [message["content"] for turns in CONVERSATIONS.values() for message in turns] * 9
  path.write_bytes(vocab.train([line for line in lines if line], 310, 1.0))
  return tokenizer.load(path)


def render(messages, add_generation_prompt=False):
  """As transformers does: sandboxed, blocks trimmed, raise_exception given."""
  sandbox = pytest.importorskip("jinja2.sandbox")
  environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.globals["raise_exception"] = raise_exception
  template = environment.from_string(chat.TEMPLATE)
  return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def raise_exception(message):
  raise ValueError(message)


def parsed(model, text):
  """Ids of a rendered conversation, its special tokens parsed, by the tokenizers package."""
  tokenizers = pytest.importorskip("tokenizers")
  return tokenizers.Tokenizer.from_str(model.json()).encode(text, add_special_tokens=False).ids


def test_a_conversation_is_its_turns_and_only_the_answer_has_weight(model):
  ids, weights = chat.encode(model, [SYSTEM, ASK, TELL])
  turn, end = 5, 6
  head = [2, turn, 9, *model.encode(SYSTEM["content"]), end]
  head += [turn, 7, *model.encode(ASK["content"]), end, turn, 8, 10]
  answer = [*model.encode(TELL["content"]), 11, end]
  assert ids == head + answer
  assert weights == [0] * len(head) + [1] * len(answer)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_renders_the_same_ids(model, name):
  messages = CONVERSATIONS[name]
  ids, weights = chat.encode(model, messages)
  assert parsed(model, render(messages)) == ids
  assert len(weights) == len(ids)
  if messages[-1]["role"] == "user":
    assert parsed(model, render(messages, add_generation_prompt=True)) == chat.prompt(
        model, messages
    )


def test_transformers_applies_the_template_with_the_same_ids(model, tmp_path):
  transformers = pytest.importorskip("transformers")
  path = tmp_path / "tokenizer.json"
  path.write_text(model.json(), encoding="utf-8")
  theirs = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(path), chat_template=chat.TEMPLATE
  )
  for messages in CONVERSATIONS.values():
    given = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert given == chat.encode(model, messages)[0]
  with pytest.raises(Exception, match="expected assistant"):
    theirs.apply_chat_template([ASK, ASK], tokenize=False)


def test_a_prompt_is_the_beginning_of_the_conversation_with_its_answer(model):
  prompt = chat.prompt(model, [SYSTEM, ASK])
  ids, weights = chat.encode(model, [SYSTEM, ASK, TELL])
  assert ids[: len(prompt)] == prompt
  assert weights.index(1) == len(prompt)
  assert prompt[-3:] == [5, 8, 10]


def test_text_that_spells_special_tokens_stays_text(model):
  spelled = "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><BOS_TOKEN><EOS_TOKEN>"
  plain, _ = chat.encode(model, [ASK | {"content": ""}, TELL])
  ids, _ = chat.encode(model, [ASK | {"content": spelled}, TELL])
  specials = set(tokenizer.SPECIALS.values())
  assert [id for id in ids if id in specials] == [id for id in plain if id in specials]
  assert spelled in model.decode(ids)


def test_an_answer_stops_at_any_of_three_ids(model):
  assert chat.stop_ids(model) == (3, 6, 11)


@pytest.mark.parametrize("message", REFUSED)
def test_turns_out_of_order_are_refused_by_code_and_template(model, message):
  with pytest.raises(run.Refused, match=message):
    chat.encode(model, REFUSED[message])
  with pytest.raises(ValueError, match=message):
    render(REFUSED[message])


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "a list of messages"),
        ("hello", "a list of messages"),
        (["hello"], "message 0 is not"),
        ([{"role": "user"}], "message 0 is not"),
        ([{"role": "user", "content": None}], "message 0 is not"),
        ([{"role": "usr", "content": "x"}], "did you mean 'user'"),
        ([{"content": "x"}], "unknown role in message 0 None"),
    ],
)
def test_what_is_no_conversation_is_refused(model, messages, message):
  with pytest.raises(run.Refused, match=message):
    chat.encode(model, messages)


def test_a_prompt_that_ends_with_the_answer_is_refused(model):
  with pytest.raises(run.Refused, match="a prompt ends with a message from user"):
    chat.prompt(model, [ASK, TELL])
