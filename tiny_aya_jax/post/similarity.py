"""How alike two checkpoints are: SimMerge's features of an ordered pair (a, b), before any merge.

Functional ones are of forward passes over an unlabelled multilingual probe, structural ones of the
weights and, given the base that both came from, of the task vectors (SimMerge, arXiv 2601.09473;
its list of structural features is not published: ours are those of tiny_aya.md 7.2). Everything
returned is a dict of floats, ready for JSON. Chooses nothing: selection.py does.

A position counts if its next token has a weight, as in bits per byte: not padding, not the end of
a document, not a prompt.
"""

import functools
import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from tiny_aya_jax import axes, processes, run
from tiny_aya_jax.data import loader
from tiny_aya_jax.evaluate import rollups
from tiny_aya_jax.export import cohere2
from tiny_aya_jax.model import bits, divergence as apart

QUANTILES = dict(p10=0.1, p50=0.5, p90=0.9, p99=0.99)


def features(model, pair, base, manifests, mesh, config):
  """dict(functional, structural) of the parameters (a, b) of `model`; base: parameters, or None.

  manifests: of the probe's rows. config: batch, chunk, probe_tokens.
  """
  batches, codes = probe(manifests, config.batch, config.probe_tokens, axes.process_part(mesh))
  return dict(functional=functional(model, pair, batches, mesh, codes, chunk=config.chunk),
              structural=structural(model.cfg, pair, base))


# --- the probe ----------------------------------------------------------------------------------


