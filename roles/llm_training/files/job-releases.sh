#!/bin/sh
# job-releases.sh UNIT…: exit 1 at the first job that runs another release than its link names, or is not linked to the current one.
for unit; do
  release=$(readlink -f "/opt/llmtrain/units/$unit")
  pid=$(systemctl show --property=MainPID --value "$unit")
  # 0: the job is done.
  [ "$pid" = 0 ] || tr '\0' '\n' < "/proc/$pid/cmdline" | grep -q "^$release/" || { echo "$unit runs another release than $release"; exit 1; }
  [ "$release" = "$(readlink -f /opt/llmtrain/current)" ] || { echo "$unit is linked to $release, which is not current"; exit 1; }
done
