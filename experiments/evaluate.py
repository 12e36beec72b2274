"""Checkpoints side by side, per language: bits per byte, tasks, language confusion; and a page.

  python -m tiny_aya_jax evaluate --config=experiments/evaluate.py --workdir=runs/report \\
      --config.checkpoints="('runs/pretrain', 'runs/cooldown')" \\
      --config.rows=runs/data/validation --config.tokenizer=runs/vocab/tokenizer.model \\
      --config.tasks.belebele=SETS/belebele --config.tasks.translation=SETS/ntrex

Expected: a table, WORKDIR/evaluation.json, WORKDIR/report.html, and every answer under
WORKDIR/outputs. A task runs when it is given its set: files named by language, or hf://NAME. With
config.baselines.train_text and .validation_text, xz and an order-5 byte n-gram stand beside. With
config.divergence_from=runs/sft, say, each checkpoint's KL to that one, both ways, on the rows.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run

TASKS = ("belebele", "global_mmlu", "include", "global_piqa", "xcopa", "cloze", "translation", "mgsm",
         "qa", "blend", "normad", "confusion", "open", "multijail", "xstest")


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "tiny"))
  c = ConfigDict()
  c.checkpoints = ()  # workdirs (their newest step), checkpoint folders or Hugging Face folders
  c.baseline = config_dict.placeholder(str)  # the column that others are compared with
  c.rows = config_dict.placeholder(str)  # packed validation rows
  c.divergence_from = config_dict.placeholder(str)  # a checkpoint of the same vocabulary
  c.tokenizer = config_dict.placeholder(str)  # of our checkpoints
  c.tasks = ConfigDict({name: config_dict.placeholder(str) for name in TASKS})
  c.languages = ("all",)  # of tasks
  c.limit = 0  # items of a task and language, the first ones; 0: all
  c.choices = "letters"  # or cloze: the answers' own texts; belebele, global_mmlu, include
  c.prompts = "chat"  # turns of a conversation (of a folder, its own template), or plain: text and a line break, for base models
  c.tokens = config_dict.placeholder(int)  # most of an answer; absent: each task's own (tasks.py)
  c.T = config_dict.placeholder(int)  # most tokens of a request; absent: the checkpoint's own
  c.harness = ConfigDict(dict(  # tasks of lm-evaluation-harness
      tasks=(),  # names of tasks or groups
      shots=config_dict.placeholder(int),  # examples in front; absent: the task's own
      chat=False,  # turns of a conversation
      greedy=False,  # also where a task samples; False refuses such a task
      folder=config_dict.placeholder(str),  # of YAML files of your own
  ))
  c.identifier = "py3langid"  # of languages in answers; or a fastText model file
  c.english = config_dict.placeholder(str)  # a word list, for English words in other scripts
  c.judge = ConfigDict(dict(  # any OpenAI-compatible endpoint; its answers are kept and paid once
      url=config_dict.placeholder(str), model="", key_variable="OPENAI_API_KEY", concurrency=8,
      requests_per_minute=500, timeout_seconds=120, attempts=5, price_in=0.0, price_out=0.0,
      body="{}",  # JSON: further fields of a request, or null to leave one of ours out
  ))
  c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, context=1))
  c.batch = 32  # rows at a time
  # Positions of a row of validation whose logits exist at a time; 64: faster on CPU (LOG.md).
  c.chunk = 512 if variant == "full" else 64
  c.dtype = "bfloat16" if variant == "full" else "float32"
  c.attention = "chunked"
  c.heartbeat_seconds = 100  # a process that is silent for so long ends the others
  c.overwrite = False
  c.baselines = ConfigDict(dict(
      train_text=config_dict.placeholder(str), validation_text=config_dict.placeholder(str),
      processes=2,
  ))
  return c
