"""Checks that CUDA works on each GPU: a context, and memory that retains data. `python -m llmgpu.cuda` prints the result.

Through the driver's library (libcuda.so.1), which needs no CUDA toolkit. A process of its own runs it, since a sick
GPU makes these calls hang or end the process.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable

SECONDS = 120.0  # the first context of a GPU without persistence takes seconds
WORDS = 1 << 18  # of 4 bytes each, written and read back
PATTERN = 0x5A17C0DE


class CudaError(Exception):
    """CUDA cannot be used at all; the message says why."""


def check(seconds: float = SECONDS) -> list[str]:
    """For each GPU that CUDA finds, in PCI order, the fault, or ""; raises CudaError."""
    environment = {name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "llmgpu.cuda"],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            env={**environment, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        )
    except subprocess.TimeoutExpired:
        raise CudaError(f"CUDA does not answer within {seconds:g} s: see `journalctl -k` for Xids") from None
    if result.returncode != 0:
        raise CudaError(result.stderr.strip()[-300:] or f"CUDA ended the process ({result.returncode})")
    answered: list[str] = json.loads(result.stdout)
    return answered


def try_all() -> list[str]:
    """As `check`, in this process."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise CudaError("libcuda.so.1 was not found: install NVIDIA's driver (Debian: libcuda1)") from None

    def call(name: str, *arguments: object) -> None:
        function: Callable[..., int] = getattr(cuda, name)
        if code := function(*arguments):
            error_name = ctypes.c_char_p()
            cuda.cuGetErrorName(code, ctypes.byref(error_name))
            raise CudaError(f"{name} failed with {(error_name.value or b'').decode() or code}")

    call("cuInit", ctypes.c_uint(0))
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    answers = []
    for index in range(count.value):
        try:
            try_one(call, index)
            answers.append("")
        except CudaError as error:
            answers.append(str(error))
    return answers


def try_one(call: Callable[..., None], index: int) -> None:
    """Write a pattern into the memory of one GPU and read it back; raises CudaError."""
    device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        call("cuCtxSetCurrent", context)
        call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(4 * WORDS))
        call("cuMemsetD32_v2", memory, ctypes.c_uint(PATTERN), ctypes.c_size_t(WORDS))
        words = (ctypes.c_uint32 * WORDS)()
        call("cuMemcpyDtoH_v2", words, memory, ctypes.c_size_t(4 * WORDS))
        call("cuMemFree_v2", memory)
    finally:
        call("cuDevicePrimaryCtxRelease_v2", device)
    if wrong := sum(word != PATTERN for word in words):
        raise CudaError(f"its memory changed {wrong} of {WORDS} words")


if __name__ == "__main__":
    try:
        print(json.dumps(try_all()))
    except CudaError as trouble:
        sys.exit(str(trouble))
