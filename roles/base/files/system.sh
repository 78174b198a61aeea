#!/bin/sh
# system.sh: name and major version of the system, as in `debian 13`.
. /etc/os-release
printf "%s %s" "$ID" "${VERSION_ID%%.*}"
