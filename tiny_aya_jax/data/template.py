"""How a Hugging Face folder is spoken to: its own chat template, and the ids that end an answer.

Rendered as transformers does, in a process that holds nothing and cannot take long (render.py). The
promise of chat.py is kept: only the template's own text makes special tokens. What a message spells
is hidden from the template behind a mark, stays characters, and is put back before it is encoded;
so a template that looks for a special token in a message does not find it. A template that differs
between renderings (strftime_now) gives prompts that do.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any, NamedTuple

from tiny_aya_jax import run
from tiny_aya_jax.data import chat

SECONDS = 2  # of a core, for one rendering; templates take milliseconds
MEMORY = 1 << 29  # bytes of address space of the process that renders
CHARACTERS = 1 << 22  # of a rendering
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MARK = "\U0010fffd"  # private use: no letter, no space; the character behind it says what is hidden
# MARK as tojson(ensure_ascii=True), repr, bytes and urlencode write it: what it hides would be lost.
ESCAPED = (r"\udbff\udffd", r"\U0010fffd", r"\xf4\x8f\xbf\xbd", "%F4%8F%BF%BD")
WHITE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"  # the tokenizers package's \s
SAFE_JINJA = (3, 1, 6)  # before, format strings and the filter attr led out of the sandbox


class Turns(NamedTuple):
  """How a model is spoken to."""

  prompt: Any  # messages -> the ids behind which the model answers
  stop_ids: tuple  # what ends an answer
  template: Any  # Template, or None for the turns of chat.py
  identity: Any = None  # what answers depend on beside model and tokenizer, as JSON; None for chat.py's

  @property
  def said(self):
    return "the folder's chat template" if self.template else "the turns of data/chat.py"

  def unspoken(self, tokenizer, V):
    """The ids that no answer holds. A folder's own template may leave special tokens for the model to say:
    an answer of Command R7B begins with START_RESPONSE. `decode` drops them."""
    return [*range(tokenizer.size, V)] if self.template else chat.unspoken(tokenizer, V, self.stop_ids)


def turns(tokenizer, folder=None):
  """Turns of a Hugging Face folder, or without one those of our own checkpoints."""
  if folder is None:
    return Turns(functools.partial(chat.prompt, tokenizer), chat.stop_ids(tokenizer), None)
  template = None if source(folder) == chat.TEMPLATE else load(folder, tokenizer)
  if template:
    prompt = template.prompt
  elif chat.spoken(tokenizer):
    prompt = functools.partial(chat.prompt, tokenizer)
  else:
    prompt = functools.partial(_no_turns, folder)
  stops = stop_ids(folder, tokenizer)
  usual = template is None and set(stops) == set(chat.stop_ids(tokenizer))
  identity = None if usual else [template and [template.source, template.variables], stops]
  return Turns(prompt, stops, template, identity)


def _no_turns(folder, messages):
  raise run.Refused(f"{folder} has no chat template, and its tokenizer not all special tokens of data/chat.py: "
                    "a base model; evaluate it with --config.prompts=plain")


def stop_ids(folder, tokenizer):
  """Ids of generation_config.json's eos_token_id (else config.json's) and of chat.STOPS, ascending."""
  given, path = None, pathlib.Path(folder) / "generation_config.json"
  if path.exists():
    given = run.read_json(path, "Hugging Face folder").get("eos_token_id")
  if given is None:
    path = path.with_name("config.json")
    given = run.read_json(path, "Hugging Face folder").get("eos_token_id")
  ids = given if isinstance(given, list) else [] if given is None else [given]
  if odd := [id for id in ids if type(id) is not int or not 0 <= id < tokenizer.size]:
    raise run.Refused(f"{path}: eos_token_id has {str(odd[0])[:60]}, expected ids from 0 to "
                      f"{tokenizer.size - 1}")
  return tuple(sorted({*ids, *chat.stop_ids(tokenizer)}))


def source(folder):
  """The text of a folder's chat template: chat_template.jinja's, else tokenizer_config.json's; None
  where it has neither."""
  folder = pathlib.Path(folder)
  path = folder / "chat_template.jinja"
  if path.exists():
    try:
      return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise run.Refused(f"{path} cannot be read as UTF-8 ({error})") from None
  found = _tokenizer_config(folder).get("chat_template")
  if isinstance(found, list):
    named = {one["name"]: one.get("template") for one in found
             if isinstance(one, dict) and isinstance(one.get("name"), str)}
    if "default" not in named:
      raise run.Refused(f"{folder}/tokenizer_config.json has chat templates {sorted(named)}, none of "
                        "them 'default': put the one to use into chat_template.jinja")
    found = named["default"]
  if found is not None and not isinstance(found, str):
    raise run.Refused(f"{folder}/tokenizer_config.json: chat_template is a {type(found).__name__}, expected "
                      "text, or a list of {name, template}")
  return found


def _tokenizer_config(folder):
  path = folder / "tokenizer_config.json"
  return run.read_json(path, "Hugging Face folder") if path.exists() else {}


def load(folder, tokenizer):
  """The chat template of a folder, compiled -> Template; None where it has none."""
  text = source(folder)
  if text is None:
    return None
  _check_jinja(folder)
  folder = pathlib.Path(folder)
  config, variables = _tokenizer_config(folder), {}
  for name in NAMES:
    value = config.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    if isinstance(value, str):
      variables[name] = value
  for name, flags in tokenizer.flags.items():
    if name in tokenizer.specials and "single_word" in flags:
      raise run.Refused(f"{tokenizer.path}: {name} is single_word, which is not done for special tokens of a "
                        "chat template: remove the flag")
  return Template(folder, text, variables, tokenizer)


def _check_jinja(folder):
  if importlib.util.find_spec("jinja2") is None:
    raise run.Refused(f"{folder} has a chat template, and to render it needs jinja2: "
                      "pip install 'tiny_aya_jax[export]'")
  version = importlib.metadata.version("jinja2")
  if tuple(map(int, re.findall(r"\d+", version)[:3])) < SAFE_JINJA:
    raise run.Refused(f"jinja2 {version} does not hold chat templates of strangers: pip install 'jinja2>="
                      f"{'.'.join(map(str, SAFE_JINJA))}'")


class Template:
  """A chat template and the process that renders it, begun anew if a rendering was its end."""

  def __init__(self, folder, source, variables, tokenizer):
    self.folder, self.source, self.variables, self.tokenizer = folder, source, variables, tokenizer
    names = sorted(tokenizer.specials, key=len, reverse=True)
    eats = [[WHITE if flag in tokenizer.flags.get(name, ()) else "" for flag in ("lstrip", "rstrip")]
            for name in names]
    self._special = re.compile("|".join(
        f"{left}({re.escape(name)}){right}" for name, (left, right) in zip(names, eats)) or r"(?!)")
    # What is hidden: a special token's name, MARK, and letters that would end or begin a name.
    self._hidden = [MARK, *ESCAPED, *names, *sorted({letter for name in names for letter in (*name[:-1], *name[1:])})]
    self._code = {text: MARK + chr(0xF0000 + number) for number, text in enumerate(self._hidden)}
    self._whole = re.compile("|".join(map(re.escape, [MARK, *ESCAPED, *names])))
    self._longest = max(map(len, names), default=0)
    self._heads = {name[:end] for name in names for end in range(1, len(name))}
    self._tails = {name[start:] for name in names for start in range(1, len(name))}
    self._turn = threading.Lock()
    self._begin()

  def prompt(self, messages):
    """Messages that end with the user -> the ids behind which the model answers, as transformers'
    apply_chat_template gives them; all that messages spell is characters."""
    for index, message in enumerate(chat.listed(messages)):
      chat.role(index, message)
    chat.ends_with_user(messages)
    ids = self.ids(self.text(messages))
    if not ids:
      raise run.Refused(f"the chat template of {self.folder} renders nothing for these messages")
    return ids

  def text(self, messages, open=False):
    """Messages as text with what they spell hidden, for `ids`; `open`: the last one is gone on with."""
    shown = [dict(role=message["role"], content=self._hide(message["content"])) for message in messages]
    if not open:
      return self._rendered(messages=shown, add_generation_prompt=True)
    end = MARK + chr(0xEFFFF)
    shown[-1]["content"] += end
    text, found, _ = self._rendered(messages=shown, add_generation_prompt=False).rpartition(end)
    if not found:
      raise run.Refused(f"the chat template of {self.folder} does not show the answer that is to be gone on "
                        "with")
    return text

  def ids(self, text):
    """What `text` returned, with plain text behind it or not -> ids: special tokens, longest first,
    and the texts between them."""
    special, texts, at = [], [], 0
    for match in self._special.finditer(text):
      texts.append(self._show(text[at : match.start()]))
      special.append(self.tokenizer.specials[match[match.lastindex]])
      at = match.end()
    first, *rest = self.tokenizer.encode_many([*texts, self._show(text[at:])])
    return first + [id for one, ids in zip(special, rest) for id in (one, *ids)]

  def _hide(self, content):
    """A message's text in which nothing is a special token, or a part of one with what stands beside."""
    hidden = self._whole.sub(lambda match: self._code[match.group()], content)
    kept = hidden.strip()
    begin, end = len(hidden) - len(hidden.lstrip()), len(hidden.rstrip())
    sizes = range(1, min(len(kept), self._longest) + 1)
    places = {begin + size - 1 for size in sizes if kept[:size] in self._tails}
    places |= {end - size for size in sizes if kept[-size:] in self._heads}
    if not places:
      return hidden
    return "".join(self._code[letter] if at in places else letter for at, letter in enumerate(hidden))

  def _show(self, text):
    return re.sub(f"{MARK}([\U000f0000-\U0010fffc])", self._shown, text) if MARK in text else text

  def _shown(self, match):
    number = ord(match[1]) - 0xF0000
    return self._hidden[number] if number < len(self._hidden) else match.group()

  def _rendered(self, **asked):
    with self._turn:  # one at a time
      if self._child is None:
        self._begin()
      text = self._ask(asked)
    if any(escaped in text for escaped in ESCAPED):
      raise run.Refused(f"the chat template of {self.folder} escapes what a message spells, as "
                        "tojson(ensure_ascii=True) does, so that its ids would be others: put one with plain tojson "
                        "into chat_template.jinja")
    return text

  def _begin(self):
    self._child = _start()
    weakref.finalize(self, _end, self._child)
    self._ask(dict(source=self.source, variables=self.variables, seconds=SECONDS, memory=MEMORY,
                   characters=CHARACTERS))

  def _ask(self, asked):
    try:
      self._child.stdin.write(json.dumps(asked) + "\n")
      self._child.stdin.flush()
      reply = self._child.stdout.readline()
    except BrokenPipeError:
      reply = ""
    except BaseException:  # Ctrl-C: what comes would be taken for the answer to the next question
      self._child.kill()
      self._child = None
      raise
    if not reply:
      code, self._child = _end(self._child), None
      why = f"takes more than {SECONDS} seconds" if code == -signal.SIGPROF else (
          f"was the end of the process that renders it (exit {code})")
      raise run.Refused(f"the chat template of {self.folder} {why}: it is no template to use")
    found = json.loads(reply)
    if "why" in found:
      raise run.Refused(f"the chat template of {self.folder} refuses: {found['why']}")
    return found["text"]


def _start():
  """The process: without this one's environment, in which keys may stand."""
  kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
  return subprocess.Popen(
      [sys.executable, "-P", str(pathlib.Path(__file__).with_name("render.py"))],
      env=kept | dict(PYTHONPATH=os.pathsep.join(sys.path), PYTHONIOENCODING="utf-8"),
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8")


def _end(child):
  for pipe in (child.stdin, child.stdout):
    with contextlib.suppress(BrokenPipeError):  # what was written is not read any more
      pipe.close()
  return child.wait()
