#!/bin/sh
# make-keystore.sh HOME: the keystore with the password of the first start, which goes through a pipe. What a package made is replaced.
set -eu
umask 077
store=/etc/elasticsearch/elasticsearch.keystore
rm -f "$store"
"$1/bin/elasticsearch-keystore" create > /dev/null
systemd-creds decrypt --name=elasticsearch.bootstrap /etc/credstore.encrypted/elasticsearch.bootstrap - |
  "$1/bin/elasticsearch-keystore" add --stdin --force bootstrap.password
chown root:elasticsearch "$store"
chmod 0640 "$store"
touch /etc/elasticsearch/.llmkeep-keystore
