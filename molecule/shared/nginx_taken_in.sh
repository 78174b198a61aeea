#!/bin/sh
# Reload nginx, and wait until the workers of before are gone, which still have the old configuration.
before=$(grep --invert-match --line-regexp "$(systemctl show --property=MainPID --value nginx.service)" \
  /sys/fs/cgroup/system.slice/nginx.service/cgroup.procs)
systemctl reload nginx.service || exit 1
for worker in $before; do
  timeout 60 tail --pid="$worker" --follow /dev/null || exit 1
done
