#!/bin/sh
# foreign-client.sh HANDSHAKE ADDRESS:PORT NAME CLIENT: what openssl says of a handshake with a certificate for CLIENT that is not of the estate's CA;
# HANDSHAKE is the program tls-handshake.sh.
handshake=$1 address=$2 name=$3 client=$4
folder=$(mktemp --directory) || exit 2
trap 'rm -r "$folder"' EXIT
openssl req -quiet -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj "/CN=$client" -addext "subjectAltName=DNS:$client" \
  -keyout "$folder/key.pem" -out "$folder/cert.pem" || exit 2
sh -c "$handshake" tls-handshake.sh "$address" "$name" -tls1_3 -cert "$folder/cert.pem" -key "$folder/key.pem"
