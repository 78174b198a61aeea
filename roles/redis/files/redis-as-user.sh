#!/bin/sh
# redis-as-user.sh SOCKET USER CREDENTIAL COMMANDS: Redis's answers to this user, one per line. AUTH goes through a pipe, so that no
# argument or environment ever holds the password.
{
  printf 'AUTH %s ' "$2"
  systemd-creds decrypt --name="$3" "/etc/credstore.encrypted/$3" -
  printf '\n%b' "$4"
} | redis-cli -s "$1"
