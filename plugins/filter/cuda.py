"""Filters of the roles that install CUDA: which driver a Python environment needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

# The oldest branch of NVIDIA's driver that runs any toolkit of a CUDA major version, by minor version compatibility: table 1 of
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {12: 525, 13: 580}


def cuda_version(lock: dict[str, Any], environment: str) -> str:
    """The CUDA runtime that an environment's torch brings, such as 13.0; empty if the lock does not say it."""
    for key in lock["environments"].get(environment, []):
        if match := re.match(r"nvidia-cuda-runtime(?:-cu\d+)?==(\d+\.\d+)", key):
            return match.group(1)
    return ""


def cuda_majors(lock: dict[str, Any], environment: str) -> list[int]:
    """Major versions of CUDA of the libraries that an environment's torch loads; more than one do not work together."""
    library = re.compile(r"nvidia-(?:cublas|cuda-runtime|cudnn|nccl)(?:-cu(\d+))?==(\d+)")
    matches = map(library.match, lock["environments"][environment])
    return sorted({int(match[1] or match[2]) for match in matches if match})


def numbers(version: str) -> tuple[int, ...]:
    """(12, 4) of 12.4."""
    return tuple(map(int, version.split(".")))


def runs_cuda(driver_set: Mapping[str, Any], version: str) -> bool:
    """Whether the CUDA range that a set names has this version."""
    limits = driver_set["cuda"]
    return numbers(limits["from"]) <= numbers(version) < numbers(limits["below"])


def stated_range(driver_set: Mapping[str, Any]) -> str:
    """The driver and the CUDA range of a set."""
    limits = driver_set["cuda"]
    return f"driver {driver_set['driver']}, CUDA from {limits['from']} and below {limits['below']}"


def mixed_set_fault(driver_set: Mapping[str, Any]) -> str:
    """Why the CUDA range that a set names is not its driver's; empty if it is."""
    branch = int((re.match(r"\d+", driver_set["driver"]) or "0")[0])
    for major, oldest in OLDEST_DRIVER.items():
        if branch < oldest and runs_cuda(driver_set, f"{major}.0"):
            return (
                f"the set {driver_set['name']} ({stated_range(driver_set)}) is mixed: CUDA {major} needs driver {oldest} or"
                f" later. Set its cuda below {major}.0, or use driver {oldest}"
            )
    return ""


def cuda_environments(groups: Iterable[str], variables: Mapping[str, Any]) -> list[str]:
    """Environments with CUDA that a host installs, by its groups and its variables."""

    mine = set(groups)

    def chosen(group: set[str], variable: str, value: object) -> bool:
        return bool(group & mine) and variable in variables and variables[variable] == value

    installed = {
        "serving-cuda": chosen({"serve", "engines"}, "llm_serving_accelerator", "cuda"),
        "training-cuda": chosen({"train"}, "llm_training_gpus", True),
        "vllm": "vllm" in mine,
    }
    return [name for name, used in installed.items() if used]


def needed_driver(lock: dict[str, Any], environment: str) -> tuple[int, str]:
    """The oldest branch of NVIDIA's driver that runs an environment, and the reason; 0 and the way out if it is not known."""
    cuda = cuda_version(lock, environment)
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0])) if cuda else None
    if oldest is None:
        built = f"CUDA {cuda}" if cuda else "no CUDA"
        return 0, (
            f"artifacts.lock.d/gpu.yml has {built} for {environment}, but the driver it needs is unknown: use a bundle of "
            "profile gpu or gpu-debian, or add the version to plugins/filter/cuda.py"
        )
    return oldest, f"{environment} has CUDA {cuda}, which needs NVIDIA's driver {oldest} or later"


