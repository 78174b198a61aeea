#!/bin/sh
# sudo-output FOLDER MIB: remove the oldest of what sudo kept until it fills no more than that. Only root writes there.
set -eu
cd "$1"
while [ "$(du --summarize --block-size=1M . | cut --fields=1)" -gt "$2" ]; do
  oldest=$(find . -mindepth 1 -maxdepth 1 -printf '%T@ %f\n' | sort --numeric-sort | head --lines=1 | cut --delimiter=' ' --fields=2)
  [ -n "$oldest" ] || exit 0
  rm --recursive --force -- "./$oldest"
done
