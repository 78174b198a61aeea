"""The components of an estate's hosts: collected, compared with the bundles, and signed."""

import argparse
import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmkeep.bundle import bill, cache, manifest
from llmkeep.places import Places
from llmkeep.playbooks import RunResults, inventory_path, listed, play, verified_tree
from llmkeep.record import runs
from llmkeep.record.report import inventory_digest, own_verifier, record_heads
from llmkeep.record.sboms import TIME
from llmkeep.sbom import answers, catalogue, comparison
from llmkeep.sbom.catalogue import Catalogue
from llmproof.archive import packed
from llmproof.heads import Signer, Verifier
from llmproof.sbom import FORMAT, PURPOSE, SUMMARY, file_of, unknown

INVENTORY = "/etc/llmkeep/inventory"
ROLES, READ = "List the roles of the host", "List installed components"  # tasks of playbooks/components.yml
MOST_BYTES = 64 << 20  # of one host


def asked(arguments: argparse.Namespace) -> tuple[Path, list[Path], RunResults]:
    """Tree, inventories and the hosts' answers, in a recorded run. Raises LlmkeepError if it cannot be recorded."""
    tree = verified_tree()
    if not runs.is_kept(tree) or not (runs.FOLDER / "verifier").exists():
        raise runs.RecordError("SBOMs are signed by the record's key, which is not on this host: run it on the control "
            "node, after `llmkeep audit init`")  # fmt: skip
    runs.seed()  # before hosts are asked in vain
    playbook = (tree / "playbooks/components.yml").resolve()
    inventories = [inventory_path(place, tree) for place in arguments.inventory or [INVENTORY]]
    with runs.recorded(
        tree, playbook, inventories, arguments, {"event.action": "sbom make", "event.type": ["info"]}
    ) as outcome:
        outcome.code, results = play(
            playbook, inventories, [], quiet=True, asked=frozenset({ROLES, READ}), most_bytes=MOST_BYTES
        )
        outcome.hosts = results.hosts
    return tree, inventories, results


def expected(inventories: list[Path], tree: Path) -> list[str]:
    """All hosts of inventories, sorted."""
    groups = listed(inventories, tree)
    return sorted(
        {host for name, group in groups.items() if name != "_meta" for host in group.get("hosts", [])}
    )


def problem(host: str, failures: Sequence[str]) -> str:
    """The reason why a host did not answer, as Ansible reports it."""
    prefix = f"{host}: "
    return next(
        (each.removeprefix(prefix)[:1000] for each in failures if each.startswith(prefix)),
        "it did not answer",
    )


def contents(
    hosts: Sequence[str], results: RunResults, known: Catalogue, about: Mapping[str, Any], created: str
) -> dict[str, bytes]:
    """The files of the archive: the summary, with what it is ABOUT, and the documents of the hosts that answered."""
    files, summaries = {}, {}
    for host in hosts:
        summaries[host], document = _host(host, results, known, created)
        if document:
            files[file_of(host)] = document
    summary = {"format": FORMAT, **about, "hosts": summaries}
    return {SUMMARY: _json(summary), **files}


def _host(host: str, results: RunResults, known: Catalogue, created: str) -> tuple[dict[str, Any], bytes]:
    """A host's part of the summary and its document, empty where it did not answer."""
    silent = {"answers": False, "sha256": "", "components": 0, "unknown": [], "missing": [], "skipped": []}
    text = results.outputs.get((READ, host))
    if text is None:
        return {**silent, "problem": answers.plain(problem(host, results.failures))}, b""
    try:
        answer = answers.read(text)
    except ValueError as error:
        return {
            **silent,
            "problem": f"its answer is not a list of components ({error}): examine that host",
        }, b""
    made = comparison.document(host, answer, known, created)
    document = bill.encoded(made)
    roles = json.loads(results.outputs.get((ROLES, host), "[]"))
    return {
        "answers": True,
        "problem": "",
        "sha256": hashlib.sha256(document).hexdigest(),
        "components": len(made.get("components", [])),
        "unknown": unknown(made),
        "missing": comparison.missing(answer, known, roles),
        "skipped": answer.skipped,
    }, document


def archive(files: Mapping[str, bytes], verifier: Verifier, seed: bytes, now: datetime) -> bytes:
    """The signed archive of FILES."""
    return packed(dict(files), Signer(verifier.scoped(PURPOSE).name, seed), now)


def made(arguments: argparse.Namespace, places: Places) -> tuple[str, bytes]:
    """Query all hosts; returns the archive's name and content. The run is on record."""
    begun = datetime.now(UTC)
    tree, inventories, results = asked(arguments)
    now, known = datetime.now(UTC), catalogue.read(places)
    about = {
        "control_node": socket.gethostname(),
        "operator": runs.who(),
        "begun": begun.strftime(manifest.TIME),
        "ended": now.strftime(manifest.TIME),
        "inventory_sha256": inventory_digest(inventories),
        "bundle_serial": known.current.manifest.serial if known.current else None,
        "bundle_sha256": cache.sha256(known.current.folder / manifest.NAME) if known.current else None,
        "tree_revision": runs.revision(tree),
        "record_head": record_heads()[0],
    }
    files = contents(expected(inventories, tree), results, known, about, now.strftime(manifest.TIME))
    content = archive(files, own_verifier(), runs.seed(), now)
    digest = hashlib.sha256(content).hexdigest()
    name = f"sbom-{now.strftime(TIME)}-{digest[:8]}.tar"
    runs.append(
        {
            "event.kind": "event",
            "event.category": ["configuration"],
            "event.action": "sbom made",
            "event.outcome": "success",
            "user.name": runs.who(),
            "llmkeep.sbom.name": name,
            "llmkeep.sbom.sha256": digest,
        }
    )
    return name, content


def _json(document: object) -> bytes:
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True).encode() + b"\n"
