"""lm-evaluation-harness on a JAX checkpoint: any of its tasks, sharded, batched by length, no torch.

  lm = harness.Harness(engine)
  lm_eval.simple_evaluate(model=lm, tasks=["belebele_deu_Latn"], num_fewshot=5)

What it asks is answered as its Hugging Face backend answers on the exported folder (test_harness.py):
the same tokens, BOS in front, a window of engine.T. Differences, on purpose: of a whole text
(`loglikelihood_rolling`) that backend also counts how likely BOS is behind BOS, where the tokenizer
puts one in front; here BOS is given (count_bos=True counts it). A prompt that is too long keeps BOS,
an answer holds no special token, and a continuation that tokens swallow whole is encoded by itself.
"""

import collections
import functools
import os
import re

import jinja2
import lm_eval
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from tiny_aya_jax import run
from tiny_aya_jax.data import chat
from tiny_aya_jax.evaluate import engine as engines, formats

TURNS = "\U0010fffe"  # no character, and none of a text: in front of what a folder's template renders
MOST_TOKENS = 256  # of an answer where a task does not say; the harness's own


def check(settings, T):
  """Loads the tasks of config.harness, their data too, and refuses what could not be answered in T."""
  tasks = manager(settings["folder"])
  for name in settings["tasks"]:
    run.choose("config.harness.tasks", name, tasks.all_tasks)
  try:
    found = tasks.load(list(settings["tasks"]))["tasks"]
  except Exception as error:  # of the data, the network or a YAML file: it raises whatever it likes
    raise run.Refused(f"config.harness.tasks {settings['tasks']} cannot be loaded "
                      f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
  for name, task in found.items():
    if task.OUTPUT_TYPE == "generate_until":
      _generation(dict(task.config.generation_kwargs or {}) | _forced(settings), T, f"task {name}")


@functools.cache  # it reads thousands of files
def manager(folder):
  """The harness's tasks, and those of YAML files in `folder` if there is one."""
  return TaskManager(include_path=folder)


def _forced(settings):
  return dict(do_sample=False, temperature=0.0) if settings["greedy"] else {}


def _generation(settings, T, what):
  """(most tokens, ends) of a task's generation_kwargs; refuses sampling, and more than half of T."""
  found = normalize_gen_kwargs(settings, MOST_TOKENS)
  if found.get("do_sample") or found.get("temperature"):
    raise run.Refused(f"{what} samples its answers ({settings}), and would be scored on chance: set "
                      "config.harness.greedy=True")
  if found["max_gen_toks"] > T // 2:
    raise run.Refused(f"{what} asks for answers of {found['max_gen_toks']} tokens, more than half of "
                      f"{T}: set config.T")
  return found["max_gen_toks"], tuple(end for end in found["until"] if end)


def measures(engine, name, settings, limit):
  """Runs a task or group -> [{"item": {"task", "language", "measure", "better", "items"}, "answer"}].

  settings: shots, chat, greedy, folder of config.harness. `limit` items, 0 for all. Of a group, those tasks
  count whose name ends in a language (belebele_deu_Latn, mgsm_direct_de); if there are none, the
  group or task itself, under "other".
  """
  local = os.environ.pop("LOCAL_RANK", None)  # of a launcher; lm-eval has results for its 0 alone
  try:
    found = lm_eval.simple_evaluate(
        model=Harness(engine), tasks=[name], task_manager=manager(settings["folder"]),
        num_fewshot=settings["shots"], apply_chat_template=settings["chat"],
        fewshot_as_multiturn=settings["chat"], gen_kwargs=_forced(settings) or None,
        limit=limit or None, bootstrap_iters=0, log_samples=False)
  finally:
    if local is not None:
      os.environ["LOCAL_RANK"] = local
  named = {task: named_language(task) for task in found["results"]}
  named = {task: one for task, one in named.items() if one} or {name: (name, "other")}
  rows = []
  for task, (base, code) in named.items():
    for key, value in found["results"][task].items():
      measure, _, filtered = key.partition(",")
      if not filtered or measure.endswith("_stderr") or not isinstance(value, (int, float)):
        continue
      higher = found["higher_is_better"].get(task, {}).get(measure) is not False
      rows.append(dict(answer=float(value), item=dict(
          task=base, language=code, items=found["results"][task].get("sample_len"),
          measure=measure if filtered == "none" else f"{measure}, {filtered}",
          better="higher" if higher else "lower")))
  return rows


def named_language(task):
  """'belebele_deu_Latn' -> ('belebele', 'deu_Latn'); None for a name that ends in no language.

  ('include_base_44_hindi_few_shot_en' -> ('include_base_44_few_shot_en', 'hin_Deva').) A variety of
  a language is none of ours.
  """
  shots = re.search(r"_few_shot_(en|og)$", task)
  pieces = task[: shots.start() if shots else None].split("_")
  for at in range(1, len(pieces)):
    code, variety = formats.tag("_".join(pieces[at:]))
    if code and not variety:
      return "_".join(pieces[:at]) + (shots.group() if shots else ""), code
    if variety:
      return None
  return None


class Harness(TemplateLM):
  """`LM` of lm-eval 0.4.13. Every process gives it the same tasks."""

  def __init__(self, engine, count_bos=False):
    super().__init__()
    self.engine, self.count_bos = engine, count_bos
    self._template = engine.turns.template
    self._specials = re.compile("|".join(
        sorted(map(re.escape, engine.tokenizer.specials), key=len, reverse=True)))

  @property
  def eot_token_id(self):
    return self.engine.tokenizer.special("<EOS_TOKEN>")

  @property
  def prefix_token_id(self):
    return self.engine.tokenizer.special("<BOS_TOKEN>")

  @property
  def max_length(self):
    return self.engine.T

  @property
  def tokenizer_name(self):
    return self.engine.tokenizer.sha256

  def chat_template(self, chat_template=False):
    return (self._template.source if self._template else chat.TEMPLATE) if chat_template else None

  def apply_chat_template(self, chat_history, add_generation_prompt=True):
    """Turns as text; `tok_encode` reads the special tokens back."""
    if self._template:
      return TURNS + self._template.text(chat_history, open=not add_generation_prompt)
    environment = jinja2.Environment()
    environment.globals["raise_exception"] = _refuse
    text = environment.from_string(chat.TEMPLATE).render(
        messages=chat_history, add_generation_prompt=add_generation_prompt)
    # An answer that has been begun is gone on with: the turn is left open.
    return text if add_generation_prompt else text.removesuffix("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>")

  def tok_encode(self, string, add_special_tokens=None, **_):
    """Ids with BOS in front. Special tokens are read only from turns, which begin with BOS's name; or of
    a folder's own template with TURNS, and have BOS if it says so."""
    if self._template and string.startswith(TURNS):
      return self._template.ids(string.removeprefix(TURNS))
    bos, name = self.prefix_token_id, self.engine.tokenizer.piece(self.prefix_token_id)
    if string.startswith(name):
      return self._with_specials(string)
    ids = self.engine.tokenizer.encode(string)
    return ids if add_special_tokens is False else [bos, *ids]

  def _with_specials(self, string):
    ids, at, tokenizer = [], 0, self.engine.tokenizer
    for found in self._specials.finditer(string):
      ids += [*tokenizer.encode(string[at : found.start()]), tokenizer.special(found.group())]
      at = found.end()
    return ids + tokenizer.encode(string[at:])

  def _encode_pair(self, context, continuation):
    before, rest = super()._encode_pair(context, continuation)
    return before, rest or self.engine.tokenizer.encode(continuation)

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
    found = engines.likelihoods(
        self.engine, [(context, continuation) for _, context, continuation in requests],
        "lm-eval log-likelihoods", bos=False)
    answers = [(result.nats, result.greedy) for result in found]
    for (key, *_), answer in zip(requests, answers):
      if key is not None:
        self.cache_hook.add_partial("loglikelihood", key, answer)
    return answers

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    """The log-probability of each text, in windows of T tokens that do not overlap in what counts."""
    windows, owners = [], []
    for number, request in enumerate(requests):
      ids = self.tok_encode(request.args[0], add_special_tokens=self.count_bos or False)
      for window in utils.get_rolling_token_windows(
          ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1):
        windows.append((None, *utils.make_disjoint_window(window)))
        owners.append(number)
    sums = collections.Counter()
    for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows)):
      sums[number] += nats
    return [float(sums[number]) for number in range(len(requests))]

  def generate_until(self, requests, disable_tqdm=False):
    """Greedy answers; a task that samples is refused."""
    groups, found = collections.defaultdict(list), [None] * len(requests)
    for number, request in enumerate(requests):
      groups[_generation(request.args[1], self.max_length, "a task")].append(number)
    for (tokens, ends), numbers in groups.items():
      ids = [self.tok_encode(requests[number].args[0]) for number in numbers]
      answers = engines.answers(self.engine, ids, tokens=tokens, what="lm-eval answers", ends=ends)
      for number, (text, _) in zip(numbers, answers):
        found[number] = text
        self.cache_hook.add_partial("generate_until", requests[number].args, text)
    return found


def _refuse(why):
  raise run.Refused(why)
