#!/usr/bin/python3
"""slurm-gpus: the number of GPUs that NVML finds and that answer; 0 without NVML."""

import ctypes
import sys


def answering() -> int:
    """Number of GPUs whose UUID NVML reads, by its documented functions; 0 if the library is missing or does not start."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2():
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return 0
    number = 0
    for index in range(count.value):
        device, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        number += not (
            nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
            or nvml.nvmlDeviceGetUUID(device, uuid, len(uuid))
        )
    return number


if __name__ == "__main__":
    sys.stdout.write(f"{answering()}\n")
