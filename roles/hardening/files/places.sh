#!/bin/sh
# places.sh PATH...: `fstab PATH` for each mount point of the host's own lines in /etc/fstab, `above PATH` for each PATH below which something
# is mounted, and `container` in one.
if [ -e /etc/fstab ]; then
  sed '/^# BEGIN hardening$/,/^# END hardening$/d' /etc/fstab | awk '$1 !~ /^#/ && NF > 1 { print "fstab", $2 }'
fi
for path; do
  if findmnt --noheadings --list --output TARGET | grep --quiet "^$path/"; then echo "above $path"; fi
done
if [ -e /run/systemd/container ]; then echo container; fi
