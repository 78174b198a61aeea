"""NVIDIA's drivers in a bundle: the packages of a profile's driver sets, and whether its wheels fit them.

Role gpu defines the sets and their versions (roles/gpu/defaults/main.yml); a profile names them under `driver_sets`.
Contradictions are refused when the profile is locked and again when a bundle of it is built.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from llmkeep import source_tree
from llmkeep.errors import LlmkeepError

# Sources of artifacts.yml that have the packages of a set, by the set's own `source`. Any other is the source of that name.
SOURCES = {"trixie": {"debian-non-free"}, "trixie-backports": {"debian-backports", "debian-backports-nvidia"}}
MOST_NAMED = 5


def chosen(profiles: Mapping[str, Any], profile: str) -> list[dict[str, Any]]:
    """The driver sets of a profile, as role gpu defines them."""
    names = profiles[profile].get("driver_sets", [])
    if not names:
        return []
    text = (source_tree.TREE / "roles/gpu/defaults/main.yml").read_text()
    sets: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in yaml.safe_load(text)["gpu_sets"]}
    if unknown := sorted(set(names) - set(sets)):
        raise LlmkeepError(
            f"the profile {profile} names the driver sets {', '.join(unknown)}, but roles/gpu has only {', '.join(sets)}: "
            "name one of these; packages of your own set go into apt.roles"
        )
    return [sets[name] for name in names]


def packages(driver_set: Mapping[str, Any]) -> list[str]:
    """All packages of a set that role gpu installs."""
    names = [driver_set["dkms"]["package"], *driver_set["packages"], driver_set["fabric_manager"]]
    return [name for name in [*names, driver_set["dcgm"], driver_set["container_toolkit"]] if name]


def available(driver_set: Mapping[str, Any], sources: list[str]) -> bool:
    """Whether one of these sources has the set."""
    return bool(SOURCES.get(driver_set["source"], {driver_set["source"]}) & set(sources))


def absent(profiles: Mapping[str, Any], profile: str) -> Iterator[str]:
    """One sentence per driver set whose packages are missing from a bundle of this profile."""
    for entry in chosen(profiles, profile):
        if not available(entry, profiles[profile]["sources"]):
            names = sorted(SOURCES.get(entry["source"], {entry["source"]}))
            yield (
                f"WITHOUT the driver of set {entry['name']} ({', '.join(packages(entry))}): profile {profile} lacks the "
                f"source {' or '.join(names)}. Add it in artifacts.d (docs/operate/packages.md), build profile gpu-debian "
                "for Debian's "
                "own driver, or install the driver yourself and set gpu_set to provided"
            )


def faults(
    profiles: Mapping[str, Any],
    profile: str,
    environments: Mapping[str, list[str]],
    debs: list[str],
) -> Iterator[str]:
    """Reasons why driver sets, packages and wheels of a profile are incompatible.

    `environments`: those with CUDA, name to `name==version`; `debs`: `name=version` of the role of each set and what it needs.
    """
    sets = chosen(profiles, profile)
    if sets or environments:
        cuda = source_tree.plugin("filter.cuda")
        yield from _cuda_faults(cuda, profile, sets, {"environments": dict(environments)})
    versions = dict(key.split("=", 1) for key in debs)
    for entry in sets:
        equal = [name for name in packages(entry) if name not in (entry["dcgm"], entry["container_toolkit"])]
        other = [
            f"{name} {versions[name]}"
            for name in equal
            if name in versions and not re.match(rf"(\d+:)?{re.escape(entry['driver'])}-", versions[name])
        ]
        if other:
            yield (
                f"the set {entry['name']} needs driver {entry['driver']}, but its source has {', '.join(other)}: kernel "
                "module and libraries must have the same version. Qualify that version and write it as driver in gpu_sets, "
                f"or use a source with {entry['driver']}"
            )


def _cuda_faults(
    cuda: Any, profile: str, sets: list[dict[str, Any]], pinned: dict[str, Any]
) -> Iterator[str]:
    yield from filter(None, map(cuda.mixed_set_fault, sets))
    for name in pinned["environments"]:
        majors = cuda.cuda_majors(pinned, name)
        if len(majors) > 1:
            yield (
                f"the environment {name} of profile {profile} mixes wheels for CUDA {' and '.join(map(str, majors))}: "
                "choose torch and vllm for the same CUDA version under its environments"
            )
        elif version := cuda.cuda_version(pinned, name):
            for entry in sets:
                if not cuda.runs_cuda(entry, version):
                    yield (
                        f"the environment {name} of profile {profile} has CUDA {version}, but its set {entry['name']} "
                        f"supports {cuda.stated_range(entry)}: choose wheels for that CUDA version under environments, as "
                        "profile gpu-debian does, or other driver_sets"
                    )


def wheel_faults(files: list[str], interpreter: str) -> Iterator[str]:
    """A sentence if the file names of wheels are for another Python than `interpreter`, such as 3.13."""
    own = f"cp{interpreter.replace('.', '')}"
    others = [file for file in files if (tag := re.search(r"-(cp\d+)-cp\d+t?-", file)) and tag[1] != own]
    if others:
        yield (
            f"{', '.join(sorted(others)[:MOST_NAMED])} are not for Python {interpreter}, which artifacts.yml names: "
            "run `llmkeep "
            f"lock update` with python{interpreter}"
        )
