#!/bin/sh
# What becomes of an attempt to write to the tokens as the process that serves them sees them.
nsenter --target "$(systemctl show --property=MainPID --value softhsm-server.service)" --mount touch /var/lib/softhsm/tokens/.verify 2>&1
if [ -e /var/lib/softhsm/tokens/.verify ]; then
  rm /var/lib/softhsm/tokens/.verify
  echo "what serves the tokens can write to them"
fi
