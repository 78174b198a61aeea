#!/usr/bin/env bash
# run.sh [ROLE...]: the scenario of each role, or of all, on the suite's hosts. One whose programs are absent is SKIPPED.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ $# = 0 ]; then
  mapfile -t all < <(sed -n 's/^  .*role: \([a-z_]*\).*/\1/p' meta/features.yml)
  set -- "${all[@]}"
fi
export PATH="$PWD/.venv/bin:$PATH"
for role in "$@"; do
  case $role in
    elasticsearch | filebeat | logstash | kibana)
      if [ ! -e .lab/bundle/bin/elasticsearch ] || [ ! -e .lab/bundle/bin/filebeat ]; then
        echo "molecule: SKIPPED without LLMKEEP_MIRROR, a folder that has Elasticsearch and Filebeat: scenario $role"
        continue
      fi
      ;;
    kubernetes)
      if ! llmkeep program kube > /dev/null; then
        echo "molecule: SKIPPED without LLMKEEP_MIRROR, a folder that has Kubernetes: scenario $role"
        continue
      fi
      ;;
  esac
  export LAB_INSTANCE=suite
  inventories=(-i inventory/lab)
  if grep -q inventory/lab-kernel "molecule/$role/molecule.yml"; then
    LAB_INSTANCE=suite-kernel
    inventories+=(-i inventory/lab-kernel)
  fi
  lab "${inventories[@]}" floor
  lab netns -- molecule test --scenario-name "$role"
done
