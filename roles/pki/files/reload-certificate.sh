#!/bin/sh
# Reloads the units named by the files in reload.d. If one fails, the others are reloaded all the same.
# A unit that can only be restarted reads no revocation list: it is left alone if it started after the certificates arrived.
failed=0
newest=$(stat --format=%Y /etc/llmkeep/pki/host.pem /etc/llmkeep/pki/edge.pem /etc/llmkeep/pki/public.pem 2> /dev/null | sort --numeric-sort | tail --lines=1)
for entry in /etc/llmkeep/pki/reload.d/*; do
  [ -e "$entry" ] || continue
  unit=${entry##*/}
  if [ "$(systemctl show --property=CanReload --value "$unit")" = no ]; then
    started=$(systemctl show --timestamp=unix --property=ActiveEnterTimestamp --value "$unit")
    started=${started#@}
    [ "${started:-0}" -le "${newest:-0}" ] || continue
  fi
  systemctl try-reload-or-restart "$unit" || failed=1
done
exit "$failed"
