"""VERB merge: checkpoints and Hugging Face folders of one architecture -> one model (report 3.3).

The formulas are operators.py's, the unit is the Hugging Face tensor: a layer's matrix, not our stack
of periods. Tensors are read, merged and written one after the other, in fp32, so that memory is that
of the largest parameter of each model. A result appears when it is whole, then merge.json, its
recipe, which it holds too: a record and a result of two recipes are told apart.
"""

import itertools
import math
import pathlib
import shutil
import time
from typing import Callable, NamedTuple

import numpy as np

from tiny_aya_jax import run
from tiny_aya_jax.data import tokenizer as tokenizers
from tiny_aya_jax.export import cohere2, huggingface, tensors as files
from tiny_aya_jax.post import operators, search
from tiny_aya_jax.train import begin, saved

# What needs jax is imported behind the checks: a wrong field is refused in a second.
READS = dict(  # of what `merge` takes
    linear=("weights", "normalize"),
    slerp=("t",),
    nuslerp=("base", "t"),
    task_arithmetic=("base", "weights", "scale", "normalize"),
    ties=("base", "weights", "density", "trimming", "scale", "normalize"),
    dare_linear=("base", "weights", "density", "scale", "normalize", "seed"),
    dare_ties=("base", "weights", "density", "scale", "normalize", "seed"),
)
FOLDER = "huggingface"


def merge(models, operator, *, base=None, weights=(), t=0.5, density=1.0, scale=1.0,
          trimming="tensor", normalize=None, seed=0):
  """Parameter trees (nested dicts of arrays) -> their merge, a tree of fp32 NumPy arrays.

  base: the tree that task vectors are taken from. The rest as in experiments/merge.py; what an operator
  does not read is not looked at (READS). Raises Refused for settings that cannot be, and for numbers
  that are not finite.
  """
  recipe = check(operator, len(models), base is not None, dict(
      weights=weights, t=t, density=density, scale=scale, trimming=trimming,
      normalize=normalize, seed=seed))
  named = {f"model {number}": tree for number, tree in enumerate(models)}
  shapes = _shapes(models[0])
  for name, tree in (named | (dict(base=base) if base is not None else {})).items():
    if odd := sorted({"/".join(path) for path, _ in _shapes(tree).items() ^ shapes.items()}):
      raise run.Refused(f"{name} differs from model 0 in {len(odd)} arrays, e.g. {odd[0]}")
  sources = [_tree_source(name, tree) for name, tree in named.items()]
  below = _tree_source("base", base) if base is not None else None
  return _nested(_stacked(shapes, merged_tensors(shapes, sources, below, recipe)))


def _nested(leaves):
  tree = {}
  for path, leaf in leaves:
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return tree


def check(operator, models, base, settings):
  """{"operator", and what it reads of settings}, weights filled in; refuses what cannot be."""
  run.choose("operator", operator, READS)
  reads = READS[operator]
  if models < 2:
    raise run.Refused(f"{models} models are given, expected at least 2")
  if "t" in reads and models != 2:
    raise run.Refused(f"{operator} is between 2 models, {models} are given")
  if base != ("base" in reads):
    raise run.Refused(f"{operator} needs the base that the models were trained from" if not base else
                      f"{operator} reads no base: leave it out, or give it as one of the models")
  recipe = dict(operator=operator) | {name: settings[name] for name in reads if name != "base"}
  for name in ("t", "density", "scale"):
    if name in reads and not math.isfinite(recipe[name]):
      raise run.Refused(f"{name} is {recipe[name]}, expected a number")
  if "t" in reads and not 0 <= recipe["t"] <= 1:
    raise run.Refused(f"t is {recipe['t']}, expected 0 (the first model) to 1 (the second)")
  if "density" in reads and not 0 < recipe["density"] <= 1:
    raise run.Refused(f"density is {recipe['density']}, expected more than 0 and at most 1")
  if "trimming" in reads:
    run.choose("trimming", recipe["trimming"], ("tensor", "model"))
  if "weights" in reads:
    recipe["weights"] = _weights(operator, models, recipe)
  if "normalize" in reads and recipe["normalize"] is None:
    recipe["normalize"] = operator == "ties"
  return recipe


