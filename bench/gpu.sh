#!/bin/bash
# Measures this project on one NVIDIA GPU, offline, in about ten minutes: training beside TRL and the plan, int8 and nf4 beside
# bf16, the gateway before an engine on the GPU, and the health reader on the card's own NVML. Without a GPU: a sentence, and 0.
#
#   bench/gpu.sh [--out FOLDER] [--rehearse] [PART...]      parts: train quantized gateway health (default: all)
#
# FOLDER (default .lab/gpu) gets results.json and table.md, rewritten after each part, nvml.json (what NVML answered) and log.
# --rehearse runs every part on the CPU with tiny models, to see that it works; its figures say nothing of a GPU.
#
# Where there is no `make env`, the environment is made here: of the machine's python3, which has to have torch, and of the
# wheels in bench/.wheels, which `make peers PEER=gpu` fetches on a connected machine and which are brought along with this tree.
set -euo pipefail
cd "$(dirname "$0")/.."

rehearse=
for word; do
	case $word in
	--rehearse) rehearse=1 ;;
	-h | --help)
		sed -n '2,/^set/{/^#/s/^# \?//p}' "$0"
		exit 0
		;;
	esac
done

if [ -z "$rehearse" ] && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
	echo "bench/gpu.sh: nvidia-smi lists no GPU on this machine, so nothing was measured (--rehearse tries each part on the CPU)"
	exit 0
fi

python=payload/.venv/bin/python
if [ ! -x $python ]; then
	echo "bench/gpu.sh: no payload/.venv here: made of $(command -v python3) and bench/.wheels" >&2
	if ! torch=$(python3 -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])'); then
		echo "bench/gpu.sh: python3 has no torch: install one that was built for CUDA" >&2
		exit 1
	fi
	if ! compgen -G 'bench/.wheels/*.whl' >/dev/null; then
		echo "bench/gpu.sh: bench/.wheels is empty: run \`make peers PEER=gpu\` on a connected machine and bring that folder along" >&2
		exit 1
	fi
	python3 -m venv --without-pip payload/.venv
	# The wheels come first, then what the machine has: torch, numpy, CUDA's libraries.
	packages=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	printf '%s\n' "$PWD/payload" "$PWD" "import site; site.addsitedir('$torch')" >"$packages/bench.pth"
	python3 -m pip --quiet --disable-pip-version-check --python $python install \
		--no-index --no-deps --no-compile --ignore-requires-python bench/.wheels/*.whl
	if [ ! -e bench/.venv-trl ]; then ln -s ../payload/.venv bench/.venv-trl; fi
fi
if [ -z "$rehearse" ] && ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
	echo "bench/gpu.sh: $($python -c 'import torch; print("torch", torch.__version__, "of", torch.__file__)') sees no GPU, though nvidia-smi" \
		"does: move payload/.venv away, and bench/gpu.sh makes one of the machine's python3" >&2
	exit 1
fi
exec $python bench/gpu.py "$@"
