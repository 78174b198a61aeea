"""Readings of all GPUs of this host, from NVIDIA's library libnvidia-ml, which comes with the driver (nvidia-ml-py)."""

import ctypes
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pynvml

LINKS = 18  # NVLinks of one GPU, at most
XID_EVENTS = 8  # nvmlEventTypeXidCriticalError
COMPUTE_MODES = {
    "default": pynvml.NVML_COMPUTEMODE_DEFAULT,
    "exclusive_process": pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS,
    "prohibited": pynvml.NVML_COMPUTEMODE_PROHIBITED,
}
MODE_NAMES = {number: name for name, number in COMPUTE_MODES.items()}
# What makes a GPU slower than asked for: bits of nvmlDeviceGetCurrentClocksThrottleReasons.
SLOWDOWN = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class NvmlError(Exception):
    """The library is absent, the driver is not loaded, or a call failed; the message says which."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU at one moment. None: this GPU does not report the value. Counters are those since the driver was loaded."""

    index: int
    uuid: str = ""  # empty if it was lost before its first reading
    name: str = ""
    lost: bool = False
    memory_total: int = 0  # bytes
    memory_used: int = 0  # bytes
    utilization: float | None = None  # 0 to 1
    temperature: int | None = None  # °C
    slowdown_temperature: int | None = None  # °C
    power: float | None = None  # W
    power_limit: float | None = None  # W
    throttled: int = 0  # bits of SLOWDOWN, and others
    persistence: bool | None = None
    ecc: bool | None = None
    ecc_pending: bool | None = None  # what it will be after a reset of the GPU or a reboot
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    remapped: int | None = None  # rows
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    retirement_pending: bool | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    nvlinks: int = 0
    nvlinks_down: tuple[int, ...] = ()
    mig: bool | None = None
    mig_pending: bool | None = None  # as of ECC
    mig_instances: tuple[str, ...] = ()  # profiles, such as 3g.40gb, sorted
    compute_mode: str | None = None  # one of COMPUTE_MODES


@dataclass(frozen=True, slots=True)
class Reading:
    """All GPUs that the driver counts, at time.monotonic() `at`."""

    at: float
    driver: str
    gpus: tuple[Gpu, ...]

    @property
    def present(self) -> int:
        """Number of GPUs that answer."""
        return sum(not gpu.lost for gpu in self.gpus)


@dataclass(slots=True)
class Handle:
    """A GPU that has answered: its constant properties."""

    handle: Any
    uuid: str
    name: str
    links: int


@dataclass(slots=True)
class Nvml:
    """The library, opened. For one thread at a time; a call into a hanging driver does not return."""

    handles: dict[int, Handle] = field(default_factory=dict)  # by index
    events: Any = None
    driver: str = ""

    def open(self) -> None:
        """Load the library and find the GPUs; raises NvmlError."""
        try:
            pynvml.nvmlInit()
            self.driver = pynvml.nvmlSystemGetDriverVersion()
            self.events = pynvml.nvmlEventSetCreate()
            for index in range(pynvml.nvmlDeviceGetCount()):
                self.find(index)
        except pynvml.NVMLError as error:
            raise NvmlError(message(error)) from error

    def find(self, index: int) -> None:
        """Take up a GPU and its events, unless it is lost."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
            links = 0
            while links < LINKS and supported(pynvml.nvmlDeviceGetNvLinkState, handle, links) is not None:
                links += 1
            supported(pynvml.nvmlDeviceRegisterEvents, handle, XID_EVENTS, self.events)
        except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_NoPermission):
            return
        self.handles[index] = Handle(handle, uuid, name, links)

    def close(self) -> None:
        """Close the library; when it is opened again, it finds what has changed."""
        self.handles.clear()
        try:
            if self.events is not None:
                pynvml.nvmlEventSetFree(self.events)
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            pass  # it was never opened, or the driver is gone
        self.events = None

    def read(self) -> Reading:
        """One reading of all GPUs; raises NvmlError."""
        try:
            count = pynvml.nvmlDeviceGetCount()
            gpus = tuple(self.gpu(index) for index in range(count))
        except pynvml.NVMLError as error:
            raise NvmlError(message(error)) from error
        return Reading(time.monotonic(), self.driver, gpus)

    def gpu(self, index: int) -> Gpu:
        """One GPU's reading; `lost` if it no longer answers."""
        entry = self.handles.get(index)
        if entry is None:
            return Gpu(index, lost=True)
        try:
            return read_gpu(index, entry)
        except pynvml.NVMLError_GpuIsLost:
            return Gpu(index, entry.uuid, entry.name, lost=True)

    def wait(self, seconds: float) -> Counter[tuple[str, int]]:
        """Wait for Xid events, for at most `seconds` each; returns their number by UUID ("" if unknown) and code.

        Returns once nothing more waits, so that a storm ends up as one number. Raises NvmlError.
        """
        counts: Counter[tuple[str, int]] = Counter()
        end = time.monotonic() + seconds
        uuids = {address(entry.handle): entry.uuid for entry in self.handles.values()}
        while (remaining := end - time.monotonic()) > 0 or counts:
            patience = 0 if counts else max(1, round(1000 * remaining))
            try:
                event = pynvml.nvmlEventSetWait_v2(self.events, patience)
            except pynvml.NVMLError_Timeout:
                if counts:
                    break
                continue
            except (
                pynvml.NVMLError_GpuIsLost
            ):  # the next reading shows which; told again at each call until then
                time.sleep(max(0.0, min(end - time.monotonic(), 1.0)))
                break
            except pynvml.NVMLError as error:
                raise NvmlError(message(error)) from error
            if event.eventType == XID_EVENTS:
                counts[uuids.get(address(event.device), ""), int(event.eventData)] += 1
            if time.monotonic() > end:
                break  # a storm must not keep the next reading away
        return counts


