#!/usr/bin/env bash
# The run on one host of a slice; tpu.py calls it on all of them.
#
#   bash launch/host.sh run VERB --config=... --workdir=...    starts it, unless one runs
#   bash launch/host.sh status REVISION MOUNT      host NAME bare|idle|running|stopped|exit CODE
#   bash launch/host.sh stop|halt SECONDS          SIGTERM: it saves, and ends with 75; halt: to go on
#
# State lies in the home folder: run.lock is held while it runs, run.log, run.pid of supervise.py,
# run.exit with its code, run.stopped once it was asked to stop, run.env with secrets (mode 600).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=$here/.venv/bin/python
case ${1:-} in
  run)
    [ -x "$python" ] || { echo "refused: there is no $python, run startup.sh first" >&2; exit 65; }
    exec 9> ~/run.lock  # inherited by the run: a dead one holds nothing, whatever run.pid says
    flock --nonblock 9 || { echo "running already"; exit 0; }
    rm -f ~/run.exit ~/run.stopped ~/run.pid
    # A stalled transfer ends after a minute, instead of never. One descriptor a shard of rows.
    export TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=1024
    ulimit -n "$(ulimit -Hn)"
    set -a
    # shellcheck source=/dev/null
    [ ! -e ~/run.env ] || . ~/run.env
    set +a
    cd "$here"
    setsid nohup bash launch/host.sh hold "${@:2}" >> ~/run.log 2>&1 < /dev/null &
    echo started ;;
  hold)
    code=0
    "$python" launch/supervise.py -- "$python" -m tiny_aya_jax "${@:2}" 9>&- &
    echo $! > ~/run.pid
    wait $! || code=$?
    echo "$code" > ~/run.exit ;;
  status)
    state=idle
    if ! flock --nonblock --shared ~/run.lock true; then state=running
    elif [ "$(cat ~/setup.done 2> /dev/null)" != "$2" ] || ! mountpoint -q "$3"; then state=bare
    elif [ -e ~/run.stopped ]; then state=stopped
    elif [ -e ~/run.exit ]; then state="exit $(cat ~/run.exit)"
    fi
    echo "host $(hostname) $state" ;;
  stop | halt)
    if ! flock --nonblock --shared ~/run.lock true; then
      [ "$1" = halt ] || touch ~/run.stopped
      kill -TERM "$(cat ~/run.pid)"
      flock --shared --wait "$2" ~/run.lock true || { echo "still running after $2 s" >&2; exit 1; }
    fi
    echo "host $(hostname) ended with $(cat ~/run.exit 2> /dev/null || echo nothing)" ;;
  *) echo "usage: bash launch/host.sh run WORDS | status REVISION MOUNT | stop|halt SECONDS" >&2; exit 65 ;;
esac
