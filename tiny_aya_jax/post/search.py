"""Which merge: candidates (operators at strengths) are merged and measured, or their scores predicted.

Of two checkpoints, Global first and a region's second; a strength is the share of the second.
Measured is, per language, minus the bits per byte of development rows, and as safety the share of
pairs whose chosen answer is the likelier one a token, against Global's own. What was measured before
a stop is not measured again (WORKDIR/search.jsonl). Chooses by selection.py; the pair is described
by similarity.py. One process; merges nothing itself.
"""

import functools
import math
import statistics

from tiny_aya_jax import languages, run
from tiny_aya_jax.data import loader, tokenizer as tokenizers
from tiny_aya_jax.post import selection

# What needs jax is imported behind the checks: a wrong field is refused in a second.
LEAST = dict(minimum_weight=0, tolerance=0, batch=1, chunk=1, probe_tokens=1)


def settings(operator, strength):
  """What `merge` takes for a candidate: a strength is the share of the second model."""
  return dict(t=strength) if operator in ("slerp", "nuslerp") else dict(weights=(1 - strength, strength))


def check(config, reads):
  """Refuses what cannot be; -> {"candidates", "languages", and the manifests of rows, safety, probe}.

  config: of the verb merge. reads: {operator: what it reads}, of which `base` is looked at.
  """
  asked = config.search
  candidates = list(asked.candidates)
  if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
             and isinstance(pair[1], (int, float)) for pair in candidates):
    raise run.Refused(f"config.search.candidates are {asked.candidates}, expected pairs of an operator and "
                      "a strength, such as (('linear', 0.3), ('slerp', 0.5))")
  candidates = [selection.parsed(selection.candidate(*pair)) for pair in candidates]  # as they are named
  candidates += [selection.parsed(selection.NULL)] * (selection.parsed(selection.NULL) not in candidates)
  for operator, strength in candidates:
    run.choose("operator in config.search.candidates", operator, reads)
    if not 0 <= strength <= 1:
      raise run.Refused(f"candidate {operator} has strength {strength}, expected 0 (the first checkpoint) to 1")
    if "base" in reads[operator] and not config.base:
      raise run.Refused(f"candidate {operator} needs config.base, what both checkpoints were trained from")
  if len(config.checkpoints) != 2:
    raise run.Refused(f"a search is over 2 checkpoints, Global and a region's: {len(config.checkpoints)} given")
  if not asked.rows and not asked.learn_from:
    raise run.Refused("a search needs config.search.rows, packed development rows to measure on, or "
                      "config.search.learn_from, the merge.json of earlier searches, to predict")
  if asked.learn_from and not asked.probe:
    raise run.Refused("config.search.learn_from predicts from the similarity on config.search.probe: set it")
  if asked.safety and not asked.rows:
    raise run.Refused("config.search.safety is measured beside config.search.rows: set them, or leave it out")
  if asked.rows:
    run.existing("tokenizer", config.tokenizer)
  for name, least in LEAST.items():
    if not least <= asked[name] < math.inf or name == "minimum_weight" and asked[name] > 1:
      raise run.Refused(f"config.search.{name} is {asked[name]}, expected at least {least}"
                        + " and at most 1" * (name == "minimum_weight"))
  if not 0 < asked.ridge < math.inf:
    raise run.Refused(f"config.search.ridge is {asked.ridge}, expected more than 0")
  run.choose_fields(asked, "dtype", "attention")
  found = {name: loader.read_manifests(asked[name]) if asked[name] else []
           for name in ("rows", "safety", "probe")}
  for name, kinds in dict(rows=(loader.FIELDS,), probe=(loader.FIELDS,),
                          safety=(loader.PAIRS, loader.SCORED)).items():
    for manifest in found[name]:
      loader.check_fields(manifest, kinds)
  chosen = set(languages.select(asked.languages))
  measured = found["rows"] or found["probe"]
  codes = sorted({manifest["language"] for manifest in measured} & chosen)
  if not codes:
    raise run.Refused(f"config.search.languages {asked.languages} have no rows in {asked.rows or asked.probe}")
  found["rows"] = [manifest for manifest in found["rows"] if manifest["language"] in codes]
  earlier = selection.read_rows(asked.learn_from) if asked.learn_from else []
  if asked.learn_from and not earlier:
    raise run.Refused(f"config.search.learn_from {tuple(asked.learn_from)} hold no measured language of their "
                      "probes: there is nothing to learn from")
  return found | dict(candidates=candidates, languages=codes, earlier=earlier)


def check_tokenizer(work, sha256):
  """Refuses rows of another tokenizer than the models'."""
  for manifest in (one for name in ("rows", "safety", "probe") for one in work[name]):
    if manifest["tokenizer_sha256"] != sha256:
      raise run.Refused(f"{manifest['path']} was packed with tokenizer {manifest['tokenizer_sha256'][:12]}, "
                        f"the models have {sha256[:12]}: pack it again")


def fingerprint(config, work):
  """Of all that the search depends on besides the models."""
  return [[manifest["sha256"] for name in ("rows", "safety", "probe") for manifest in work[name]],
          work["candidates"], work["languages"], work["earlier"],
          {name: value for name, value in config.search.to_dict().items()
           if name not in ("rows", "safety", "probe", "learn_from", "batch", "chunk", "mesh")}]


