#!/bin/sh
# unit-exposure.sh TENTHS UNIT…: exit 1 at the first unit that `systemd-analyze security` finds more exposed, with what it says.
threshold=$1
shift
for unit; do
  systemd-analyze security --no-pager --threshold="$threshold" "$unit" || exit 1
done
