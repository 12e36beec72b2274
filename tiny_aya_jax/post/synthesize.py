"""VERB synthesize: post-training data made by other models, over OpenAI-compatible endpoints.

  WORKDIR/<code>/<recipe>/*.jsonl   conversations that pack reads; of `pairs` chosen and rejected
  WORKDIR/ledger.ndjson             every item, in exactly one state: kept, dropped or failed
  WORKDIR/synthesis.json            counts, what was spent, the choice of translators, versions
  WORKDIR/answers/<endpoint>.ndjson every answer that was paid for; nothing is asked twice of one url
                                    and model: at another url all is paid for again

The output is a function of the text, the config and the answers: a killed run, started again, plays
the same items and pays for what is missing. Files are written when all is known, each atomically,
synthesis.json last; until then the folder is not whole, and pack refuses it. A finished run whose
items failed asks those again with config.overwrite=True; the others are answered by the cache.

Scale: serve open models with `vllm serve` (over several nodes: its own Ray backend) behind one url,
raise an endpoint's concurrency, and start n processes with config.part=(0, n) to (n-1, n) on one
WORKDIR; each reads what the others, or those of another n, have paid for. datatrove's inference
pipeline is not underneath: a runner of its has one model, where fusion has four and translation a
choice; a request that fails ends its task, rates and prices are unknown to it, and its cache is
deleted when it is done.
"""

import collections
import contextlib
import fcntl
import functools
import importlib.metadata
import itertools
import json
import pathlib
import re

from tiny_aya_jax import client, languages, run
from tiny_aya_jax.data import text
from tiny_aya_jax.post import pairs, prompts, recipes, rounds

RECIPES = dict(translate=recipes.translate, transform=recipes.transform, fuse=recipes.fuse,
               filter=recipes.filter_pairs, pairs=pairs.compose)
# What may differ between a run and the one that continues it.
FREE = ("key_variable", "concurrency", "requests_per_minute", "timeout_seconds", "attempts",
        "price_in", "price_out")
HOOKS = ("quality", "difficulty", "estimator")
PASSED_ON = ("id", "url", "source", "licence", "license", "task")  # fields of a record


def main(config, workdir):
  """Plays config.recipe over config.text; writes what the module's head lists."""
  askers = check(config, workdir)
  record = workdir / _named("synthesis", ".json", config.part)
  sign = workdir / text.SYNTHESIS / _named("part", "", config.part)
  inputs = _inputs(config, askers)
  if not sign.exists() and run.up_to_date(record, inputs, config.overwrite) and _whole(record, workdir):
    run.say(f"{record}: up to date")
    return
  with _claimed(sign, record):
    identifier = _identifier(config)
    items = _of_part(config, identifier)
    # Read under the claim: another process may have bought answers until then.
    askers = check(config, workdir) | _commands(config)
    wrong = functools.partial(_wrong, config, identifier)
    settings = config[config.recipe]
    tools = recipes.Tools(settings, wrong, {}, _scores(settings))
    models, choice = _models(config, items, tools, askers, workdir)
    tools = tools._replace(models=models)
    played = rounds.play({item.name: _work(item, config, tools) for item in items}, askers)
    record.unlink(missing_ok=True)
    result = dict(inputs=inputs, recipe=config.recipe, part=list(config.part), choice=choice)
    result |= _write(items, played, config, workdir)
    result |= dict(spent=_spent(askers), prompts=run.sha256(prompts.__file__),
                   identifier=_version(_setting(config, "identifier")), unseen=_unseen(items, identifier),
                   **run.provenance(config))
    run.write_json(record, result)  # last: its presence says that all is there
  for line in table(result):
    run.say(line)


# --- the door -----------------------------------------------------------------------------------


