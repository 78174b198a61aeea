"""`llmkeep cve` and `llmkeep patch --plan`, with a real run of the playbook on this machine where hosts are asked."""

import argparse
import datetime
import json
from pathlib import Path

import bundle_with_advisories
import pytest
import scanned_estate

from llmkeep import cve
from llmkeep.cli import main
from llmkeep.places import Places
from llmkeep.record import software

INVENTORY = """
all:
  hosts:
    here: {ansible_connection: local, ansible_python_interpreter: /usr/bin/python3.13}
    away: {ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: 1}
"""
TODAY = datetime.datetime.now(datetime.UTC)
WAIVER = """
- {id: CVE-2099-0001, package: openssl, reason: No such client., owner: ops@example.org, until: 2999-01-01}
- {id: CVE-2099-0002, package: openssl, reason: Local only., owner: ops@example.org, until: 2001-01-01}
- {id: CVE-2099-0009, package: zlib, reason: Gone., owner: ops@example.org, until: 2999-01-01}
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command, with an inventory, a bundle and a folder of waivers."""
    bundle = bundle_with_advisories.write(tmp_path / "bundle", TODAY, more=(scanned_estate.MARKED,))
    (tmp_path / "hosts.yml").write_text(INVENTORY)
    return [
        "cve",
        "-i",
        str(tmp_path / "hosts.yml"),
        "--database",
        str(bundle),
        "--waivers",
        str(tmp_path / "waivers"),
    ]


def hosts(monkeypatch: pytest.MonkeyPatch, **answers: str | None) -> None:
    """What hosts print, in place of a run."""
    monkeypatch.setattr(software, "read", lambda *_: answers)


SAFE = [["libssl3t64", "3.5.1-1", "gnutls28", "3.5.1-1", []]]


def test_a_host_is_asked_and_one_that_does_not_answer_is_unknown(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--json"]) == cve.UNKNOWN
    document = json.loads(capsys.readouterr().out)
    assert document["hosts"]["away"]["unknown"] == ["it did not answer"]
    assert document["hosts"]["here"]["answers"]
    assert document["hosts"]["here"]["release"] == "debian trixie"
    assert document["hosts"]["here"]["components"] > 100


def test_open_findings_and_nothing_unknown_end_with_a_code_of_their_own(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts(monkeypatch, llm1=scanned_estate.text(packages=SAFE, scripts=[]))
    assert main(words) == cve.VULNERABLE
    hosts(monkeypatch, llm1=scanned_estate.text(packages=SAFE, scripts=[], python=[]))
    assert main(words) == 0
    assert main([*words, "--days", "0"]) == cve.UNKNOWN


def test_lines_name_severity_hosts_units_waivers_and_what_covers_nothing(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    waivers = tmp_path / "waivers"
    waivers.mkdir()
    (waivers / "a.yml").write_text(WAIVER)
    hosts(monkeypatch, llm1=scanned_estate.text(), llm2=scanned_estate.text())
    assert main([*words, "--vex", str(tmp_path / "vex.json")]) == cve.UNKNOWN
    printed = capsys.readouterr().out
    assert (
        "high  CVE-2099-0001  openssl 3.5.1-1  fixed in 3.5.1-1+deb13u1  waived until 2999-01-01 by ops@example.org: "
        "No such client.  on llm1 (nginx.service), llm2 (nginx.service)\n"
    ) in printed
    assert "no fix  WAIVER EXPIRED on 2001-01-01 by ops@example.org: Local only." in printed
    assert "the waiver of CVE-2099-0009 in zlib by ops@example.org matches no finding: remove it" in printed
    assert (
        "critical  CVE-2099-0010  Jinja2 3.1.4  fixed in 3.1.5  on llm1 (unseen), llm2 (unseen)\n" in printed
    )
    assert "llm1: 3 open (1 critical, 1 medium, 1 low; 1 with a fix), 1 unknown" in printed
    assert json.loads((tmp_path / "vex.json").read_text())["bomFormat"] == "CycloneDX"


def test_a_waiver_is_called_idle_only_where_all_hosts_were_asked_and_answered(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "waivers").mkdir()
    (tmp_path / "waivers/a.yml").write_text(WAIVER)
    hosts(monkeypatch, llm1=scanned_estate.text(), llm2=None)
    main(words)
    hosts(monkeypatch, llm1=scanned_estate.text())
    main([*words, "--host", "llm1"])
    assert "matches no finding" not in capsys.readouterr().out


def test_a_waiver_that_cannot_be_read_is_refused_before_hosts_are_asked(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("hosts were asked")

    monkeypatch.setattr(software, "read", asked)
    (tmp_path / "waivers").mkdir()
    (tmp_path / "waivers/a.yml").write_text("- {id: CVE-1}")
    assert main(words) == 1
    assert "a.yml: the waiver {'id': 'CVE-1'} has no package: write it" in capsys.readouterr().err


def test_a_bundle_of_another_signer_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    keyring = tmp_path / "etc/apt/keyrings/llmkeep.pgp"
    keyring.parent.mkdir(parents=True)
    keyring.touch()
    monkeypatch.setattr(cve, "PLACES", Places(tmp_path))
    assert main(words) == 3
    assert "lacks MANIFEST.json.sig: unsigned content is not used" in capsys.readouterr().err


def test_a_plan_names_what_the_bundles_packages_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = "Package: libssl3t64\nSource: openssl\nVersion: 3.5.1-1+deb13u1\n"
    files = {
        **bundle_with_advisories.DATABASES,
        "apt/dists/trixie/main/binary-amd64/Packages": index.encode(),
    }
    bundle_with_advisories.write(tmp_path / "srv/llmkeep/bundle/current", TODAY, files)
    monkeypatch.setattr(software, "PLACES", Places(tmp_path))
    hosts(monkeypatch, llm1=scanned_estate.text(scripts=[]), llm2=None)
    assert list(software.plan(tmp_path, [], argparse.Namespace())) == [
        "llm1: its packages fix 1 of 2 open vulnerabilities: CVE-2099-0001 (openssl, high); 1 unknown, see `llmkeep cve`",
        "llm2: its packages fix 0 of 0 open vulnerabilities; 1 unknown, see `llmkeep cve`",
    ]


def test_without_a_bundle_a_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "PLACES", Places(tmp_path))
    (line,) = software.plan(tmp_path, [], argparse.Namespace())
    assert line.startswith("it is unknown which vulnerabilities that fixes: there is no bundle at ")
