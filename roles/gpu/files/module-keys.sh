#!/bin/sh
# module-keys.sh: files where dkms, shim and this role could have left a private key. One in DER has no marker, so names count too.
for place in /var/lib/dkms /var/lib/shim-signed /etc/dkms /etc/llmkeep/modules; do
  [ ! -d "$place" ] || find "$place" -type f \( -name '*.key' -o -name '*.priv' \) -print
  [ ! -d "$place" ] || grep -rslE 'BEGIN ([A-Z]+ )?PRIVATE KEY' "$place"
done | sort -u