def check(config, workdir):
  """Refuses what cannot be, before anything is asked. -> {name: rounds.Endpoint} of those in use."""
  run.choose("config.recipe", config.recipe, RECIPES)
  if config.recipe not in config:
    raise run.Refused(f"config.recipe is {config.recipe}, and the config has no fields of it: take "
                      f"--config=experiments/synthesize.py:{config.recipe}")
  settings = config[config.recipe]
  _check_part(config.part)
  languages.select(config.languages)
  if config.name is not None:
    run.plain_name("name", config.name)
  if config.recipe == "pairs":
    pairs.check(settings, config.languages)
    return {}
  if not config.text:
    raise run.Refused("config.text is not set: the folder with the text to work on")
  if _embedded(config.text):
    _check_embedded("config.text", config.text, config.recipe)
  _check_folders(config.text, workdir)
  if config.limit < 0:
    raise run.Refused(f"config.limit is {config.limit}, expected items a language, or 0 for all")
  if config.margin < 0 or not 0 <= config.script_share <= 1:
    raise run.Refused(f"config.margin is {config.margin} and config.script_share is "
                      f"{config.script_share}, expected at least 0, and 0 to 1")
  CHECKS[config.recipe](settings, config)
  used = _used(settings)
  for name in used:
    run.choose("endpoint", name, config.endpoints)
    if not config.endpoints[name].url:
      raise run.Refused(f"config.endpoints.{name}.url is not set, and {config.recipe} asks "
                        f"{config.endpoints[name].model} there")
  return {name: _endpoint(name, config, workdir) for name in sorted(used)}


def _check_part(part):
  if len(part) != 2 or not all(type(n) is int for n in part) or not 0 <= part[0] < part[1]:
    raise run.Refused(f"config.part is {part}, expected (i, n) with i from 0 to n-1")


def _check_embedded(field, folder, recipe):
  """Of the embedded corpus only conversations are text to work on."""
  if recipe == "filter":
    raise run.Refused(f"{field} is {folder}, and filter reads pairs of .jsonl files: give a folder")
  run.choose(field, folder, ("embedded/instruct",))


def _check_folders(folder, workdir):
  here, there = pathlib.Path(workdir).resolve(), pathlib.Path(folder).resolve()
  if here == there or there in here.parents or here in there.parents:
    raise run.Refused(f"--workdir={workdir} and config.text={folder} lie in one another: what is "
                      "made would be read as text")


def _check_translate(settings, config):
  run.choose("config.translate.what", settings.what, ("prompts", "conversations"))
  if not settings.targets:
    raise run.Refused("config.translate.targets is empty: name languages, or ('all',)")
  languages.select(settings.targets)
  _check_longest("translate", settings)
  _check_choice("translate", settings)
  if len(settings.models) > 1 and not settings.scores:
    if not settings.dev:
      raise run.Refused(f"config.translate.models are {settings.models}: to choose one a language, "
                        "give config.translate.dev and an estimator, or config.translate.scores")
    if _embedded(settings.dev):
      _check_embedded("config.translate.dev", settings.dev, "translate")
    else:
      text.files(settings.dev)
    if config.part[1] > 1:
      raise run.Refused("config.part with config.translate.dev would pay for the dev set in every "
                        "part: run it once, then give its WORKDIR/scores.json as translate.scores")
    if bool(settings.estimator.endpoint) == bool(settings.estimator.command):
      raise run.Refused(f"config.translate.estimator has the endpoint {settings.estimator.endpoint} "
                        f"and the command {settings.estimator.command}, expected one of them: for a "
                        "command, set --config.translate.estimator.endpoint=")
    if settings.dev_items < 1:
      raise run.Refused(f"config.translate.dev_items is {settings.dev_items}, expected at least 1")


