"""The vocabulary: SentencePiece BPE over all 70 languages, and what it costs each of them.

  python -m tiny_aya_jax vocab --config=experiments/vocab.py:tiny --workdir=runs/vocab

Expected: tokenizer.model, tokenizer.json and vocab.json in the workdir, fairness.json and
fairness.html beside them; the realised shares by bucket, then the ratio of the worst language's
tokens per character to the best's. `tiny` takes seconds and needs no files. `full` and `small` read
your own text: add --config.text=DIR (DIR/<code>/... or DIR/<code>.txt.gz) and, held out,
--config.validation=DIR. More:

  --config.beside="('proportional', 'uniform', 'A', 'B')" --config.bytes=2000000
      the same by these rules, beside each other in the page; fewer bytes than the text has, or
      every rule takes all of it
  --config.tokenizer=FILE
      trains nothing: measures a tokenizer.json or tokenizer.model
"""

from ml_collections import ConfigDict, config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  """full: 262,144 pieces; small: 8,192; tiny: 4,096 from the embedded corpus."""
  run.choose("variant", variant, ("full", "small", "tiny"))
  config = ConfigDict()
  config.text = config_dict.placeholder(str)  # a folder of raw text, or embedded/train
  config.validation = config_dict.placeholder(str)  # held-out text; absent: parts of the above
  config.languages = ("all",)
  config.tokenizer = config_dict.placeholder(str)
  config.size = 262_144  # V of the released models (tiny_aya.md 2.1)
  # The report's Eq. 1; its weights are unpublished. Reading A is the formula's (tiny_aya.md 3). Its
  # w^d is the share in the training mixture, whose temperature is 3.33 (pretrain.py).
  config.mixture = ConfigDict(dict(
      kind="buckets",
      temperature=3.33,
      alpha=config_dict.placeholder(float),
      epochs=config_dict.placeholder(float),  # unimax; its budget is config.bytes
      by="family",
      reading="A",
      bucket_temperature=config_dict.placeholder(float),
      weights=(),
      keep=(),
      fixed=(),  # (("eng_Latn", 0.3),) is what the method paper is said to do (tiny_aya.md 3)
      floor=config_dict.placeholder(float),
  ))
  config.bytes = 50_000_000_000  # report 2.1; needs 500 GB of memory, and less is refused
  # How often the text of a language may be taken that has less than its share; the report says
  # nothing of repeats. With equal shares 4 costs English 0.6% more tokens, Igbo 14% less (LOG.md).
  config.repeat = 1
  config.character_coverage = 0.9999  # ours: the rest, mostly rare Han, is bytes
  config.seed = 0  # which lines of the text are sampled
  config.beside = ()  # names of BESIDE in data/vocab.py
  config.processes = 1  # vocabularies trained at once; each is one thread
  config.plot = True  # fairness.svg; needs matplotlib
  config.overwrite = False
  if variant == "small":
    config.size = 8192  # ours: of a model of a few million parameters; a larger head is slower
    config.bytes = 200_000_000  # ours: about 2 GB of memory
    config.character_coverage = 0.9995  # ours: SentencePiece's default; Han would fill the rest
  if variant == "tiny":
    config.text, config.validation = "embedded/train", "embedded/validation"
    config.size = 4096  # ours: trains in seconds
    config.bytes = 20_000_000  # ours: all of the embedded corpus, whatever the rule
    config.character_coverage = 0.9995
  return config
