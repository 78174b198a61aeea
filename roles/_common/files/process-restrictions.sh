#!/bin/sh
# process-restrictions.sh UNIT…: capabilities, no_new_privs and seccomp mode of each unit's main process, as reported by the kernel, one per line.
for unit; do
  pid=$(systemctl show --property=MainPID --value "$unit")
  grep -E '^(CapBnd|NoNewPrivs|Seccomp):' "/proc/$pid/status" | tr -s '\t\n' ' ' | sed 's, $,,'
  echo
done
