#!/bin/sh
# job-restrictions.sh UNIT…: exit 1 at the first running job that has capabilities, or lacks seccomp or no_new_privs.
for unit; do
  pid=$(systemctl show --property=MainPID --value "$unit")
  [ "$pid" = 0 ] && continue
  seen=$(grep -E '^(CapBnd|NoNewPrivs|Seccomp):' "/proc/$pid/status" | tr -s '\t\n' ' ' | sed 's, $,,')
  [ "$seen" = "CapBnd: 0000000000000000 NoNewPrivs: 1 Seccomp: 2" ] || { echo "$unit: $seen"; exit 1; }
done
