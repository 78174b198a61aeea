#!/bin/sh
# host.sh RELEASE real|stand-in: what the lab's bundle has not (wheels of vLLM) and no lab host has (a GPU, its driver and nvidia-smi).
set -eu
mkdir -p "$1/bin" /var/lib/stand-in
if [ "$2" = real ]; then
  # vLLM's CPU build, read-only, with the Python that it was installed by; one core, and little room for its cache.
  cat > "$1/bin/python" << 'END'
#!/bin/sh
export VLLM_TARGET_DEVICE=cpu PYTHONHOME=/run/lab/stick LD_LIBRARY_PATH=/run/lab/stick/lib OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
exec /run/lab/stick/bin/python "$@"
END
  program=vllm.entrypoints.cli.main
else
  # The payload's release has the YAML that vLLM's has; the role installs it.
  cat > "$1/bin/python" << 'END'
#!/bin/sh
export PYTHONPATH=/usr/local/lib/vllm
exec /opt/llmkeep/releases/*/bin/python "$@"
END
  program=vllm
fi
printf '#!/bin/sh\nexec "%s/bin/python" -m %s "$@"\n' "$1" "$program" > "$1/bin/vllm"
chmod 755 "$1/bin/python" "$1/bin/vllm"
# The role takes a release with a record for whole.
echo '{"id": "of the scenario", "bundle_serial": 0, "wheels": {}}' > "$1/release.json"
echo 'NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build' > /var/lib/stand-in/driver
printf '#!/bin/sh\ncat /var/lib/stand-in/mebibytes\n' > /usr/local/bin/nvidia-smi
echo 24564 > /var/lib/stand-in/mebibytes
chmod 755 /usr/local/bin/nvidia-smi
