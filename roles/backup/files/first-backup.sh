#!/bin/sh
# first-backup.sh FILE REPOSITORY: back up at once if FILE names no verified backup in REPOSITORY; otherwise print nothing.
grep --quiet --no-messages --fixed-strings "\"repository\": \"$2\"" "$1" && exit
systemctl start llmkeep-backup.service && echo "backed up to $2" && exit
journalctl --unit=llmkeep-backup.service --lines=15 --no-pager --output=cat
exit 1
