#!/bin/sh
# page-status.sh ADDRESS NAME PORT PATH: status and Location of the edge's answer to an unauthenticated request for a page.
printf 'GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$4" "$2" |
  openssl s_client -connect "$1:$3" -servername "$2" -CAfile /etc/llmkeep/pki/root.pem -tls1_3 -quiet \
    -verify_quiet -verify_return_error -verify_hostname "$2" | tr -d '\r' | sed -n 's/^HTTP.[0-9.]* \([0-9]*\).*/\1/p; s/^[Ll]ocation: //p'
