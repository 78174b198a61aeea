#!/bin/sh
# logstash-keystore HOME: puts Logstash's settings in memory, with the keystore beside them, where it is expected. Secrets go through pipes.
set -eu
cp /etc/logstash/* "$RUNTIME_DIRECTORY/"
set -- "$1/bin/logstash-keystore" --path.settings "$RUNTIME_DIRECTORY"
# It asks whether to go without a password, which would have to be in the environment.
echo y | "$@" create > /dev/null
"$@" add API_KEY --stdin < "$CREDENTIALS_DIRECTORY/logstash.key" > /dev/null
"$@" add API_PASSWORD --stdin < "$CREDENTIALS_DIRECTORY/logstash.api" > /dev/null
