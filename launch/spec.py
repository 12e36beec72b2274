"""What to run and where, for every backend: one TOML file (example.toml explains each field).

Standard library only. Everything that is wrong is refused here, in one sentence, exit code 65, before
a cloud is asked for anything. Values of secrets are never in a Spec: `environment` holds names.
"""

import argparse
import dataclasses
import difflib
import math
import re
import tomllib
from typing import NamedTuple

REFUSED = 65  # the exit code, see supervise.py


class Refused(ValueError):
  """One sentence: what was given, what was expected. Exit code 65."""


class Arguments(argparse.ArgumentParser):
  """A wrong argument is refused as everything else is."""

  def error(self, message):
    raise Refused(message)


class Family(NamedTuple):
  """A generation of TPUs, by the names that the clouds have for it."""

  accelerator: str  # of TPU VMs and xpk
  runtime: str  # image of a TPU VM
  gke: str  # node label cloud.google.com/gke-tpu-accelerator
  axes: int


FAMILIES = dict(
    v4=Family("v4-{cores}", "tpu-ubuntu2204-base", "tpu-v4-podslice", 3),
    v5e=Family("v5litepod-{chips}", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2),
    v5p=Family("v5p-{cores}", "v2-alpha-tpuv5", "tpu-v5p-slice", 3),
    v6e=Family("v6e-{chips}", "v2-alpha-tpuv6e", "tpu-v6e-slice", 2),
)
CAPACITIES = ("spot", "reserved", "on-demand")


def _text(default="", *, like, say):
  return dataclasses.field(default=default, metadata=dict(like=like, say=say))


def _number(default):
  return dataclasses.field(default=default, metadata=dict(say="a whole number of at least 1"))


@dataclasses.dataclass(frozen=True)
class Spec:
  """Fields without a default are always needed, the others by the backends that ask for them."""

  # It names cloud resources: DNS-1123, a letter first, short enough for the suffixes of pods.
  name: str = _text(dataclasses.MISSING, like=r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?",
                    say="at most 40 of a-z, 0-9 and -, a letter first and no - last")
  command: tuple = dataclasses.field(metadata=dict(say="a list of words, the verb first"))
  repository: str = _text(say="the URL of a git repository, without a password",
                          like=r"https://[\w.:/~+-]+|(ssh://)?[\w.-]+@[\w.:/~+-]+|/[\w./~+-]+")
  revision: str = _text(like=r"[0-9a-f]{40}", say="a git commit, 40 hexadecimal digits")
  bucket: str = _text(like=r"gs://[a-z0-9][a-z0-9._-]+", say="gs://BUCKET, no folder in it")
  mount: str = _text("/mnt/tiny-aya", like=r"(/[\w.-]+)+", say="an absolute path of plain letters")
  environment: tuple = dataclasses.field(default=(), metadata=dict(say="a list of names of variables"))
  attempts: int = _number(20)
  grace_seconds: int = _number(300)
  delete_when_done: bool = dataclasses.field(default=True, metadata=dict(say="true or false"))
  topology: str = _text(like=r"v\w+:[1-9]\d*(x[1-9]\d*)*", say="a slice such as v5e:4x4 or v5p:4x4x8")
  slices: int = _number(1)
  capacity: str = _text("spot", like="|".join(CAPACITIES), say="spot, reserved or on-demand")
  project: str = _text(like=r"[a-z][a-z0-9:.-]+", say="a Google Cloud project")
  zone: str = _text(like=r"[a-z]+-[a-z]+\d+-[a-z]", say="a zone such as us-east5-b")
  cluster: str = _text(like=r"[a-z][-a-z0-9]*", say="the name of a GKE cluster")
  image: str = _text(like=r"[a-z0-9][\w./:@-]*", say="a container image")
  reservation: str = _text(like=r"[a-z][\w./-]*", say="the name of a reservation")
  service_account: str = _text("default", like=r"[a-z0-9][-a-z0-9.]*",
                               say="a Kubernetes service account")
  secret: str = _text("tiny-aya", like=r"[a-z0-9][-a-z0-9.]*", say="the name of a Kubernetes secret")
  nodes: int = _number(1)
  gpus: int = _number(8)
  partition: str = _text(like=r"[\w.-]+", say="a SLURM partition")
  time: str = _text("24:00:00", like=r"(\d+-)?\d+(:\d\d){0,2}", say="a SLURM time such as 24:00:00")

  def __post_init__(self):
    for field in dataclasses.fields(self):
      _check(field, getattr(self, field.name))
    if not self.command or not re.fullmatch(r"[a-z]+", self.command[0]):
      raise Refused(f"command is {list(self.command)}, expected a verb first, for example 'train'")
    if any(word.startswith("--workdir") for word in self.command):
      raise Refused(f"command has --workdir, expected none: it is {self.workdir}, from the name alone")
    for name in self.environment:
      if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        before = name.split("=")[0]  # what is after it may be a secret: not repeated
        raise Refused(f"environment has {before!r} and more, expected names without values")
    if self.topology and self.chips > 8 and self.chips % 4:
      raise Refused(f"topology {self.topology} has {self.chips} chips, "
                    "expected a multiple of 4, those of a host")

  @property
  def family(self):
    kind, shape = self.topology.split(":")
    if kind not in FAMILIES:
      raise Refused(f"unknown topology {self.topology!r}: {nearest(kind, FAMILIES)}")
    axes, expected = len(shape.split("x")), FAMILIES[kind].axes
    if axes != expected:
      raise Refused(f"topology {self.topology} has {axes} axes, expected {expected} for {kind}")
    return FAMILIES[kind]

  @property
  def shape(self):
    return self.topology.split(":")[1]

  @property
  def chips(self):
    """Of one slice."""
    return self.family and math.prod(map(int, self.shape.split("x")))

  @property
  def chips_a_host(self):
    """v5e and v6e have hosts of eight as well, which are a slice by themselves."""
    return self.chips if self.family.axes == 2 and self.chips <= 8 else min(self.chips, 4)

  @property
  def hosts(self):
    """Of one slice."""
    return self.chips // self.chips_a_host

  @property
  def accelerator(self):
    """The type of one slice; v4 and v5p are counted in TensorCores, two a chip."""
    return self.family.accelerator.format(chips=self.chips, cores=2 * self.chips)

  @property
  def workdir(self):
    """By the run's name alone: a resume needs nothing else."""
    return f"{self.mount}/runs/{self.name}"

  @property
  def startup(self):
    """What startup.sh is told, as assignments before a command; no field has a letter to quote."""
    return (f"REPOSITORY={self.repository} REVISION={self.revision} BUCKET={self.bucket} "
            f"MOUNT={self.mount}")

  def words(self, slices=None):
    """The verb line. On fewer slices each step is split further, so that the global batch stays."""
    slices, flag = self.slices if slices is None else slices, "--config.accumulate="
    if slices < 1 or self.slices % slices:
      raise Refused(f"{slices} slices of the planned {self.slices}: expected a divisor of "
                    f"{self.slices}, so that the batch splits evenly")
    words = list(self.command)
    if slices != self.slices:
      own = [word.removeprefix(flag) for word in words if word.startswith(flag)] or ["1"]
      if not re.fullmatch(r"[1-9]\d*", own[-1]):
        raise Refused(f"command has {flag}{own[-1]}, expected a whole number of at least 1")
      words = [word for word in words if not word.startswith(flag)]
      words.append(f"{flag}{int(own[-1]) * self.slices // slices}")
    return (*words, f"--workdir={self.workdir}")

  def need(self, backend, *names):
    """Refuses a Spec in which a field that the backend needs is not set."""
    for name in names:
      if not getattr(self, name):
        raise Refused(f"{backend} needs {name}, which is not set: {_say(name)}")


