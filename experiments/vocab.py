"""The vocabulary: SentencePiece BPE over all 70 languages.

  python -m tiny_aya_jax vocab --config=experiments/vocab.py:tiny --workdir=runs/vocab

Expected: tokenizer.model, tokenizer.json and vocab.json in the workdir; a table of the five best
and five worst languages in tokens per character; `tiny` takes seconds and needs no files. `full`
and `small` read your own text: add --config.text=DIR (DIR/<code>/... or DIR/<code>.txt.gz).
"""

from ml_collections import config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  """full: 262,144 pieces; small: 8,192; tiny: 4,096 from the embedded corpus."""
  run.choose("variant", variant, ("full", "small", "tiny"))
  config = config_dict.ConfigDict()
  config.text = config_dict.placeholder(str)  # a folder of raw text, or embedded/train
  config.languages = ("all",)
  config.size = 262_144  # V of the released models (tiny_aya.md 2.1)
  # Exponent 0.3 on the bytes of each language, as in XLM-R (Conneau et al. 2020); 1 would be the
  # natural distribution. The report weights by family and script instead (its Eq. 1).
  config.temperature = 3.33
  # Ours: the report sampled 50 GB (tiny_aya.md 2.1); SentencePiece would need 500 GB of memory.
  config.bytes = 4_000_000_000
  config.character_coverage = 0.9999  # ours: the rest, mostly rare Han, is bytes
  config.seed = 0  # which lines of the text are sampled
  config.overwrite = False
  if variant == "small":
    config.size = 8192  # ours: of a model of a few million parameters; a larger head is slower
    config.bytes = 200_000_000  # ours: about 2 GB of memory
    config.character_coverage = 0.9995  # ours: SentencePiece's default; Han would fill the rest
  if variant == "tiny":
    config.text = "embedded/train"
    config.size = 4096  # ours: trains in seconds
    config.bytes = 20_000_000  # ours: all of the embedded corpus
    config.character_coverage = 0.9995
  return config
