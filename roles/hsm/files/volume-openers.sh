#!/bin/sh
# Each unit that opens an encrypted volume, and that systemd does not start after the tunnel to the HSM or without it.
systemctl list-unit-files --no-legend 'systemd-cryptsetup@?*.service' | while read -r unit _; do
  for property in Wants After; do
    systemctl show --property="$property" --value "$unit" | tr ' ' '\n' | grep --quiet --line-regexp llmkeep-hsm-tls.service ||
      echo "$unit: $property lacks llmkeep-hsm-tls.service"
  done
done
