#!/bin/sh
# unit-exposure.sh UNIT=TENTHS…: exit 1 at the first unit that `systemd-analyze security` finds more exposed, with what it says.
for each; do
  systemd-analyze security --no-pager --threshold="${each##*=}" "${each%=*}" || exit 1
done
