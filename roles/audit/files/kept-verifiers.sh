#!/bin/sh
# kept-verifiers.sh HOST…: prints `kept` for each host whose verifier is stored here.
for host; do
  if test -s "/var/lib/llmkeep/witness/$host/verifier"; then echo kept; else echo "nothing is kept of $host"; fi
done
