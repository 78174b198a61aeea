#!/bin/sh
# Logs a line, and prints it once the journal on the disk has it; exit 1 where it does not within 4 s. Nothing is synced, since that could wait for a busy
# disk.
line="verify $$"
logger --tag llmkeep-verify "$line"
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  journalctl --directory=/var/log/journal --identifier=llmkeep-verify --since=-1min --output=cat --quiet | grep --fixed-strings --line-regexp "$line" && exit
  sleep 0.2
done
exit 1
