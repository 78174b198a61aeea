#!/bin/sh
# running-watch.sh ROOT: exit 1 if the watch runs another release than ROOT/current.
release=$(readlink -f "$1/current")
pid=$(systemctl show --property=MainPID --value llm-gpu.service)
tr '\0' '\n' < "/proc/$pid/cmdline" | grep -q "^$release/" || { echo "llm-gpu.service runs another release than $release"; exit 1; }
