#!/usr/bin/env bash
# The long fault campaigns (`make storm`). KILLS: of a program; STORM: power cuts of a host; SEED: what both are drawn from; FUZZ_SECONDS: of a parser.
# A campaign whose peer is not installed (`make peers PEER=...`) says SKIPPED. The first that fails ends the storm.
set -euo pipefail
cd "$(dirname "$0")/.."
export SEED="${SEED:-5}"
cuts=${STORM:-20}
kills() { echo "${KILLS:-$1}"; }  # by default as many as a campaign is used to
unset STORM
pytest() { (cd "$1" && .venv/bin/pytest "${@:2}"); }
storm() { STORM=$1 pytest "${@:2}"; }
if_installed() { # PEER WHAT COMMAND...
  if [ -e "bench/.venv-$1" ]; then
    "${@:3}"
  else
    echo "storm: SKIPPED without \`make peers PEER=$1\`: $2"
  fi
}
fsdp() {
  cd payload
  ../bench/.venv-torch/bin/python -m pytest tests/train/run/test_strategies.py -k fsdp -rs
  STORM=1 ../bench/.venv-torch/bin/python -m pytest tests/train/run/test_preferences.py -k fsdp -rs
  cd ..
}
fuzz() { # the control node's parsers beside the payload's
  local site=$PWD/bench/.venv-atheris/lib/python3.13/site-packages failed=0
  PYTHONPATH=$site .venv/bin/python tests/helpers/fuzz_campaign.py tests/fuzz &
  PYTHONPATH=$site payload/.venv/bin/python tests/helpers/fuzz_campaign.py payload/tests/fuzz || failed=1
  wait $! && return "$failed"
}

# The lab's kernel from its source, as where no archive has it.
cache=$(mktemp -d)
env -u LLMKEEP_MIRROR XDG_CACHE_HOME="$cache" .venv/bin/lab prepare kernel
rm -rf "$cache"

storm "$(kills 500)" . tests/unit/plugins/volumes/test_luks_storm.py -rP
storm "$(kills 500)" . tests/unit/plugins/hsm/test_hsm_pin.py tests/unit/plugins/volumes/test_volume_verbs.py -k kill -rP
storm "$cuts" . tests/lab/kernels/test_lost_writes.py tests/lab/kernels/test_lost_saves.py -k lost_writes -rP
storm "$cuts" . tests/lab/storm/kernels/test_power_cuts.py -rP
storm "$cuts" . tests/lab/containers/test_lab.py -k killed -rP
storm 1 . tests/lab/faults/test_image.py -k "builder or containerfile" -rs
LAB_SYNC=1 STORM_MINUTES=60 storm "$(kills 50)" . tests/lab/faults/test_log_faults.py -rP
storm "$cuts" . tests/unit/llmkeep/bundle/test_bootstrap_media.py tests/unit/llmkeep/bundle/test_media.py -k kill -rP
pytest . tests/lab/storm/containers -rP
pytest . tests/lab/storm/kernels --deselect tests/lab/storm/kernels/test_power_cuts.py -rP
storm 1 . tests/unit/kubernetes/test_roll_out.py -k thousand -rs
if_installed vllm "the real vLLM on a host" pytest . tests/lab/roles/test_roles.py -k vllm
pytest . tests/unit/roles/test_logstash_role.py -k elastics_package -rs
storm 1 . tests/lab/firmware tests/unit/plugins/gpu/test_nvidia_builds.py --durations=0 -rs
if_installed mutmut "mutants of llmproof" bench/mutants.py llmproof
if_installed atheris "fuzzing of parsers" fuzz

storm "$(kills 200)" payload tests/train/run/test_saves_cut_short.py -k kill -rP
storm "$(kills 50)" payload tests/train/test_round.py -rP
storm 1 payload tests/serve/engine/test_engine_contract.py -k 'vllm or deepseek' -rs
storm 1 payload tests/train/run/test_preferences.py -k 'strategy or zero3' -rs
if_installed trl "losses of TRL" pytest payload tests/train/run/test_preferences.py -k trl
if_installed label-studio "annotations through Label Studio" storm 1 payload tests/train/annotation -k label_studio
if_installed torch "FSDP2" fsdp
STORM_MINUTES=10 pytest payload tests/serve/gateway/test_storms.py -k memory -rP
