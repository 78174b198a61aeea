#!/bin/sh
# list-lives.sh FILE DAYS: exit 1 unless the first revocation list in FILE is valid for at least DAYS more days.
until=$(openssl crl -in "$1" -noout -nextupdate) || exit 1
left=$((($(date --date="${until#nextUpdate=}" +%s) - $(date +%s)) / 86400))
[ "$left" -ge "$2" ] || { echo "the list is valid for $left days"; exit 1; }
