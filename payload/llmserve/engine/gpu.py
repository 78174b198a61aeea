"""Utilization of the GPUs, from NVIDIA's library libnvidia-ml, which comes with the driver."""

import ctypes
import logging

log = logging.getLogger("llmserve.gpu")
SUCCESS = 0


class Utilization(ctypes.Structure):
    """`nvmlUtilization_t`: percent of the last sample period."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Gpus:
    """All GPUs visible to this process; none without a driver."""

    def __init__(self) -> None:
        """Load the library and find the GPUs; if that fails, there are none."""
        self.handles: list[ctypes.c_void_p] = []
        try:
            self.library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        count = ctypes.c_uint()
        failed = self.library.nvmlInit_v2() or self.library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        if failed != SUCCESS:
            log.warning(
                "libnvidia-ml failed: GPU utilization is not reported",
                extra={"fields": {"nvml.error": failed}},
            )
            return
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if self.library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == SUCCESS:
                self.handles.append(handle)

    def used(self) -> list[float]:
        """Share of time that each GPU was busy, 0 to 1; GPUs that fail to report are left out."""
        shares = []
        for handle in self.handles:
            sample = Utilization()
            if self.library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(sample)) == SUCCESS:
                shares.append(sample.gpu / 100)
        return shares
