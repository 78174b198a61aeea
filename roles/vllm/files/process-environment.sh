#!/bin/sh
# process-environment.sh UNIT…: exit 1 at the first unit whose process has no key, shows it in its arguments, or may send usage statistics.
for unit; do
  pid=$(systemctl show --property=MainPID --value "$unit")
  key=$(tr '\0' '\n' < "/proc/$pid/environ" | sed -n 's/^VLLM_API_KEY=//p')
  [ -n "$key" ] || { echo "$unit has no key"; exit 1; }
  ! tr '\0' '\n' < "/proc/$pid/cmdline" | grep -qF "$key" || { echo "$unit has its key among its arguments"; exit 1; }
  for setting in VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1; do
    tr '\0' '\n' < "/proc/$pid/environ" | grep -qx "$setting" || { echo "$unit runs without $setting"; exit 1; }
  done
done
