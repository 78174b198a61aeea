#!/bin/sh
# kibana-keystore PROGRAM CREDENTIAL=SETTING…: hands Kibana its secrets, which come from systemd's credentials, in a keystore in memory.
set -eu
program=$1
shift
rm -f "$KBN_PATH_CONF/kibana.keystore"
"$program" create > /dev/null
for pair; do
  "$program" add "${pair#*=}" --stdin --force < "$CREDENTIALS_DIRECTORY/${pair%%=*}" > /dev/null
done
