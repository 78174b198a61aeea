#!/bin/sh
# `signed` if the running OPA is the current program and has the digest that its folder is named after.
program=$(readlink "/proc/$(systemctl show --property=MainPID --value opa.service)/exe")
current=$(readlink -f /opt/llmkeep/programs/opa/current)
[ "$program" = "$current/opa" ] || { echo "$program is running, but $current is current"; exit 1; }
[ "$(sha256sum < "$program" | cut -c 1-12)" = "$(basename "$current")" ] || { echo "$program does not have its folder's digest"; exit 1; }
echo signed
