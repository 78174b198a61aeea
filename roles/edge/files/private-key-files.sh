#!/bin/sh
# private-key-files.sh CERTIFICATE: the files of this host that hold its private key.
wanted=$(openssl x509 -in "$1" -noout -pubkey)
grep -rslE 'BEGIN ([A-Z]+ )?PRIVATE KEY' /etc /root /var/lib/nginx /var/lib/llmkeep* | while read -r file; do
  [ "$(openssl pkey -in "$file" -pubout -passin pass: 2> /dev/null)" != "$wanted" ] || echo "$file"
done
