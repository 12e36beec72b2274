#!/usr/bin/env bash
# Mounts a bucket for rows and workdirs: BUCKET=gs://NAME MOUNT=/mnt/tiny-aya bash launch/mount.sh
#
# A mount that is there is left. Names are not cached (all ttl 0): a host that lists checkpoints must
# see what another has just committed. Rows are read at random, for which a cache of whole shards would
# read thousands of times too much: the file cache holds only files that are read from their beginning.
set -euo pipefail
for name in BUCKET MOUNT; do
  [ -n "${!name:-}" ] || {
    echo "refused: $name is not set, expected BUCKET=gs://NAME and MOUNT=FOLDER" >&2
    exit 65
  }
done
if mountpoint -q "$MOUNT"; then
  echo "$MOUNT is mounted"
  exit 0
fi
[ -d "$MOUNT" ] || sudo mkdir -p "$MOUNT"
sudo chown "$(id -u):$(id -g)" "$MOUNT"
cache=${CACHE:-$HOME/.cache/gcsfuse}
mkdir -p "$cache"
# A checkpoint is committed by renaming its folder: it fails with a limit below its number of files.
# A bucket with a hierarchical namespace renames in one step; take such a one.
gcsfuse --implicit-dirs --rename-dir-limit=200000 --kernel-list-cache-ttl-secs=0 \
  --metadata-cache-ttl-secs=0 --cache-dir="$cache" --file-cache-max-size-mb=20480 \
  --file-cache-cache-file-for-range-read=false "${BUCKET#gs://}" "$MOUNT"
