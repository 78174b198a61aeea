#!/bin/sh
# filebeat-keystore PROGRAM: hands Filebeat its key, which comes from systemd's credential, in a keystore in memory.
set -eu
set -- "$1" -c /etc/filebeat/filebeat.yml --path.data /run/filebeat/data keystore
"$@" create --force > /dev/null
"$@" add API_KEY --stdin --force < "$CREDENTIALS_DIRECTORY/filebeat.key" > /dev/null
