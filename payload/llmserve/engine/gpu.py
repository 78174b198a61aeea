"""Utilization of the GPUs, from NVIDIA's library libnvidia-ml, which comes with the driver."""

import logging
from typing import Any

import pynvml

log = logging.getLogger("llmserve.gpu")


class Gpus:
    """All GPUs visible to this process; none without a driver."""

    def __init__(self) -> None:
        """Load the library and find the GPUs; if that fails, there are none."""
        self.handles: list[Any] = []
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError_LibraryNotFound:
            return
        except pynvml.NVMLError as error:
            fields = {"nvml.error": str(error)}
            log.warning("libnvidia-ml failed: GPU utilization is not reported", extra={"fields": fields})
            return
        for index in range(count):
            try:
                self.handles.append(pynvml.nvmlDeviceGetHandleByIndex(index))
            except pynvml.NVMLError:
                continue  # lost

    def used(self) -> list[float]:
        """Share of time that each GPU was busy, 0 to 1; GPUs that fail to report are left out."""
        shares = []
        for handle in self.handles:
            try:
                shares.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            except pynvml.NVMLError:
                continue
        return shares