def cuda_driver_fault(lock: dict[str, Any], environment: str, stated: str) -> str:
    """Why a host cannot run an environment with CUDA, as a sentence without its full stop; empty if it can.

    `stated` is the content of /proc/driver/nvidia/version, empty where there is none.
    """
    oldest, needs = needed_driver(lock, environment)
    if not oldest:
        return needs
    match = re.search(r"Kernel Module(?: for \S+)?\s+((\d+)\.[\d.]+)", stated)
    if not match:
        present = repr(stated.strip()[:80]) if stated.strip() else "no /proc/driver/nvidia/version"
        return f"{needs}; the host has {present}: install the driver for its GPUs and its kernel"
    if int(match.group(2)) < oldest:
        return f"{needs}; the host has {match.group(1)}: install a newer driver"
    return ""


def cuda_set_fault(
    lock: dict[str, Any], environment: str, name: str, driver_sets: Iterable[Mapping[str, Any]]
) -> str:
    """Why the driver set of that name cannot run an environment with CUDA; empty if it can, is mixed, or does not exist.

    `driver_sets` are the host's gpu_sets.
    """
    oldest, needs = needed_driver(lock, environment)
    if not oldest:
        return needs
    sets = {entry["name"]: entry for entry in driver_sets}
    if name not in sets or mixed_set_fault(sets[name]):
        return ""
    version = cuda_version(lock, environment)
    fitting = [key for key, entry in sets.items() if runs_cuda(entry, version) and not mixed_set_fault(entry)]
    if name in fitting:
        return ""
    observed = f"gpu_set is {name} ({stated_range(sets[name])})"
    way_out = f"take {' or '.join(fitting)}, or " if fitting else ""
    if version.split(".")[0] != "12" and runs_cuda(sets[name], "12.0"):
        way_out += "build a bundle of profile gpu-debian, whose wheels are for CUDA 12, or "
    return f"{observed}, but the bundle's {needs}: {way_out}install such a driver yourself and set gpu_set to provided"


def cuda_purls(text: str, groups: dict[str, list[str]], hostvars: Mapping[str, Any]) -> list[str]:
    """Package URLs of the wheels that a bundle must carry for the hosts of an inventory that compute on GPUs, sorted.

    `text` is the content of artifacts.lock.d/gpu.yml, parsed only where there are such hosts; `groups` and
    `hostvars` are Ansible's.
    """
    names = {
        name
        for host in groups["all"]
        for name in cuda_environments(hostvars[host]["group_names"], hostvars[host])
    }
    if not names:
        return []
    lock = yaml.safe_load(text)
    keys = {key for name in names for key in lock["environments"][name]}
    return sorted(lock["wheels"][key]["purl"] for key in keys)


def driver_purls(
    groups: Mapping[str, list[str]], hostvars: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """Package URLs of the driver packages that a bundle must carry for the hosts in [gpu], sorted.

    `defaults` are the role gpu's; hosts whose driver came another way need none.
    """
    purls: set[str] = set()
    for host in groups.get("gpu", []):
        mine = {
            **defaults,
            **{key: hostvars[host][key] for key in ("gpu_set", "gpu_sets") if key in hostvars[host]},
        }
        for entry in mine["gpu_sets"]:
            if entry["name"] == mine["gpu_set"]:
                names = [
                    entry["dkms"]["package"],
                    *entry["packages"],
                    entry["dcgm"],
                    entry["container_toolkit"],
                ]
                origin = "debian" if entry["source"].startswith("trixie") else entry["source"]
                purls.update(f"pkg:deb/{origin}/{name}@{entry['driver']}" for name in names if name)
    return sorted(purls)


def by_cuda(expect: Mapping[str, Any]) -> bool:
    """Whether acceptance can use each GPU through CUDA, by gpu_health_expect.

    CUDA shows a process one MIG instance, and no other GPU beside it. A compute mode may leave a GPU to its engine alone.
    """
    return not (
        expect.get("mig") or expect.get("mig_layout") or expect.get("compute_mode") not in (None, "default")
    )


class FilterModule:
    """What Ansible asks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "by_cuda": by_cuda,
            "cuda_driver_fault": cuda_driver_fault,
            "cuda_purls": cuda_purls,
            "driver_purls": driver_purls,
        }
