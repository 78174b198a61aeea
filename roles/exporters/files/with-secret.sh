#!/bin/sh
# exporter-with-secret redis|elasticsearch ARGUMENT…: one of Debian's exporters with the secret that systemd unsealed for its unit.
# Redis' reads a file, which is in memory here; Elasticsearch's knows no other way than its environment, which root and it alone can read.
set -eu
exporter=$1
shift
case $exporter in
redis)
  umask 077
  printf '{"unix://exporter@/run/redis/redis.sock":"%s"}\n' "$(cat "$CREDENTIALS_DIRECTORY/redis.exporter")" > "$RUNTIME_DIRECTORY/passwords"
  set -- "-redis.password-file=$RUNTIME_DIRECTORY/passwords" "$@"
  ;;
elasticsearch)
  ES_API_KEY=$(base64 --wrap=0 "$CREDENTIALS_DIRECTORY/elasticsearch.exporter")
  export ES_API_KEY
  ;;
esac
exec "/usr/bin/prometheus-$exporter-exporter" "$@"
