#!/bin/sh
# current-release.sh UNIT…: exit 1 at the first unit whose link names another release than the current one.
current=$(readlink -f /opt/llmkeep/current)
for unit; do
  release=$(readlink -f "/opt/llmkeep/units/$unit")
  [ "$release" = "$current" ] || { echo "$unit is linked to $release, but $current is current"; exit 1; }
done
