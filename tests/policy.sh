#!/usr/bin/env bash
# Who may do what: format, strict types, tests and their coverage, lint. What an absent program would do is SKIPPED.
set -euo pipefail
cd "$(dirname "$0")/.."
if opa=$(.venv/bin/llmkeep program opa); then
  unformatted=$("$opa" fmt --list policy)
  if [ -n "$unformatted" ]; then
    echo "policy: run \`opa fmt -w\` on $unformatted"
    exit 1
  fi
  "$opa" check --strict --schema policy/schemas --bundle policy
  "$opa" test --bundle policy
  covered=$("$opa" test --bundle policy --coverage --threshold 95 2>&1) || { tail -n 20 <<< "$covered"; exit 1; }
else
  echo 'policy: SKIPPED without opa: format, strict types, coverage'
fi
.venv/bin/llmkeep policy check --source policy
if regal=$(.venv/bin/llmkeep program regal); then
  REGAL_DISABLE_VERSION_CHECK=1 "$regal" lint policy
else
  echo 'policy: SKIPPED without regal: lint'
fi
