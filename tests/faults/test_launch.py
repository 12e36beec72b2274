"""Launchers without a cloud: gcloud and its like are programs of fake_cloud.py, first on PATH."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "launch"), str(pathlib.Path(__file__).parent)]
import fake_cloud  # noqa: E402
import render  # noqa: E402
import spec as specs  # noqa: E402
import tpu  # noqa: E402

GCLOUD = shutil.which("gcloud")
REVISION = "0123456789abcdef0123456789abcdef01234567"
FIELDS = dict(
    name="aya", command=["train", "--config=experiments/pretrain.py"], repository="https://git.example.org/aya",
    revision=REVISION, bucket="gs://rows", topology="v5e:4x4", project="my-project", zone="us-west4-a",
    cluster="c", image="images.example.org/aya:1", partition="gpu", attempts=4)
ODD = ("a b", "it's", '"quoted"', "$(touch pwned)", "`id`", "$HOME ${HOME} $$", "two\nlines", "back\\slash",
       "ünïcode 語 😀", "*", "", ";rm -rf .", "#no", "--config.x=('a', 'b')", "\t", "%x @{name}", "\u2028\x7f")
SECRET = "s3cr3t'\"$(id)\nvalue"


def toml(folder, **fields):
  path = folder / "spec.toml"
  lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in (FIELDS | fields).items())
  path.write_text("\n".join(lines).replace("\x7f", "\\u007f"), encoding="utf-8")
  return str(path)


def program(folder, name, text):
  """A program of ours, put first on PATH."""
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("#!/usr/bin/env bash\n" + text)
  path.chmod(0o755)
  return path


def bash(command, home, **environment):
  return subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True, check=False,
                        env=dict(PATH=os.environ["PATH"], HOME=str(home)) | environment, timeout=60)


def until(what, seconds=20):
  end = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.fixture(autouse=True)
def no_cloud(tmp_path, monkeypatch):
  """Whatever a test does, no real cloud is asked."""
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
  for name in ("gcloud", "kubectl", "xpk", "sky", "sbatch"):
    program(tmp_path / "bin", name, "exit 99")


# --- the spec


def test_the_example_names_every_field_and_is_a_spec():
  text = (ROOT / "launch" / "example.toml").read_text()
  assert set(re.findall(r"^(\w+) =", text, re.M)) == set(specs.Spec.__dataclass_fields__)
  assert specs.read(ROOT / "launch" / "example.toml").workdir == "/mnt/tiny-aya/runs/aya-pretrain"


@pytest.mark.parametrize("fields, says", [
    (dict(nmae="x"), "unknown field 'nmae': did you mean 'name'?"),
    (dict(name="Aya_1"), "name is 'Aya_1', expected at most 40"),
    (dict(name="a" * 41), "expected at most 40"),
    (dict(topology="v5p:4x4"), "has 2 axes, expected 3"),
    (dict(topology="v7:4x4"), "unknown topology 'v7:4x4'"),
    (dict(topology="v5e:3x3"), "9 chips, expected a multiple of 4"),
    (dict(topology="2xv5e:4x4"), "expected a slice such as v5e:4x4"),
    (dict(slices=0), "slices is 0, expected a whole number of at least 1"),
    (dict(slices="2"), "slices is '2', expected a whole number"),
    (dict(capacity="cheap"), "expected spot, reserved or on-demand"),
    (dict(revision="main"), "expected a git commit, 40 hexadecimal digits"),
    (dict(bucket="rows"), "expected gs://BUCKET"),
    (dict(repository="https://me:pass@host/x"), "without a password"),
    (dict(environment=["KEY=pass"]), "environment has 'KEY' and more"),
    (dict(command=[]), "expected a verb first"),
    (dict(command=["train", "--workdir=x"]), "it is /mnt/tiny-aya/runs/aya"),
    (dict(command=["train", 3]), "expected a list of words"),
    (dict(partition="a\n#SBATCH --wrap=x"), "expected a SLURM partition"),
    (dict(delete_when_done=1), "expected true or false"),
    (dict(zone=""), "tpu.py needs zone, which is not set"),
])
def test_a_wrong_field_is_refused_in_one_sentence(fields, says, tmp_path, capsys):
  assert tpu.main(["create", toml(tmp_path, **fields)]) == 65
  error = capsys.readouterr().err
  assert says in error and error.count("\n") == 1 and "pass@" not in error and "=pass" not in error


def test_a_file_that_is_no_toml_or_not_there_and_wrong_arguments_are_refused(tmp_path, capsys):
  (tmp_path / "broken").write_text("name = ")
  for argv in (["create", str(tmp_path / "broken")], ["create", str(tmp_path / "none")], ["creat", "x"], [],
               ["run", toml(tmp_path, slices=4), "--slices=3"], ["run", toml(tmp_path), "--slices=0"]):
    assert tpu.main(argv) == 65
    assert capsys.readouterr().err.startswith("refused: ")


@pytest.mark.parametrize("topology, accelerator, hosts, chips", [
    ("v5e:1x1", "v5litepod-1", 1, 1), ("v5e:2x4", "v5litepod-8", 1, 8), ("v5e:4x4", "v5litepod-16", 4, 4),
    ("v6e:16x16", "v6e-256", 64, 4), ("v5p:2x2x1", "v5p-8", 1, 4), ("v5p:2x2x4", "v5p-32", 4, 4),
    ("v4:4x4x4", "v4-128", 16, 4)])
def test_a_topology_has_a_type_and_hosts(topology, accelerator, hosts, chips):
  spec = specs.Spec(name="a", command=("train",), topology=topology)
  assert (spec.accelerator, spec.hosts, spec.chips_a_host) == (accelerator, hosts, chips)
  assert spec.hosts * spec.chips_a_host == spec.chips


def test_fewer_slices_accumulate_more_at_the_same_batch():
  spec = specs.Spec(name="a", command=("train", "--config.accumulate=3"), slices=4)
  assert spec.words() == ("train", "--config.accumulate=3", "--workdir=/mnt/tiny-aya/runs/a")
  assert spec.words(2)[1] == "--config.accumulate=6"
  assert specs.Spec(name="a", command=("train",), slices=4).words(1)[1] == "--config.accumulate=4"
  with pytest.raises(specs.Refused, match="3 slices of the planned 4"):
    spec.words(3)


# --- babysit


class Played:
  """What a verb of tpu.py did in a scenario, with time that passes only when it sleeps."""

  def __init__(self, folder, scenario, *flags, verb="babysit", **fields):
    fake_cloud.install(folder, scenario)
    self.now, self.pauses = 0.0, []
    self.code = tpu.main([verb, toml(folder, **fields), *flags], sleep=self.sleep, clock=lambda: self.now)
    self.calls = fake_cloud.calls(folder)
    self.all = [fake_cloud.verb(argv) for argv in self.calls]
    self.verbs = [verb for verb in self.all if verb not in ("describe", "node", "status")]

  def sleep(self, seconds):
    self.pauses.append(seconds)
    self.now += seconds
    assert len(self.pauses) < 200, "endless"


@pytest.fixture
def play(tmp_path):
  return lambda scenario, *flags, **fields: Played(tmp_path, scenario, *flags, **fields)


def life(*runs, states=("ACTIVE",), **more):
  return dict(states=states, runs=runs, **more)


LONG = ["running"] * 3  # more than a minute of polls
DONE = life(["running", "exit 0"])
FRESH = ["create", "scp", "setup", "run"]
QUOTA = ["ERROR: RESOURCE_EXHAUSTED: Quota 'TPUV5sPreemptible' exceeded. HTTP 403", 1]
FULL = ["ERROR: There is no more capacity in the zone; code 8", 1]
OFFLINE = ["ERROR: gcloud crashed (ConnectionError): Max retries exceeded", 1]
DENIED = ["ERROR: (gcloud) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", 1]

SCENARIOS = {
    "it waits, runs and gives the slices back": (
        dict(lives=[life(["running", "running", "exit 0"], states=["ACCEPTED", "CREATING", "WAITING_FOR_RESOURCES",
                                                                   "PROVISIONING", "ACTIVE"])]),
        0, [*FRESH, "delete"]),
    "preempted twice, then done": (
        dict(lives=[life(["running"], states=["ACTIVE"] * 3 + ["SUSPENDING", "SUSPENDED"]),
                    life(["running"], states=["ACTIVE"] * 3 + ["SUSPENDED"]), DONE]),
        0, [*FRESH, "delete", *FRESH, "delete", *FRESH, "delete"]),
    "a node is preempted while its request still says ACTIVE": (
        dict(lives=[life(["running"], nodes=["READY", "READY", "PREEMPTED"]), DONE]), 0,
        [*FRESH, "delete", *FRESH, "delete"]),
    "a node is gone while its request still says ACTIVE": (
        dict(lives=[life(["running"], nodes=["READY", "READY", "GONE"]), DONE]), 0,
        [*FRESH, "delete", *FRESH, "delete"]),
    "the request vanishes": (
        dict(lives=[life(["running"], states=["ACTIVE", "ACTIVE", "GONE"]), DONE], there=True), 0,
        ["scp", "setup", "run", *FRESH, "delete"]),
    "a suspended request of yesterday": (
        dict(lives=[life([], states=["SUSPENDED"]), DONE], there=True), 0, ["delete", *FRESH, "delete"]),
    "failed once": (dict(lives=[life([], states=["PROVISIONING", "FAILED"]), DONE]), 0,
                    ["create", "delete", *FRESH, "delete"]),
    "failed for ever": (dict(lives=[life([], states=["FAILED"])]), 1, ["create", "delete"] * 4 + ["create"]),
    "quota three times": (dict(lives=[DONE], faults=dict(create=[QUOTA, FULL, OFFLINE])), 0,
                          ["create"] * 3 + FRESH + ["delete"]),
    "quota for ever": (dict(lives=[DONE], faults=dict(create=dict(always=QUOTA))), 1, ["create"] * 4),
    "no permission": (dict(lives=[DONE], faults=dict(create=[DENIED])), 65, ["create"]),
    "not logged in": (dict(lives=[DONE], faults=dict(describe=[
        ["ERROR: You do not currently have an active account selected. $ gcloud auth login", 1]])), 65, []),
    "a type that the zone has not": (dict(lives=[DONE], faults=dict(create=[
        ["ERROR: INVALID_ARGUMENT: accelerator type v5litepod-16", 1]])), 65, ["create"]),
    "an unknown zone": (dict(lives=[DONE], faults=dict(create=[["ERROR: NOT_FOUND: zone", 1]])), 65, ["create"]),
    "somebody else created it meanwhile": (
        dict(lives=[DONE], faults=dict(create=[["ERROR: ALREADY_EXISTS", 6]])), 0, ["create", *FRESH, "delete"]),
    "descriptions fail for ever": (dict(lives=[DONE], faults=dict(describe=dict(always=["ERROR: 503", 7]))), 7, []),
    "set-up fails twice": (dict(lives=[DONE], faults=dict(setup=[["ssh: closed", 255], ["apt: lock", 100]])), 0,
                           ["create"] + ["scp", "setup"] * 3 + ["run", "delete"]),
    "a host is never ready": (dict(lives=[life([], bare=True)]), 1, ["create"] + ["scp", "setup"] * 4),
    "set-up is refused": (dict(lives=[DONE], faults=dict(setup=[["refused: BUCKET is not set", 65]])), 65,
                          ["create", "scp", "setup"]),
    "an ssh key needs a minute": (
        dict(lives=[DONE], faults=dict(status=[["Permission denied (publickey). PERMISSION_DENIED", 255]])), 0,
        [*FRESH, "delete"]),
    "not logged in, when it comes to ssh": (dict(lives=[DONE], there=True, faults=dict(status=[
        ["ERROR: (gcloud.compute.tpus.tpu-vm.ssh) UNAUTHENTICATED: expired", 1]])), 65, []),
    "the run is refused": (dict(lives=[life(["running", "exit 65"])]), 65, FRESH),
    "one host refuses": (dict(lives=[life(["running", ["exit 1", "exit 65", "exit 134", "exit 1"]])]), 65, FRESH),
    "not finite for ever": (dict(lives=[life(["running", "exit 77"])]), 77, FRESH + ["run"] * 3),
    "a hang, then done": (dict(lives=[life(["running", "exit 76"], ["exit 0"])]), 0, [*FRESH, "run", "delete"]),
    "crashes for ever": (dict(lives=[life(["exit 1"])]), 1, FRESH + ["run"] * 5),
    "saved, and its slices are taken": (
        dict(lives=[life(LONG + ["exit 75"], states=["ACTIVE"] * 6 + ["SUSPENDING"]), DONE]), 0,
        [*FRESH, "delete", *FRESH, "delete"]),
    "saved, slices still there": (dict(lives=[life(LONG + ["exit 75"], ["exit 0"])]), 0, [*FRESH, "run", "delete"]),
    "stopped by the user": (dict(lives=[life(["running", "running", "stopped"])]), 75, FRESH),
    "a host rebooted": (dict(lives=[life([["running", "running", "idle", "running"]], ["running", "exit 0"])]), 0,
                        [*FRESH, "run", "delete"]),
    "three hosts wait for one that crashed": (
        dict(lives=[life([["running", "exit 1", "running", "running"]] * 20 + [["exit 75"] * 3 + ["exit 1"]],
                         ["exit 0"])]), 0, [*FRESH, "halt", "run", "delete"]),
    "one host crashes for ever, the others save": (
        dict(lives=[life(["running"] * 3 + [["exit 75", "exit 1", "exit 75", "exit 75"]])]), 1, FRESH + ["run"] * 5),
    "babysit begins again while it runs": (
        dict(lives=[DONE], there=True, runs=True), 0, ["delete"]),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_babysit_follows_the_table(name, play):
  scenario, code, verbs = SCENARIOS[name]
  played = play(scenario)
  assert (played.code, played.verbs) == (code, verbs)


def test_pauses_double_and_a_request_is_not_polled_in_a_hurry(play):
  assert play(dict(lives=[DONE], faults=dict(create=dict(always=FULL)))).pauses == [10, 20, 40]


def test_hosts_that_do_not_answer_are_asked_again_and_bounded(play):
  played = play(dict(lives=[life(["running"])], hosts=3))
  assert (played.code, played.verbs) == (1, ["create"]) and played.all.count("status") == 4


def test_a_gcloud_that_hangs_is_left(play, monkeypatch):
  monkeypatch.setattr(tpu, "CALL_SECONDS", 0.5)
  began = time.monotonic()
  played = play(dict(lives=[DONE], faults=dict(describe=dict(always=60))), attempts=2)
  assert time.monotonic() - began < 30
  assert (played.code, played.all) == (1, ["describe"] * 2)


def test_slices_are_nodes_of_one_request_and_may_be_fewer(play):
  played = play(dict(lives=[DONE]), "--slices=2", slices=4)
  create = next(argv for argv in played.calls if fake_cloud.verb(argv) == "create")
  assert played.code == 0 and {"--node-count=2", "--node-prefix=aya"} <= set(create)
  runs = [argv for argv in played.calls if fake_cloud.verb(argv) == "run"]
  assert [argv[4] for argv in runs] == ["aya-0", "aya-1"] and "--config.accumulate=2" in runs[0][6]


def test_without_gcloud_one_sentence_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert tpu.main(["babysit", toml(tmp_path)]) == 65
  assert capsys.readouterr().err == "refused: gcloud is not on PATH, install the Google Cloud CLI\n"


def test_a_babysitter_that_is_stopped_ends_with_75_and_leaves_the_run(play, tmp_path):
  fake_cloud.install(tmp_path, dict(lives=[life(["running"])], there=True))
  child = subprocess.Popen([sys.executable, ROOT / "launch" / "tpu.py", "babysit", toml(tmp_path)])
  until(lambda: "run" in map(fake_cloud.verb, fake_cloud.calls(tmp_path)))
  child.send_signal(signal.SIGTERM)
  assert child.wait(20) == 75
  assert "stop" not in map(fake_cloud.verb, fake_cloud.calls(tmp_path))


# --- what is printed, and secrets


def test_a_dry_run_prints_what_is_run_and_runs_nothing(play, tmp_path, capsys):
  fields = dict(command=["train", "--config=x", *ODD], slices=2)
  assert play(dict(lives=[DONE]), "--dry_run=json", **fields).calls == []
  lists = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  play(dict(lives=[DONE]), "--dry_run", **fields)
  assert shlex.split(capsys.readouterr().out) == [word for argv in lists for word in argv]
  plain = lambda argv: ["run.env" if word.endswith("/run.env") else word for word in argv]
  ran = [plain(argv) for argv in play(dict(lives=[DONE]), **fields).calls]
  for argv in map(plain, lists):
    assert argv[1:] in ran or fake_cloud.verb(argv[1:]) == "stop"


@pytest.mark.skipif(not GCLOUD, reason="needs the Google Cloud CLI")
def test_the_real_gcloud_knows_every_flag(tmp_path, capsys):
  assert tpu.main(["babysit", toml(tmp_path), "--dry_run=json"]) == 0
  lists = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  lines = {tuple(argv[3:5]): re.sub("--command=.*?(?= --project)", "--command=x", " ".join(argv)) for argv in lists}
  (tmp_path / "commands").write_text(json.dumps([dict(command_string=line) for line in lines.values()]))
  done = subprocess.run([GCLOUD, "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands'}"],
                        env=os.environ | dict(CLOUDSDK_CONFIG=str(tmp_path)), capture_output=True, text=True)
  found = json.loads(done.stdout)
  assert len(found) == len(lines) == 6 and all(command["success"] for command in found), done.stdout[-2000:]


def test_a_secret_reaches_the_hosts_in_a_closed_file_and_nothing_else(play, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("ODD_KEY", SECRET)
  played = play(dict(lives=[DONE]), environment=["ODD_KEY"])
  assert played.code == 0
  mode, file = (tmp_path / "run.env").read_text().split("\n", 1)
  assert mode == "600" and bash(f'{file}\nprintf %s "$ODD_KEY"', tmp_path).stdout == SECRET
  assert not any(os.path.exists(word) for argv in played.calls for word in argv if word.endswith("run.env"))
  play(dict(lives=[DONE]), "--dry_run", environment=["ODD_KEY"])
  for backend, code in dict(jobset=0, sky=0, slurm=0, xpk=65).items():  # xpk would write the value
    assert render.main([backend, toml(tmp_path, environment=["ODD_KEY"])]) == code
  printed = "".join(capsys.readouterr()) + (tmp_path / "calls.jsonl").read_text()
  assert "s3cr3t" not in printed and "ODD_KEY" in printed
  monkeypatch.delenv("ODD_KEY")
  assert play(dict(lives=[DONE]), verb="setup", environment=["ODD_KEY"]).code == 65


# --- the hosts


@pytest.fixture
def home(tmp_path):
  """A host after its set-up, whose python writes down what it is told and ends with ~/code."""
  repository = tmp_path / "home" / "tiny_aya_jax"
  repository.mkdir(parents=True)
  (repository / "launch").symlink_to(ROOT / "launch")
  program(repository / ".venv" / "bin", "python", f"""