def _weights(operator, models, recipe):
  weights = [float(weight) for weight in recipe["weights"]] or [1 / models] * models
  if len(weights) != models:
    raise run.Refused(f"{len(weights)} weights are given for {models} models")
  if not all(map(math.isfinite, weights)):
    raise run.Refused(f"weights are {tuple(weights)}, expected numbers")
  total = math.fsum(weights)
  if operator == "linear" and not recipe["normalize"] and abs(total - 1) > 1e-6:
    raise run.Refused(f"weights {tuple(weights)} of linear sum to {total:g}, expected 1: change them, "
                      "or divide by their sum with normalize")
  if operator == "linear" and abs(total) < 1e-6:
    raise run.Refused(f"weights {tuple(weights)} of linear sum to {total:g}: they cannot be divided by "
                      "their sum")
  return weights


class Source(NamedTuple):
  """One model: its name in sentences, and (path in our tree, period or None) -> tensor, torch's shape."""

  name: str
  read: Callable


def merged_tensors(shapes, sources, base, recipe):
  """Yields (path, period, merged tensor in torch's shape) of every Hugging Face tensor, leaf by leaf.

  shapes: {path: shape of our leaf}. Refuses a tensor with a number that is not finite, by name.
  """
  _refuse_emptied(shapes, recipe)
  whole = {}
  if recipe.get("trimming") == "model":
    whole = _whole_model(shapes, sources, base, recipe)
  for path, period in _places(shapes):
    tensors = [_read(source, path, period) for source in sources]
    below = _read(base, path, period) if base else None
    name = _name(path, period)
    merged = _merge(name, tensors, below, recipe, whole)
    if not operators.finite(merged):
      raise run.Refused(f"{name} of the merge has a number that is not finite")
    yield path, period, merged
    del tensors, below, merged  # before the next are read


def _merge(name, tensors, base, recipe, whole):
  kept = {key: value for key, value in recipe.items() if key not in ("operator", "trimming", "seed")}
  if "seed" in recipe:
    kept["seeds"] = [int(run.fingerprint([recipe["seed"], name, number])[:16], 16)
                     for number in range(len(tensors))]
  return dict(
      linear=lambda: operators.linear(tensors, **kept),
      slerp=lambda: operators.slerp(*tensors, **kept),
      nuslerp=lambda: operators.nuslerp(base, *tensors, **kept),
      task_arithmetic=lambda: operators.task_arithmetic(base, tensors, **kept),
      ties=lambda: operators.ties(base, tensors, **kept, **whole),
      dare_linear=lambda: operators.dare_linear(base, tensors, **kept),
      dare_ties=lambda: operators.dare_ties(base, tensors, **kept),
  )[recipe["operator"]]()


def _refuse_emptied(shapes, recipe):
  """A density that keeps nothing of some tensor."""
  if recipe["operator"] == "ties" and recipe["trimming"] == "tensor":
    size, path = min((math.prod(shape[_layered(path, shape):]), path) for path, shape in shapes.items())
    if int(recipe["density"] * size) < 1:
      raise run.Refused(f"density {recipe['density']} keeps none of the {size} numbers of "
                        f"{'/'.join(path)}: give at least {1 / size:.2g}")


def _whole_model(shapes, sources, base, recipe):
  """What the authors' code takes of the flattened model: each model's threshold, and the majority sign.

  The threshold is the k-th smallest magnitude, k = size - int(density * size); what equals it stays.
  """
  cuts = [operators.Cut(np.float32(-1), -1)] * len(sources)
  if recipe["density"] < 1:
    cuts = [_threshold(shapes, source, base, recipe["density"]) for source in sources]
  total = sum(
      operators.elected(_read(base, path, period), [_read(source, path, period) for source in sources],
                        recipe["weights"], cuts)
      for path, period in _places(shapes))
  return dict(cuts=cuts, zeros_up=total > 0)


def _threshold(shapes, source, base, density):
  """Exact, in two passes, one for each half of the bits of the magnitude."""
  size = sum(math.prod(shape) for shape in shapes.values())
  rank, halves = size - int(density * size), []  # rank 1 is the smallest
  for _ in range(2):
    counts = sum(
        operators.magnitudes(_read(base, path, period), _read(source, path, period), *halves)
        for path, period in _places(shapes))
    until = np.cumsum(counts)
    halves.append(int(np.searchsorted(until, rank)))
    rank -= int(until[halves[-1] - 1]) if halves[-1] else 0
  threshold = np.array(halves[0] << 16 | halves[1], np.uint32).view(np.float32)[()]
  return operators.Cut(threshold, size)  # of equals, all


