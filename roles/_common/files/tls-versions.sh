#!/bin/sh
# tls-versions.sh ADDRESS:PORT…: for each listener, the outcome of a handshake with TLS 1.2 and with TLS 1.3, with this host's certificate.
pki=/etc/llmkeep/pki
for listener; do
  for version in tls1_2 tls1_3; do
    said=$(openssl s_client -connect "$listener" "-$version" -brief -CAfile $pki/root.pem -cert $pki/host.pem -cert_chain $pki/host.pem -key $pki/host.key < /dev/null 2>&1)
    spoken=$(printf '%s' "$said" | sed -n 's/^Protocol version: //p')
    echo "$listener $version ${spoken:-refused}"
  done
done