if [ "$1" = launch/supervise.py ]; then exec {sys.executable} "$@"; fi
{sys.executable} -c 'import json, os, sys; json.dump([sys.argv[1:], os.environ.get("ODD_KEY")], open("words", "w"))' "$@"
[ -e ~/code ] && exit "$(cat ~/code)"
trap 'exit 75' TERM
for _ in $(seq 300); do sleep 0.1; done""")
  (tmp_path / "home" / "setup.done").write_text(REVISION)
  return tmp_path / "home"


def remote(folder, capsys, verb, **fields):
  """The command that `verb` gives to hosts."""
  capsys.readouterr()
  assert tpu.main([verb, toml(folder, mount="/proc", **fields), "--dry_run=json"]) == 0
  argv = json.loads(capsys.readouterr().out.splitlines()[-1])
  return next(word.removeprefix("--command=") for word in argv if word.startswith("--command="))


def test_odd_words_and_secrets_arrive_as_they_were_given(home, capsys):
  (home / "code").write_text("0")
  (home / "run.env").write_text(f"ODD_KEY={shlex.quote(SECRET)}\n")
  done = bash(remote(home, capsys, "run", command=["train", *ODD]), home)
  assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr
  until(lambda: (home / "run.exit").exists())
  assert json.loads((home / "tiny_aya_jax" / "words").read_text()) == [
      ["-m", "tiny_aya_jax", "train", *ODD, "--workdir=/proc/runs/aya"], SECRET]
  assert not list(home.rglob("pwned")) and "s3cr3t" not in (home / "run.log").read_text()


def test_a_run_is_started_once_and_ends_saved_when_stopped(home, capsys):
  start, status = remote(home, capsys, "run"), remote(home, capsys, "status")
  state = lambda: bash(status, home).stdout.split(" ", 2)[2].strip()
  assert state() == "idle"
  assert [bash(start, home).stdout for _ in range(2)] == ["started\n", "running already\n"]
  until(lambda: (home / "tiny_aya_jax" / "words").exists())
  assert state() == "running"
  done = bash(remote(home, capsys, "stop", grace_seconds=20), home)
  assert done.stdout.endswith("ended with 75\n") and state() == "stopped"
  (home / "code").write_text("65")
  assert bash(start, home).stdout == "started\n"
  until(lambda: state() == "exit 65")
  (home / "setup.done").write_text("another revision")
  assert state() == "bare"
  shutil.move(home / "tiny_aya_jax", home / "away")
  assert state() == "bare"


FAILS_TWICE = """
echo "$(basename "$0") $*" >> "$STATE/log"
n=$(cat "$STATE/$(basename "$0").n" 2> /dev/null || echo 0); echo $((n + 1)) > "$STATE/$(basename "$0").n"
[ "$n" -ge "${FAILURES:-2}" ] || { echo "E: Could not get lock /var/lib/dpkg/lock-frontend" >&2; exit 100; }
"""


@pytest.fixture
def fresh(tmp_path):
  """A fresh machine: apt, curl, git, pip and gcsfuse fail twice each, then work."""
  path = tmp_path / "bin"
  gcsfuse = "#!/usr/bin/env bash\\n" + FAILS_TWICE.replace("'", "'\\''") + 'touch "$STATE/mounted"\\n'
  program(path, "apt-get", FAILS_TWICE + f"""
