#!/bin/sh
# network-interfaces.sh UNIT…: the interfaces in the network namespace of each unit's main process, one per line.
for unit; do
  pid=$(systemctl show --property=MainPID --value "$unit")
  nsenter --target "$pid" --net ip -oneline link | cut -d: -f2 | tr -d ' '
done
