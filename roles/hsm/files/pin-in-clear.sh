#!/bin/sh
# Each place where the PIN, or a way to it, is written in clear.
grep -rsE 'pin-(value|source)=' /etc/crypttab /etc/pkcs11 /etc/systemd/system
grep -rsE '^(Environment|SetCredential)=.*(\bPIN=|pkcs11-pin)' /etc/systemd/system
find /etc/credstore /run/credstore -name 'cryptsetup.pkcs11-pin' 2> /dev/null
true