def _read(source, path, period):
  tensor = np.ascontiguousarray(source.read(path, period), np.float32)
  if not operators.finite(tensor):
    raise run.Refused(f"{source.name}: {_name(path, period)} has a number that is not finite")
  return tensor


def _name(path, period):
  return "/".join(path) + ("" if period is None else f"[{period}]")


def _layered(path, shape):
  """Whether a leaf is stacked, [L, ...]: its rank is one more than its name has letters."""
  letters = path[-1].rpartition("_")[2]
  return letters.isupper() and len(shape) == len(letters) + 1


def _places(shapes):
  """(path, period) of every tensor, a leaf's one after the other."""
  for path, shape in shapes.items():
    for period in range(shape[0]) if _layered(path, shape) else (None,):
      yield path, period


def _shapes(tree, path=()):
  """{path: shape} of every leaf, in the order of the tree."""
  if not isinstance(tree, dict):
    return {path: tuple(np.shape(tree))}
  return {key: shape for name in sorted(tree)
          for key, shape in _shapes(tree[name], (*path, name)).items()}


def _tree_source(name, tree):
  def read(path, period):
    leaf = tree
    for key in path:
      leaf = leaf[key]
    return cohere2.theirs(np.asarray(leaf if period is None else leaf[period]), path[-1])

  return Source(name, read)


def _stacked(shapes, tensors):
  """(path, period, tensor of torch's shape) -> (path, leaf of our shape), one leaf in memory."""
  for path, group in itertools.groupby(tensors, lambda found: found[0]):
    leaf = np.empty(shapes[path], np.float32)
    for _, period, tensor in group:
      part = leaf if period is None else leaf[period]
      part[...] = cohere2.ours(tensor, part.shape, path[-1])
      del tensor, part
    yield path, leaf
    del leaf  # before the next is made


# --- the verb -----------------------------------------------------------------------------------


class Input(NamedTuple):
  """What is known of a model before its parameters are read."""

  path: pathlib.Path
  folder: bool  # of Hugging Face
  model: dict
  T: int
  tokenizer: str  # sha256
  fingerprint: str


def main(config, workdir):
  """Writes workdir/checkpoints/0 or workdir/huggingface, and workdir/merge.json."""
  began = time.monotonic()
  names = ("weights", "t", "density", "trimming", "scale", "normalize", "seed")
  settings = {name: config[name] for name in names}
  work = search.check(config, READS) if config.search.candidates else None
  recipes = {one: _candidate(config, settings, *one) for one in work["candidates"]} if work else {}
  recipe = None if work else check(config.operator, len(config.checkpoints), bool(config.base), settings)
  run.choose("config.output", config.output, ("checkpoint", FOLDER))
  run.choose("config.dtype", config.dtype, ("bfloat16", "float16", "float32"))
  if config.output == "checkpoint" and config.dtype != "float32":
    raise run.Refused(f"config.dtype is {config.dtype}, and a checkpoint is float32: only a "
                      "Hugging Face folder has another")
  inputs = [_input("checkpoints", place) for place in config.checkpoints]
  base = _input("base", config.base) if config.base else None
  everything = [*inputs, base] if base else inputs
  for other in everything[1:]:
    begin.same_fields(other.path, other.model, inputs[0].model)
  sha256, texts = _tokenizer(config, everything)
  if work:
    search.check_tokenizer(work, sha256)
  facts = dict(
      inputs=run.fingerprint([recipe or [list(recipes.values()), search.fingerprint(config, work)],
                              [one.fingerprint for one in inputs], base and base.fingerprint,
                              sha256, config.output, config.dtype]),
      **(recipe or {}), checkpoints=[_told(one) for one in inputs], base=base and _told(base),
      tokenizer_sha256=sha256,
  )
  _refuse_others(workdir)
  record = workdir / "merge.json"
  if run.up_to_date(record, facts["inputs"], config.overwrite) and _whole(workdir, config, facts):
    run.say(f"{record}: up to date")
    return
  found = {}
  if work:
    found = _searched(config, work, inputs, base, recipes, workdir, facts["inputs"])
    recipe = recipes[found["operator"], found["strength"]]
    facts |= recipe
  else:
    import jax

    jax.config.update("jax_platforms", "cpu")  # NumPy's work: no accelerator is taken
  write = _write_checkpoint if config.output == "checkpoint" else _write_folder
  place = write(workdir, config, inputs, base, recipe, facts, texts)
  run.write_json(record, facts | found | dict(
      output=str(place), dtype=config.dtype, seconds=round(time.monotonic() - began, 1),
      **run.provenance(config)))
  run.say(f"merged {', '.join(str(one.path) for one in inputs)} by {_sentence(recipe)} into {place}")


