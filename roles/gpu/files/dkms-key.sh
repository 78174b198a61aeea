#!/bin/sh
# dkms-key.sh: the key and the certificate that dkms signs with, read as dkms reads them.
mok_signing_key="" mok_certificate=""
for file in /etc/dkms/framework.conf /etc/dkms/framework.conf.d/*.conf; do
  # shellcheck disable=SC1090
  [ ! -f "$file" ] || . "$file"
done
echo "$mok_signing_key $mok_certificate"
