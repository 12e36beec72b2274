"""What a Hugging Face folder says of itself beside its weights: its tokenizer, its T, what it is.

Read without jax. The weights are huggingface.py's, how it is spoken to data/template.py's.
"""

import pathlib

from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer as tokenizers

MOST_T = 8192  # of a folder that says more: nobody has looked at what it does beyond (tiny_aya.md 1.1)


def is_one(place):
  """Whether a place is a Hugging Face folder, and no checkpoint or workdir of ours."""
  return (pathlib.Path(place) / "config.json").exists()


def tokenizer(folder, given=None):
  """The Tokenizer of a folder; `given`, a path or None, must have the same ids.

  Refuses a vocabulary that is larger than the folder's embedding.
  """
  found = tokenizers.load(pathlib.Path(folder) / "tokenizer.json")
  rows = _whole("vocab_size", folder, None)
  if found.size > rows:
    raise run.Refused(f"{found.path} has {found.size} ids, the embedding of {folder} only {rows} rows")
  if given and (odd := found.difference(tokenizers.load(given))):
    raise run.Refused(f"{folder} has its own tokenizer, and {given} is another ({odd}): leave config.tokenizer "
                      "unset")
  return found


def T(folder):
  """Most tokens that a folder's model reads."""
  return min(_whole("max_position_embeddings", folder, MOST_T), MOST_T)


def params(folder):
  """The digest of a folder's parameters: what its weights' files are."""
  return run.fingerprint([run.sha256(path) for path in sorted(pathlib.Path(folder).glob("*.safetensors"))])


def _whole(field, folder, default):
  found = run.read_json(pathlib.Path(folder) / "config.json", "Hugging Face folder").get(field, default)
  if type(found) is not int or found < 1:
    raise run.Refused(f"{folder}/config.json: {field} is {found!r}, expected a whole number")
  return found