def read(path):
  """launch/*.toml -> Spec."""
  try:
    with open(path, "rb") as file:
      values = tomllib.load(file)
  except OSError as error:
    raise Refused(f"{path} cannot be read: {error.strerror}") from None
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise Refused(f"{path} is not TOML: {error}") from None
  fields = {field.name: field for field in dataclasses.fields(Spec)}
  for name in values:
    if name not in fields:
      raise Refused(f"{path}: unknown field {name!r}: {nearest(name, fields)}")
  for name, field in fields.items():
    if name not in values and field.default is dataclasses.MISSING:
      raise Refused(f"{path} has no {name}: {_say(name)}")
  try:
    return Spec(**{name: tuple(value) if isinstance(value, list) else value
                   for name, value in values.items()})
  except Refused as error:
    raise Refused(f"{path}: {error}") from None


def nearest(name, names):
  """'did you mean X?', or the list when nothing is close."""
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  return f"did you mean {close[0]!r}?" if close else "expected one of " + ", ".join(names)


def _check(field, value):
  kind, say = field.type, field.metadata["say"]
  if type(value) is not kind:
    raise Refused(f"{field.name} is {value!r}, expected {say}")
  if kind is int and value < 1:
    raise Refused(f"{field.name} is {value}, expected {say}")
  if kind is tuple and not all(isinstance(word, str) and "\0" not in word for word in value):
    raise Refused(f"{field.name} is {list(value)!r}, expected {say}")
  if kind is str and value and not re.fullmatch(field.metadata["like"], value, re.ASCII):
    # A URL may hold a password: it is not repeated.
    given = "not one" if field.name == "repository" else repr(value)
    raise Refused(f"{field.name} is {given}, expected {say}")
  if kind is str and not value and field.default is dataclasses.MISSING:
    raise Refused(f"{field.name} is empty, expected {say}")


def _say(name):
  return "expected " + Spec.__dataclass_fields__[name].metadata["say"]