def probe(manifests, batch, tokens, process=(0, 1)):
  """(batches, codes): the first rows of each language, until `tokens` positions count.

  Batches are the loader's, of T as the rows have it; source_B is an index into codes. Languages
  take turns, and so do the sources of one. Process (i, n) has its slice of each batch. Refuses a
  language without a position that counts.
  """
  codes = sorted({manifest["language"] for manifest in manifests})
  found = []
  for source, code in enumerate(codes):
    rows = _first([manifest for manifest in manifests if manifest["language"] == code], tokens)
    if not rows:
      raise run.Refused(f"the probe's rows of {code} have no token to predict: leave the language out")
    found.append([row | dict(source_B=np.full(1, source, np.int32)) for row in rows])
  rows = list(_in_turn(found))
  blank = jax.tree.map(np.zeros_like, rows[0]) | dict(source_B=np.full(1, -1, np.int32))
  rows += [blank] * (-len(rows) % batch)
  index, count = process
  mine = slice(index * batch // count, (index + 1) * batch // count)
  return [_stacked(rows[start : start + batch][mine]) for start in range(0, len(rows), batch)], codes


def _first(manifests, tokens):
  """Rows of one language as batches of one, positions behind the first `tokens` with weight 0."""
  rows = []
  for row in _in_turn(loader.every_row_once([manifest], 1) for manifest in manifests):
    counted_BT = row["weight_BT"] > 0
    kept_BT = counted_BT & (np.cumsum(counted_BT).reshape(counted_BT.shape) <= tokens)
    tokens -= int(kept_BT.sum())
    if kept_BT.any():
      rows.append(row | dict(weight_BT=row["weight_BT"] * kept_BT))
    if tokens <= 0:
      break
  return rows


def _in_turn(iterables):
  """One of each, then the next of each, until all are empty."""
  for group in itertools.zip_longest(*iterables):
    yield from (one for one in group if one is not None)


def _stacked(rows):
  return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


# --- functional ---------------------------------------------------------------------------------


def functional(model, pair, batches, mesh, codes, *, chunk):
  """dict(languages={code: features}, mean=features with each language counted once).

  features: tokens (positions that count); kl_ab and kl_ba, KL(a || b) and KL(b || a) in nats a
  token, each dict(mean, p10, p50, p90, p99); agreement, the share of positions where both find the
  same token likeliest; cosine, a list over the layers of the mean cosine of the two hidden states
  behind a layer. batches: of `probe`. chunk: positions of a row whose logits exist at a time.
  """
  compare = _comparer(model, len(codes), chunk)
  values = {name: [[] for _ in codes] for name in ("kl_ab_BT", "kl_ba_BT", "agree_BT")}
  cosine = np.zeros((len(codes), 4 * model.cfg.L))
  with jax.set_mesh(mesh):
    for batch in run.progress(batches, "similarity"):
      found = processes.gathered(compare(*pair, axes.place(mesh, batch)))
      cosine += found["cosine"]
      for source in set(found["source_B"].tolist()) - {-1}:
        counted_BT = (found["weight_BT"] > 0) & (found["source_B"] == source)[:, None]
        for name in values:
          values[name][source].append(found[name][counted_BT])
  languages = {
      code: _features(*(np.concatenate(values[name][source]).astype(np.float64) for name in values),
                      cosine[source]) for source, code in enumerate(codes)}
  return dict(languages=languages, mean=_mean(list(languages.values())))


def _comparer(model, sources, chunk):
  """Jitted (a, b, batch) -> what is per position, and sums of cosines [sources, layers]."""

  @jax.jit
  def compare(a, b, batch):
    hidden, cosine = apart.states(model, (a, b), batch)
    found = apart.predictions([model.cfg] * 2, (a, b), hidden, chunk)
    counted_BT = batch["weight_BT"] > 0
    layers = cosine.reshape(-1, *counted_BT.shape)
    sums = jax.vmap(lambda x_BT: bits.by_source(x_BT * counted_BT, batch["source_B"], sources))(layers)
    rows = {name: batch[name] for name in ("weight_BT", "source_B")}
    return found | rows | dict(cosine=axes.constrain(sums.T, None, None))

  return compare


def _features(kl_ab, kl_ba, agree, cosine):
  return dict(tokens=len(agree), kl_ab=_spread(kl_ab), kl_ba=_spread(kl_ba),
              agreement=float(agree.mean()), cosine=(cosine / len(agree)).tolist())


def _spread(values):
  return dict(mean=float(values.mean()),
              **{name: float(np.quantile(values, share)) for name, share in QUANTILES.items()})


def _mean(trees):
  """The mean of each figure of dicts of one form, element by element of lists."""
  if isinstance(trees[0], dict):
    return {name: _mean([tree[name] for tree in trees]) for name in trees[0]}
  return np.mean(trees, axis=0).tolist()


# --- structural ---------------------------------------------------------------------------------


def structural(cfg, pair, base=None):
  """dict(tensors={HF name: figures}, kinds={the same without its layer: figures}, whole=figures).

  figures: cosine of the two weights, distance |a - b| / |a|, norm_ratio |b| / |a|; with a base, of
  the task vectors a - base and b - base task_cosine, task_norm_ratio and sign_agreement (the share
  of one sign, of the elements where neither is 0). A kind or the whole is one long vector. None: of
  a vector that is 0. pair, base: parameters in fp32, as they are merged.
  """
  sums = processes.gathered(_sums(*pair, base))
  tensors, kinds = {}, {}
  for name, (path, period) in cohere2.tensor_names(cfg).items():
    tensors[name] = _of(sums, path, period)
    kind = ".".join(part for part in name.split(".")[1:-1] if part != "layers" and not part.isdigit())
    kinds.setdefault(kind, []).append(tensors[name])
  return dict(tensors={name: _figures(part) for name, part in tensors.items()},
              kinds={kind: _figures(_added(parts)) for kind, parts in kinds.items()},
              whole=_figures(_added(tensors.values())))


@jax.jit
def _sums(a, b, base):
  """{name: tree of sums over each leaf's last axis}: the rest is added up in fp64, on the host."""
  def add(function, *trees):
    return jax.tree.map(lambda *leaves: function(*(x.astype(jnp.float32) for x in leaves))
                        .astype(jnp.float32).sum(-1), *trees)

  found = dict(aa=add(jnp.square, a), bb=add(jnp.square, b), ab=add(jnp.multiply, a, b),
               dd=add(lambda a, b: jnp.square(a - b), a, b))
  if base is None:
    return found
  return found | dict(
      uu=add(lambda a, o: jnp.square(a - o), a, base), vv=add(lambda b, o: jnp.square(b - o), b, base),
      uv=add(lambda a, b, o: (a - o) * (b - o), a, b, base),
      one_sign=add(lambda a, b, o: jnp.sign(a - o) * jnp.sign(b - o) > 0, a, b, base),
      moved=add(lambda a, b, o: (a != o) & (b != o), a, b, base))


def _of(sums, path, period):
  """{name: float} of one HF tensor."""
  leaves = {name: functools.reduce(lambda node, key: node[key], path, tree)
            for name, tree in sums.items()}
  return {name: float(np.sum(leaf if period is None else leaf[period], dtype=np.float64))
          for name, leaf in leaves.items()}


def _added(parts):
  return {name: math.fsum(part[name] for part in parts) for name in next(iter(parts))}


def _figures(s):
  found = dict(cosine=_cosine(s["ab"], s["aa"], s["bb"]), distance=_root_ratio(s["dd"], s["aa"]),
               norm_ratio=_root_ratio(s["bb"], s["aa"]))
  if "uu" not in s:
    return found
  return found | dict(
      task_cosine=_cosine(s["uv"], s["uu"], s["vv"]), task_norm_ratio=_root_ratio(s["vv"], s["uu"]),
      sign_agreement=s["one_sign"] / s["moved"] if s["moved"] else None)


def _cosine(ab, aa, bb):
  return min(max(ab / math.sqrt(aa * bb), -1.0), 1.0) if aa * bb else None


def _root_ratio(one, other):
  return math.sqrt(one / other) if other else None


# --- one figure: how far from another checkpoint ------------------------------------------------


def divergence(models, pair, batches, mesh, codes, *, chunk):
  """{code: dict(tokens, kl_ab, kl_ba)}: mean KL(a || b) and KL(b || a), in nats a token.

  models: two, which may differ in all but V. batches: the loader's; codes: the language of each of
  their sources, and sources of one language are added. None: of a language without a position.
  """
  cfgs = [model.cfg for model in models]

  @functools.partial(jax.jit, donate_argnums=3)
  def add(a, b, batch, totals):
    rows = batch["token_BT"], batch["segment_BT"], batch["position_BT"]
    hidden = [model.apply({"params": params}, *rows) for model, params in zip(models, (a, b))]
    found = apart.predictions(cfgs, (a, b), hidden, chunk)
    counted_BT = (batch["weight_BT"] > 0).astype(jnp.float32)
    parts = dict(tokens=counted_BT, kl_ab=found["kl_ab_BT"] * counted_BT,
                 kl_ba=found["kl_ba_BT"] * counted_BT)
    return jax.tree.map(lambda total, x_BT: total + bits.by_source(x_BT, batch["source_B"], len(codes)),
                        totals, parts)

  totals = {name: jnp.zeros(len(codes)) for name in ("tokens", "kl_ab", "kl_ba")}
  with jax.set_mesh(mesh):
    for batch in batches:
      totals = add(*pair, axes.place(mesh, batch), totals)
  return _averages(totals, codes)


def _averages(totals, codes):
  """Sums per source and the sources' languages -> the dict of `divergence`."""
  sums = {code: dict.fromkeys(totals, 0.0) for code in codes}
  for name, values in totals.items():
    for code, value in zip(codes, values.tolist()):
      sums[code][name] += value
  return {
      code: dict(tokens=int(entry["tokens"]), **{
          name: entry[name] / entry["tokens"] if entry["tokens"] else None for name in ("kl_ab", "kl_ba")})
      for code, entry in sums.items()}


# --- for people ---------------------------------------------------------------------------------


def table(found):
  """`features` as text: a line a language under a line a region, then a line a kind of tensor."""
  return "\n".join([*_functional_lines(found["functional"]), "", *_structural_lines(found["structural"])])


def _functional_lines(found):
  heads = ("tokens", "KL a||b", "p50", "p90", "p99", "KL b||a", "p50", "p90", "p99", "agree", "cosine",
           "lowest", "layer")
  yield f"{'':22}" + "".join(f"{head:>9}" for head in heads)
  regions = {}
  for code in found["languages"]:
    regions.setdefault(rollups.facts(code)["region"], []).append(code)
  for region, codes in regions.items():
    parts = [found["languages"][code] for code in codes]
    yield _functional_line(f"{region} ({len(codes)})", _mean(parts))
    yield from (_functional_line(f"  {code}", part) for code, part in zip(codes, parts))
  yield _functional_line("mean", found["mean"])


def _functional_line(name, part):
  nats = [part[way][share] for way in ("kl_ab", "kl_ba") for share in ("mean", "p50", "p90", "p99")]
  lowest = min(part["cosine"])
  return (f"{name:22}{part['tokens']:9,.0f}" + "".join(f"{value:9.4f}" for value in nats)
          + f"{part['agreement']:9.3f}{statistics.fmean(part['cosine']):9.4f}{lowest:9.4f}"
          f"{part['cosine'].index(lowest):9}")


def _structural_lines(found):
  names = list(found["whole"])
  yield f"{'':22}" + "".join(f"{name.replace('_', ' '):>17}" for name in names)
  for kind, figures in (*found["kinds"].items(), ("whole", found["whole"])):
    cells = ["-" if figures[name] is None else f"{figures[name]:.5f}" for name in names]
    yield f"{kind:22}" + "".join(f"{cell:>17}" for cell in cells)
