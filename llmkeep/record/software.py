"""A recorded run that reads the hosts' installed software, and the scan of their answers."""

import argparse
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmkeep.bundle import manifest
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places
from llmkeep.playbooks import play
from llmkeep.record import runs
from llmkeep.vulnerabilities import database, estate, fixes, waivers
from llmkeep.vulnerabilities.model import DEBIAN

PLACES = Places()
PRINTED = "List installed software"  # task of playbooks/vulnerabilities.yml
MOST_BYTES = 16 << 20  # of one host


def read(tree: Path, inventories: list[Path], arguments: argparse.Namespace) -> dict[str, str | None]:
    """Output of each host; None if it did not answer. Raises LlmkeepError if no host was asked."""
    playbook = (tree / "playbooks/vulnerabilities.yml").resolve()
    words = ["--limit", arguments.limit] if arguments.limit else []
    action: runs.Event = {"event.action": "cve", "event.type": ["info"]}
    with runs.recorded(tree, playbook, inventories, arguments, action) as outcome:
        outcome.code, results = play(
            playbook, inventories, words, quiet=True, asked=frozenset({PRINTED}), most_bytes=MOST_BYTES
        )
        outcome.hosts = results.hosts
    if outcome.code == 130:
        raise KeyboardInterrupt
    if not results.hosts:
        listed = "\n".join(f"- {each}" for each in results.failures or results.complaints)
        raise LlmkeepError(f"no host was asked:\n{listed}\nFix this, and run it again")
    names = [str(each["host.name"]) for each in results.hosts]
    return {name: results.outputs.get((PRINTED, name)) for name in names}


def scan(
    tree: Path, inventories: list[Path], arguments: argparse.Namespace, bundle: Path, days: int, folder: Path
) -> dict[str, Any]:
    """Ask the hosts, and compare their answers with BUNDLE's databases and the waivers in FOLDER."""
    accepted = waivers.read(folder)  # before hosts are asked in vain
    return estate.scan(read(tree, inventories, arguments), bundle, datetime.now(UTC), days, accepted)


def plan(tree: Path, inventories: list[Path], arguments: argparse.Namespace) -> Iterator[str]:
    """Lines on the vulnerabilities that newer Debian packages of the bundle in use fix, host by host."""
    bundle = PLACES.bundles / "current"
    if not (bundle / manifest.NAME).exists():
        yield f"it is unknown which vulnerabilities that fixes: there is no bundle at {bundle}"
        return
    document = scan(tree, inventories, arguments, bundle, database.DAYS, PLACES.waivers)
    fixes.close(document, bundle, bundle, datetime.now(UTC))
    for name, host in document["hosts"].items():
        yield f"{name}: {_closes(host)}"


def _closes(host: Mapping[str, Any]) -> str:
    debian = [each for each in host["findings"] if estate.is_open(each) and each["ecosystem"] == DEBIAN]
    closed = [f"{each['id']} ({each['package']}, {each['severity']})" for each in debian if each["closed"]]
    unknown = len(host["unknown"]) + sum(map(estate.is_unknown, host["findings"]))
    names = f": {', '.join(closed)}" if closed else ""
    known = f"; {unknown} unknown, see `llmkeep cve`" if unknown else ""
    return f"its packages fix {len(closed)} of {len(debian)} open vulnerabilities{names}{known}"
