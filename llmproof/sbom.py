"""A signed archive of the software installed on hosts: SUMMARY, and a CycloneDX document for each host that answered.

A component's property ORIGIN says where it came from. Components of UNKNOWN origin belong to no bundle or release of
the estate.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from llmproof import archive
from llmproof.archive import ArchiveRefused
from llmproof.heads import Head, Verifier

PURPOSE = "sbom"
SUMMARY = "sbom.json"
ORIGIN, UNKNOWN, PLACE = "llmkeep:origin", "unknown", "llmkeep:place"
FORMAT = 1


@dataclass(frozen=True)
class Sbom:
    """Verified software of hosts. `documents`: CycloneDX, by host; `files`: as they were signed."""

    summary: dict[str, Any]
    documents: dict[str, dict[str, Any]]
    files: dict[str, bytes]

    @property
    def complete(self) -> bool:
        """Whether each host of the inventory answered."""
        hosts = self.summary["hosts"]
        return bool(hosts) and all(host["answers"] for host in hosts.values())


def file_of(host: str) -> str:
    """Name of a host's document in the archive."""
    return f"hosts/{host}.cdx.json"


def is_file(name: str) -> bool:
    """Whether a file of an archive is one of an SBOM."""
    return name == SUMMARY or name.startswith(file_of("").removesuffix(".cdx.json"))


def origin(component: dict[str, Any]) -> str:
    """Where a component came from; UNKNOWN unless it says so once."""
    values = [each["value"] for each in component.get("properties", []) if each["name"] == ORIGIN]
    return str(values[0]) if len(values) == 1 else UNKNOWN


def unknown(document: dict[str, Any]) -> list[str]:
    """The `bom-ref` of all components of a document whose origin is unknown, sorted."""
    return sorted(
        each["bom-ref"] for each in document.get("components", []) if origin(each).startswith(UNKNOWN)
    )


def verified(content: bytes, verifier: Verifier) -> tuple[Sbom, Head]:
    """The SBOMs in an archive with this CONTENT, and the head over it.

    ArchiveRefused unless each byte is as the owner of VERIFIER signed it, the key of the record.
    """
    files, head = archive.opened(content, verifier.scoped(PURPOSE))
    return read(files), head


def read(files: dict[str, bytes]) -> Sbom:
    """The SBOMs in FILES that were signed; ArchiveRefused unless their summary follows from the documents."""
    try:
        return _consistent(files)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArchiveRefused(f"it is signed, but is not an SBOM ({type(error).__name__}: {error})") from error


def _consistent(files: dict[str, bytes]) -> Sbom:
    summary = json.loads(files[SUMMARY])
    if summary["format"] != FORMAT:
        raise ArchiveRefused(f"it has format {summary['format']}, but this program reads {FORMAT}")
    answering = {name for name, host in summary["hosts"].items() if host["answers"]}
    if {SUMMARY, *map(file_of, answering)} != set(files):
        raise ArchiveRefused(f"its documents do not match the hosts that answered according to {SUMMARY}")
    documents = {name: json.loads(files[file_of(name)]) for name in sorted(answering)}
    for name, document in documents.items():
        host = summary["hosts"][name]
        digest = hashlib.sha256(files[file_of(name)]).hexdigest()
        counted = len(document.get("components", []))
        if (host["sha256"], host["components"], host["unknown"]) != (digest, counted, unknown(document)):
            raise ArchiveRefused(f"{SUMMARY} does not follow from {file_of(name)}")
    return Sbom(summary, documents, files)


def lines(bills: Sbom) -> list[str]:
    """Lines for a person: a summary, then each host with its unknown and missing components."""
    summary = bills.summary
    hosts = summary["hosts"]
    state = "complete" if bills.complete else "NOT COMPLETE"
    answers = f"{sum(host['answers'] for host in hosts.values())} of {len(hosts)} hosts answered"
    when = f"from {summary['begun']} to {summary['ended']}"
    text = [f"{state}: {answers}, {when}; compared with bundle {summary['bundle_serial']}"]
    for name, host in sorted(hosts.items()):
        if not host["answers"]:
            text.append(f"{name}: NOT KNOWN: {host['problem']}")
            continue
        text.append(
            f"{name}: {host['components']} components, {len(host['unknown'])} unknown, {len(host['missing'])} missing, "
            f"SHA-256 {host['sha256']}"
        )
        text += [f"{name}: unknown: {each}" for each in host["unknown"]]
        text += [f"{name}: missing: {each}" for each in host["missing"]]
        text += [f"{name}: not searched: {each}" for each in host["skipped"]]
    return text