def _candidate(config, settings, operator, strength):
  """The recipe of a candidate of the search."""
  asked = settings | search.settings(operator, strength)
  return check(operator, len(config.checkpoints), "base" in READS[operator], asked)


def _searched(config, work, inputs, base, recipes, workdir, key):
  """What search.decide finds; the models are in memory as long."""
  import ml_collections

  trees = [_tree(one) for one in (*inputs, base) if one]
  models, below = trees[: len(inputs)], trees[len(inputs)] if base else None

  def merged(*candidate):
    recipe = dict(recipes[candidate])
    operator = recipe.pop("operator")
    return merge(models, operator, base=below if "base" in READS[operator] else None, **recipe)

  workdir.mkdir(parents=True, exist_ok=True)
  cfg = ml_collections.ConfigDict(inputs[0].model)
  return search.decide(config, work, cfg, models, below, merged, workdir, key)


def _tree(one):
  """The parameters of an input, NumPy arrays in our tree."""
  import ml_collections

  shapes = cohere2.leaf_shapes(ml_collections.ConfigDict(one.model))
  source = _folder_source(one) if one.folder else _checkpoint_source(one, shapes)
  tensors = ((path, period, _read(source, path, period)) for path, period in _places(shapes))
  return _nested(_stacked(shapes, tensors))


def _sentence(recipe):
  reads = (f"{name} {value}" for name, value in recipe.items() if name != "operator")
  return ", ".join([recipe["operator"], *reads])


def _input(field, place):
  place = pathlib.Path(run.existing(field, place)).absolute()
  if huggingface.is_folder(place):
    model, T = huggingface.describe(place)
    return Input(place, True, model.to_dict(), T, run.sha256(place / "tokenizer.json"),
                 run.fingerprint(huggingface.digests(place)))
  path = saved.find(place)
  meta = saved.meta(path)
  return Input(path, False, meta["model"], meta["T"], meta["tokenizer_sha256"],
               run.fingerprint([meta["model"], meta["fingerprints"]["params"]]))


def _told(one):
  return dict(path=str(one.path), fingerprint=one.fingerprint, tokenizer_sha256=one.tokenizer)


def _tokenizer(config, inputs):
  """(sha256 of the merge's tokenizer, the folder or Tokenizer that gives a folder's files).

  Two files may hold one tokenizer: their ids are compared where their digests differ.
  """
  given = tokenizers.load(run.existing("tokenizer", config.tokenizer)) if config.tokenizer else None
  trained = [one for one in inputs if not one.folder]
  folders = [one for one in inputs if one.folder]
  for one in trained:
    place, sha256 = (given.path, given.sha256) if given else (trained[0].path, trained[0].tokenizer)
    if one.tokenizer != sha256:
      raise run.Refused(
          f"{one.path} was trained with tokenizer {one.tokenizer[:12]}, {place} is {sha256[:12]}")
  if trained and folders and not given and trained[0].tokenizer != folders[0].tokenizer:
    raise run.Refused(
        f"{trained[0].path} was trained with tokenizer {trained[0].tokenizer[:12]}, {folders[0].path} "
        f"has {folders[0].tokenizer[:12]}: if they are one, give config.tokenizer, what the checkpoint "
        "was trained with")
  for one in folders:
    if one.tokenizer != (given.sha256 if given else folders[0].tokenizer):
      mine = tokenizers.load(one.path / "tokenizer.json")
      other = given or tokenizers.load(folders[0].path / "tokenizer.json")
      if differ := mine.difference(other):
        raise run.Refused(f"{one.path} has another tokenizer than {other.path}: {differ}")
  if config.output == FOLDER and not (folders or given):
    raise run.Refused("a Hugging Face folder needs config.tokenizer: checkpoints do not hold theirs")
  sha256 = given.sha256 if given else inputs[0].tokenizer if not trained else trained[0].tokenizer
  return sha256, folders[0].path if folders else given


def _refuse_others(workdir):
  """A workdir that holds what is not a merge."""
  for step in saved.steps(workdir):
    if "merge" not in saved.meta(saved.path(workdir, step)):
      raise run.Refused(f"{workdir} holds the checkpoints of another verb: give another --workdir")
  if (workdir / FOLDER).exists() and not (workdir / FOLDER / "merge.json").exists():
    raise run.Refused(f"{workdir / FOLDER} exists and is no merge: give another --workdir")


