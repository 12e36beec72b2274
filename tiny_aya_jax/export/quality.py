"""What each quantisation costs each language, in bits per byte of held-out text.

The weights of a GGUF file, decoded, run through our own forward pass in fp32: what differs between
two kinds is their weights alone. llama.cpp also rounds what is multiplied with them: of a small
model that moved a language by 0.003 bits per byte at most, and the mean by 0.0003.
The report's Figures 15 and 16 show the same in chrF and win rates.
"""

import gc

import jax

from tiny_aya_jax import axes, run
from tiny_aya_jax.data import loader
from tiny_aya_jax.evaluate import rollups
from tiny_aya_jax.export import gguf
from tiny_aya_jax.model import bits
from tiny_aya_jax.model.transformer import TinyAya

MOST = 5  # languages that are named


def bits_per_byte(models, rows, tokenizer, *, batch, chunk, mesh=None, attention="chunked"):
  """{kind: path of a GGUF file}, folder of packed rows -> {kind: {language: bits per byte}}.

  Every row counts once. One model is in memory at a time. batch: rows at once; chunk: positions
  whose logits are held at once. Refuses rows of another tokenizer, and files of different models.
  """
  mesh = mesh or axes.mesh()
  manifests = loader.read_manifests(rows)
  if manifests[0]["tokenizer_sha256"] != tokenizer.sha256:
    raise run.Refused(f"{rows} was packed with tokenizer {manifests[0]['tokenizer_sha256'][:12]}, "
                      f"{tokenizer.path} is {tokenizer.sha256[:12]}")
  languages = [manifest["language"] for manifest in manifests]
  found, shared, score = {}, None, None
  for kind, path in models.items():
    params, cfg = gguf.read(path)
    if shared is None:
      shared, model = cfg, TinyAya(cfg, backend=attention)
      score = bits.scorer(model, tokenizer.bytes_V, len(languages), chunk=chunk)
    if cfg.to_dict() != shared.to_dict():
      raise run.Refused(f"{path} is a model of {cfg.to_dict()}, the others of {shared.to_dict()}")
    params = jax.device_put(params, axes.shardings(mesh, params))
    total = -(-sum(manifest["rows"] for manifest in manifests) // batch)
    batches = run.progress(loader.every_row_once(manifests, batch, axes.process_part(mesh)), f"bits per byte, {kind}",
                           total=total)
    with jax.default_matmul_precision("highest"):
      sums = bits.evaluate(score, params, batches, mesh, languages)
    found[kind] = {language: entry["bits_per_byte"] for language, entry in sums.items()}
    del params  # before the next is read
    gc.collect()
  return found


def table(found, base):
  """{kind: {language: bits per byte}} -> {kind: dict(...)}, each beside `base`, the unquantised kind.

  mean, deviation, poorest, worst {language: bits per byte}: over languages (rollups.summary);
  difference: of the means; lost: {language: difference}, the five that lose most, that first.
  """
  run.choose("unquantised kind", base, found)
  summaries = {kind: rollups.summary(column, "lower") for kind, column in found.items()}
  rows = {}
  for kind, column in found.items():
    lost = {language: value - found[base][language] for language, value in column.items()}
    most = sorted(lost, key=lost.get, reverse=True)[:MOST] if kind != base else []
    kept = ("languages", "mean", "deviation", "poorest", "worst")
    rows[kind] = {name: summaries[kind][name] for name in kept}
    rows[kind] |= dict(difference=summaries[kind]["mean"] - summaries[base]["mean"],
                       lost={language: lost[language] for language in most})
  return rows


def record(found, base, files):
  """quantisation.json: of each kind its file (gguf.facts), its row of the table, every language."""
  return dict(base=base, kinds={
      kind: dict(file=files[kind], **row, bits_per_byte=found[kind])
      for kind, row in table(found, base).items()})


def markdown(record):
  """The model card's table of a `record`, in lines of text; which types a file really holds included."""
  lines = ["| kind | MB | bits per weight | tensors | bits per byte: mean | deviation | worst | lost | "
           "most lost |", "|---|---|---|---|---|---|---|---|---|"]
  for kind, row in record["kinds"].items():
    file, most = row["file"], list(row["lost"].items())[:3]
    lines.append("| " + " | ".join((
        kind, f"{file['bytes'] / 1e6:,.1f}", f"{file['bits_per_weight']:.2f}",
        ", ".join(f"{tensors} {type}" for type, tensors in file["types"].items()),
        f"{row['mean']:.4f}", f"{row['deviation']:.4f}",
        f"{next(iter(row['worst']))} {row['poorest']:.4f}", f"{row['difference']:+.4f}",
        ", ".join(f"{language} {value:+.4f}" for language, value in most) or "-")) + " |")
  return "\n".join(lines)
