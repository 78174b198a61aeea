#!/bin/sh
# job-releases.sh UNIT…: exit 1 at the first job that runs another release than its link names, or is not to run the current one.
for unit; do
  release=$(readlink -f "/opt/llmtrain/units/$unit")
  pid=$(systemctl show --property=MainPID --value "$unit")
  # 0: it is done.
  [ "$pid" = 0 ] || tr '\0' '\n' < "/proc/$pid/cmdline" | grep -q "^$release/" || { echo "$unit runs another release than $release"; exit 1; }
  [ "$release" = "$(readlink -f /opt/llmtrain/current)" ] || { echo "$unit is to run $release, which is not current"; exit 1; }
done