def _check_transform(settings, config):
  shares = settings.shares.to_dict()
  if any(not 0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
    raise run.Refused(f"config.transform.shares are {shares}, expected shares that add up to 1")
  _check_choice("transform", settings)
  if len(settings.models) > 1 and not settings.scores:
    raise run.Refused(f"config.transform.models are {settings.models}: to choose one a language, "
                      "give config.transform.scores, a JSON file {code: {model: score}}")


def _check_choice(recipe, settings):
  if not settings.models or len(set(settings.models)) < len(settings.models):
    raise run.Refused(f"config.{recipe}.models is {settings.models}, expected endpoints, each once")
  if settings.scores:
    run.existing(f"{recipe}.scores", settings.scores)


def _check_fuse(settings, config):
  run.choose("config.fuse.fallback", settings.fallback, ("judge", "drop"))
  if not settings.teachers or settings.samples < 1:
    raise run.Refused(f"config.fuse.teachers is {settings.teachers} with {settings.samples} samples "
                      "each, expected at least one of each")
  if not 1 <= settings.least <= len(settings.teachers) * settings.samples:
    raise run.Refused(f"config.fuse.least is {settings.least}, expected 1 to "
                      f"{len(settings.teachers) * settings.samples}, the candidates there can be")
  _check_longest("fuse", settings)


def _check_filter(settings, config):
  languages.find(settings.other)
  _check_longest("filter", settings)
  if not 0 <= settings.digits <= 1:
    raise run.Refused(f"config.filter.digits is {settings.digits}, expected a share, 0 to 1")
  for hook in ("quality", "difficulty"):
    given = [name for name in ("endpoint", "command", "file") if settings[hook][name]]
    if len(given) > 1:
      raise run.Refused(f"config.filter.{hook} has {' and '.join(given)}, expected one of them")
    if settings[hook].file:
      run.existing(f"filter.{hook}.file", settings[hook].file)
  if settings.back:
    languages.select(settings.back)
    if settings.quality.file:
      raise run.Refused("config.filter.back makes texts that config.filter.quality.file has no "
                        "scores of: give an endpoint or a command")
    if not settings.translator:
      raise run.Refused("config.filter.back needs config.filter.translator, an endpoint")


def _check_longest(recipe, settings):
  if not settings.longest >= 1:
    raise run.Refused(f"config.{recipe}.longest is {settings.longest}, expected a ratio of at least 1")


CHECKS = dict(translate=_check_translate, transform=_check_transform, fuse=_check_fuse,
              filter=_check_filter)


def _used(settings):
  """Names of the endpoints that a recipe's group of the config asks."""
  names = {*settings.get("models", ()), *settings.get("teachers", ())}
  names |= {settings[hook].endpoint for hook in HOOKS if hook in settings}
  names.add(settings.get("fusor"))
  if settings.get("fallback") == "judge":
    names.add(settings.judge)
  if settings.get("back"):
    names.add(settings.translator)
  if settings.get("scores") or len(settings.get("models", ())) == 1:
    names -= {settings.estimator.endpoint} if "estimator" in settings else set()
  return names - {None, ""}


def _endpoint(name, config, workdir):
  settings = config.endpoints[name].to_dict()
  more = client.fields_of(settings["body"], f"config.endpoints.{name}.body")
  cache = workdir / "answers" / _named(name, ".ndjson", config.part)
  asker = client.Client(settings["url"], settings["model"], cache,
                        **{key: settings[key] for key in FREE})
  borrowed = _borrowed(name, cache)
  borrowed = {key: borrowed[key] for key in borrowed.keys() - asker.cache.rows.keys()}
  asker.cache.rows.update(borrowed)
  fields = dict(temperature=settings["temperature"], max_tokens=settings["tokens"]) | more
  return rounds.Endpoint(asker, fields, frozenset(borrowed))


def _borrowed(name, cache):
  """{key: row} of the answers of an endpoint that other parts have paid for, also of another n."""
  parts = [path for path in sorted(cache.parent.glob(f"{name}*.ndjson")) if path != cache
           and re.fullmatch(rf"{re.escape(name)}(-\d+-of-\d+)?", path.stem)]
  return {row["key"]: row for path in parts for row in run.read_lines(path)
          if isinstance(row, dict) and row.keys() >= set(client.ROW)}


def _inputs(config, used):
  """Fingerprint of what the output depends on."""
  given = config.to_dict()
  for field in ("overwrite", "endpoints", "text"):
    given.pop(field, None)
  endpoints = {name: {key: value for key, value in config.endpoints[name].to_dict().items()
                      if key not in FREE} for name in sorted(used)}
  folder = _setting(config, "text")
  paths = [] if folder is None or _embedded(folder) else sorted(
      {path for *_, path, _ in text.files(folder)})
  files = {path: run.sha256(path) for path in _files(config) if pathlib.Path(path).is_file()}
  return run.fingerprint([
      json.loads(json.dumps(given)), endpoints, text.fingerprint(folder, paths),
      sorted(files.values()), run.sha256(prompts.__file__)])


def _embedded(folder):
  return str(folder).startswith("embedded/")


def _setting(config, name):
  """A field that the recipe pairs does not have, or None."""
  return config[name] if name in config else None


def _files(config):
  """Files that the config names beside the text."""
  settings = config[config.recipe]
  given = [_setting(config, "identifier"), *(settings[name] for name in ("scores", "templates", "safety")
                                       if name in settings)]
  given += [settings[hook].file for hook in HOOKS if hook in settings and "file" in settings[hook]]
  if settings.get("dev") and not _embedded(settings.dev):
    given += sorted({str(path) for *_, path, _ in text.files(settings.dev)})
  return [path for path in given if path]


@contextlib.contextmanager
def _claimed(sign, record):
  """One process a part at a time; the sign of an unfinished part stays until it is finished.

  While the record of an earlier run is there, so are its files: an error then leaves no sign.
  """
  for other in sign.parent.glob("part*"):
    if other.name.partition("-of-")[2] != sign.name.partition("-of-")[2]:
      _forget(other)
  with _opened(sign) as file:
    _lock(file, fcntl.LOCK_EX, sign)
    try:
      yield
    finally:
      if record.exists():
        sign.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other parts are at work
          sign.parent.rmdir()


def _opened(sign):
  while True:
    sign.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # a part that finished just then removed the folder
      return open(sign, "a", encoding="utf-8")


def _lock(file, kind, sign):
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    raise run.Refused(f"another process is at work on {sign.parents[1]} as {sign.name}: wait for it, "
                      "or end it") from None


def _forget(sign):
  """Removes the sign of a dead run of another config.part(n), and the rows it had begun to write."""
  workdir, suffix = sign.parents[1], sign.name.removeprefix("part")
  with contextlib.suppress(FileNotFoundError), open(sign, encoding="utf-8") as file:
    _lock(file, fcntl.LOCK_SH, sign)  # shared: other parts look too
    if not (workdir / f"synthesis{suffix}.json").exists():
      for rows in workdir.glob(f"*/*/rows{suffix}.jsonl"):
        rows.unlink(missing_ok=True)
    sign.unlink(missing_ok=True)


# --- items --------------------------------------------------------------------------------------


def _of_part(config, identifier):
  """The items of config.part, a list; of more parts than there are items the last ones have none."""
  items = list(itertools.islice(_items(config, identifier), config.part[0], None, config.part[1]))
  if not items and config.part[0] == 0:
    raise run.Refused(f"{_setting(config, 'text') or config.recipe} has nothing for config.languages "
                      f"{config.languages}")
  counted = collections.Counter(item.name for item in items)
  if len(counted) < len(items):
    raise run.Refused(f"{counted.most_common(1)[0][0]} names {counted.most_common(1)[0][1]} items, "
                      "expected one: rename the file")
  return items


def _items(config, identifier):
  """Yields every Item of all parts, in the order of the files."""
  if config.recipe == "pairs":
    yield from pairs.items(config.pairs, config.languages, config.name)
    return
  counted = collections.Counter()
  chosen = set(languages.select(config.languages)) - {languages.CODE}
  for name, code, record in _records(config.text, _pair_records if config.recipe == "filter" else None):
    if code in chosen and (not config.limit or counted[code] < config.limit):
      counted[code] += 1
      yield from _becoming(name, code, record, config, identifier)


def _becoming(name, code, record, config, identifier):
  """The items that one record of the text becomes."""
  settings, called = config[config.recipe], config.name or config.recipe
  whole = recipes.Item(name, code, code, record, f"{code}/{called}")
  if isinstance(record, text.Malformed) or config.recipe not in ("translate", "filter"):
    yield whole
  elif config.recipe == "translate":
    for target in languages.select(settings.targets):
      if target != code:
        yield whole._replace(name=f"{name} into {target}", target=target, folder=f"{target}/{called}")
  else:
    wrong = functools.partial(_wrong, config, identifier)
    source, target, *way = recipes.pair_of(record, code, settings.other, wrong)
    way = [languages.find(name).code for name in way]
    record = record | dict(source=source, target=target, code=way[0])
    whole = whole._replace(code=way[0], target=way[1], record=record)
    yield whole
    for other in languages.select(settings.back) if settings.back else ():
      if other not in way:
        yield whole._replace(name=f"{name} from {other}", code=other, back=True)


def _records(folder, reader=None):
  """Yields (name, code, record or Malformed) of a folder's text, or of embedded/<split>."""
  if _embedded(folder):
    for code, sources in text.languages(folder).items():
      for source in sources:
        for number, document in enumerate(text.read(folder, code, source), 1):
          yield f"{code}/{source}#{number}", code, {_field(document): document}
    return
  for codes, _, path, labels in text.files(folder):
    place = path.relative_to(folder).as_posix() + (f":{'+'.join(labels)}" if labels else "")
    for number, record in enumerate((reader or text.records)(path, labels), 1):
      yield f"{place}#{number}", codes[0] if len(codes) == 1 else _chinese(record), record


def _field(document):
  return "text" if isinstance(document, str) else "messages"


def _chinese(record):
  """Which of the two a record of cmn_Hani is."""
  from tiny_aya_jax.data import identify

  return identify.han(json.dumps(record, ensure_ascii=False) if isinstance(record, dict) else "")


def _pair_records(path, labels):
  """The records of a .jsonl of pairs: {"source", "target"}, or a conversation of one exchange."""
  if ".jsonl" not in path.name:
    raise run.Refused(f"{path} holds no pairs: filter reads .jsonl")
  marks = [b"\\u", *(label.encode() for label in labels)] if labels else [b""]
  for number, line in text.lines(path):
    if line.strip() and any(mark in line for mark in marks):
      record = _pair_record(line, f"{path}, line {number}")
      label = None if isinstance(record, text.Malformed) else record.get("lang", record.get("language"))
      if not labels or label in labels:
        yield record


def _pair_record(line, place):
  try:
    record = json.loads(line.decode())
    turns = record.get("messages")
    said = [record.get("source"), record.get("target")] if turns is None else [
        turn["content"] for turn in turns]
    roles = [turn["role"] for turn in turns or ()]
    ways = [record[field] for field in ("source_lang", "target_lang") if field in record]
  except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
    return text.Malformed("not JSON", f"{place} is no record ({type(error).__name__}: {error})")
  if len(said) != 2 or not all(isinstance(part, str) for part in said) or roles not in (
      [], ["user", "assistant"]):
    return text.Malformed("no pair", f"{place}: expected 'source' and 'target', or one exchange")
  if not all(part.strip() for part in said):
    return text.Malformed(text.EMPTY, f"{place} says nothing")
  try:
    "".join(said).encode()
    for name in ways:
      languages.find(name)
  except ValueError as error:  # also a Refused
    return text.Malformed("no pair", f"{place}: {error}")
  return record if turns is None else record | dict(
      messages=[dict(role=role, content=part) for role, part in zip(roles, said, strict=True)])


def _work(item, config, tools):
  """The generator that rounds.play plays."""
  if isinstance(item.record, text.Malformed):
    return _spoilt("malformed", str(item.record)) if item.record.reason != text.EMPTY else (
        _spoilt("empty", ""))
  if "text" in item.record and config.recipe != "filter":
    return _spoilt("no conversation", "a document, expected messages")
  return RECIPES[config.recipe](item, tools)


def _spoilt(reason, why):
  raise recipes.Ended("dropped", reason, why)
  yield


# --- tools --------------------------------------------------------------------------------------


def _identifier(config):
  if config.recipe == "pairs":
    return None
  try:
    from tiny_aya_jax.data import identify
  except ImportError as error:
    raise run.Refused(f"synthesize needs {error.name}: pip install 'tiny_aya_jax[data]'") from None
  return identify.identifier(config.identifier)


def _wrong(config, identifier, said, code):
  from tiny_aya_jax.post import checks

  return checks.other_language(said, code, identifier, config.margin, config.script_share)


def _commands(config):
  settings = config[config.recipe]
  return {hook: rounds.Command(settings[hook].command)
          for hook in HOOKS if hook in settings and settings[hook].command}


def _scores(settings):
  """{hook: {item's name: score}} of the hooks that are files of {"item", "score"}."""
  found = {}
  for hook in HOOKS:
    if hook in settings and "file" in settings[hook] and settings[hook].file:
      try:
        found[hook] = {row["item"]: float(row["score"]) for row in run.read_lines(settings[hook].file)}
      except (KeyError, TypeError, ValueError) as error:
        raise run.Refused(f"{settings[hook].file}: expected lines of \"item\" and a number \"score\" "
                          f"({type(error).__name__}: {error})") from None
  return found


def _whole(record, workdir):
  """Whether the files that a finished run has written are still there."""
  return all((workdir / name).exists() for name in run.read_json(record, "earlier result")["files"])


def _models(config, items, tools, askers, workdir):
  """({language: the endpoint that writes in it}, the scores they were chosen by or None)."""
  settings = tools.settings
  if config.recipe == "filter":
    return {code: settings.translator for code in languages.select(settings.back or ("all",))}, None
  if "models" not in settings:
    return {}, None
  wanted = languages.select({item.target for item in items}) if items else ()
  if len(settings.models) == 1:
    return dict.fromkeys(wanted, settings.models[0]), None
  if settings.scores:
    scores = run.read_json(settings.scores, "scores of models")
  else:
    sources = _dev_texts(settings, config.languages)
    scores = _assayed(sources, wanted, tools, askers)
    run.write_json(workdir / "scores.json", scores)
  return _best(scores, wanted, settings), scores


def _best(scores, wanted, settings):
  """{language: the model of the highest score}; of equal ones the first in the config."""
  best = {}
  for code in wanted:
    row = scores.get(code)
    if not isinstance(row, dict) or not all(
        isinstance(row.get(model), int | float) for model in settings.models):
      raise run.Refused(f"the scores of models have none of {code} for each of {settings.models}: "
                        f"they hold {str(row)[:100]}")
    best[code] = max(settings.models, key=row.get)
  return best


def _assayed(sources, wanted, tools, askers):
  """{language: {model: its mean score over the dev set}}.

  What was dropped counts as the worst score of all, 0 at most: scales may be negative. A text that
  one model was not answered for counts for none.
  """
  items = [recipes.Item(f"{name} into {code} by {model}", source, code,
                        dict(source=said, endpoint=model), "")
           for code, model in itertools.product(wanted, tools.settings.models)
           for name, source, said in sources if source != code]
  played = rounds.play({item.name: recipes.assay(item, tools) for item in items}, askers)
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for item in items:
    found[item.target][item.name.rpartition(" by ")[0]].append(played[item.name][0])
  floor = min([0.0, *(one["score"] for one, _ in played.values() if isinstance(one, dict))])
  return {code: _means(code, texts.values(), tools.settings.models, floor)
          for code, texts in found.items()}


def _means(code, rows, models, floor):
  """{model: mean} of rows of what became of a text under each model; `floor` for what was dropped."""
  whole = [row for row in rows if not any(
      isinstance(one, recipes.Ended) and one.state == "failed" for one in row)]
  if not whole:
    raise run.Refused(f"into {code} no text of config.translate.dev was answered by each of {models} "
                      "and scored: see to the endpoints, and start again")
  scores = [[one["score"] if isinstance(one, dict) else floor for one in row] for row in whole]
  return {model: sum(column) / len(whole) for model, column in zip(models, zip(*scores), strict=True)}


def _dev_texts(settings, wanted):
  """[(name, language, text)]: the first texts of the dev set in each language that is translated."""
  found, counted, chosen = [], collections.Counter(), languages.select(wanted)
  for name, code, record in _records(settings.dev):
    malformed = isinstance(record, text.Malformed)
    if malformed or code not in chosen or counted[code] == settings.dev_items:
      continue
    counted[code] += 1
    said = record["text"] if "text" in record else record["messages"][0]["content"]
    found.append((name, code, said))
  return found


# --- what is written ----------------------------------------------------------------------------


def _write(items, played, config, workdir):
  """Writes the languages' files and the ledger; -> dict(counts by language and state, files)."""
  rows, ledger, counts = collections.defaultdict(list), [], {}
  for item in items:
    outcome, asked = played[item.name]
    ended = isinstance(outcome, recipes.Ended)
    state, reason, why = (outcome.state, outcome.reason, outcome.why) if ended else ("kept", "", "")
    ledger.append(dict(item=item.name, folder=item.folder, state=state, reason=reason,
                       why=_mended(why), asked=asked))
    count = counts.setdefault(item.folder.partition("/")[0], dict(items=0, kept=0, dropped={}, failed={}))
    count["items"] += 1
    if ended:
      count[state][reason] = count[state].get(reason, 0) + 1
    else:
      count["kept"] += 1
      rows[item.folder].append(_row(item, outcome, config))
  name = _named("rows", ".jsonl", config.part)
  for old in workdir.glob(f"*/*/{name}"):  # of other inputs, overwritten
    if str(old.parent.relative_to(workdir)) not in rows:
      old.unlink()
  for folder, lines in rows.items():
    (workdir / folder).mkdir(parents=True, exist_ok=True)
    run.write_lines(workdir / folder / name, lines)
  run.write_lines(workdir / _named("ledger", ".ndjson", config.part), ledger)
  return dict(counts=counts, files=sorted(f"{folder}/{name}" for folder in rows))


def _row(item, outcome, config):
  passed = {key: _mended(item.record[key]) for key in PASSED_ON
            if isinstance(item.record.get(key), str)}
  if config.recipe == "filter" and "messages" not in item.record:
    passed.pop("source", None)  # there it is the text
  return dict(lang=item.folder.partition("/")[0], **outcome, item=item.name, recipe=config.recipe) | passed


def _mended(said):
  """Half a surrogate pair, which UTF-8 cannot write, becomes '?'."""
  return said.encode("utf-8", "replace").decode()


def _named(name, suffix, part):
  """'rows.jsonl', or 'rows-00002-of-00008.jsonl' of one part of several."""
  return f"{name}{suffix}" if part[1] == 1 else f"{name}-{part[0]:05}-of-{part[1]:05}{suffix}"


def _spent(askers):
  """{endpoint: what this run asked and paid, and under "kept" all that lies in its cache}."""
  return {name: asker.client.spent() | dict(kept=asker.paid())
          for name, asker in askers.items() if isinstance(asker, rounds.Endpoint)}


def _version(identifier):
  if identifier is None:
    return None
  if pathlib.Path(identifier).is_file():
    return dict(file=pathlib.Path(identifier).name, sha256=run.sha256(identifier))
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return dict(package=identifier, version=importlib.metadata.version(identifier))
  return dict(package=identifier)


def _unseen(items, identifier):
  """Languages among the targets that the identifier has no label for: judged by script alone."""
  if identifier is None:
    return []
  return sorted(code for code in {item.target for item in items}
                if not identifier.sees(languages.find(code)))


def table(result):
  """Lines: items, kept, dropped and failed by reason, per language and in all; then what was spent."""
  counts = result["counts"]
  total = dict(items=0, kept=0, dropped=collections.Counter(), failed=collections.Counter())
  for count in counts.values():
    for state in total:
      total[state] += count[state] if state in ("items", "kept") else collections.Counter(count[state])
  yield f"{'language':10} {'items':>7} {'kept':>7}  dropped and failed, by reason"
  for code, count in [*counts.items(), ("all", total)]:
    why = [f"{reason} {n}" for reason, n in count["dropped"].items()]
    why += [f"failed for {reason} {n}" for reason, n in count["failed"].items()]
    yield f"{code:10} {count['items']:7} {count['kept']:7}  {', '.join(why)}"
  for name, spent in result["spent"].items():
    sent = spent["requests"] - spent["cached"]
    yield (f"{name}: {sent} requests sent, {spent['retried']} tries more, {spent['cached']} from the "
           f"cache, {spent['failed']} failed; {spent['prompt_tokens']} + {spent['completion_tokens']} "
           f"tokens, {spent['money']:.4f} spent now, {spent['kept']['money']:.4f} in all")
