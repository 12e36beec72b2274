#!/usr/bin/env bash
# Makes a fresh TPU VM ready for a run, and a ready one again at no cost:
#
#   REPOSITORY=https://... REVISION=<commit> BUCKET=gs://NAME MOUNT=/mnt/tiny-aya bash startup.sh
#
# The commit in ~/tiny_aya_jax, its .venv, the bucket at MOUNT. Every step is tried five times, $PAUSE
# seconds apart: the first minutes of a VM belong to its own upgrades, and networks fail. Secrets are
# not needed here. EXTRAS and PYTHON are as for environment.sh.
set -euo pipefail
for name in REPOSITORY REVISION BUCKET MOUNT; do
  [ -n "${!name:-}" ] || {
    echo "refused: $name is not set, expected REPOSITORY, REVISION, BUCKET and MOUNT" >&2
    exit 65
  }
done
here=$HOME/tiny_aya_jax
if [ "$(cat ~/setup.done 2> /dev/null)" = "$REVISION" ] && mountpoint -q "$MOUNT"; then
  echo "ready at $REVISION"
  exit 0
fi
rm -f ~/setup.done

# retry COMMAND...: five times; what is refused (65) is not tried again. `set -e` is off inside of it,
# so that functions join their steps with &&.
retry() {
  local attempt code
  for attempt in 1 2 3 4 5; do
    code=0
    "$@" || code=$?
    [ "$code" != 0 ] || return 0
    [ "$code" != 65 ] || return 65
    echo "attempt $attempt of 5 failed with $code: $1 ${2:-}" >&2
    [ "$attempt" = 5 ] || sleep "${PAUSE:-20}"
  done
  return "$code"
}

apt() {  # waits for whoever holds the lock, unattended-upgrades as a rule
  sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$@"
}

gcsfuse_source() {
  local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  curl -fsSL "$site/doc/apt-key.gpg" | sudo tee "$key" > /dev/null &&
    echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
}

checkout() {
  { [ -d "$here/.git" ] || git init --quiet "$here"; } &&
    git -C "$here" fetch --quiet --depth=1 "$REPOSITORY" "$REVISION" &&
    git -C "$here" checkout --quiet --force FETCH_HEAD
}

python=${PYTHON:-python3.11}
packages=(git)
command -v "$python" > /dev/null || packages+=("$python" "$python-venv")  # Ubuntu 22.04 has 3.10
if ! command -v gcsfuse > /dev/null; then
  retry gcsfuse_source
  packages+=(gcsfuse)
fi
retry apt update
retry apt install -y "${packages[@]}"
retry checkout
cd "$here"
# environment.sh installs once per setup.py; in a shell of its own, since it may `exit`.
# shellcheck disable=SC2016
retry env PYTHON="$python" bash -euc '. launch/environment.sh "$0"' "${EXTRAS:-tpu,data,export,track}"
retry bash launch/mount.sh
echo "$REVISION" > ~/setup.done
echo "ready at $REVISION"
