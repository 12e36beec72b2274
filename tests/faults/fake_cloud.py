"""A gcloud that asks nobody: it plays a scenario, keeps its state in a file and logs every argv.

A scenario is JSON:
  lives   one for each `create`: states of the queued resource, of its nodes, and what hosts say of each
          `run` in turn: one step a call, the last one stays; a list in it is one word a host;
          bare: a set-up does not help
  faults  verb -> one a call: null, [stderr, code] or seconds to hang; "always" of a verb: for ever
  hosts   of a node
  there   whether life 0 has begun; runs: and its first run
"""

import json
import pathlib
import sys
import time

NOT_THERE = "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'x' was not found"


def install(folder, scenario, name="gcloud"):
  """Writes FOLDER/bin/gcloud; returns FOLDER/bin, to be put first on PATH."""
  (folder / "bin").mkdir(exist_ok=True)
  (folder / "scenario.json").write_text(json.dumps(scenario))
  program = folder / "bin" / name
  program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {folder} "$@"\n')
  program.chmod(0o755)
  return folder / "bin"


def calls(folder):
  """What was asked, as lists of words."""
  log = folder / "calls.jsonl"
  return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def verb(argv):
  """['compute', 'tpus', 'tpu-vm', 'ssh', ...] -> 'run', 'setup', 'create' and so on."""
  kind, what = argv[2:4]
  if what != "ssh":
    return what if kind == "queued-resources" or what == "scp" else "node"
  command = next(word for word in argv if word.startswith("--command="))
  return next((name for name in ("status", "stop", "halt", "run ") if f"host.sh {name}" in command), "setup").strip()


def main(folder, argv):
  folder = pathlib.Path(folder)
  with open(folder / "calls.jsonl", "a", encoding="utf-8") as file:
    file.write(json.dumps(argv) + "\n")
  scenario = json.loads((folder / "scenario.json").read_text())
  saved = folder / "state.json"
  state = json.loads(saved.read_text()) if saved.exists() else dict(
      there=scenario.get("there", False), life=0 if scenario.get("there") else -1, polls=0, nodes=0,
      set_up=scenario.get("runs", False), run=0 if scenario.get("runs") else -1, asked=0, asks={})
  asked = verb(argv)
  state["asks"][asked] = state["asks"].get(asked, 0) + 1
  code = _fault(scenario.get("faults", {}), asked, state["asks"][asked])
  if code is None:
    code = _play(folder, scenario, state, asked, argv)
  saved.write_text(json.dumps(state))
  return code


def _fault(faults, asked, times):
  fault = faults.get(asked, [])
  fault = fault["always"] if isinstance(fault, dict) else (fault + [None] * times)[times - 1]
  if fault is None:
    return None
  if isinstance(fault, int):
    time.sleep(fault)
    return 0
  print(fault[0], file=sys.stderr)
  return fault[1]


def _play(folder, scenario, state, asked, argv):
  step = lambda steps, index: steps[min(index, len(steps) - 1)]
  life = step(scenario["lives"], max(state["life"], 0))
  if asked == "create":
    if state["there"]:
      print("ERROR: ALREADY_EXISTS", file=sys.stderr)
      return 1
    state.update(there=True, life=state["life"] + 1, polls=0, nodes=0, set_up=False, run=-1, asked=0)
    return 0
  now = step(life["states"], state["polls"])
  state["there"] = state["there"] and not (asked == "describe" and now == "GONE")
  if not state["there"]:
    print(NOT_THERE, file=sys.stderr)
    return 1
  if asked == "describe":
    state["polls"] += 1
    print(json.dumps(dict(name="x", state=dict(state=now))))
  elif asked == "node":
    now = step(life.get("nodes", ["READY"]), state["nodes"])
    state["nodes"] += 1
    if now == "GONE":
      print(NOT_THERE, file=sys.stderr)
      return 1
    print(json.dumps(dict(state=now)))
  elif asked == "delete":
    state["there"] = False
  elif asked == "scp":
    for word in argv[4:6]:
      path = pathlib.Path(word)
      (folder / path.name).write_text(f"{path.stat().st_mode & 0o777:o}\n{path.read_text()}")
  elif asked == "setup":
    state["set_up"] = True
  elif asked == "run":
    state.update(run=state["run"] + 1, asked=0)
  elif asked == "halt":
    state["asked"] = 1000
  elif asked == "status":
    words = "bare" if life.get("bare") or not state["set_up"] else "idle" if state["run"] < 0 else (
        step(step(life["runs"], state["run"]), state["asked"]))
    state["asked"] += 1
    count = scenario.get("hosts", 4)
    for host, word in enumerate(words if isinstance(words, list) else [words] * count):
      print(f"host {argv[4]}-{host} {word}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1], sys.argv[2:]))
