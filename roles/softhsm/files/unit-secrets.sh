#!/bin/sh
# unit-secrets.sh UNIT…: the lines of these units that would hand a secret to a process; exit 1 without any.
systemctl cat "$@" | grep -E '^((Load|Set|Import)Credential|Environment|PassEnvironment)'
