#!/bin/sh
# How OPA verifies a policy; before that, where the key that it verifies by is not the control node's, the difference.
sed -n 's/^ *\(.*\)$/\1/; /^-----BEGIN/,/^-----END/p' /etc/opa/config.yaml | diff - /etc/llmkeep/policy/policy.pem &&
  grep '^    signing:' /etc/opa/config.yaml
