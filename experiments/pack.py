"""Text or conversations -> rows for training. One line a variant; the same TEXT layout for each.

  tiny-aya pack --config=experiments/pack.py --workdir=runs/data --config.text=TEXT \\
      --config.tokenizer=runs/vocab/tokenizer.model --config.licence=odc-by
  tiny-aya pack --config=experiments/pack.py:small --workdir=runs/data --config.text=TEXT \\
      --config.tokenizer=runs/vocab/tokenizer.model
  tiny-aya pack --config=experiments/pack.py:tiny --workdir=runs/tiny \\
      --config.tokenizer=runs/tiny/tokenizer.model       (also :tiny_instruct, _validation, _sft, _pairs)

Expected: WORKDIR/<stage>/<code>/<source>/{manifest.json, rows-*.array_record} and a table of
documents, tokens, rows, bytes per token, fill (100% but for a source's last row with 'split') and
the share of documents that were cut ('truncated'; conversations are dropped instead).
A second call says "up to date".
"""

import ml_collections
from ml_collections import config_dict

from tiny_aya_jax import run

VARIANTS = ("full", "small", "tiny", "tiny_instruct", "tiny_validation", "tiny_sft", "tiny_sft_held_out",
            "tiny_pairs", "tiny_pairs_held_out")


def get_config(variant="full"):
  run.choose("variant", variant, VARIANTS)
  c = ml_collections.ConfigDict()
  c.text = config_dict.placeholder(str)  # DIR/<code>[/<source>]/*.{jsonl,txt}[.gz,.zst], embedded/*
  c.tokenizer = config_dict.placeholder(str)  # tokenizer.model, tokenizer.json or their folder
  c.stage = "train"  # folder under the workdir
  c.languages = ("all",)  # codes, names, regions; 'code' is a language here
  c.T = 8192  # the model's context (tiny_aya.md 1.1)
  c.packing = "split"  # best_fit: documents whole; needed for conversations
  c.part, c.held_out = "all", 0.0  # or "train" and "held_out", and the share that is held out
  c.pairs = 0  # most preference pairs a row; 0: the text is documents or conversations
  c.rows_per_shard = 16384  # 57,351 bytes a row at T 8192: 0.9 GB raw, one open file per shard
  c.licence = config_dict.placeholder(str)  # into the manifest; not set: what clean noted of the text
  c.processes = 0  # sources packed at once; 0: one after the other, in this process
  c.overwrite = False
  if variant == "small":
    c.T = 512  # ours: sixteen times less attention, for models of a few million parameters
  if variant.startswith("tiny"):
    c.text = "embedded/train"
    c.T = 256  # ours: the wiring corpus has short documents, and two cores
    c.rows_per_shard = 1024
    c.licence = "Unicode-3.0"  # made from CLDR
  if variant == "tiny_validation":
    c.text, c.stage = "embedded/validation", "validation"
  if variant == "tiny_instruct":  # beside the text, as the source 'instruct': the cooldown's
    c.text, c.packing = "embedded/instruct", "best_fit"
  if variant.startswith("tiny_sft"):
    c.text, c.packing, c.held_out = "embedded/instruct", "best_fit", 0.1
  if variant.startswith("tiny_pairs"):  # of facts that are held out
    c.text = "embedded/preference" + ("_validation" if variant.endswith("held_out") else "")
    c.packing, c.pairs = "best_fit", 16
  if variant.startswith(("tiny_sft", "tiny_pairs")):
    c.stage = variant.removeprefix("tiny_")
  if c.held_out:
    c.part = "held_out" if variant.endswith("held_out") else "train"
  return c
