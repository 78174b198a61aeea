#!/bin/sh
# last-look-is-fresh.sh MINUTES: exit 1 if the witness's last complete run, whose end updates this file, is older.
findings=/var/lib/llmkeep/witness/findings.json
# If a first run is scheduled, it may still be in progress.
for _ in $(seq 60); do
  ended=$(stat --format=%Y "$findings" 2> /dev/null)
  age=$(( ($(date +%s) - ${ended:-0}) / 60 ))
  [ "$age" -lt "$1" ] && exit 0
  { [ -z "$ended" ] && systemctl --quiet is-active llmkeep-audit-witness.timer; } || break
  sleep 2
done
echo "the last look was $age minutes ago"
exit 1
