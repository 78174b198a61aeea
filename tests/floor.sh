#!/usr/bin/env bash
# floor.sh [kernel]: the suite's snapshots of hosts, made once. Those of kernels are made from the containers': on kernels they take three
# times as long.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = kernel ]; then
  export LAB_INSTANCE=suite-kernel
  inventories=(-i inventory/lab/hosts.yml -i inventory/lab-kernel)
  like=(--like suite)
else
  export LAB_INSTANCE=suite
fi
exec {lock}> .lab/floor.lock
flock "$lock"
if [ ! -e ".lab/instances/$LAB_INSTANCE/floor.sha256" ]; then
  .venv/bin/lab "${inventories[@]}" floor "${like[@]}"
  .venv/bin/lab down
fi
