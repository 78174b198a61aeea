#!/bin/sh
# Each setting by which OpenSSL or nginx would get the PIN of the edge's token.
grep -h pin /etc/llmkeep/edge-hsm/openssl.cnf | grep -v '^#'
grep -rshE 'pin-(value|source)=' /etc/nginx /etc/llmkeep/edge-hsm /etc/systemd/system/nginx.service.d
sed -n '/PKCS#11/!p' /etc/llmkeep/edge-hsm/edge.key | base64 -d | grep -aoE 'pin-(value|source)='
true
