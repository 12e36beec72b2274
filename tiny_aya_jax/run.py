"""What every verb shares: flags and configs, refusals and exit codes, atomic files, progress.

Nothing here imports jax: a wrong flag, field or file is refused in about a second, before any
device is touched. Exit codes are a contract with whatever restarts the process (see `EXIT`).
"""

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

# ml_collections and absl are imported where configs are parsed: models need neither.

EXIT = dict(
    done=0,
    refused=65,  # bad config or data: never restart
    preempted=75,  # saved: restart at once
    hang=76,  # restart with backoff
    not_finite=77,  # loss is not finite: restart at most N times
)
BEGAN = time.time()  # when this process did, within the interpreter's start


class Refused(ValueError):
  """Bad input, in one sentence: what was given, what was expected, what to do. Exit code 65."""


def nearest(name, names):
  """'; did you mean X?' for the closest of `names`, or the list itself when nothing is close."""
  names = sorted(map(str, names))
  close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
  if close:
    return f"did you mean {close[0]!r}?"
  return "expected one of " + ", ".join(names)


def choose(what, given, choices):
  """Returns `given` if it is one of `choices`; refuses with the nearest name otherwise."""
  if not isinstance(given, str) or given not in choices:
    raise Refused(f"unknown {what} {given!r}: {nearest(given, choices)}")
  return given


# What these fields of a config may be, in every verb that has them.
CHOICES = dict(
    dtype=("float32", "bfloat16"), attention=("reference", "chunked", "splash", "cudnn"),
    remat=("none", "full", "attn", "qkv", "minimal", "offload"), matmul=("dtype", "fp8"),
)


def choose_fields(config, *names):
  """Refuses a config whose fields `names` are not among CHOICES."""
  for name in names:
    choose(f"config.{name}", config[name], CHOICES[name])


def plain_name(field, name):
  """Refuses a name that is not that of one new folder inside another."""
  if not name or name in (".", "..") or pathlib.PurePath(name).name != name:
    raise Refused(f"config.{field} is {name!r}: expected the name of one folder")


def existing(field, path):
  """Returns `path` if it is there; refuses one that is not set or does not exist."""
  if not path:
    raise Refused(f"config.{field} is not set")
  if not os.path.exists(path):
    raise Refused(f"config.{field}: {path} does not exist")
  return path


def installed(package):
  """Whether a package can be imported; it is not."""
  return importlib.util.find_spec(package) is not None


def parse(argv, verbs_without_workdir=()):
  """['VERB', '--config=FILE[:variant]', '--workdir=DIR', '--config.x=y'] -> (config, workdir).

  The file is Python with `get_config(variant)`; fields are overridden with their own types and
  nothing else is accepted. Raises Refused for anything unknown, with the nearest name.
  """
  verb, rest = argv[0], argv[1:]
  given = {}
  for word in rest:
    name, equals, value = word.removeprefix("--").partition("=")
    if not word.startswith("--") or not equals:
      raise Refused(f"argument {word!r} is not of the form --name=value")
    if name != "config" and name != "workdir" and not name.startswith("config."):
      raise Refused(f"unknown flag --{name}: {nearest(name, ('config', 'workdir'))}")
    if name in given:
      raise Refused(f"--{name} is given twice: {given[name]!r} and {value!r}")
    given[name] = value
  if not given.get("config"):
    raise Refused(f"{verb} needs --config=FILE[:variant], for example --config=experiments/{verb}.py")
  if not given.get("workdir") and verb not in verbs_without_workdir:
    raise Refused(f"{verb} needs --workdir=DIR, the folder it writes to")
  config = load_config(given.pop("config"))
  workdir = given.pop("workdir", None)
  if workdir and "://" in workdir:  # pathlib would make a local folder of that name
    raise Refused(f"--workdir={workdir} is remote: mount the bucket (gcsfuse) and give its path")
  for folder in (pathlib.Path(workdir), *pathlib.Path(workdir).parents) if workdir else ():
    if folder.exists() and not folder.is_dir():
      raise Refused(f"--workdir={workdir}: {folder} is a file, expected a folder")
  override(config, {name.removeprefix("config."): value for name, value in given.items()})
  return config, pathlib.Path(workdir) if workdir else None


def load_config(spec):
  """'FILE[:variant]' -> a locked ConfigDict, from the file's get_config(variant)."""
  path, _, variant = spec.partition(":")
  if not os.path.isfile(path):
    raise Refused(f"--config names {path!r}, which is not a file")
  if not path.endswith(".py"):
    raise Refused(f"--config names {path!r}, expected a Python file with get_config(variant)")
  module_spec = importlib.util.spec_from_file_location(f"config_{pathlib.Path(path).stem}", path)
  module = importlib.util.module_from_spec(module_spec)
  # A config may import its neighbours, and those of the folder above (experiments/sweeps), from
  # whichever folder the verb was called.
  folder = os.path.dirname(os.path.abspath(path))
  with _import_path(os.path.dirname(folder)), _import_path(folder):
    try:
      module_spec.loader.exec_module(module)
      if not hasattr(module, "get_config"):
        raise Refused(f"{path} has no get_config(variant) function")
      config = module.get_config(variant) if variant else module.get_config()
    except Refused:
      raise
    except Exception as error:  # the file is a program: it may fail in any way
      raise Refused(f"{path} is not a config that can be read "
                    f"({type(error).__name__}: {' '.join(str(error).split())})") from error
  from ml_collections import ConfigDict

  if not isinstance(config, ConfigDict):
    raise Refused(f"{path}: get_config returns a {type(config).__name__}, expected a ConfigDict")
  return config.lock()


