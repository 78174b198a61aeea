#!/bin/sh
# named-by-certificate.sh PORT OWN [OPTION NAME]…: each NAME that the edge's certificate has, as openssl verifies it by OPTION. An address is asked
# itself where this host has it, and OWN otherwise.
port=$1 own=$2
shift 2
while [ $# -gt 0 ]; do
  target=$own
  [ "$1" = -verify_ip ] && ip -oneline address show to "$2" | grep -q . && target=$2
  case $target in *:*) target="[$target]" ;; esac
  openssl s_client -connect "$target:$port" -CAfile /etc/llmkeep/pki/root.pem -tls1_3 -verify_return_error "$1" "$2" < /dev/null 2> /dev/null |
    grep -q '^Verify return code: 0 ' && echo "$2"
  shift 2
done
