#!/bin/sh
# Exit 1 where OPA judges by another policy than the one in place. OPA writes down what it loaded, and looks each second or two.
for _ in 1 2 3 4 5 6 7 8; do
  cmp --silent /var/lib/llmkeep/policy/bundle.tar.gz /var/lib/opa/bundles/llm/bundle.tar.gz && exit 0
  sleep 0.5
done
echo "in place is another policy than the one that OPA judges by"
journalctl --unit opa.service --lines 1 --output cat
exit 1
