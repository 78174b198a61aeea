#!/bin/sh
# last-look-is-fresh.sh MINUTES: exit 1 where the witness's last look ended longer ago.
# The first look may still be running where one is planned.
for _ in $(seq 60); do
  ended=$(systemctl show --property=ExecMainExitTimestamp --value llmkeep-audit-witness.service)
  age=$(( ($(date +%s) - $(date +%s --date="${ended:-1970-01-01}")) / 60 ))
  [ "$age" -lt "$1" ] && exit 0
  { [ -z "$ended" ] && systemctl --quiet is-active llmkeep-audit-witness.timer; } || break
  sleep 2
done
echo "the last look was $age minutes ago"
exit 1
