#!/usr/bin/env bash
# N processes on this machine, joined as the hosts of a pod are: a rehearsal, and what the tests use.
#
#   bash launch/local_pod.sh -n 2 train --config=experiments/pretrain.py:tiny --workdir=runs/pod ...
#
# Each has the devices that XLA gives a process (CPU: --xla_force_host_platform_device_count in XLA_FLAGS).
# SIGTERM and SIGINT go to all. Ends when all have; its exit code is that of the first one that failed, in
# time. A process that fails alone is left to the others to notice, as on a pod.
set -euo pipefail
if [ "${1:-}" != -n ] || ! [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 3 ]; then
  echo "usage: bash launch/local_pod.sh -n N VERB --config=FILE --workdir=DIR ..." >&2
  exit 65
fi
count=$2
shift 2
python=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python
[ -x "$python" ] || python=python3
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
pids=()
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT
for ((process = 0; process < count; process++)); do
  JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$process \
    "$python" -m tiny_aya_jax "$@" &
  pids+=($!)
  echo "local_pod: process $process is pid $!" >&2
done
first=0
left=$count
while [ "$left" -gt 0 ]; do
  code=0
  ended=
  wait -n -p ended || code=$?
  [ -n "$ended" ] || continue  # the trap's signal ended the wait, not a process
  left=$((left - 1))
  [ "$code" = 0 ] || echo "local_pod: pid $ended exited with $code" >&2
  [ "$first" != 0 ] || first=$code
done
exit "$first"
