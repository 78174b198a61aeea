#!/bin/sh
# Exit 1 if OPA uses another policy than the installed one. OPA saves what it loaded, and checks every one or two seconds.
for _ in 1 2 3 4 5 6 7 8; do
  cmp --silent /var/lib/llmkeep/policy/bundle.tar.gz /var/lib/opa/bundles/llm/bundle.tar.gz && exit 0
  sleep 0.5
done
echo "OPA uses another policy than the installed one"
journalctl --unit opa.service --lines 1 --output cat
exit 1
