#!/bin/sh
# `signed` where the running OPA is the current program, with the bytes that its folder is named after.
program=$(readlink "/proc/$(systemctl show --property=MainPID --value opa.service)/exe")
current=$(readlink -f /opt/llmkeep/programs/opa/current)
[ "$program" = "$current/opa" ] || { echo "$program runs, current is $current"; exit 1; }
[ "$(sha256sum < "$program" | cut -c 1-12)" = "$(basename "$current")" ] || { echo "$program is not what its folder says"; exit 1; }
echo signed
