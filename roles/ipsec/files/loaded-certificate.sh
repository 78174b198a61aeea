#!/bin/sh
# Exit 1 where strongSwan has not loaded the host's certificate on disk.
encoded() { sed '/^-----BEGIN/,/^-----END/!d; /^-----/d' | tr -d '\n'; }
own=$(openssl x509 -in /etc/llmkeep/pki/host.pem | encoded)
loaded=$(swanctl --list-certs --type x509 --pem --uri unix:///run/llmkeep-ipsec/charon.vici | encoded)
case $loaded in *"${own:-none}"*) exit 0 ;; esac
echo "strongSwan has not loaded /etc/llmkeep/pki/host.pem"
exit 1
