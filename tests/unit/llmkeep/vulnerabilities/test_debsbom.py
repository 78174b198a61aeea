"""debsbom, which Siemens wrote for Debian, judges the same packages by the same database as we do."""

import json
import random
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from llmkeep.vulnerabilities import database, matching
from llmkeep.vulnerabilities.model import Component

ROOT = Path(__file__).resolve().parents[4]
PROGRAM = ROOT / "bench/.venv-debsbom/bin/debsbom"
VERSIONS = ["1.0-1", "1.0-1+deb13u1", "1.0-1~deb13u1", "1.0~rc1-1", "1:0.5-2", "1.0+dfsg-1", "1.0.1-1", "2.0-1",
            "10.0-1", "1.0-1+b2"]  # fmt: skip
URGENCIES = ["high", "medium", "low", "not yet assigned", "unimportant", "end-of-life"]

pytestmark = pytest.mark.skipif(
    not PROGRAM.exists(), reason="no debsbom: `make peers PEER=debsbom` installs it"
)


def estate(seed: int) -> tuple[list[Component], dict[str, Any]]:
    """Packages of a host, and a tracker's document with advisories on most of their sources."""
    chance = random.Random(seed)  # noqa: S311 - for a test
    components, document = [], dict[str, Any]()
    for number in range(120):
        source, version = f"source{number}", chance.choice(VERSIONS)
        for name in chance.sample([source, f"lib{source}", f"{source}-tools"], chance.randint(1, 3)):
            components.append(Component("debian", name, version, source, version))
        document[source] = {
            f"CVE-2099-{number:04}{each}": {"releases": {"trixie": state(chance)}}
            for each in range(chance.randint(0, 4))
        }
    return components, document


def state(chance: random.Random) -> dict[str, Any]:
    fixed = chance.choice([*VERSIONS, "0"])
    status = chance.choice(["resolved", "resolved", "open"])
    known = {"status": status, "urgency": chance.choice(URGENCIES), "repositories": {"trixie": "1.0-1"}}
    return known | ({"fixed_version": fixed} if status == "resolved" else {})


def debsbom_finds(
    folder: Path, components: list[Component], document: dict[str, Any]
) -> set[tuple[str, str]]:
    """Source package and name of each vulnerability."""
    status = folder / "root/var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(
        "\n".join(
            f"Package: {each.name}\nStatus: install ok installed\nMaintainer: T <t@example.org>\nArchitecture: amd64\n"
            f"Source: {each.source}\nVersion: {each.version}\nDescription: x\n"
            for each in components
        )
    )
    (folder / "tracker.json").write_text(json.dumps(document))
    bill = ["generate", "--sbom-type", "cdx", "--root", str(folder / "root"), "--distro-arch", "amd64"]
    subprocess.run([PROGRAM, *bill, "--out", str(folder / "sbom")], check=True, capture_output=True)
    # Without a least urgency, which would leave out what has none.
    scan = ["sec-scan", "--db", str(folder / "tracker.json"), "--distro", "trixie", "--format", "json"]
    done = subprocess.run(
        [PROGRAM, *scan, str(folder / "sbom.cdx.json")], check=True, capture_output=True, text=True
    )
    rows = map(json.loads, done.stdout.splitlines())
    return {(row["package"].partition("@")[0], row["vulnerability"]["id"]) for row in rows}


@pytest.mark.parametrize("seed", range(3))
def test_debsbom_finds_what_we_find(seed: int, tmp_path: Path) -> None:
    components, document = estate(seed)
    databases = {"debian": database.Database("debian", datetime.now(UTC), "", database.tracker(document))}
    scan = matching.host(components, databases, {}, "debian trixie")
    assert not scan.unknown
    ours = {(each.package, each.id) for each in scan.findings}
    assert len(ours) > 50
    assert debsbom_finds(tmp_path, components, document) == ours
