#!/bin/sh
# Reloads the units whose names are the names of the files in reload.d. One that fails does not keep the others from it.
failed=0
for entry in /etc/llmkeep/pki/reload.d/*; do
  [ -e "$entry" ] || continue
  systemctl try-reload-or-restart "${entry##*/}" || failed=1
done
exit "$failed"
