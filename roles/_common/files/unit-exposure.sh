#!/bin/sh
# unit-exposure.sh UNIT=TENTHS…: exit 1 at the first unit that `systemd-analyze security` rates as more exposed, with its rating.
for each; do
  systemd-analyze security --no-pager --threshold="${each##*=}" "${each%=*}" || exit 1
done
