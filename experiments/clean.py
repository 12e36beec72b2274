"""Raw text -> the same without what is not the language, not text, or there already; and a report.

  tiny-aya clean --config=experiments/clean.py --workdir=runs/text --config.text=TEXT
  tiny-aya clean --config=experiments/clean.py:tiny --workdir=runs/tiny/text

Expected: WORKDIR/<code>/<source>/*.jsonl.gz, which the other verbs read; WORKDIR/clean.json and
clean.html: kept, dropped by reason, samples. Every rule is a veto; `full` is mild enough to keep
at least 95% of clean books, news and documentation in every language. For crawled pages give
FineWeb-2's thresholds (config.thresholds), set config.repetition_words=0 and raise
config.quality.min_doc_words to Gopher's 50: they drop a third of what is kept here.
"""

import ml_collections
from ml_collections import config_dict

from tiny_aya_jax import run


def get_config(variant="full"):
  run.choose("variant", variant, ("full", "tiny"))
  c = ml_collections.ConfigDict()
  # DIR/<code>[/<source>]/*.{jsonl,txt,parquet}, embedded/train, or hf://OWNER/NAME
  c.text = config_dict.placeholder(str)
  c.hf = ml_collections.ConfigDict(dict(  # of hf://OWNER/NAME, streamed
      subset="{code}",  # {code}, {iso}; cmn_Hans and cmn_Hant ask for cmn_Hani and are split
      split="train",
      field="text",
      revision=config_dict.placeholder(str),  # a commit: what is there may change
      tasks=8,  # a language's stream is read in so many parts
      limit=config_dict.placeholder(int),  # documents a task; all without it
  ))
  c.languages = ("all",)
  c.licence = config_dict.placeholder(str)  # of text whose records name none
  c.identifier = "py3langid"  # or a fastText model file, such as GlotLID v3's, which sees all 70
  # Ours: on held-out text of 68 languages no document and 0.04% of lines are vetoed falsely at 3,
  # and 99% of lines in another language are caught (LOG.md).
  c.margin = 3.0
  c.veto = "document"  # or "line": cut lines of another language out of documents
  c.script_share = 0.3  # ours: least share of letters in the language's script; pages quote names
  c.thresholds = config_dict.placeholder(str)  # DIR/<code>.yml as FineWeb-2's configs
  # datatrove's Gopher and FineWeb filters, each with its own argument names. Ours are far milder
  # than the published ones, which are made for crawled pages: drop what is mostly repetition.
  c.repetition_words = 100  # ours: shares of repeated n-grams mean nothing in a shorter document
  c.repetition = ml_collections.ConfigDict(dict(
      dup_line_frac=0.7, dup_para_frac=0.7, dup_line_char_frac=0.7, dup_para_char_frac=0.7,
      top_n_grams=((2, 0.4), (3, 0.4), (4, 0.4)),
      dup_n_grams=((5, 0.7), (6, 0.7), (7, 0.7), (8, 0.7), (9, 0.7), (10, 0.7)),
  ))
  c.quality = ml_collections.ConfigDict(dict(
      min_doc_words=1, max_doc_words=100_000_000, min_avg_word_length=1.5, max_avg_word_length=20.0,
      max_symbol_word_ratio=0.1, max_bullet_lines_ratio=1.0,  # dialogue in books
      max_ellipsis_lines_ratio=0.9,
      max_non_alpha_words_ratio=0.4,  # the least share of words with a letter, despite its name
  ))
  c.lines = ml_collections.ConfigDict(dict(
      line_punct_thr=0.0, short_line_thr=1.0, short_line_length=30, char_duplicates_ratio=0.7,
      new_line_ratio=1.0,
  ))
  c.min_stop_words = 2  # Gopher's; only where config.thresholds lists a language's stop words
  c.deduplicate = True  # within a language, over all its sources; one of each cluster is kept
  c.minhash = ml_collections.ConfigDict(dict(n_grams=5, buckets=14, hashes=8))  # as FineWeb: 0.72
  c.urls = True  # datatrove's block lists, for documents that have a url
  c.blocked = ()  # files of more blocked domains, one a line
  c.pii = True  # e-mail and public IP addresses are replaced
  c.test_sets = ()  # files or folders (.txt .tsv .csv .json .jsonl) that must not be in the text
  c.test_ngram = 13  # words shared with a test set that are too many (GPT-3's)
  c.classifier = config_dict.placeholder(str)  # 'package.module:function' (texts, code) -> scores
  c.classifier_threshold = 0.5
  c.samples = 5  # dropped documents that the report shows, a reason and language
  c.executor = "local"  # or "slurm", "ray"
  c.workers = 2  # tasks at once
  c.slurm = ml_collections.ConfigDict(dict(
      partition=config_dict.placeholder(str), time="24:00:00", mem_per_cpu_gb=4,
      venv=config_dict.placeholder(str), qos="normal",
  ))
  c.overwrite = False
  if variant == "tiny":
    c.text, c.licence = "embedded/train", "Unicode-3.0"
  return c
