"""Data types of this package: components of hosts, and findings on them."""

from dataclasses import dataclass, field

DEBIAN, PYPI, NPM = ECOSYSTEMS = ("debian", "pypi", "npm")
# From the worst to the mildest. Debian never says critical; `unassigned`: the database states none.
CRITICAL, HIGH, MEDIUM, LOW, UNASSIGNED = SEVERITIES = ("critical", "high", "medium", "low", "unassigned")
# States of a finding. `undetermined`: the database does not know yet; `unknown`: it could not be compared; `unimportant`: Debian
# judges that it has no security impact. A waiver covers the first two.
OPEN, UNDETERMINED, UNKNOWN, UNIMPORTANT = "open", "undetermined", "unknown", "unimportant"


@dataclass(frozen=True)
class Component:
    """Something installed on a host. `name`: a binary package, a distribution, or a package of npm.

    `place`: an environment's folder. `units`: units whose processes map one of its files; None if that cannot be seen.
    """

    ecosystem: str
    name: str
    version: str
    source: str = ""
    source_version: str = ""
    place: str = ""
    units: tuple[str, ...] | None = ()


@dataclass(frozen=True)
class Finding:
    """A vulnerability of a component in a database. `package`: the source package, or the distribution.

    `packages`: the binary packages. `fixed`: the first version without it, empty if there is none.
    """

    id: str
    ecosystem: str
    package: str
    version: str
    severity: str
    state: str
    fixed: str = ""
    note: str = ""
    packages: tuple[str, ...] = ()
    place: str = ""
    units: tuple[str, ...] | None = ()
    aliases: tuple[str, ...] = ()


@dataclass
class Host:
    """A host's scan.

    `unknown`: sentences on components that were not compared; `uncovered`: components that no database covers.
    """

    findings: list[Finding] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)