@contextlib.contextmanager
def _import_path(folder):
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)


def override(config, values):
  """Sets {'data.T': '512', ...} on a locked config, each in the type of the field."""
  from absl import flags
  from ml_collections import ConfigDict, config_flags

  for name, value in values.items():
    node, path = config, name.split(".")
    for depth, key in enumerate(path):
      if not isinstance(node, ConfigDict) or key not in node:
        fields = node.keys() if isinstance(node, ConfigDict) else []
        where = ".".join(("config", *path[:depth]))
        raise Refused(
            f"unknown field {name!r}: {where} has no {key!r}; {nearest(key, fields)}"
            if fields
            else f"unknown field {name!r}: {where} is a value and has no fields"
        )
      if depth < len(path) - 1:
        node = node[key]
    if isinstance(node[path[-1]], ConfigDict):
      raise Refused(f"config.{name} is a group of fields, not a value: set one of "
                    + ", ".join(f"config.{name}.{key}" for key in node[path[-1]].keys()))
  argv = ["tiny-aya", *(f"--config.{name}={value}" for name, value in values.items())]
  flag_values = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=argv)
  try:
    flag_values(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise Refused(" ".join(str(error).split())) from error


def sha256(path):
  """Hex digest of a file's bytes."""
  digest = hashlib.sha256()
  try:
    with open(path, "rb") as file:
      while block := file.read(1 << 20):
        digest.update(block)
  except OSError as error:
    raise Refused(f"{path} cannot be read: {error.strerror}") from None
  return digest.hexdigest()


def fingerprint(value):
  """Hex digest of any JSON value: equal inputs, equal fingerprints, on every machine."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path, value):
  """Writes atomically: a reader sees the old file or the new one, never half of it."""
  write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path, rows):
  """Writes a file of JSON lines, as write_json does."""
  write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path, text):
  """Writes UTF-8, atomically and to the disk."""
  path = pathlib.Path(path)
  temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def read_lines(path):
  """The rows of a file of JSON lines; one that a crash tore is left out, and no file has none."""
  rows, path = [], pathlib.Path(path)
  if path.exists():
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
      with contextlib.suppress(json.JSONDecodeError):
        rows.append(json.loads(line))
  return rows


def read_json(path, what):
  """Reads a JSON object; a missing or broken file is refused as '`what`: ...'."""
  try:
    found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except OSError as error:
    reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
    raise Refused(f"{what}: {path} {reason}") from None
  except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers or depth beyond reason
    raise Refused(f"{what}: {path} is not JSON ({error})") from None
  if not isinstance(found, dict):
    raise Refused(f"{what}: {path} holds a JSON {type(found).__name__}, expected an object")
  return found


def up_to_date(record, inputs, overwrite):
  """Whether `record` (a JSON file with 'inputs') was made from the same inputs.

  A missing record means there is work to do, and so does `overwrite`, whatever is there; else
  another fingerprint is refused.
  """
  if overwrite or not pathlib.Path(record).exists():
    return False
  if read_json(record, "earlier result").get("inputs") == inputs:
    return True
  raise Refused(
      f"{record} was made from other inputs: give another --workdir, or --config.overwrite=True"
  )


def provenance(config):
  """What produced a result: config text, git revision and diff, versions, command, time."""
  def git(*command):
    if not shutil.which("git"):
      return None
    root = pathlib.Path(__file__).parent
    found = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None

  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")
  return dict(
      config=str(config),
      command=sys.argv,
      git_revision=git("rev-parse", "HEAD"),
      git_diff=git("diff", "HEAD"),
      versions={name: importlib.metadata.version(name) for name in packages},
      python=sys.version.split()[0],
      time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
  )


@functools.cache  # one watch a process
def end_with():
  """Ends this process soon after its parent: a worker must not write on when its call was killed."""
  parent = os.getppid()

  def watch():
    while os.getppid() == parent:
      time.sleep(0.5)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def say(*words):
  """Prints one line at once; only process 0 speaks. A log on a full disk is no reason to end."""
  jax = sys.modules.get("jax")
  # To ask a process for its number starts its devices, and before it has joined others it must not.
  if jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0:
    with contextlib.suppress(OSError):
      # One write, its end included: other threads write into the same log.
      print(" ".join(map(str, words)) + "\n", end="", flush=True)


def progress(items, what, total=None):
  """Yields `items`, with a bar on a terminal and a plain line every ten seconds elsewhere.

  A terminal shows one bar at a time: threads beside the main one say lines.
  """
  if sys.stdout.isatty() and threading.current_thread() is threading.main_thread():
    from rich.progress import track

    yield from track(items, description=what, total=total, transient=True)
    return
  total = total if total is not None else len(items)
  last = time.monotonic()
  for done, item in enumerate(items):
    if time.monotonic() - last > 10:
      say(f"{what}: {done} of {total}")
      last = time.monotonic()
    yield item
