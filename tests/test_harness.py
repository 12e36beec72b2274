"""lm-evaluation-harness's own tasks on our parameters, and on the exported folder by its own backend."""

import json

import ml_collections
import pytest

from conftest import random_params
from tiny_aya_jax import axes, run
from tiny_aya_jax.data import chat, template, tokenizer as tokenizers
from tiny_aya_jax.evaluate import engine as engines
from tiny_aya_jax.export import huggingface

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'tiny_aya_jax[eval]'")

DAYS = "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag Pazartesi Salı Çarşamba".split()
TASKS = dict(
    days_choice="output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
                "doc_to_target: '{{label}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    days_rolling="output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{long}}'\n"
                 "metric_list: [{metric: bits_per_byte}]\n",
    days_answer="output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: x\n"
                "generation_kwargs: {until: ['a', '\\n'], do_sample: false, max_gen_toks: 12}\n"
                "metric_list: [{metric: exact_match}]\n",
)


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  rows = [dict(text=" ".join(DAYS[: 2 + number % 5]), choices=[DAYS[number % 10], DAYS[number % 7]],
               label=number % 2, long=" ".join(DAYS[number % 4:] * (1 + number % 3)))
          for number in range(24)]
  (folder / "days.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for name, task in TASKS.items():
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'days.jsonl'}}}}}\n{task}")
  from lm_eval.tasks import TaskManager

  return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def exported(cfg, data, tmp_path_factory):
  """A folder as export writes it, of random parameters."""
  folder = tmp_path_factory.mktemp("exported") / "model"
  cfg = ml_collections.ConfigDict(cfg.to_dict() | dict(V=600, window=16))
  huggingface.write(folder, random_params(cfg, seed=5), cfg, tokenizers.load(data / "tokenizer.model"))
  return folder


@pytest.fixture(scope="module")
def engine(exported):
  settings = ml_collections.ConfigDict(dict(batch=8, dtype="float32", attention="chunked"))
  return engines.load(exported, tokenizers.load(exported), axes.mesh(data=8, fsdp=1), settings, 40)


def samples(model, manager, *tasks):
  found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager,
                                  log_samples=True, bootstrap_iters=0)
  return found["samples"], found["results"]


def test_it_answers_as_the_hugging_face_backend_on_the_exported_folder(engine, exported, manager):
  pytest.importorskip("torch", reason="pip install torch==2.13.0")
  pytest.importorskip("accelerate", reason="pip install 'tiny_aya_jax[parity]'")
  from lm_eval.models.huggingface import HFLM

  from tiny_aya_jax.evaluate import harness

  theirs, scores = samples(HFLM(pretrained=str(exported), device="cpu", batch_size=8, max_length=40,
                                dtype="float32"), manager, *TASKS)
  ours, own = samples(harness.Harness(engine, count_bos=True), manager, *TASKS)
  for task in TASKS:
    assert [one["doc_id"] for one in ours[task]] == [one["doc_id"] for one in theirs[task]]
    assert len(ours[task]) == 24
  assert [one["resps"] for one in ours["days_answer"]] == [one["resps"] for one in theirs["days_answer"]]
  assert {one["resps"][0][0] for one in ours["days_answer"]} != {""}
  for task in ("days_choice", "days_rolling"):
    for one, other in zip(ours[task], theirs[task]):
      for mine, given in zip(one["filtered_resps"], other["filtered_resps"]):
        mine, given = (float(x[0] if isinstance(x, (tuple, list)) else x) for x in (mine, given))
        assert mine == pytest.approx(given, abs=1e-3)
  for metric in ("acc,none", "acc_norm,none"):
    assert own["days_choice"][metric] == scores["days_choice"][metric]
  # Without counting BOS it is what that backend says when told to put none in front.
  bare = HFLM(pretrained=str(exported), device="cpu", batch_size=8, max_length=40, dtype="float32",
              add_bos_token=False)
  _, scores = samples(bare, manager, "days_rolling")
  _, own = samples(harness.Harness(engine), manager, "days_rolling")
  assert own["days_rolling"]["bits_per_byte,none"] == pytest.approx(
      scores["days_rolling"]["bits_per_byte,none"], abs=1e-5)


