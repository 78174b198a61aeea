# ADDRESS PORT: what Redis' listener says to a host of the estate, to a client without a certificate, and in TLS 1.2.
pki=/etc/llmkeep/pki
ask() {
  timeout 5 redis-cli -h "$1" -p "$2" --tls --cacert "$pki/root.pem" $3 ping 2>&1 | grep -o NOAUTH || echo refused
}
echo "TLS 1.3 with a certificate: $(ask "$1" "$2" "--cert $pki/host.pem --key $pki/host.key")"
echo "without one: $(ask "$1" "$2" "")"
if timeout 5 openssl s_client -connect "$1:$2" -tls1_2 -cert $pki/host.pem -key $pki/host.key < /dev/null > /dev/null 2>&1
then echo "TLS 1.2: spoken"
else echo "TLS 1.2: refused"
fi
