#!/bin/sh
# sealed-secrets.sh NAME…: mode and owner of each sealed credential, followed by the length in bytes of its unsealed content.
for name; do
  path=/etc/credstore.encrypted/$name
  stat --format='%a %U:%G' "$path" && systemd-creds decrypt --name="$name" "$path" - | wc --bytes
done
