"""Post-training data made by other models: prompts translated and made natural, answers fused from
several teachers, translations filtered; and the preference pairs of identity and safety. A variant
is a recipe; each reads what another wrote.

  tiny-aya synthesize --config=experiments/synthesize.py:translate --workdir=runs/prompts \\
      --config.text=ENGLISH --config.languages="('eng_Latn',)" \\
      --config.endpoints.command.url=http://HOST:8000/v1 --config.translate.models="('command',)"
  tiny-aya synthesize --config=experiments/synthesize.py:transform --workdir=runs/natural \\
      --config.text=runs/prompts --config.endpoints.command.url=http://HOST:8000/v1
  tiny-aya synthesize --config=experiments/synthesize.py:fuse --workdir=runs/answers \\
      --config.text=runs/natural --config.endpoints.gemma.url=... (also command, deepseek, judge)
  tiny-aya synthesize --config=experiments/synthesize.py:filter --workdir=runs/translations \\
      --config.text=PAIRS
  tiny-aya synthesize --config=experiments/synthesize.py:pairs --workdir=runs/pairs \\
      --config.pairs.name=Aya --config.pairs.maker=Cohere

Expected: WORKDIR/<code>/<recipe>/rows.jsonl, which pack reads; ledger.ndjson, every item in one
state; synthesis.json and a table of it: kept, dropped by reason, failed, what was spent. Killed, it
goes on where it was. A key is the name of an environment variable, never in a config.
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run

VARIANTS = ("translate", "transform", "fuse", "filter", "pairs")
# On NTREX's news in 67 languages 0.0% of pairs are longer than four times the other, and in 0.6%
# of pairs with digits on both sides fewer than a third of them are the same (LOG.md).
LONGEST, DIGITS = 4.0, 0.34


def get_config(variant="translate"):
  run.choose("variant", variant, VARIANTS)
  c = ConfigDict()
  c.recipe = variant
  c.languages = ("all",)  # of the text; of pairs, those that pairs are made in
  c.name = config_dict.placeholder(str)  # of the folder in <code>/; absent: the recipe
  c.part = (0, 1)  # (i, n): every n-th item from the i-th, by n processes on one workdir
  c.overwrite = False  # also asks again what failed in a finished run
  c[variant] = dict(translate=translate, transform=transform, fuse=fuse, filter=filter_pairs,
                    pairs=pairs)[variant]()
  if variant != "pairs":
    c.text = config_dict.placeholder(str)  # DIR/<code>[/<source>]/*.jsonl, DIR/*.jsonl with "lang"
    c.limit = 0  # records a language, the first ones; 0: all
    c.identifier = "py3langid"  # or a fastText model file, such as GlotLID v3's (the report: FastText)
    c.margin, c.script_share = 3.0, 0.3  # as clean.py's
    c.endpoints = ConfigDict(dict(  # the report's models (section 2.3), served by whoever serves them
        command=endpoint("CohereLabs/command-a-translate-08-2025" if variant in ("translate", "filter")
                         else "CohereLabs/c4ai-command-a-03-2025"),
        deepseek=endpoint("deepseek-ai/DeepSeek-V3"),
        gemma=endpoint("google/gemma-3-27b-it"),
        judge=endpoint("CohereLabs/c4ai-command-a-03-2025", temperature=0.0),
    ))
  return c


def endpoint(model, temperature=0.3):
  """An OpenAI-compatible endpoint. temperature: 0.3 in arXiv 2510.00931 and 2510.19806."""
  return ConfigDict(dict(
      url=config_dict.placeholder(str), model=model, key_variable="", concurrency=8,
      requests_per_minute=500, timeout_seconds=300, attempts=5, price_in=0.0, price_out=0.0,
      temperature=temperature, tokens=4096,  # of an answer; a longer one is dropped as cut short
      body="{}",  # JSON: further fields of a request, or null to leave one of ours out
  ))


def translate():
  return ConfigDict(dict(
      targets=("all",),
      what="prompts",  # without the last answer, for fuse to give; or conversations, whole
      models=("command", "deepseek"),  # one is chosen for each language (report 2.3)
      scores=config_dict.placeholder(str),  # JSON {code: {model: score}}; absent: by the dev set
      dev=config_dict.placeholder(str),  # a folder of text; its first texts a language
      dev_items=50,  # ours: a mean of 50 scores, as many requests for each model and language
      # An endpoint that scores 0 to 100, or a command that reads JSON lines and prints numbers, as of
      # xCOMET-XL or AfriCOMET (the report's).
      estimator=dict(endpoint="judge", command=config_dict.placeholder(str)),
      longest=LONGEST,
  ))


def transform():
  return ConfigDict(dict(
      models=("command",),  # report 2.3: Command A or DeepSeek-V3, chosen for each language
      scores=config_dict.placeholder(str),  # JSON {code: {model: score}}, for several models
      # Cultural and difficult are on top of natural. Half of each: best all-round (2510.19806).
      shares=dict(plain=0.0, natural=0.0, cultural=0.5, difficult=0.5),
      seed=0,
  ))


def fuse():
  return ConfigDict(dict(
      teachers=("gemma", "command", "deepseek"), fusor="command",  # report 2.3
      samples=1,  # of each teacher: 2510.00931's for data
      least=2,  # ours: candidates without which there is nothing to fuse
      fallback="judge",  # the best candidate by the judge where the fusor's answer is unmarked; or drop
      judge="judge",
      longest=2.0,  # ours: of the longest candidate
  ))


def filter_pairs():
  def hook(least):  # a placeholder of its own in each: one that is shared is one field
    return dict(endpoint=config_dict.placeholder(str), command=config_dict.placeholder(str),
                file=config_dict.placeholder(str),  # JSON lines of "item", as in the ledger, and "score"
                least=least)

  return ConfigDict(dict(
      other="eng_Latn",  # what a language's pairs are with, where a record does not say it
      longest=LONGEST, digits=DIGITS,
      quality=hook(70.0),  # ours: of 100; set it for your estimator's scale
      difficulty=hook(25.0),  # ours; higher is harder (negate Sentinel-25-src)
      back=(),  # languages that targets are translated back into (the report: Command A's 23)
      translator="command",
  ))


def pairs():
  return ConfigDict(dict(
      name=config_dict.placeholder(str), maker=config_dict.placeholder(str),
      speaks=("all",), wrong=("eng_Latn", "fra_Latn", "deu_Latn", "spa_Latn", "cmn_Hans"),
      others=("ChatGPT/OpenAI", "Gemma/Google", "DeepSeek/DeepSeek-AI"),  # whose answers teach
      templates="experiments/identity.json",  # 47 languages, ours
      safety=config_dict.placeholder(str),  # JSON lines of lang, prompt, safe, unsafe
  ))
