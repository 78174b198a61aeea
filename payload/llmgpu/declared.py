"""The declared settings of GPUs: what differs, whether the GPUs support it, and setting it through NVML, as root."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pynvml

from llmgpu.nvml import COMPUTE_MODES, Gpu, Nvml, message, profile, supported
from llmgpu.settings import Expect

ECC, MIG, PERSISTENCE = "ECC", "MIG", "persistence"
POWER, COMPUTE = "the power limit", "the compute mode"
WORDS = {True: "on", False: "off", None: "not supported"}


class SettingError(Exception):
    """A setting that a GPU does not accept; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting of one GPU. `pending`: it is already ordered, and takes effect with a reset of the GPU or a reboot."""

    gpu: int
    setting: str
    before: str
    after: str
    pending: bool = False


def differences(gpu: Gpu, expect: Expect) -> Iterator[Difference]:
    """The differences from the declaration, in the order in which they are set. `gpu` must answer."""
    for setting, value, target, pending in (
        (PERSISTENCE, gpu.persistence, expect.persistence, None),
        (ECC, gpu.ecc, expect.ecc, gpu.ecc_pending),
    ):
        if target is not None and value is not target:
            yield Difference(gpu.index, setting, WORDS[value], WORDS[target], pending is target)
    if expect.compute_mode and gpu.compute_mode != expect.compute_mode:
        yield Difference(gpu.index, COMPUTE, gpu.compute_mode or WORDS[None], expect.compute_mode)
    if (watts := expect.power_limit_watts) and gpu.power_limit != watts:
        before = WORDS[None] if gpu.power_limit is None else f"{gpu.power_limit:g} W"
        yield Difference(gpu.index, POWER, before, f"{watts:g} W")
    profiles = expect.layout(gpu.index)
    target = expect.mig if profiles is None else bool(profiles)
    if gpu.mig is None and not target:
        return  # a GPU that cannot be divided is one that is not
    if target is not None and (gpu.mig is not target or (profiles and profiles != gpu.mig_instances)):
        before, after = layout(gpu.mig, gpu.mig_instances), layout(target, profiles or ())
        yield Difference(gpu.index, MIG, before, after, gpu.mig is not target and gpu.mig_pending is target)


def layout(mig: bool | None, profiles: tuple[str, ...]) -> str:
    return f"on ({', '.join(profiles)})" if mig and profiles else WORDS[mig]


def refusals(nvml: Nvml, gpu: Gpu, expect: Expect) -> Iterator[str]:
    """Why a GPU cannot have the declared settings; checked before anything is set."""
    if gpu.lost:
        yield f"GPU {gpu.index} does not answer: reboot the host"
        return
    for each in differences(gpu, expect):
        if each.before == WORDS[None]:
            yield f"GPU {gpu.index} ({gpu.name}) has no setting for {each.setting}: do not declare it as {each.after}"
        elif each.setting == POWER and expect.power_limit_watts:
            handle = nvml.handles[gpu.index].handle
            limits = supported(pynvml.nvmlDeviceGetPowerManagementLimitConstraints, handle)
            if limits and not limits[0] <= 1000 * expect.power_limit_watts <= limits[1]:
                yield (
                    f"the power limit of GPU {gpu.index} ({gpu.name}) cannot be {each.after}: declare {limits[0] / 1000:g} to"
                    f" {limits[1] / 1000:g} W"
                )


def set_one(nvml: Nvml, each: Difference, expect: Expect) -> bool:
    """Set what differs; returns whether that waits for a reset of the GPU. If it raises SettingError, MIG is unchanged."""
    handle = nvml.handles[each.gpu].handle
    try:
        if each.setting == PERSISTENCE:
            pynvml.nvmlDeviceSetPersistenceMode(handle, int(bool(expect.persistence)))
        elif each.setting == ECC:
            pynvml.nvmlDeviceSetEccMode(handle, int(bool(expect.ecc)))
            return True
        elif each.setting == COMPUTE and expect.compute_mode:
            pynvml.nvmlDeviceSetComputeMode(handle, COMPUTE_MODES[expect.compute_mode])
        elif each.setting == POWER and expect.power_limit_watts:
            pynvml.nvmlDeviceSetPowerManagementLimit(handle, round(1000 * expect.power_limit_watts))
        elif each.setting == MIG:
            return set_mig(handle, bool(expect.mig or expect.layout(each.gpu)), expect.layout(each.gpu) or ())
    except pynvml.NVMLError as error:
        raise SettingError(
            f"{each.setting} of GPU {each.gpu} is still {each.before}: {reason(error)}"
        ) from error
    return False


def reason(error: pynvml.NVMLError) -> str:
    """Why NVML refused, and what to do."""
    if isinstance(error, pynvml.NVMLError_NoPermission):
        return "only root may set it"
    if isinstance(error, pynvml.NVMLError_InUse):
        return "the GPU is in use: stop the programs that use it, including DCGM and other monitors"
    return message(error)


def set_mig(handle: Any, mode: bool, profiles: tuple[str, ...]) -> bool:
    """Divide a GPU, or end its division; returns whether the mode waits for a reset. Raises NVMLError or SettingError once the
    former layout is restored.
    """
    before, instances = bool(pynvml.nvmlDeviceGetMigMode(handle)[0]), instances_of(handle)
    former = tuple(name for name, _ in instances)
    try:
        destroy(instances)
        if mode is not before and pynvml.nvmlDeviceSetMigMode(handle, int(mode)) != pynvml.NVML_SUCCESS:
            return True
        create(handle, profiles)
    except (pynvml.NVMLError, SettingError):
        if bool(pynvml.nvmlDeviceGetMigMode(handle)[0]) or before:
            destroy(instances_of(handle))
            pynvml.nvmlDeviceSetMigMode(handle, int(before))
            create(handle, former)
        raise
    return False


def known_profiles(handle: Any) -> dict[str, Any]:
    """The profiles into which a GPU in MIG mode can be divided, by name."""
    profiles = {}
    for number in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        if (info := supported(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, number)) is not None:
            profiles[profile(info.name)] = info
    return profiles


def instances_of(handle: Any) -> list[tuple[str, Any]]:
    """A GPU's instances, each with the name of its profile; only root may list them."""
    instances = []
    for name, info in known_profiles(handle).items():
        array, count = (pynvml.c_nvmlGpuInstance_t * info.instanceCount)(), ctypes.c_uint(info.instanceCount)
        pynvml.nvmlDeviceGetGpuInstances(handle, info.id, array, ctypes.byref(count))
        instances += [(name, array[number]) for number in range(count.value)]
    return instances


