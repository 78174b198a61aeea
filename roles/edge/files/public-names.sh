#!/bin/sh
# public-names.sh ADDRESS PORT NAME…: each NAME is served with the certificate on disk, which verifies up to the CA's root alone.
address=$1 port=$2
shift 2
for name; do
  /usr/local/lib/llmkeep/served-certificate "$address" "$port" "$name" /etc/llmkeep/pki/public.pem /etc/llmkeep/pki/public-root.pem || exit 1
done
