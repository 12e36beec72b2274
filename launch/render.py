"""Prints what another scheduler runs, from the same Spec; nothing is sent anywhere.

  python launch/render.py jobset SPEC.toml | kubectl apply -f -     GKE, TPU slices
  python launch/render.py xpk SPEC.toml                             the xpk command line for the same
  python launch/render.py sky SPEC.toml > sky.yaml; sky jobs launch sky.yaml     SkyPilot, managed spot
  python launch/render.py slurm SPEC.toml > run.sbatch; sbatch run.sbatch        GPU nodes

--slices=K as in tpu.py. Templates lie beside this file. Values enter YAML as JSON and shell as quoted
words, so that no name, quote, dollar or newline gets out of its place.
"""

import dataclasses
import json
import pathlib
import re
import shlex
import string
import sys

import spec as specs

HERE = pathlib.Path(__file__).parent
PROGRAM = ("python", "launch/supervise.py", "--", "python", "-m", "tiny_aya_jax")  # as in Dockerfile


class Template(string.Template):
  """@{name}: a dollar means something in shell, and in Kubernetes."""

  delimiter = "@"


def jobset(spec, words):
  """A JobSet: a job a slice, a pod a host."""
  spec.need("jobset", "topology", "image", "bucket")
  labels = {"cloud.google.com/gke-tpu-accelerator": spec.family.gke,
            "cloud.google.com/gke-tpu-topology": spec.shape}
  if spec.capacity == "spot":
    labels["cloud.google.com/gke-spot"] = "true"
  if spec.capacity == "reserved":
    spec.need("jobset with capacity reserved", "reservation")
    labels["cloud.google.com/reservation-name"] = spec.reservation
  secrets = [dict(name=name, valueFrom=dict(secretKeyRef=dict(name=spec.secret, key=name)))
             for name in spec.environment]
  return _fill(
      "jobset.yaml", name=spec.name, attempts=spec.attempts, slices=spec.slices, hosts=spec.hosts,
      grace=spec.grace_seconds, service_account=spec.service_account, labels=labels, image=spec.image,
      chips=spec.chips_a_host, mount=spec.mount, bucket=spec.bucket.removeprefix("gs://"),
      secrets=secrets,
      # Kubernetes replaces $(NAME) in arguments; $$ is a dollar.
      arguments=[word.replace("$", "$$") for word in words],
  )


def xpk(spec, words):
  """One command line. xpk starts again after 42, never after 65 or 75: a saved run ends with 42."""
  return xpk_line(spec, shlex.join([*PROGRAM, *words]) + "; code=$?; [ $code != 75 ] || code=42; exit $code",
                  spec.attempts)


def xpk_line(spec, command, restarts):
  """The same for any command of a shell."""
  spec.need("xpk", "project", "zone", "cluster", "topology", "image")
  if spec.environment:
    raise specs.Refused(f"environment names {spec.environment[0]}, and xpk writes values into "
                        "manifests: use jobset, which refers to a Kubernetes secret")
  capacity = {"spot": ["--spot"], "on-demand": ["--on-demand"]}.get(spec.capacity)
  if capacity is None:
    spec.need("xpk with capacity reserved", "reservation")
    capacity = [f"--reservation={spec.reservation}"]
  return shlex.join([
      "xpk", "workload", "create", "--workload", spec.name, "--cluster", spec.cluster,
      "--project", spec.project, "--zone", spec.zone,
      "--tpu-type", spec.accelerator, "--num-slices", str(spec.slices),
      "--docker-image", spec.image, "--max-restarts", str(restarts),
      "--termination-grace-period-seconds", str(spec.grace_seconds), *capacity, "--command", command,
  ]) + "\n"


def sky(spec, words):
  """A SkyPilot task: one slice, each host of which runs the command."""
  spec.need("sky", "topology", "bucket", "repository", "revision")
  if spec.slices > 1:
    raise specs.Refused(f"slices is {spec.slices}, expected 1: SkyPilot does not join slices")
  run = "\n".join([
      "cd ~/tiny_aya_jax",
      "export TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=1024",
      "ulimit -n $(ulimit -Hn)", "PATH=$PWD/.venv/bin:$PATH", f"exec {shlex.join([*PROGRAM, *words])}",
  ])
  return _fill(
      "sky.yaml", name=spec.name, infra=f"gcp/*/{spec.zone}" if spec.zone else "gcp",
      accelerator=f"tpu-{spec.accelerator}", runtime=spec.family.runtime, spot=spec.capacity == "spot",
      attempts=spec.attempts, startup=str(HERE / "startup.sh"), run=run,
      setup=f"{spec.startup} bash startup.sh",
      secrets={name: None for name in spec.environment},
  )


def slurm(spec, words, attempts=None):
  """A batch script for GPU nodes that share a file system; attempts: beside the first, not the Spec's."""
  spec.need("slurm", "partition")
  return _text(
      "slurm.sbatch", name=spec.name, partition=spec.partition, time=spec.time, nodes=spec.nodes,
      gpus=spec.gpus, grace=spec.grace_seconds, attempts=spec.attempts if attempts is None else attempts,
      secrets=" ".join(spec.environment), command=shlex.join(words),
  )


def _fill(template, /, **values):
  return _text(template, **{key: _yaml(value) for key, value in values.items()})


def _text(template, /, **values):
  return Template((HERE / template).read_text(encoding="utf-8")).substitute(values)


def _yaml(value):
  """JSON is YAML, but for letters that JSON leaves as they are and YAML folds or forbids."""
  text = json.dumps(value, ensure_ascii=False)
  return re.sub("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]",
                lambda found: f"\\u{ord(found[0]):04x}", text)


BACKENDS = dict(jobset=jobset, xpk=xpk, sky=sky, slurm=slurm)


def main(argv):
  """['BACKEND', 'SPEC.toml', '--slices=K'] -> exit code."""
  parser = specs.Arguments(prog="python launch/render.py")
  parser.add_argument("backend", choices=BACKENDS)
  parser.add_argument("spec")
  parser.add_argument("--slices", type=int)
  try:
    given = parser.parse_args(argv)
    spec = specs.read(given.spec)
    words = spec.words(given.slices)
    spec = dataclasses.replace(spec, slices=given.slices or spec.slices)
    sys.stdout.write(BACKENDS[given.backend](spec, words))
    return 0
  except specs.Refused as error:
    print(f"refused: {error}", file=sys.stderr)
    return specs.REFUSED


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
