# tls.sh ADDRESS PORT: the answer of Redis's listener to a host of the estate, to a client without a certificate, and to TLS 1.2.
pki=/etc/llmkeep/pki
ask() {
  timeout 5 redis-cli -h "$address" -p "$port" --tls --cacert $pki/root.pem "$@" ping 2>&1 | grep -o NOAUTH || echo refused
}
address=$1 port=$2
echo "TLS 1.3 with a certificate: $(ask --cert $pki/host.pem --key $pki/host.key)"
echo "without one: $(ask)"
set -- "$address:$port" -tls1_2 -cert $pki/host.pem -cert_chain $pki/host.pem -key $pki/host.key
echo "TLS 1.2: $(timeout 5 openssl s_client -connect "$@" < /dev/null 2>&1 | grep -q 'alert protocol version' && echo refused || echo spoken)"
