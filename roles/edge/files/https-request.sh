#!/bin/sh
# https-request.sh ADDRESS:PORT NAME METHOD PATH LENGTH [HEADER [OPTION…]]: one request over TLS 1.3; options of openssl follow. In shell, because
# Python takes ten times as long to start.
# Prints the answer as it comes, nothing where the certificate is not the estate's for NAME.
# The body is sent whole, as LENGTH zeros: nginx waits 5 s for one that it refused before it closes.
address=$1 name=$2 method=$3 path=$4 length=$5 header=${6:-Accept: */*}
shift 5
[ $# -eq 0 ] || shift
{
  printf '%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %s\r\n%b\r\nConnection: close\r\n\r\n' "$method" "$path" "$name" "$length" "$header"
  head -c "$length" /dev/zero
} |
  openssl s_client -connect "$address" -servername "$name" -CAfile /etc/llmkeep/pki/root.pem -tls1_3 -quiet \
    -verify_quiet -verify_return_error -verify_hostname "$name" "$@" | tr -d '\r'
