"""What an auditor reads from a report's archive on another machine: hosts, software, vulnerabilities, controls, observations."""

import base64
import datetime
import hashlib
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import advisories
import pytest
from estate import BUNDLE, HOSTS, Lab, carry, sign_as_builder

from llmkeep.bundle import databases, manifest

OPEN, ACCEPTED = "CVE-2099-0101", "CVE-2099-0102"
MARKED = "GHSA-8888-8888-8888"  # of the chat page's library
WAIVER = f"""
- id: {ACCEPTED}
  package: openssl
  hosts: [llm1]
  reason: No service parses such files.
  owner: security@example.org
  until: 2999-12-31
"""


def finding(urgency: str) -> dict[str, Any]:
    """An entry of Debian's tracker without a fix."""
    return {"releases": {"trixie": {"status": "open", "repositories": {}, "urgency": urgency}}}


@dataclass(frozen=True)
class Machine:
    """The auditor's machine: a report's archive, the verifier key noted before, and llmproof alone."""

    archive: Path
    verifier: str
    program: Path

    def verify(self, archive: Path) -> tuple[int, str]:
        """Exit code and output of `llm-audit verify-report`."""
        words = [str(self.program), "verify-report", str(archive), "--verifier", self.verifier]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    def content(self, name: str) -> bytes:
        """A file in the archive."""
        with tarfile.open(self.archive) as tar:
            file = tar.extractfile(name)
            assert file
            return file.read()


def add_databases(lab: Lab, folder: Path) -> None:
    """Add databases of made-up vulnerabilities to the control node's bundle, as its builder would."""
    contents = {
        "debian": advisories.tracker({"openssl": {OPEN: finding("low"), ACCEPTED: finding("high")}}),
        "pypi": advisories.archive(advisories.JINJA),
        "npm": advisories.archive(advisories.MARKED),
    }
    bundle = manifest.read(BUNDLE)
    date = datetime.datetime.now(datetime.UTC).strftime(manifest.TIME)
    for name, content in contents.items():
        path = f"{databases.FOLDER}/{databases.FILES[name]}"
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
        purl, digest = f"pkg:generic/{name}-vulnerabilities@{date}", hashlib.sha256(content).hexdigest()
        bundle.files.append(
            manifest.Entry(path, len(content), digest, "application/octet-stream", "MIT", "generic", purl)
        )
    bundle.serial += 1
    sign_as_builder(bundle, folder)
    carry(lab, folder)


@pytest.fixture(scope="module")
def machine(estate: Lab, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """An auditor's machine with the report of an estate that has an SBOM and a waiver."""
    folder = tmp_path_factory.mktemp("auditor")
    add_databases(estate, tmp_path_factory.mktemp("databases"))
    estate.on("ops1", "mkdir -p /etc/llmkeep/waivers && cat > /etc/llmkeep/waivers/openssl.yml", given=WAIVER)
    estate.operate("sbom make", check=False)  # 1: components are missing that a lab host's container replaces
    estate.operate("audit report", "--standard cis-debian13 --out /root/report")
    archive = folder / "report.tar"
    archive.write_bytes(base64.b64decode(estate.on("ops1", "base64 /root/report/*.tar")))
    environment = folder / "environment"
    subprocess.run(["python3.13", "-m", "venv", str(environment)], check=True)
    wheels = f"--find-links={BUNDLE / 'wheels/control'}"
    pip = [str(environment / "bin/pip"), "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--no-index", wheels, "llmkeep-proof"], check=True)
    verifier = estate.on("ops1", "cat /var/log/llmkeep-audit/verifier").strip()
    return Machine(archive, verifier, environment / "bin/llm-audit")


def test_the_report_names_its_signer_and_its_hosts_vulnerabilities_with_owners(machine: Machine) -> None:
    code, printed = machine.verify(machine.archive)
    assert code == 0, printed
    assert f"as signed by {machine.verifier} at " in printed
    assert "on 2 hosts" in printed
    assert "SBOM of the hosts: complete: 2 of 2 hosts answered" in printed
    assert "ops1: 2 vulnerabilities open, 0 unknown" in printed
    assert "llm1: 2 vulnerabilities open, 0 unknown" in printed
    assert f"llm1: {ACCEPTED} in openssl accepted by security@example.org until 2999-12-31" in printed


def test_the_archive_shows_the_hosts_software_and_what_each_check_observed(machine: Machine) -> None:
    software = {host: json.loads(machine.content(f"hosts/{host}.cdx.json"))["components"] for host in HOSTS}
    names = {host: {each["name"] for each in components} for host, components in software.items()}
    assert {"openssl", "Jinja2"} <= names["ops1"]
    assert {"openssl", "redis-server", "marked", "all-minilm-l6-v2"} <= names["llm1"]
    scan = json.loads(machine.content("vulnerabilities.json"))
    unwaived = {host: {each["id"] for each in answer["findings"] if not each["waiver"]}
                for host, answer in scan["hosts"].items()}  # fmt: skip
    assert unwaived == {"ops1": {OPEN, ACCEPTED}, "llm1": {OPEN, MARKED}}
    results = json.loads(machine.content("results.json"))["hosts"]
    checks = {host: {each["id"]: each for each in results[host]["checks"]} for host in HOSTS}
    assert "debian 13" in checks["llm1"]["base.system_is_tested"]["observed"]
    assert {each["state"] for each in checks["ops1"].values()} <= {"ok", "not enforceable"}
    for language in ("en", "zh"):
        page = machine.content(f"report.{language}.html").decode()
        assert {OPEN, ACCEPTED, MARKED} <= set(re.findall(r"(?:CVE|GHSA)(?:-\w{4})+", page))


def test_a_flipped_byte_of_the_archive_is_refused_with_the_files_name(
    machine: Machine, tmp_path: Path
) -> None:
    content = machine.content("results.json")
    altered = tmp_path / "altered.tar"
    changed = content.replace(b'"llm1"', b'"llm2"', 1)
    altered.write_bytes(machine.archive.read_bytes().replace(content, changed))
    code, printed = machine.verify(altered)
    assert code == 3
    assert "results.json" in printed
