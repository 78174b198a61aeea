#!/bin/sh
# ready-first.sh UNIT…: of how many volumes `llmkeep-volumes ready` is run before they are opened.
systemctl show --property=ExecStartPre "$@" | grep --count 'argv\[\]=/usr/local/sbin/llmkeep-volumes ready '