def read_gpu(index: int, entry: Handle) -> Gpu:
    """All values of one GPU; raises NVMLError_GpuIsLost."""
    handle = entry.handle
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    used = supported(pynvml.nvmlDeviceGetUtilizationRates, handle)
    ecc = supported(pynvml.nvmlDeviceGetEccMode, handle)
    remapped = supported(pynvml.nvmlDeviceGetRemappedRows, handle)
    mig = supported(pynvml.nvmlDeviceGetMigMode, handle)
    power = supported(pynvml.nvmlDeviceGetPowerUsage, handle)
    limit = supported(pynvml.nvmlDeviceGetPowerManagementLimit, handle)
    compute_mode = supported(pynvml.nvmlDeviceGetComputeMode, handle)
    corrected, uncorrected = (
        supported(pynvml.nvmlDeviceGetTotalEccErrors, handle, kind, pynvml.NVML_VOLATILE_ECC)
        for kind in (pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)
    )
    down = (
        link for link in range(entry.links) if not supported(pynvml.nvmlDeviceGetNvLinkState, handle, link)
    )
    return Gpu(
        index,
        entry.uuid,
        entry.name,
        memory_total=memory.total,
        memory_used=memory.used,
        utilization=None if used is None else used.gpu / 100,
        temperature=supported(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        slowdown_temperature=supported(
            pynvml.nvmlDeviceGetTemperatureThreshold, handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        ),
        power=None if power is None else power / 1000,
        power_limit=None if limit is None else limit / 1000,
        throttled=supported(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0,
        persistence=flag(supported(pynvml.nvmlDeviceGetPersistenceMode, handle)),
        ecc=None if ecc is None else flag(ecc[0]),
        ecc_pending=None if ecc is None else flag(ecc[1]),
        ecc_corrected=corrected,
        ecc_uncorrected=uncorrected,
        remapped=None if remapped is None else remapped[0] + remapped[1],
        remap_pending=None if remapped is None else flag(remapped[2]),
        remap_failed=None if remapped is None else flag(remapped[3]),
        retirement_pending=flag(supported(pynvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)),
        pcie_width=supported(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        pcie_width_max=supported(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        pcie_generation=supported(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        pcie_generation_max=supported(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        nvlinks=entry.links,
        nvlinks_down=tuple(down),
        mig=None if mig is None else flag(mig[0]),
        mig_pending=None if mig is None else flag(mig[1]),
        mig_instances=mig_instances(handle) if mig is not None and mig[0] else (),
        compute_mode=None if compute_mode is None else MODE_NAMES.get(compute_mode, str(compute_mode)),
    )


def mig_instances(handle: Any) -> tuple[str, ...]:
    """Profiles of a GPU's MIG devices, sorted. Taken from the device names, which every user may read; only root may list the
    instances."""
    profiles = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            device = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            profiles.append(profile(pynvml.nvmlDeviceGetName(device)))
        except (pynvml.NVMLError_NotFound, pynvml.NVMLError_NoPermission):
            continue  # no device there, or one that this user may not see
    return tuple(sorted(profiles))


def profile(name: str) -> str:
    """The profile at the end of a name, such as that of "NVIDIA A100-SXM4-80GB MIG 3g.40gb"."""
    return name.rpartition("MIG ")[2].strip()


def supported[**P, T](function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T | None:
    """What `function` returns; None where this GPU or driver does not have it."""
    try:
        return function(*arguments, **options)
    except (
        pynvml.NVMLError_NotSupported,
        pynvml.NVMLError_FunctionNotFound,
        pynvml.NVMLError_InvalidArgument,
    ):
        return None


def flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def address(handle: Any) -> int:
    """A handle's value: events name GPUs by it."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def message(error: pynvml.NVMLError) -> str:
    """What to do about an error of the library."""
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return "libnvidia-ml.so.1 was not found: install NVIDIA's driver"
    if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
        return "NVIDIA's driver is not loaded: `modprobe nvidia`, and see `journalctl -k`"
    return f"NVML failed: {error}"
