#!/bin/sh
# ready-first.sh UNIT…: number of units that run `llmkeep-volumes ready` before they open their volume.
systemctl show --property=ExecStartPre "$@" | grep --count 'argv\[\]=/usr/local/sbin/llmkeep-volumes ready '
