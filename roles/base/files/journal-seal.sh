#!/bin/sh
# Exit 1 if a sealing key exists but journald does not use it.
[ -e "/var/log/journal/$(cat /etc/machine-id)/fss" ] || exit 0
journalctl --file="/var/log/journal/$(cat /etc/machine-id)/system.journal" --header | grep --quiet '^Compatible flags:.* SEALED' && exit 0
echo "there is a sealing key, and the journal is not sealed by it"
exit 1
