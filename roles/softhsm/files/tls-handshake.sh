#!/bin/sh
# tls-handshake.sh ADDRESS:PORT NAME OPTION…: a TLS handshake, by default without a client certificate, with openssl's output.
# With TLS 1.3 a client learns of a refusal only after its own last message; an accepted client is ended after 8 s.
address=$1 name=$2
shift 2
timeout 8 openssl s_client -connect "$address" -servername "$name" -CAfile /etc/llmkeep/pki/root.pem \
  -verify_return_error -verify_hostname "$name" -quiet "$@" < /dev/null 2>&1
