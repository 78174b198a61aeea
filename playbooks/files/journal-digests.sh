#!/bin/sh
# journal-digests.sh FOLDER: sha256 and name of each file of a journal of ratings; nothing where there is none.
set -eu
[ -d "$1" ] || exit 0
cd "$1"
find . -maxdepth 1 -type f -regex './\(rated\|reviewed\|answered\)-[0-9T]+\.jsonl' -printf '%f\n' | LC_ALL=C sort | xargs --no-run-if-empty sha256sum
