#!/bin/sh
# redis-as-user.sh SOCKET USER COMMANDS: Redis's answers to this user, a line each. AUTH goes through a pipe, so that no argument and
# no environment ever holds the password.
{
  printf 'AUTH %s ' "$2"
  systemd-creds decrypt --name="redis.$2" "/etc/credstore.encrypted/redis.$2" -
  printf '\n%b' "$3"
} | redis-cli -s "$1"
