#!/bin/sh
# running-release.sh FOLDER UNIT…: exit 1 at the first unit whose process does not belong to the release that its link in FOLDER names.
folder=$1
shift
for unit; do
  release=$(readlink -f "$folder/$unit")
  pid=$(systemctl show --property=MainPID --value "$unit")
  tr '\0' '\n' < "/proc/$pid/cmdline" | grep -q "^$release/" || { echo "$unit runs another release than $release"; exit 1; }
done