case "$*" in *gcsfuse*) printf '%b' '{gcsfuse}' > {path}/gcsfuse; chmod +x {path}/gcsfuse ;; esac""")
  program(path, "sudo", '[ "$1" != tee ] || { cat > /dev/null; exit; }\nexec "$@"')
  program(path, "lsb_release", "echo jammy")
  program(path, "curl", FAILS_TWICE)
  program(path, "mountpoint", '[ -e "$STATE/mounted" ]')
  program(path, "git", f"""
if [ "$1" = init ]; then mkdir -p "$3/.git"; exit; fi
case "$*" in
  *fetch*) {FAILS_TWICE} ;;
  *checkout*) cp -r {ROOT}/launch {ROOT}/setup.py "$2" ;;
esac""")
  program(path, "pip", FAILS_TWICE)
  program(path, "python3.11", f"""
case "$1" in
  -c) exit 0 ;;
  -m) mkdir -p .venv/bin; touch .venv/bin/activate
      printf '#!/bin/sh\\nshift 2; exec {path}/pip "$@"\\n' > .venv/bin/python; chmod +x .venv/bin/python ;;
esac""")
  (tmp_path / "state").mkdir()
  return dict(PATH=f"{path}:/usr/bin:/bin", STATE=str(tmp_path / "state"), PAUSE="0", REVISION=REVISION,
              REPOSITORY="https://git.example.org/aya", BUCKET="gs://rows", MOUNT=str(tmp_path / "mount"))


STARTUP = f"bash {ROOT}/launch/startup.sh"


def test_a_set_up_outlives_two_failures_of_each_step_and_is_done_once(fresh, tmp_path):
  done = bash(STARTUP, tmp_path, **fresh)
  assert done.returncode == 0 and done.stdout.endswith(f"ready at {REVISION}\n"), done.stderr
  log = (tmp_path / "state" / "log").read_text()
  assert f"fetch --quiet --depth=1 https://git.example.org/aya {REVISION}" in log
  assert "--editable .[tpu,data,export,track]" in log and f" rows {tmp_path}/mount" in log
  assert {name: log.count(f"{name} ") for name in ("curl", "fetch", "pip")} == dict(curl=3, fetch=3, pip=3)
  again = bash(STARTUP, tmp_path, **fresh)
  assert (again.returncode, again.stdout) == (0, f"ready at {REVISION}\n")
  assert (tmp_path / "state" / "log").read_text() == log


def test_a_set_up_that_never_works_ends_after_five_attempts(fresh, tmp_path):
  done = bash(STARTUP, tmp_path, FAILURES="9", **fresh)
  assert done.returncode == 100 and done.stderr.count("attempt 5 of 5") == 1
  assert not (tmp_path / "setup.done").exists()


def test_a_set_up_of_another_commit_is_made_and_a_lost_mount_mounted(fresh, tmp_path):
  bash(STARTUP, tmp_path, FAILURES="0", **fresh)
  (tmp_path / "state" / "mounted").unlink()
  for revision in (REVISION, "f" * 40):
    assert bash(STARTUP, tmp_path, FAILURES="0", **fresh | dict(REVISION=revision)).returncode == 0
    assert (tmp_path / "state" / "mounted").exists() and (tmp_path / "setup.done").read_text() == revision + "\n"


@pytest.mark.parametrize("script, names", [("startup.sh", ("REPOSITORY", "REVISION", "BUCKET", "MOUNT")),
                                           ("mount.sh", ("BUCKET", "MOUNT"))])
def test_a_script_without_a_parameter_refuses(script, names, fresh, tmp_path):
  for name in names:
    done = bash(f"bash {ROOT}/launch/{script}", tmp_path, **fresh | {name: ""})
    assert done.returncode == 65 and done.stderr.startswith(f"refused: {name} is not set")


def test_scripts_are_shell(tmp_path, capsys):
  (tmp_path / "run.sbatch").write_text(rendered(capsys, "slurm", tmp_path))
  scripts = sorted((ROOT / "launch").glob("*.sh")) + [tmp_path / "run.sbatch"]
  for script in scripts:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
  if shutil.which("shellcheck"):
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# --- other schedulers


def rendered(capsys, backend, folder, *flags, **fields):
  capsys.readouterr()
  assert render.main([backend, toml(folder, **fields), *flags]) == 0, capsys.readouterr().err
  return capsys.readouterr().out


NAME = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
POD = dict(
    restartPolicy="Never", terminationGracePeriodSeconds=int, serviceAccountName=NAME,
    nodeSelector={"cloud.google.com/gke-tpu-accelerator": r"tpu-v\w+(-\w+)*-(pod)?slice",
                  "cloud.google.com/gke-tpu-topology": r"\d+x\d+(x\d+)?"},
    containers=[dict(name=NAME, image=str, args=[str], env=[], volumeMounts=[dict(name=NAME, mountPath=r"/[^ ]*")],
                     resources=dict(requests={"google.com/tpu": int}, limits={"google.com/tpu": int}))],
    volumes=[dict(name=NAME)])
JOBSET = dict(
    apiVersion="jobset.x-k8s.io/v1alpha2", kind="JobSet",
    metadata=dict(name=NAME, annotations={"alpha.jobset.sigs.k8s.io/exclusive-topology": r"cloud.google.com/gke-\w+"}),
    spec=dict(network=dict(enableDNSHostnames=bool), failurePolicy=dict(maxRestarts=int, rules=[dict(
        name=NAME, action="FailJobSet", onJobFailureReasons=["PodFailurePolicy"])]), replicatedJobs=[dict(
            name=NAME, replicas=int, template=dict(spec=dict(
                completionMode="Indexed", parallelism=int, completions=int, backoffLimit=int,
                podFailurePolicy=dict(rules=[dict(action="FailJob", onExitCodes=dict(
                    containerName=NAME, operator="In", values=[int]))]),
                template=dict(metadata=dict(annotations={"gke-gcsfuse/volumes": "true"}), spec=POD))))]))


def follows(found, schema, where="JobSet"):
  """Fails where `found` has not the keys, types and patterns of `schema`; unknown keys only in leaves."""
  if isinstance(schema, dict):
    assert isinstance(found, dict) and set(schema) <= set(found), where
    assert where.endswith(("Selector", "volumes[]")) or set(found) == set(schema), (where, set(found) ^ set(schema))
    for key, inner in schema.items():
      follows(found[key], inner, f"{where}.{key}")
  elif isinstance(schema, list):
    assert isinstance(found, list), where
    for item in found if schema else ():
      follows(item, schema[0], f"{where}[]")
  elif isinstance(schema, type):
    assert type(found) is schema, where
  else:
    assert isinstance(found, str) and re.fullmatch(schema, found), (where, found)


@pytest.mark.parametrize("topology, slices, hosts, chips", [
    ("v5e:4x4", 1, 4, 4), ("v5p:4x4x8", 2, 32, 4), ("v6e:16x16", 4, 64, 4), ("v6e:2x4", 1, 1, 8)])
def test_a_jobset_is_one_and_has_all_hosts(topology, slices, hosts, chips, tmp_path, capsys):
  found = yaml.safe_load(rendered(
      capsys, "jobset", tmp_path, topology=topology, slices=slices, environment=["ODD_KEY"],
      command=["train", *ODD]))
  follows(found, JOBSET)
  job = found["spec"]["replicatedJobs"][0]
  pod = job["template"]["spec"]["template"]["spec"]
  train = pod["containers"][0]
  assert (job["replicas"], job["template"]["spec"]["completions"]) == (slices, hosts)
  assert job["template"]["spec"]["parallelism"] == hosts and job["template"]["spec"]["backoffLimit"] == 0
  assert train["resources"]["limits"]["google.com/tpu"] == chips and pod["terminationGracePeriodSeconds"] == 300
  assert job["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [65]
  assert train["env"] == [dict(name="ODD_KEY", valueFrom=dict(secretKeyRef=dict(name="tiny-aya", key="ODD_KEY")))]
  # as Kubernetes reads arguments: $$ is a dollar, and $(NAME) a variable, of which none is left
  assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", word) for word in train["args"])
  words = [word.replace("$$", "$") for word in train["args"]]
  assert words == ["train", *ODD, "--workdir=/mnt/tiny-aya/runs/aya"]


def test_fewer_slices_are_rendered_fewer(tmp_path, capsys):
  found = yaml.safe_load(rendered(capsys, "jobset", tmp_path, "--slices=1", slices=2))
  assert found["spec"]["replicatedJobs"][0]["replicas"] == 1 and "--config.accumulate=2" in str(found)


@pytest.mark.parametrize("code, restarted", [(0, 0), (65, 65), (75, 42), (1, 1)])
def test_xpk_is_told_that_a_saved_run_may_start_again(code, restarted, tmp_path, capsys):
  argv = shlex.split(rendered(capsys, "xpk", tmp_path, command=["train", *ODD], topology="v6e:16x16", slices=2))
  flags = dict(zip(argv[3::2], argv[4::2]))
  assert flags["--tpu-type"] == "v6e-256" and flags["--num-slices"] == "2" and flags["--workload"] == "aya"
  program(tmp_path, "python", f'{sys.executable} -c "import json, sys; json.dump(sys.argv, open(\'w\', \'w\'))" "$@"\n'
                              f"exit {code}")
  done = bash(argv[-1], tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
  assert done.returncode == restarted
  assert tuple(json.loads((tmp_path / "w").read_text())[7:-1]) == ODD


def test_a_sky_task_recovers_what_was_saved_and_gets_the_words(tmp_path, capsys):
  found = yaml.safe_load(rendered(capsys, "sky", tmp_path, command=["train", *ODD], environment=["ODD_KEY"]))
  assert found["resources"]["accelerators"] == "tpu-v5litepod-16" and found["resources"]["use_spot"] is True
  assert found["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
  assert found["secrets"] == {"ODD_KEY": None} and REVISION in found["setup"]
  assert shlex.split(found["run"].split("\nexec ", 1)[1])[7:-1] == list(ODD)


@pytest.mark.parametrize("codes, ends, runs, requeued", [
    ([0], 0, 1, False), ([65], 65, 1, False), ([75], 75, 1, True), ([1, 134, 0], 0, 3, False), ([77] * 9, 77, 5, False)])
def test_a_slurm_job_follows_the_exit_codes(codes, ends, runs, requeued, tmp_path, capsys):
  (tmp_path / "run.sbatch").write_text(rendered(capsys, "slurm", tmp_path, command=["train", *ODD], nodes=2))
  (tmp_path / "launch").mkdir()
  (tmp_path / "launch" / "environment.sh").touch()
  (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
  program(tmp_path, "scontrol", "echo $* > requeued")
  program(tmp_path, "srun", f"""{sys.executable} -c "import json, sys; json.dump(sys.argv, open('words', 'w'))" "$@"
echo >> runs; exit "$(sed -n "$(wc -l < runs)p" codes)" """)
  done = bash("bash run.sbatch", tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", PAUSE="0", BRIEF="0",
              SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7")
  assert done.returncode == ends and (tmp_path / "runs").read_text() == "\n" * runs, done.stderr
  assert (tmp_path / "requeued").exists() == requeued
  assert tuple(json.loads((tmp_path / "words").read_text())[7:-1]) == ODD
