#!/bin/sh
# foreign-client.sh HANDSHAKE ADDRESS:PORT NAME CLIENT: openssl's output for a handshake with a certificate for CLIENT that the estate's CA did not
# sign; HANDSHAKE is the program tls-handshake.sh.
handshake=$1 address=$2 name=$3 client=$4
folder=$(mktemp --directory) || exit 2
trap 'rm -r "$folder"' EXIT
openssl req -quiet -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj "/CN=$client" -addext "subjectAltName=DNS:$client" \
  -keyout "$folder/key.pem" -out "$folder/cert.pem" || exit 2
sh -c "$handshake" tls-handshake.sh "$address" "$name" -tls1_3 -cert "$folder/cert.pem" -key "$folder/key.pem"
