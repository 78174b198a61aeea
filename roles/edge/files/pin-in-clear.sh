#!/bin/sh
# pin-in-clear.sh CREDENTIAL: what systemd hands to nginx.service; then each setting of OpenSSL, nginx or its unit that has the PIN itself.
# The PIN is in this shell's memory only: printf is built in, so no process has it as an argument.
pin=$(systemd-creds decrypt --name="$1" "/etc/credstore.encrypted/$1" -) && [ -n "$pin" ] || exit 1
key=/etc/llmkeep/edge-hsm/edge.key
process=$(systemctl show --property=MainPID --value nginx.service)
ls /run/credentials/nginx.service
printf '%s\n' "$pin" | grep --recursive --files-with-matches --text --fixed-strings --word-regexp --file=- \
  /etc/nginx /etc/llmkeep/edge-hsm /etc/systemd/system "/proc/$process/environ" "/proc/$process/cmdline"
sed -n '/PKCS#11/!p' "$key" | base64 -d | grep --quiet --text --extended-regexp 'pin-(value|source)=' && echo "$key"
true