def compute_profiles(instance: Any) -> Iterator[Any]:
    """The profiles into which a GPU instance can be divided."""
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        shared = pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
        info = supported(pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo, instance, number, shared)
        if info is not None:
            yield info


def destroy(instances: list[tuple[str, Any]]) -> None:
    """Remove GPU instances with their compute instances."""
    for _, instance in instances:
        for info in compute_profiles(instance):
            array = (pynvml.c_nvmlComputeInstance_t * info.instanceCount)()
            count = ctypes.c_uint(info.instanceCount)
            pynvml.nvmlGpuInstanceGetComputeInstances(instance, info.id, array, ctypes.byref(count))
            for number in range(count.value):
                pynvml.nvmlComputeInstanceDestroy(array[number])
        pynvml.nvmlGpuInstanceDestroy(instance)


def create(handle: Any, profiles: tuple[str, ...]) -> None:
    """Make GPU instances, the largest first, each with one compute instance that has all of it."""
    available = known_profiles(handle) if profiles else {}
    if unknown := sorted(set(profiles) - set(available)):
        raise SettingError(
            f"the GPU has no MIG profile {unknown[0]}: declare those of {', '.join(sorted(available))}"
        )
    for name in sorted(profiles, key=lambda each: -available[each].sliceCount):
        instance = pynvml.nvmlDeviceCreateGpuInstance(handle, available[name].id)
        whole = max(compute_profiles(instance), key=lambda info: info.sliceCount)
        pynvml.nvmlGpuInstanceCreateComputeInstance(instance, whole.id)
