"""A software bill of materials (CycloneDX 1.6) of an image: what is installed, as the bundle's signed manifest describes it.

Third-party scripts of the pages, which our own wheel carries, are components, too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmkeep.bundle import bill
from llmkeep.bundle.manifest import Entry
from llmkeep.bundle.wheels import canonical
from llmkeep.errors import LlmkeepError
from llmkeep.image import contents
from llmkeep.image.contents import Source

STATUS = "var/lib/dpkg/status"


def document(source: Source, trees: list[Path], digest: str, created: str) -> dict[str, Any]:
    """The bill of the image with this digest and these layers.

    Raises LlmkeepError for installed content that is not signed.
    """
    programs = [entry for entry in source.manifest.files if entry.path == contents.OPA]
    scripts = [
        entry
        for entry in source.manifest.files
        if entry.purl.startswith("pkg:npm/") and entry.path.endswith(".js")
    ]
    entries = [*_packages(source, trees[0]), *_wheels(source, trees), *programs, *scripts]
    image = bill.Component("llmkeep", digest, sha256=digest.removeprefix("sha256:"), kind=bill.CONTAINER)
    # Environments share distributions, and the bill has each once.
    return bill.document(image, map(bill.of_entry, entries), created)


def _packages(source: Source, debian: Path) -> list[Entry]:
    """The manifest's entries of all packages that dpkg has on record."""
    known = {
        _tail(entry.purl): entry for entry in source.manifest.files if entry.path.startswith("apt/pool/")
    }
    entries = []
    for stanza in (debian / STATUS).read_text().strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        version = quote(fields["Version"], safe="")
        package = f"{fields['Package']}@{version}?arch={fields['Architecture']}"
        if package not in known:
            raise LlmkeepError(
                f"the image has {package}, which is not a package of {source.bundle}: report this"
            )
        entries.append(known[package])
    return entries


def _wheels(source: Source, trees: list[Path]) -> Iterator[Entry]:
    """The manifest's entries of all distributions in the environments. Those that Debian brings are not installed again."""
    for environment in source.environments:
        wheels = [*source.wheels(environment, ours=False), *source.wheels(environment, ours=True)]
        signed = {_release(Path(entry.path).name): entry for entry in wheels}
        folders = [tree / contents.VENVS[environment] for tree in trees]
        records = [path for folder in folders for path in folder.glob("lib/*/site-packages/*.dist-info")]
        if unknown := sorted(path.name for path in records if _release(path.stem) not in signed):
            raise LlmkeepError(
                f"the image has {', '.join(unknown)}, which is not a wheel of {source.bundle}: report this"
            )
        yield from (signed[_release(path.stem)] for path in records)


def _release(name: str) -> tuple[str, str]:
    """Distribution and version of a wheel, or of its record."""
    distribution, version = name.split("-")[:2]
    return canonical(distribution), version


def _tail(purl: str) -> str:
    """Name, version and qualifiers."""
    return purl.rsplit("/", 1)[-1]
