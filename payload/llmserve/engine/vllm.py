"""Runs vLLM in the engine's place, as in pods: `llm-serve engine` verifies the weights and is replaced by it.

On hosts systemd starts vLLM; role vllm verifies the weights and sets the same options and environment.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from llmcore.config import ConfigError
from llmserve.settings import VllmModel

# Run by a process of its own: what CUDA opens in it is not vLLM's.
COUNT = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    sys.exit(f"no driver is in this container ({error})")
if code := cuda.cuInit(0):
    sys.exit(f"cuInit failed with {code}")
count = ctypes.c_int()
cuda.cuDeviceGetCount(ctypes.byref(count))
print(count.value)
"""
COUNT_SECONDS = 120  # the driver sets up each GPU, where nothing else holds them open
# It loads from here alone, tells nothing, and its processes find each other on loopback.
ENVIRONMENT = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "DO_NOT_TRACK": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
CACHES = {"HOME": "", "TRITON_CACHE_DIR": "triton", "VLLM_CACHE_ROOT": "vllm", "XDG_CACHE_HOME": ""}
OTHERS = 0o007  # the socket is its user's and its group's, which the gateway is in


def gpus() -> int:
    """GPUs that CUDA has in this container; ConfigError if there is none."""
    try:
        process = subprocess.run(
            [sys.executable, "-c", COUNT], capture_output=True, text=True, check=False, timeout=COUNT_SECONDS
        )
        reason = process.stderr.strip().rpartition("\n")[2] if process.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"CUDA did not start within {COUNT_SECONDS} s"
    if not reason and (count := int(process.stdout)):
        return count
    raise ConfigError(
        f"no GPU: {reason or 'CUDA starts and finds none'}. vLLM needs one: ask for nvidia.com/gpu and the runtime class of "
        "NVIDIA's container toolkit (deploy/kubernetes/components/gpu), on a node whose driver runs this image's CUDA"
    )


def require_gpus(model: VllmModel) -> None:
    """Raise ConfigError unless there are as many GPUs as the model is divided over."""
    demand, count = model.tensor_parallel * model.pipeline_parallel, gpus()
    if count < demand:
        raise ConfigError(
            f"tensor_parallel {model.tensor_parallel} times pipeline_parallel {model.pipeline_parallel} takes {demand} GPUs, and "
            f"this container has {count}: ask for {demand} nvidia.com/gpu, or divide the model over fewer"
        )


def require_program(model: VllmModel) -> None:
    """Raise ConfigError if vLLM is not installed."""
    if not os.access(model.program, os.X_OK):
        raise ConfigError(
            f"there is no vLLM at {model.program}: deploy the image of variant cuda, or set another driver"
        )


def arguments(name: str, socket: Path, drain_seconds: float, model: VllmModel) -> list[str]:
    """vLLM's command line for a model. It has no API key: the folder's permissions protect the socket."""
    settings = {
        "served-model-name": name,
        "uds": socket,
        "load-format": "safetensors",
        "tensor-parallel-size": model.tensor_parallel,
        "pipeline-parallel-size": model.pipeline_parallel,
        "max-model-len": model.context,
        "dtype": model.dtype,
        "gpu-memory-utilization": model.gpu_memory_utilization,
        "shutdown-timeout": round(drain_seconds),
        "quantization": model.quantization,
        "max-num-seqs": model.slots,
        "max-num-batched-tokens": model.batch_tokens,
    }
    options = [f"--{key}={value}" for key, value in settings.items() if value is not None]
    return [str(model.program), "serve", str(model.path), *options, "--disable-uvicorn-access-log"]


def become(name: str, socket: Path, drain_seconds: float, model: VllmModel) -> NoReturn:
    """Replace this process with vLLM; the weights have been verified."""
    socket.unlink(missing_ok=True)  # a killed one's, whose place vLLM does not take
    os.umask(OTHERS)
    scratch = Path(tempfile.gettempdir())
    caches = {variable: str(scratch / folder) for variable, folder in CACHES.items()}
    command = arguments(name, socket, drain_seconds, model)
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, **ENVIRONMENT, **caches})  # noqa: S606 -- no shell is wanted
