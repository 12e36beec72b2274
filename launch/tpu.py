"""A run on TPU VMs, through queued resources and gcloud; a laptop without jax is enough.

  python launch/tpu.py babysit launch/mine.toml     asks for the slices, sets up, runs, and again when
                                                    they are taken away, until the run is done
  python launch/tpu.py create|setup|run|status|logs|stop SPEC.toml     one step of it

  --dry_run       prints every command instead, quoted for a shell; --dry_run=json as lists of words
  --slices=K      K slices instead of the planned ones, at the same global batch; babysit gives back
                  what an earlier K had
  --delete        stop: also gives the slices back

Exit codes of babysit: 0 done · 65 refused by us, by gcloud or by the run · 75 asked to stop (Ctrl-C
leaves the run alone; `stop` ends it, saved) · otherwise the last code, after bounded attempts.
The names of `environment` are read here and go to the hosts as a file of mode 600, over ssh.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import spec as specs
from supervise import DONE, FIRST_PAUSE, LONGEST_PAUSE, PREEMPTED, REFUSED, Policy

HERE = pathlib.Path(__file__).parent
POLL_SECONDS = 60
# What gcloud may take: a description, a set-up with its installs.
CALL_SECONDS, SETUP_SECONDS = 300, 3600
# States of a queued resource and of a node; what is in none of these lists is waited for.
LOST = ("SUSPENDING", "SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "GONE")
# What gcloud says, in this order: a sentence about quota may also hold the number 403.
LATER = (r"RESOURCE_EXHAUSTED|no more capacity|quota|UNAVAILABLE|\b(429|50[0234])\b"
         r"|timed? ?out|connection")
NEVER = (r"PERMISSION_DENIED|does not have permission|INVALID_ARGUMENT|UNAUTHENTICATED"
         r"|unrecognized argument|invalid (value|choice|authentication)"
         r"|do not currently have an active account|reauthentication|gcloud auth login")
GONE = r"NOT_FOUND|not found"


class Later(Exception):
  """It may work when tried again; args: exit code, sentence."""


class Gone(Exception):
  """What was asked for is not there."""


class Slices:
  """The commands about one run's slices; `dry` prints them instead."""

  def __init__(self, spec, slices=None, dry=None):
    spec.need("tpu.py", "project", "zone", "topology", "repository", "revision", "bucket")
    self.spec, self.dry = spec, dry
    self.count, self.words = spec.slices if slices is None else slices, spec.words(slices)
    self.nodes = [spec.name] if self.count == 1 else [f"{spec.name}-{i}" for i in range(self.count)]

  def create(self):
    spec = self.spec
    nodes = [f"--node-id={spec.name}"]
    if self.count > 1:
      nodes = [f"--node-count={self.count}", f"--node-prefix={spec.name}"]
    capacity = {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}[spec.capacity]
    try:
      self._call("queued-resources", "create", spec.name, f"--accelerator-type={spec.accelerator}",
                 f"--runtime-version={spec.family.runtime}", *nodes, *capacity, "--async")
    except Gone as error:  # of a new one: its project, zone or type is unknown
      raise specs.Refused(f"gcloud: {error}") from None

  def delete(self):
    try:
      self._call("queued-resources", "delete", self.spec.name, "--force", seconds=1800)
    except Gone:
      pass

  def state(self):
    """Of the queued resource; once it is ACTIVE, the worst of its nodes, whose loss it notices late."""
    try:
      state = self._state("queued-resources", self.spec.name)
    except Gone:
      return "GONE"
    try:
      nodes = [self._state("tpu-vm", node) for node in self.nodes] if state == "ACTIVE" else []
    except Gone:  # the request for it is still there, and has to go before another can be made
      return "PREEMPTED"
    worst = sorted((node for node in nodes if node != "READY"), key=lambda node: node not in LOST)
    return worst[0] if worst else state

  def _state(self, kind, name):
    text = self._call(kind, "describe", name, "--format=json")
    if self.dry:
      return "ACTIVE"
    try:
      state = json.loads(text)["state"]
      return state["state"] if isinstance(state, dict) else state
    except (ValueError, KeyError, TypeError):
      raise Later(1, f"gcloud describes {name} as {text[:100]!r}, expected JSON with a state") from None

  def setup(self):
    spec = self.spec
    missing = [name for name in spec.environment if name not in os.environ]
    if missing and not self.dry:
      raise specs.Refused(f"environment names {missing[0]}, which is not set here")
    with tempfile.TemporaryDirectory() as folder:
      secrets = pathlib.Path("A_TEMPORARY_FOLDER" if self.dry else folder, "run.env")
      if not self.dry:
        with open(os.open(secrets, os.O_CREAT | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
          file.writelines(f"{name}={shlex.quote(os.environ[name])}\n" for name in spec.environment)
      for node in self.nodes:
        self._call("tpu-vm", "scp", str(HERE / "startup.sh"), str(secrets), f"{node}:", "--worker=all")
    self._everywhere(f"{spec.startup} bash startup.sh", SETUP_SECONDS)

  def run(self):
    self._everywhere(shlex.join(["bash", "tiny_aya_jax/launch/host.sh", "run", *self.words]))

  def stop(self, delete=False, how="stop"):
    """how: "halt" if babysit is to go on."""
    seconds = self.spec.grace_seconds
    self._everywhere(f"bash tiny_aya_jax/launch/host.sh {how} {seconds}", seconds + CALL_SECONDS)
    if delete:
      self.delete()

  def hosts(self):
    """{node/host: 'bare', 'idle', 'running', 'stopped' or 'exit CODE'}, of all hosts."""
    status = f"bash tiny_aya_jax/launch/host.sh status {self.spec.revision} {self.spec.mount}"
    text = self._everywhere(f"if [ -e tiny_aya_jax/launch/host.sh ]; then {status}; "
                            'else echo "host $(hostname) bare"; fi')
    found = dict(re.findall(r"(?m)^host (\S+) (bare|idle|running|stopped|exit \d+)\s*$", text))
    expected = self.count * self.spec.hosts
    if len(found) != expected and not self.dry:
      raise Later(1, f"{len(found)} of {expected} hosts answered")
    return found

  def status(self):
    state = self.state()
    if not self.dry:
      print(state)
    if state == "ACTIVE" or self.dry:
      for host, what in self.hosts().items():
        print(host, what)

  def logs(self):
    print(self._everywhere("tail -n 50 run.log"), end="")

  def everything(self):
    """Every command that babysit may give, in the order of a life, for --dry_run."""
    self.state()
    self.create()
    self.setup()
    self.run()
    self.status()
    self.stop(delete=True)

  def _everywhere(self, command, seconds=None):
    return "".join(
        self._call("tpu-vm", "ssh", node, "--worker=all", f"--command={command}", seconds=seconds)
        for node in self.nodes)

  def _call(self, kind, verb, *words, seconds=None):
    """Runs gcloud and returns what it prints; raises Refused, Gone or Later with its own sentence."""
    argv = ["gcloud", "compute", "tpus", kind, verb, *words, f"--project={self.spec.project}",
            f"--zone={self.spec.zone}", "--quiet"]
    seconds = seconds or CALL_SECONDS
    if self.dry:
      print(json.dumps(argv) if self.dry == "json" else shlex.join(argv))
      return ""
    try:
      done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                            errors="replace", timeout=seconds, check=False)
    except FileNotFoundError:
      raise specs.Refused("gcloud is not on PATH, install the Google Cloud CLI") from None
    except subprocess.TimeoutExpired:
      raise Later(1, f"gcloud {kind} {verb} took more than {seconds} s") from None
    if done.returncode == 0:
      return done.stdout
    sentence = _sentence(done.stderr) or _sentence(done.stdout) or f"gcloud {kind} {verb} failed"
    said, remote = done.stderr, verb in ("ssh", "scp")
    if remote:  # hosts speak as well, and an ssh key may need a minute to be accepted
      said = "\n".join(line for line in said.splitlines() if line.startswith("ERROR: (gcloud."))
      if done.returncode == REFUSED:
        raise specs.Refused(f"a host says: {sentence}")
    if not re.search(LATER, said, re.IGNORECASE):
      if re.search(NEVER, said, re.IGNORECASE):
        raise specs.Refused(f"gcloud: {sentence}")
      if re.search(GONE, said, re.IGNORECASE) and not remote:
        raise Gone(sentence)
    raise Later(done.returncode, f"gcloud {kind} {verb}: {sentence}")


def _sentence(text):
  """The line of gcloud that says what is wrong, or the last one."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return next((line for line in lines if re.match("ERROR|refused", line)), lines[-1] if lines else "")


def babysit(slices, sleep=time.sleep, clock=time.monotonic, say=lambda words: print(words, flush=True)):
  """Until the run ends for good; returns the exit code.

  Trouble with gcloud, and slices lost before anything ran on them, are bounded by spec.attempts in a
  row, with pauses that double. Slices lost by a run that was running are asked for again, for ever.
  """
  policy, attempts = Policy(), slices.spec.attempts
  trouble, losses, began, uneven, code = 0, 0, clock(), None, 1
  while True:
    try:
      state = slices.state()
      say(f"babysit: {state}")
      if state in LOST:
        if losses > attempts:
          say(f"babysit: lost {losses} times before anything ran: not asked for again")
          return code
        if state != "GONE":
          slices.delete()
        if losses:
          sleep(_pause(losses))
        slices.create()
        losses += 1
      elif state == "ACTIVE":
        hosts = slices.hosts()
        states = set(hosts.values())
        ended = [int(word.removeprefix("exit ")) for word in states if word.startswith("exit")]
        say("babysit: " + ", ".join(f"{host} {what}" for host, what in sorted(hosts.items())))
        if "bare" in states:
          slices.setup()
          if "bare" in slices.hosts().values():
            raise Later(1, "a host is not ready after its set-up")
          continue
        if "running" in states:
          losses = 0
          if len(states) == 1:
            uneven = None
          elif "idle" in states:  # a host that rebooted
            slices.run()
          else:  # those that run cannot go on without the others: they notice, or are told
            uneven = uneven or clock()
            if clock() - uneven > slices.spec.grace_seconds:
              slices.stop(how="halt")
              uneven = None
        elif "stopped" in states:
          return PREEMPTED
        elif ended:
          uneven, code = None, _worst(ended)
          pause = policy.pause(code, clock() - began)
          say(f"babysit: exit {code}: " + ("ends here" if pause is None else f"again in {pause} s"))
          if pause is None:
            if code == DONE and slices.spec.delete_when_done:
              slices.delete()
            return code
          sleep(pause)
          if slices.state() == "ACTIVE":  # it saved because its slices are being taken away
            slices.run()
            began = clock()
        else:
          slices.run()
          began = clock()
      trouble = 0
      sleep(POLL_SECONDS)
    except Later as error:
      trouble += 1
      code, sentence = error.args
      say(f"babysit: {sentence} (attempt {trouble} of {attempts})")
      if trouble >= attempts:
        return code
      sleep(_pause(trouble))


def _pause(times):
  return min(FIRST_PAUSE * 2 ** (times - 1), LONGEST_PAUSE)


def _worst(codes):
  """Of the hosts: one that refuses decides, then a failure, then one that saved; done is when all are."""
  failed = [code for code in codes if code not in (DONE, PREEMPTED)]
  return REFUSED if REFUSED in codes else max(failed or codes)


VERBS = dict(create=Slices.create, setup=Slices.setup, run=Slices.run, status=Slices.status,
             logs=Slices.logs, stop=Slices.stop, babysit=babysit)


def main(argv, **clocks):
  """['VERB', 'SPEC.toml', ...] -> exit code; `clocks`: sleep and clock of babysit."""
  parser = specs.Arguments(prog="python launch/tpu.py")
  parser.add_argument("verb", choices=VERBS)
  parser.add_argument("spec")
  parser.add_argument("--dry_run", nargs="?", const="shell", choices=("shell", "json"))
  parser.add_argument("--slices", type=int)
  parser.add_argument("--delete", action="store_true")
  try:
    given = parser.parse_args(argv)
    slices = Slices(specs.read(given.spec), given.slices, given.dry_run)
    if given.verb == "babysit":
      return slices.everything() or DONE if given.dry_run else babysit(slices, **clocks)
    VERBS[given.verb](slices, **(dict(delete=given.delete) if given.verb == "stop" else {}))
    return DONE
  except specs.Refused as error:
    print(f"refused: {error}", file=sys.stderr)
    return REFUSED
  except (Later, Gone) as error:
    print(f"failed: {error.args[-1]}", file=sys.stderr)
    return error.args[0] if isinstance(error, Later) else 1
  except KeyboardInterrupt:
    print("stopped; the run, if there is one, goes on", file=sys.stderr)
    return PREEMPTED


def _interrupt(*_):
  raise KeyboardInterrupt


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, _interrupt)
  sys.exit(main(sys.argv[1:]))
