#!/bin/sh
# job-states.sh UNIT…: exit 1 at the first job that is neither running nor done.
for unit; do
  state=$(systemctl show --property=ActiveState --property=Result --value "$unit" | paste --serial --delimiters ' ')
  [ "$state" = "active success" ] || [ "$state" = "success active" ] || { echo "$unit is $state"; exit 1; }
done
