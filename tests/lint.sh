#!/usr/bin/env bash
# lint.sh: what reads the tree without running it.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
yamllint --strict .
# Without an inventory that is there it cannot load the playbooks, which only its log says.
ANSIBLE_INVENTORY=inventory/example ansible-lint -q
mapfile -t programs < <(grep -rlIE '^#!/bin/(ba)?sh|^#!/usr/bin/env bash' .ci bench/*.sh lab llmkeep molecule playbooks roles tests)
shellcheck --external-sources "${programs[@]}"
for tree in tests/unit tests/lab payload/tests; do
  if same=$(find $tree -name 'test_*.py' -printf '%f\n' | sort | uniq -d | grep .); then
    echo "pytest imports tests by their file's name, and $tree has two: ${same//$'\n'/ }" >&2
    exit 1
  fi
done
PYTHONPATH=.ansible/collections lint-imports --no-logo --no-cache
deptry llmkeep
for each in llmproof lab; do
  deptry "$each" --config "$each/pyproject.toml"
done
cd payload
PYTHONPATH=. lint-imports --no-logo --no-cache
# The payload's environment knows which distribution brings a module.
site=$(echo .venv/lib/python*/site-packages)
PYTHONPATH=$site deptry .
PYTHONPATH=$site deptry ../llmcore --config ../llmcore/pyproject.toml
