#!/bin/sh
# tls-versions.sh ADDRESS:PORT…: of each listener, what becomes of a handshake by TLS 1.2 and by TLS 1.3, with the certificate of this host.
pki=/etc/llmkeep/pki
for listener; do
  for version in tls1_2 tls1_3; do
    said=$(openssl s_client -connect "$listener" "-$version" -brief -CAfile $pki/root.pem -cert $pki/host.pem -cert_chain $pki/host.pem -key $pki/host.key < /dev/null 2>&1)
    spoken=$(printf '%s' "$said" | sed -n 's/^Protocol version: //p')
    echo "$listener $version ${spoken:-refused}"
  done
done
