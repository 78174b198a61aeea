#!/bin/sh
# taken-in [UNIT]: reload this nginx, and wait until the workers of before are gone, which still have the old configuration.
unit=${1:-nginx.service}
before=$(grep --invert-match --line-regexp "$(systemctl show --property=MainPID --value "$unit")" \
  "/sys/fs/cgroup/system.slice/$unit/cgroup.procs")
systemctl reload "$unit" || exit 1
for worker in $before; do
  timeout 60 tail --pid="$worker" --follow /dev/null || exit 1
done