def _whole(workdir, config, facts):
  """Whether what the record tells of is still there; else it is made again."""
  if config.output == "checkpoint":
    return (saved.steps(workdir) == [0] and
            saved.meta(saved.path(workdir, 0))["merge"]["inputs"] == facts["inputs"])
  found = workdir / FOLDER / "merge.json"
  if not found.exists():
    return False
  kept = run.read_json(found, "earlier result")
  return kept["inputs"] == facts["inputs"] and kept["bytes"].items() <= _sizes(workdir / FOLDER).items()


def _sizes(folder):
  return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _write_checkpoint(workdir, config, inputs, base, recipe, facts, texts):
  from tiny_aya_jax.train import checkpoint

  shapes, tensors = _opened(inputs, base, recipe)
  files.refuse_full(workdir, 4 * sum(math.prod(shape) for shape in shapes.values()))
  meta = dict(model=inputs[0].model, T=min(one.T for one in inputs),
              tokenizer_sha256=facts["tokenizer_sha256"], merge=facts)
  checkpoint.write_params(workdir, 0, _stacked(shapes, tensors), meta)
  shutil.rmtree(workdir / FOLDER, ignore_errors=True)  # of an earlier recipe
  return saved.path(workdir, 0)


def _write_folder(workdir, config, inputs, base, recipe, facts, texts):
  import ml_collections

  cfg = ml_collections.ConfigDict(inputs[0].model)
  shapes, tensors = _opened(inputs, base, recipe)
  files.refuse_full(workdir, cohere2.size(cfg, config.dtype))
  folder, old = workdir / FOLDER, workdir / f".{FOLDER}.old"
  for stale in workdir.glob(f"*.{FOLDER}.*"):  # what a killed merge left
    shutil.rmtree(stale)
  names = {place: name for name, place in cohere2.tensor_names(cfg).items()}
  with huggingface.staged(workdir / f".{FOLDER}.new") as new:
    named = ((names[path, period], tensor) for path, period, tensor in tensors)
    files.write(new, cohere2.torch_shapes(cfg), named, dtype=config.dtype)
    if isinstance(texts, pathlib.Path):
      huggingface.copy_texts(new, cfg, texts, config.dtype)
    else:
      huggingface.write_texts(new, cfg, texts, config.dtype, min(one.T for one in inputs))
    run.write_json(new / "merge.json", facts | dict(bytes=_sizes(new)))
  if folder.exists():
    folder.rename(old)
  (workdir / f".{FOLDER}.new").rename(folder)
  shutil.rmtree(old, ignore_errors=True)
  shutil.rmtree(workdir / "checkpoints", ignore_errors=True)  # of an earlier recipe
  return folder


def _opened(inputs, base, recipe):
  """(shapes of our leaves, the stream of merged tensors)."""
  import ml_collections

  shapes = cohere2.leaf_shapes(ml_collections.ConfigDict(inputs[0].model))
  sources = [_folder_source(one) if one.folder else _checkpoint_source(one, shapes) for one in
             ([*inputs, base] if base else inputs)]
  below = sources.pop() if base else None
  tensors = merged_tensors(shapes, sources, below, recipe)
  return shapes, run.progress(tensors, "merge", total=sum(1 for _ in _places(shapes)))


def _folder_source(one):
  tensors, cfg = huggingface.open_folder(one.path)
  names = {place: name for name, place in cohere2.tensor_names(cfg).items()}

  def read(path, period):
    return tensors[names[path, period]].read().astype(np.float32, copy=False)

  return Source(str(one.path), read)


def _checkpoint_source(one, shapes):
  from tiny_aya_jax.train import checkpoint

  held, read_leaf = checkpoint.leaves(one.path)
  expected = {"/".join(path): shape for path, shape in shapes.items()}
  if odd := sorted({name for name, _ in held.items() ^ expected.items()}):
    raise saved.Damaged(
        f"{one.path}: params differs from its model in {len(odd)} arrays, e.g. {odd[0]}")
  kept = {}

  def read(path, period):
    if path not in kept:
      kept.clear()  # before the next is read
      kept[path] = read_leaf("/".join(path))
    leaf = kept[path] if period is None else kept[path][period]
    return cohere2.theirs(leaf, path[-1])

  return Source(str(one.path), read)
