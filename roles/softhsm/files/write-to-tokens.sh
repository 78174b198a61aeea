#!/bin/sh
# The result of an attempt to write to the tokens in the mount namespace of the process that serves them.
nsenter --target "$(systemctl show --property=MainPID --value softhsm-server.service)" --mount touch /var/lib/softhsm/tokens/.verify 2>&1
if [ -e /var/lib/softhsm/tokens/.verify ]; then
  rm /var/lib/softhsm/tokens/.verify
  echo "the server can write to the tokens"
fi