def test_turns_become_the_ids_that_training_saw(engine):
  from tiny_aya_jax.evaluate import harness

  lm = harness.Harness(engine)
  messages = [dict(role="system", content="a"), dict(role="user", content="b"),
              dict(role="assistant", content="c"), dict(role="user", content="Montag")]
  assert lm.tok_encode(lm.apply_chat_template(messages)) == chat.prompt(engine.tokenizer, messages)
  begun = [*messages, dict(role="assistant", content="Dien")]
  assert lm.tok_encode(lm.apply_chat_template(begun, add_generation_prompt=False)) == [
      *chat.prompt(engine.tokenizer, messages), *engine.tokenizer.encode("Dien")]
  plain = "<|END_OF_TURN_TOKEN|>"  # in a text that is no turn it is characters
  assert lm.tok_encode(plain)[1:] == engine.tokenizer.encode(plain)
  with pytest.raises(run.Refused, match="expected user"):
    lm.apply_chat_template([dict(role="assistant", content="x")])


def test_a_folders_own_template_is_read_back_and_what_messages_spell_is_text(engine, exported, tmp_path):
  from tiny_aya_jax.evaluate import harness

  (tmp_path / "chat_template.jinja").write_text(
      "{% for m in messages %}<|USER_TOKEN|>{{ m.content }}{% endfor %}"
      "{% if add_generation_prompt %}<|CHATBOT_TOKEN|>{% endif %}")
  (tmp_path / "config.json").write_text("{}")
  turns, special = template.turns(engine.tokenizer, tmp_path), engine.tokenizer.special
  lm = harness.Harness(engine._replace(turns=turns))
  messages = [dict(role="user", content="a<|END_OF_TURN_TOKEN|>"), dict(role="assistant", content="b")]
  said = [special("<|USER_TOKEN|>"), *engine.tokenizer.encode("a<|END_OF_TURN_TOKEN|>")]
  assert lm.tok_encode(lm.apply_chat_template(messages[:1])) == turns.prompt(messages[:1]) == [
      *said, special("<|CHATBOT_TOKEN|>")]
  assert lm.tok_encode(lm.apply_chat_template(messages, add_generation_prompt=False) + "c") == [
      *said, special("<|USER_TOKEN|>"), *engine.tokenizer.encode("bc")]
  assert lm.chat_template(True) == turns.template.source
  assert lm.tok_encode("<BOS_TOKEN>a") == harness.Harness(engine).tok_encode("<BOS_TOKEN>a")


def test_a_task_that_samples_or_asks_for_too_much_is_refused(engine):
  from lm_eval.api.instance import Instance

  from tiny_aya_jax.evaluate import harness

  for settings, said in ((dict(do_sample=True, temperature=0.8), "samples its answers"),
                         (dict(max_gen_toks=21), "21 tokens, more than half of 40")):
    request = Instance("generate_until", {}, ("Montag", dict(until=["a"], **settings)), 0)
    with pytest.raises(run.Refused, match=said):
      harness.Harness(engine).generate_until([request])


@pytest.mark.parametrize("task, named", [
    ("belebele_deu_Latn", ("belebele", "deu_Latn")), ("belebele_hin_Latn", None), ("belebele", None),
    ("mgsm_direct_de", ("mgsm_direct", "deu_Latn")), ("global_mmlu_full_yo", ("global_mmlu_full", "yor_Latn")),
    ("global_mmlu_full_yo_stem", None), ("global_mmlu_full_yo_virology", None),
    ("include_base_44_hindi", ("include_base_44", "hin_Deva")), ("blimp_npi_present_1", None),
    ("include_base_44_hindi_few_shot_en", ("include_base_44_few_shot_en", "hin_Deva")),
    ("global_piqa_completions_por_latn_braz", None), ("afrimgsm_direct_swa_prompt_1", None),
])
def test_the_language_of_a_task_is_at_the_end_of_its_name(task, named):
  from tiny_aya_jax.evaluate import harness

  assert harness.named_language(task) == named


def test_a_token_that_would_reach_over_the_cut_loses_nothing(engine):
  from tiny_aya_jax.evaluate import harness

  lm, found = harness.Harness(engine), 0
  tokenizer = engine.tokenizer
  for one in DAYS:
    for at in range(1, len(one)):
      before, rest = engines.pair(tokenizer, one[:at], one[at:])
      assert tokenizer.decode([*before, *rest]) == one and rest
      found += tokenizer.encode(one)[: len(before)] != before
      assert lm._encode_pair(one[:at], one[at:])[1]
  assert found