def decide(config, work, cfg, models, base, merged, workdir, key):
  """The choice and all it rests on, for merge.json: dict(region, operator, strength, selection, ...).

  models: the two parameter trees, base: theirs or None. merged(operator, strength) -> a tree. key:
  fingerprint of models and recipe, under which measurements are kept. Refuses if no candidate is safe.
  """
  from tiny_aya_jax import axes
  from tiny_aya_jax.post import similarity

  asked, mesh = config.search, axes.mesh(**config.search.mesh.to_dict())
  model = _model(asked, cfg, mesh, work)
  found, predicted, predictor = dict(region=asked.region), None, None
  if work["probe"]:
    pair = [_placed(mesh, tree) for tree in models]
    found["similarity"] = similarity.features(
        model, pair, base, work["probe"], mesh, asked)
    del pair
    run.say(similarity.table(found["similarity"]))
  names = [selection.candidate(*one) for one in work["candidates"]]
  options = dict(minimum_weight=asked.minimum_weight)
  if work["earlier"]:
    predictor = selection.fit(work["earlier"], asked.ridge)
    scores = selection.predict(predictor, found["similarity"], names, work["languages"])
    predicted = selection.choose(scores, work["languages"], source="predicted", **options)
    found |= dict(predicted=predicted, predictor=predictor)
    run.say(selection.table(predicted, predictor))
  if not work["rows"]:
    return found | _kept(predicted)
  measure = _measure(config, work, model, mesh)
  rows = _measured(work["candidates"], models, merged, measure, workdir / "search.jsonl", key)
  found["scores"] = {name: row["scores"] for name, row in rows.items() if name != "baseline"}
  if work["safety"]:
    options |= dict(safety={name: row["safety"] for name, row in rows.items() if name != "baseline"},
                    baseline_safety=rows["baseline"]["safety"], tolerance=asked.tolerance)
  selected = selection.choose(found["scores"], work["languages"], **options)
  compared = selection.agreement(predicted, selected) if predicted else None
  run.say(selection.table(selected, compared=compared))
  return found | dict(selection=selected, agreement=compared) | _kept(selected)


def _kept(selected):
  if selected["choice"] is None:
    raise run.Refused(selected["why"])
  operator, strength = selection.parsed(selected["choice"])
  return dict(operator=operator, strength=strength)


def _model(asked, cfg, mesh, work):
  import jax.numpy as jnp
  import ml_collections

  from tiny_aya_jax.model import attention
  from tiny_aya_jax.model.transformer import TinyAya
  from tiny_aya_jax.train import fields

  for manifest in (*work["rows"], *work["safety"], *work["probe"]):
    fields.check_batch(ml_collections.ConfigDict(
        dict(data=dict(batch=asked.batch, T=manifest["T"]), accumulate=1)), mesh)
  attention.refuse_unless_possible(
      asked.attention, asked.dtype, cfg.H, mesh.devices.flat[0], mesh.shape["context"])
  return TinyAya(cfg, jnp.dtype(asked.dtype), asked.attention)


def _placed(mesh, tree):
  import jax

  from tiny_aya_jax import axes

  return jax.device_put(tree, axes.shardings(mesh, tree))


def _measured(candidates, models, merged, measure, path, key):
  """{"baseline" or candidate: dict(scores, safety)}: those of `path` under `key`, and the rest, measured."""
  rows = {row["candidate"]: row for row in run.read_lines(path) if row.get("key") == key}
  trees = dict(baseline=lambda: models[0])
  trees |= {selection.candidate(*one): functools.partial(merged, *one) for one in candidates}
  due = {name: make for name, make in trees.items() if name not in rows}
  if len(due) < len(trees):
    run.say(f"{len(trees) - len(due)} of {len(trees)} were measured before: {path}")
  for name, make in run.progress(due.items(), "search", total=len(due)):
    rows[name] = dict(key=key, candidate=name) | measure(make())
    run.write_lines(path, rows.values())
  return {name: rows[name] for name in trees}


def _measure(config, work, model, mesh):
  """A function: parameter tree -> dict(scores {code: minus bits per byte}, safety or None)."""
  import jax

  from tiny_aya_jax import axes
  from tiny_aya_jax.model import bits, preference

  asked = config.search
  bytes_V = tokenizers.load(config.tokenizer).bytes_V
  codes, pairs = ([manifest["language"] for manifest in work[name]] for name in ("rows", "safety"))
  score = bits.scorer(model, bytes_V, len(codes), chunk=asked.chunk)
  likelier = jax.jit(functools.partial(
      preference.likelier, model=model, chunk=asked.chunk, sources=len(pairs),
      J=work["safety"][0]["pairs"] if pairs else 0))

  def batches(name):
    return loader.every_row_once(work[name], asked.batch, axes.process_part(mesh))

  def measure(tree):
    params = _placed(mesh, tree)
    found = bits.evaluate(score, params, batches("rows"), mesh, codes)
    safety = None
    if pairs:
      with jax.set_mesh(mesh):
        totals = None
        for batch in batches("safety"):
          totals = likelier(params, axes.place(mesh, batch), totals)
      safety = _mean_over_languages(pairs, *map(list, (totals["likelier"], totals["pairs"])))
    return dict(scores={code: -entry["bits_per_byte"] for code, entry in found.items()}, safety=safety)

  return measure


def _mean_over_languages(codes, hits, counts):
  """Shares per source -> the mean over languages, each counted once."""
  rates = {}
  for code, hit, count in zip(codes, hits, counts):
    entry = rates.setdefault(code, [0.0, 0.0])
    entry[0], entry[1] = entry[0] + float(hit), entry[1] + float(count)
  return statistics.fmean(hit / count for hit, count in rates.values() if count)
