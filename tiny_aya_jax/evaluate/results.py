"""What evaluation.json holds: measures per language made of outputs, rolled up; no jax."""

import importlib.metadata
import math
import time

from tiny_aya_jax import client, languages, run
from tiny_aya_jax.evaluate import baselines, rollups

PACKAGES = ("jax", "tiny_aya_jax", "sacrebleu", "py3langid", "lm_eval")
FEW_BYTES = 10_000  # of validation text, below which a figure is too little to rank by
FEW_TOKENS = 2_500  # about as much


def of(subjects, work, outputs, tools, judge, config):
  """What evaluation.json holds; the page is drawn from it alone."""
  measures = [*_bits(subjects, work, outputs, config)] if work["manifests"] else []
  for reference in work["reference"]:
    measures += _divergences(subjects, reference, outputs)
  unscored = []
  if work["items"]:
    from tiny_aya_jax.evaluate import tasks

    if judge:
      more = client.fields_of(config.judge.body, "config.judge.body")

      def ask(requests, read):
        requests = [client.merged(request, more) for request in requests]
        return [value for value, _ in judge.json_answers(requests, read)]

      tools = tools._replace(ask=ask)
    table = tasks.table(config.choices)
    for name in work["items"]:
      if table[name].judged and not judge:
        why = "config.judge.url is not set: answers are kept, not judged"
        unscored.append(dict(task=name, why=why))
      found = {column: table[name].measures(outputs[column][name], tools) for column in outputs}
      measures += _measures(name, found, work["items"][name], tasks.FEW)
  measures += _harness_measures(outputs) if config.harness.tasks else []
  measures = [measure for measure in measures if any(  # word pass rate, where no language has one
      value is not None for column in measure["columns"].values() for value in column.values())]
  named = {entry["task"] for entry in (*measures, *unscored)}
  unscored += [dict(task=name, why="no measure has a value in any language: see its answers")
               for name in work["items"] if name not in named]
  for measure in measures:
    measure["columns"] = {name: {code: _finite(value) for code, value in column.items()}
                          for name, column in measure["columns"].items()}
    measure["summary"] = {
        name: rollups.summary(column, measure["better"], measure["columns"].get(config.baseline))
        for name, column in measure["columns"].items()}
  order = {code for measure in measures for column in measure["columns"].values() for code in column}
  known = [code for code in languages.select(("all",)) if code in order]
  return dict(
      checkpoints={subject["name"]: dict(path=str(subject["path"]), step=subject["step"],
                                         dtype=config.dtype, identity=run.fingerprint(subject["identity"]))
                   for subject in subjects},
      baseline=config.baseline,
      languages={code: rollups.facts(code) for code in (*known, *sorted(order - set(known)))},
      measures=measures, fertility=_fertility(work["manifests"]) if work["manifests"] else None,
      judge=dict(model=config.judge.model, spent=judge.spent()) if judge else None,
      unscored=unscored, versions=_versions(),
      time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
  )


def _counts(parts, items):
  """Items that count, the fewest of all checkpoints: some have no verdict."""
  given = [part.counts for part in parts if part.counts]
  return {code: min([found.get(code, len(rows)) for found in given] or [len(rows)])
          for code, rows in items.items()}


def _finite(value):
  """JSON has no NaN: what a model that has diverged gives is missing."""
  return value if value is not None and math.isfinite(value) else None


def _measures(name, found, items, few):
  """{column: [tasks.Measure]} of one task -> measures of the result, a column a checkpoint."""
  for parts in zip(*found.values(), strict=True):
    first = parts[0]
    yield dict(
        task=name, measure=first.name, better=first.better, note=first.note, chance=first.chance,
        signature=first.signature, unit="items", few=few, beside={},
        counts=_counts(parts, items),
        columns={column: part.values for column, part in zip(found, parts)})


def _harness_measures(outputs):
  """Measures of lm-eval's tasks, the languages of one task beside each other."""
  found = {}
  for column, units in outputs.items():
    for item, answer in (pair for pairs in units["harness"].values() for pair in pairs):
      measure = found.setdefault((item["task"], item["measure"]), dict(
          task=f"lm-eval {item['task']}", measure=item["measure"], better=item["better"], chance=None,
          note="lm-evaluation-harness", signature=None, unit="items", counts={}, few=100, beside={},
          columns={name: {} for name in outputs}))
      if item["language"] in measure["columns"][column]:
        run.say(f"lm-eval gives {item['task']} {item['measure']} of {item['language']} twice: the first "
                "counts")
        continue
      measure["columns"][column][item["language"]] = answer
      measure["counts"][item["language"]] = item["items"]
  return list(found.values())


def _bits(subjects, work, outputs, config):
  """The measure of bits per byte, with what costs nothing beside it."""
  counts, columns, beside = _bytes(work["manifests"]), {}, {}
  if config.baselines.train_text:
    rows = baselines.table(config.baselines.train_text, config.baselines.validation_text, list(counts),
                           config.baselines.processes)
    beside = {name: {code: row[name] for code, row in rows.items()}
              for name in ("xz_alone", "xz_given", "ngram")}
  if before := subjects[0]["untrained"]:
    columns["untrained"] = before
  for subject in subjects:
    pairs = outputs[subject["name"]]["bits_per_byte"][None]
    columns[subject["name"]] = {item["language"]: answer for item, answer in pairs}
  yield dict(
      task="bits_per_byte", measure="bits per byte", better="lower", chance=None, signature=None,
      note="held-out text, every row once; special tokens cost bits and count no bytes",
      unit="bytes", counts=counts, few=FEW_BYTES, beside=beside,
      columns={name: {code: column.get(code) for code in counts} for name, column in columns.items()})


def _divergences(subjects, reference, outputs):
  """Two measures: how far each checkpoint is from the reference, either way."""
  found = {subject["name"]: {item["language"]: answer for item, answer in
                             outputs[subject["name"]]["divergence"][None]} for subject in subjects}
  counts = {code: entry["tokens"] for code, entry in next(iter(found.values())).items()}
  for name, measure in (("kl_ab", f"KL(checkpoint || {reference['name']})"),
                        ("kl_ba", f"KL({reference['name']} || checkpoint)")):
    yield dict(
        task="divergence", measure=measure, better="lower", chance=None, signature=None,
        note=f"nats a token over the whole vocabulary, on every row of validation; lower is nearer to "
             f"{reference['path']}, not better in itself",
        unit="tokens", counts=counts, few=FEW_TOKENS, beside={},
        columns={column: {code: entry[name] for code, entry in values.items()}
                 for column, values in found.items()})


def _bytes(manifests):
  """{language: validation bytes}, in the order of the languages table."""
  return _summed(manifests, "bytes")


def _fertility(manifests):
  """{language: {"bytes_per_token", "tokens"}} of the validation rows: what the tokenizer costs."""
  tokens = _summed(manifests, "tokens")
  return {code: dict(bytes_per_token=size / tokens[code], tokens=tokens[code])
          for code, size in _bytes(manifests).items() if tokens[code]}


def _summed(manifests, field):
  found = {}
  for manifest in manifests:
    found[manifest["language"]] = found.get(manifest["language"], 0) + manifest[field]
  order = languages.select(("all",))
  return {code: found[code] for code in (*order, *sorted(found.keys() - set(order))) if code in found}


def _versions():
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
