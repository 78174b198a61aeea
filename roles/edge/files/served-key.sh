#!/bin/sh
# served-key.sh ADDRESS:PORT NAME PKCS11-SERVER PROVIDER OBJECT: the public key of a handshake, compared with the one that the token shows
# without a login.
served=$(openssl s_client -connect "$1" -servername "$2" -CAfile /etc/llmkeep/pki/root.pem -tls1_3 \
  -verify_return_error -verify_hostname "$2" < /dev/null 2> /dev/null | openssl x509 -noout -pubkey 2> /dev/null)
held=$(P11_KIT_SERVER_ADDRESS="$3" timeout 15 p11-kit export-object --provider "$4" "$5;type=public" 2> /dev/null)
if [ -z "$served" ]; then
  echo "no handshake"
elif [ "$served" = "$held" ]; then
  echo "the key that is served is the token's"
else
  echo "another key is served than the token has"
fi
