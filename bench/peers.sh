#!/usr/bin/env bash
# peers.sh PEER...: what benchmarks compare with and draw by, mutmut and atheris, each in an environment of its own below bench/.
# With LOCK=1 it resolves bench/peers/PEER.in anew into the versions and hashes of bench/peers/PEER.txt; without, nothing else is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=/usr/bin/python3.13
# Of the machine that bench/gpu.sh is for.
gpu_python=3.12

# Not an environment: wheels to carry, for the Python of a lent machine, without bitsandbytes' kernels for other CUDAs.
gpu_wheels() {
  lab/packages bench/peers/gpu.apt
  local pip=("$python" -m pip --quiet --disable-pip-version-check) each
  local target=(--no-deps --only-binary=:all: --ignore-requires-python --implementation cp --python-version "$gpu_python")
  for each in 2_5 2_17 2_24 2_27 2_28 2_34; do target+=(--platform "manylinux_${each}_x86_64"); done
  mkdir -p bench/.wheels
  if [ -n "${LOCK:-}" ]; then
    "${pip[@]}" install --dry-run "${target[@]}" --target bench/.wheels --report bench/.wheels/report.json -r bench/peers/gpu.in
    "$python" bench/peers/pinned.py bench/.wheels/report.json > bench/peers/gpu.txt
  fi
  rm -f bench/.wheels/*.whl
  "${pip[@]}" download "${target[@]}" --require-hashes --dest bench/.wheels -r bench/peers/gpu.txt
  zip --quiet --delete bench/.wheels/bitsandbytes-*.whl '*_cuda11*' '*_cuda12*' '*_rocm*' '*_xpu*'
}

environment() { # PEER
  local own=$python options=() folder=bench/.venv-$1 site=lib/python3.13/site-packages
  # They need torch, which there is for the machine's own Python (3.11); what comes with vLLM's would need another build of it.
  case $1 in vllm | guidellm) own=python3 ;; esac
  # These use Debian's packages, too: two of them compute with the torch that ours has.
  case $1 in trl | transformers | torch) options+=(--system-site-packages) ;; esac
  if [ -n "${LOCK:-}" ]; then options+=(--clear); fi
  "$own" -m venv "${options[@]}" "$folder"
  local pip=("$folder/bin/pip" --quiet --disable-pip-version-check)
  if [ -n "${LOCK:-}" ]; then
    "${pip[@]}" install --dry-run --report "$folder/report.json" -r "bench/peers/$1.in"
    "$python" bench/peers/pinned.py "$folder/report.json" > "bench/peers/$1.txt"
  fi
  "${pip[@]}" install --no-deps --require-hashes -r "bench/peers/$1.txt"
  case $1 in
    # Without packages' own scripts.
    clients) npm --prefix bench/clients ci --ignore-scripts --silent ;;
    vllm) "${pip[@]}" uninstall --yes torchaudio torchcodec ;;
    # The payload as it is, on a later torch than Debian's.
    torch) echo "import site; site.addsitedir('$PWD/payload/.venv/$site')" > "$folder/$site/payload.pth" ;;
    # What the code to mutate and its tests import.
    mutmut) echo "import site; [site.addsitedir(f'$PWD/{environment}/$site') for environment in ('.venv', 'payload/.venv')]" \
      > "$folder/$site/tree.pth" ;;
  esac
}

for peer in "$@"; do
  case $peer in
    firmware | openscap | protocols) lab/packages "bench/peers/$peer.apt" ;;
    gpu) gpu_wheels ;;
    *) environment "$peer" ;;
  esac
done
