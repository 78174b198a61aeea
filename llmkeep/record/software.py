"""A run that reads what hosts have installed, on record, and the scan of their answers."""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmkeep.errors import LlmkeepError
from llmkeep.places import Places
from llmkeep.playbooks import play
from llmkeep.record import runs
from llmkeep.vulnerabilities import estate, waivers

PLACES = Places()
PRINTED = "Read what is installed"  # task of playbooks/vulnerabilities.yml
MOST_BYTES = 16 << 20  # of one host


def read(tree: Path, inventories: list[Path], given: argparse.Namespace) -> dict[str, str | None]:
    """What each host printed; None of one that did not answer. Raises LlmkeepError where no host was asked."""
    playbook = (tree / "playbooks/vulnerabilities.yml").resolve()
    words = ["--limit", given.limit] if given.limit else []
    action: runs.Event = {"event.action": "cve", "event.type": ["info"]}
    with runs.recorded(tree, playbook, inventories, given, action) as outcome:
        outcome.code, heard = play(
            playbook, inventories, words, quiet=True, asked=frozenset({PRINTED}), most_bytes=MOST_BYTES
        )
        outcome.hosts = heard.hosts
    if outcome.code == 130:
        raise KeyboardInterrupt
    if not heard.hosts:
        listed = "\n".join(f"- {each}" for each in heard.failures or heard.complaints)
        raise LlmkeepError(f"no host was asked:\n{listed}\nPut that right, and run it again")
    names = [str(each["host.name"]) for each in heard.hosts]
    return {name: heard.said.get((PRINTED, name)) for name in names}


def scan(
    tree: Path, inventories: list[Path], given: argparse.Namespace, bundle: Path, days: int, folder: Path
) -> dict[str, Any]:
    """Ask the hosts, and compare their answers with BUNDLE's databases and the waivers in FOLDER."""
    accepted = waivers.read(folder)  # before hosts are asked in vain
    return estate.scan(read(tree, inventories, given), bundle, datetime.now(UTC), days, accepted)
