"""Conversations <-> ids: the turns, what is trained on, where an answer stops, the Jinja template.

Not here: reading conversations from files (text.py) and cutting them into rows (pack.py).
The structure is the released one without its preamble (tiny_aya.md 2.3):

  BOS  [START_OF_TURN SYSTEM text END_OF_TURN]
  START_OF_TURN USER text END_OF_TURN
  START_OF_TURN CHATBOT START_RESPONSE text END_RESPONSE END_OF_TURN  ...

Special tokens are put in as ids. Text is encoded by itself, so that a message that spells
"<|END_OF_TURN_TOKEN|>" is characters and ends nothing.
"""

from tiny_aya_jax import run

ROLES = dict(  # role of a message -> the special token behind START_OF_TURN
    system="<|SYSTEM_TOKEN|>",
    user="<|USER_TOKEN|>",
    assistant="<|CHATBOT_TOKEN|>",
    chatbot="<|CHATBOT_TOKEN|>",  # Cohere's word for assistant
)
ANSWER = ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>")
STOPS = ("<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>")  # tiny_aya.md 2.1

# The same turns for Hugging Face: the text of the special tokens, which the tokenizer there parses.
# Every tag eats the white space around it, so that only what is written in quotes is rendered.
TEMPLATE = """\
{{- '<BOS_TOKEN>' -}}
{%- set turns = namespace(next='user') -%}
{%- for message in messages -%}
  {%- set role = 'assistant' if message['role'] == 'chatbot' else message['role'] -%}
  {%- if role == 'system' and loop.first -%}
    {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' -}}
    {{- message['content'] -}}
    {{- '<|END_OF_TURN_TOKEN|>' -}}
  {%- elif role != turns.next -%}
    {{- raise_exception('message ' ~ loop.index0 ~ ' is from ' ~ role ~ ', expected ' ~ turns.next
        ~ ': one system message may come first, then user and assistant take turns') -}}
  {%- elif role == 'user' -%}
    {%- set turns.next = 'assistant' -%}
    {{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' -}}
    {{- message['content'] -}}
    {{- '<|END_OF_TURN_TOKEN|>' -}}
  {%- else -%}
    {%- set turns.next = 'user' -%}
    {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' -}}
    {{- message['content'] -}}
    {{- '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' -}}
{%- endif -%}
"""


def encode(tokenizer, messages):
  """[{"role", "content"}, ...] -> (ids, weights), two lists of one length.

  Weight 1 on what the model has to say: an assistant's text, END_RESPONSE and END_OF_TURN;
  0 on all else. Refused: roles that do not alternate, content that is not text.
  """
  check(messages)
  ids, weights = [tokenizer.special("<BOS_TOKEN>")], [0]
  for message in messages:
    head, text, tail = _turn(tokenizer, message)
    spoken = int(ROLES[message["role"]] == ROLES["assistant"])
    ids += head + text + tail
    weights += [0] * len(head) + [spoken] * (len(text) + len(tail))
  return ids, weights


def prompt(tokenizer, messages):
  """Messages that end with the user -> the ids behind which the model answers."""
  ids, _ = encode(tokenizer, messages)
  ends_with_user(messages)
  return ids + [tokenizer.special(name) for name in ANSWER]


def stop_ids(tokenizer):
  """The ids that end an answer: EOS, END_OF_TURN, END_RESPONSE, those of them that there are."""
  return tuple(tokenizer.specials[name] for name in STOPS if name in tokenizer.specials)


def spoken(tokenizer):
  """Whether a tokenizer has all special tokens of a prompt."""
  return {"<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", *ROLES.values(), *ANSWER} <= tokenizer.specials.keys()


def unspoken(tokenizer, V, stop_ids):
  """The ids that no answer holds: specials that do not end it, and rows of a table of V beyond the
  vocabulary."""
  specials = set(tokenizer.specials.values()) - set(stop_ids)
  return [*sorted(specials), *range(tokenizer.size, V)]


def check(messages):
  """Refuses what is not: one system message or none, then user and assistant in turns."""
  expected = "user"
  for index, message in enumerate(listed(messages)):
    found = role(index, message)
    if found == "system" and index == 0:
      continue
    if found != expected:
      raise run.Refused(
          f"message {index} is from {found}, expected {expected}:"
          " one system message may come first, then user and assistant take turns"
      )
    expected = "assistant" if found == "user" else "user"


def listed(messages):
  """The messages; refuses what is no list of any."""
  if not isinstance(messages, (list, tuple)) or not messages:
    raise run.Refused(f"a conversation is a list of messages, given {str(messages)[:60]!r}")
  return messages


def ends_with_user(messages):
  """Refuses a prompt after which it is not the model's turn."""
  if messages[-1]["role"] != "user":
    raise run.Refused(
        f"a prompt ends with a message from user, given one from {messages[-1]['role']}:"
        " drop the last message or add the user's"
    )


def role(index, message):
  """Who message number `index` is from; refuses what is no message."""
  if not isinstance(message, dict) or not isinstance(message.get("content"), str):
    raise run.Refused(
        f"message {index} is not {{'role': ..., 'content': text}}: {str(message)[:60]!r}"
    )
  found = run.choose(f"role in message {index}", message.get("role"), ROLES)
  return "assistant" if found == "chatbot" else found


def _turn(tokenizer, message):
  """One message -> the ids before its text, of its text, and behind it."""
  marker = ROLES[message["role"]]
  answer = marker == ROLES["assistant"]
  head = ANSWER if answer else ("<|START_OF_TURN_TOKEN|>", marker)
  tail = ("<|END_RESPONSE|>",) * answer + ("<|END_OF_TURN_TOKEN|>",)
  return (
      [tokenizer.special(name) for name in head],
      tokenizer.encode(message["content"]),
      [tokenizer.special(name) for name in tail],
  )
