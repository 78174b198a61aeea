#!/bin/sh
# redis-as-gateway.sh SOCKET CREDENTIAL COMMANDS: Redis's answers to the gateway, a line each. AUTH goes through a pipe, so that no argument and
# no environment ever holds the password.
{
  printf 'AUTH gateway '
  systemd-creds decrypt --name="$2" "/etc/credstore.encrypted/$2" -
  printf '\n%b' "$3"
} | redis-cli -s "$1"
