"""`llmkeep audit report`: what checks observed becomes a signed archive with pages and OSCAL, which say no more than that."""

import argparse
import hashlib
import json
import tempfile
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import bundle_with_advisories
import pytest
import scanned_estate
import sealing_double

from llmkeep import cli, source_tree
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places
from llmkeep.record import commands as audit
from llmkeep.record import (
    report,
    report_html,
    report_oscal,
    report_vulnerabilities,
    runs,
    software,
    standards,
    verification,
    witness,
)
from llmkeep.vulnerabilities.waivers import Waiver
from llmproof import cli as proof
from llmproof import vulnerabilities
from llmproof.archive import ArchiveRefused
from llmproof.heads import Signer, Verifier
from llmproof.report import MET, judged, verified

HOSTILE = "</td><script>alert(1)</script><img src=x onerror='alert(2)'>&\x1b[2J\u202e\"\x00"
STANDARD = """
title: A standard
version: '1'
source: ours
reviewed_by: nobody
controls:
  - {id: '1.1', title: Keys, checks: [base.ssh_takes_keys_only]}
  - {id: '1.2', title: Both, checks: [base.ssh_takes_keys_only, opa.runs]}
  - {id: '1.3', title: None, missing: no check}
  - {id: '1.4', title: People, organisation: true}
"""
RUN = verification.run
NOW = datetime(2027, 1, 31, 8, 30, tzinfo=UTC)


def check(name: str, ok: bool = True, **more: Any) -> dict[str, Any]:
    return {"id": name, "title": name, "expected": "exit 0", "observed": "exit 0", "ok": ok, **more}


def verification_report(*checks: dict[str, Any]) -> dict[str, Any]:
    """As `llmkeep verify` reports two hosts, of which one has OPA."""
    hosts = {
        "llm1": [check("base.ssh_takes_keys_only"), *(checks or [check("opa.runs")])],
        "ops1": [check("base.ssh_takes_keys_only")],
    }
    return {
        "ok": True,
        "hosts": hosts,
        "roles": {"llm1": ["base", "opa"], "ops1": ["base"]},
        "verified": {"llm1": ["base", "opa"], "ops1": ["base"]},
    }


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control node whose tree has one standard; what `llmkeep verify` reports there is in verified.json."""
    root = tmp_path / "tree"
    for name, text in {
        "site.yml": "[]",
        "hosts.yml": "all: {hosts: {llm1: {}, ops1: {}}}\n",
        "controls/small.yml": STANDARD,
        "controls/checks.yml": "{without_control: {}, conditional: []}",
        "meta/features.yml": "features: [{role: base, hosts: all}, {role: opa, hosts: serve}]",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(source_tree, "located", lambda: root)
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "log")
    monkeypatch.setattr(runs, "SEALED_SEED", tmp_path / "credstore/llmkeep-audit.seed")
    monkeypatch.setattr(runs, "SERIAL", tmp_path / "serial")
    monkeypatch.setattr(report, "PLACES", Places(tmp_path))
    monkeypatch.setattr(witness, "KEPT", tmp_path / "witness")
    sealing_double.use(monkeypatch, audit, runs)
    monkeypatch.chdir(root)
    assert cli.main(["audit", "init"]) == 0
    runs.append({"event.action": "begun"})
    runs.SERIAL.write_text("7\n")
    observe(monkeypatch, verification_report())
    monkeypatch.setattr(software, "read", lambda *_: {"llm1": scanned_estate.text(), "ops1": None})
    return root


def observe(monkeypatch: pytest.MonkeyPatch, document: dict[str, Any] | None) -> None:
    """All checks have run, with DOCUMENT as their report, or did not run to their end."""

    def run(*words: Any, **_: Any) -> tuple[int, None]:
        if document is not None:
            Path(words[4]).write_text(json.dumps(document))
        return int(document is None), None

    monkeypatch.setattr(verification, "run", run)


def made(out: Path) -> Path:
    """The archive of one `llmkeep audit report`."""
    before = set(out.glob("*.tar"))
    assert cli.main(["audit", "report", "--standard", "small", "-i", "hosts.yml", "--out", str(out)]) == 0
    (path,) = set(out.glob("*.tar")) - before
    return path


def scanned(folder: Path | None = None, *waivers: Waiver) -> dict[str, Any]:
    """A scan of a host by the databases of a bundle in FOLDER, or without any, and of one that does not answer."""
    bundle = folder and bundle_with_advisories.write(
        folder, scanned_estate.NOW, more=(scanned_estate.MARKED,)
    )
    scan = scanned_estate.scan(bundle, *waivers, llm1=scanned_estate.text(), ops1=None)
    document: dict[str, Any] = json.loads(json.dumps(scan))
    return document


def verifier() -> Verifier:
    return Verifier((runs.FOLDER / "verifier").read_text())


def small(document: dict[str, Any] | None = None) -> dict[str, Any]:
    """Results of a report on the small standard."""
    arguments = (source_tree.located(), standards.read(source_tree.located(), "small"))
    return report.results(*arguments, document or verification_report(), [Path("hosts.yml")], NOW)


def verdicts(document: dict[str, Any]) -> dict[str, str]:
    return {each["control"]: each["verdict"] for each in judged(document)}


def test_llmproof_alone_verifies_what_was_made(
    node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(tmp_path / "out")
    assert "2 met, 1 no check, 1 organisation" in capsys.readouterr().out
    assert proof.main(["verify-report", str(path), "--verifier", verifier().text]) == 0
    assert "A standard, mapping reviewed by nobody, on 2 hosts" in capsys.readouterr().out
    found = verified(path.read_bytes(), verifier()).results
    assert (found["bundle_serial"], found["control_node"]) == (7, verifier().name.split("/")[1])
    hosts_file = (node / "hosts.yml").read_bytes()
    line = f"{hashlib.sha256(hosts_file).hexdigest()}  hosts.yml\n".encode()
    assert found["inventory_sha256"] == hashlib.sha256(line).hexdigest()


@pytest.mark.usefixtures("node")
def test_a_report_is_kept_listed_and_on_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path / "out")
    kept = Places(tmp_path).reports / path.name
    assert kept.read_bytes() == path.read_bytes()
    assert kept.stat().st_mode & 0o777 == 0o600
    (lines,) = runs.FOLDER.glob("records-*")
    event = json.loads(lines.read_text().splitlines()[-1])
    assert (event["event.action"], event["llmkeep.report.standard"]) == ("audit report", "small")
    assert event["llmkeep.report.sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    capsys.readouterr()
    assert cli.main(["audit", "reports"]) == 0
    assert capsys.readouterr().out == f"{path.name}: 2 met, 1 no check, 1 organisation\n"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert cli.main(["audit", "reports"]) == 3
    assert f"{path.name}: ALTERED: " in capsys.readouterr().out


PLAYBOOK = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - {name: Report, copy: {src: ../observed.json, dest: "{{ verify_report }}", mode: "0600"}}
    - {name: Fail, fail: {msg: one check}}
"""


def test_a_report_runs_the_checks_and_is_made_although_one_failed(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node / "playbooks").mkdir()
    (node / "playbooks/verify.yml").write_text(PLAYBOOK)
    (node / "ansible.cfg").write_text("[defaults]\nnocows = true\n")
    failed = verification_report(check("opa.runs", ok=False))
    (node / "observed.json").write_text(json.dumps(failed))
    monkeypatch.setattr(verification, "run", RUN)
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as memory:  # sockets have short paths
        monkeypatch.setenv("TMPDIR", memory)
        found = verified(made(tmp_path / "out").read_bytes(), verifier())
    assert {each["control"]: each["verdict"] for each in found.verdicts}["1.2"] == "not met"
    (lines,) = runs.FOLDER.glob("records-*")
    actions = [json.loads(line).get("event.action") for line in lines.read_text().splitlines()]
    assert actions[-3:] == ["run playbooks/verify.yml", "run playbooks/verify.yml", "audit report"]


@pytest.mark.usefixtures("node")
def test_there_is_no_report_where_the_checks_did_not_run_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    observe(monkeypatch, None)
    assert cli.main(["audit", "report", "--standard", "small", "-i", "hosts.yml"]) == 1
    assert "so there is no report" in capsys.readouterr().err
    assert not Places(tmp_path).reports.exists()


@pytest.mark.usefixtures("node")
def test_there_is_no_report_where_runs_are_not_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "SEALED_SEED", tmp_path / "none")
    assert cli.main(["audit", "report", "--standard", "small", "-i", "hosts.yml"]) == 1
    assert "run it on the control node, after `llmkeep audit init`" in capsys.readouterr().err


@pytest.mark.usefixtures("node")
def test_a_seed_that_is_not_the_record_s_makes_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "seed", lambda: bytes(32))
    assert cli.main(["audit", "report", "--standard", "small", "-i", "hosts.yml"]) == 1
    assert "signature: it is signed by " in capsys.readouterr().err
    assert not Places(tmp_path).reports.exists()


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (check("opa.runs"), {"1.1": "met", "1.2": "met"}),
        (check("opa.runs", ok=False), {"1.1": "met", "1.2": "not met"}),
        (check("opa.runs", ok=False, accepted="later"), {"1.1": "met", "1.2": "not shown"}),
        (check("opa.runs", ok=False, not_enforceable="no cgroup"), {"1.1": "met", "1.2": "not shown"}),
        (check("opa.checks_run", ok=False), {"1.1": "met", "1.2": "not shown"}),
        (check("opa.runs", ok="yes"), {"1.1": "met", "1.2": "not met"}),  # type: ignore[arg-type]
    ],
)
@pytest.mark.usefixtures("node")
def test_a_control_has_the_verdict_of_its_checks(result: dict[str, Any], expected: dict[str, str]) -> None:
    found = verdicts(small(verification_report(result)))
    assert found == expected | {"1.3": "no check", "1.4": "organisation"}


@pytest.mark.usefixtures("node")
def test_a_host_that_does_not_answer_leaves_no_control_met() -> None:
    document = verification_report()
    document["hosts"]["llm2"] = [check("reachable", ok=False)]
    document["roles"]["llm2"] = document["verified"]["llm2"] = []
    found = small(document)
    assert found["hosts"]["llm2"]["answers"] is False
    assert found["hosts"]["llm2"]["checks"][0]["state"] == "error"
    assert MET not in verdicts(found).values()


@pytest.mark.usefixtures("node")
def test_a_role_whose_checks_did_not_run_leaves_its_controls_open() -> None:
    document = verification_report()
    document["hosts"]["llm1"] = document["hosts"]["llm1"][:1]
    document["verified"]["llm1"] = ["base"]
    assert verdicts(small(document))["1.2"] == "not shown"


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def hostile(document: object) -> Any:
    """The document with HOSTILE after each text in it, and in the names of its hosts."""
    if isinstance(document, dict):
        return {name: hostile(value) for name, value in document.items()}
    if isinstance(document, list):
        return [hostile(value) for value in document]
    return f"{document}{HOSTILE}" if isinstance(document, str) else document


@pytest.mark.parametrize("language", report_html.LANGUAGES)
@pytest.mark.usefixtures("node")
def test_no_value_of_a_host_or_a_standard_becomes_markup(language: str) -> None:
    plain = small(verification_report(check("opa.runs", ok=False, accepted="later")))
    plain["witnessed_heads"] = {"llm1": "head"}
    bad = hostile(plain)
    bad["standard"]["controls"] = hostile(plain["standard"]["controls"])
    bad["hosts"] = {f"{name}{HOSTILE}": host for name, host in bad["hosts"].items()}
    bad["witnessed_heads"] = {f"llm1{HOSTILE}": HOSTILE}
    rows = hostile(judged(plain))
    written = report_html.page(bad, rows, language)
    assert Page(written).tags == Page(report_html.page(plain, judged(plain), language)).tags
    assert Page(written).attributes <= {"lang", "charset", "http-equiv", "content", "href", "id"}
    assert not {"\x1b", "\u202e", "\0"} & set(written)


@pytest.mark.usefixtures("node")
def test_a_page_leads_from_a_control_to_its_evidence() -> None:
    document = small(verification_report(check("opa.runs", ok=False)))
    written = report_html.page(document, judged(document), "en")
    assert "<td>1.2</td><td>Both</td><td>not met</td>" in written
    assert 'opa.runs: <a href="#h0">llm1</a> failed' in written
    assert '<h3 id="h0">llm1</h3>' in written
    assert "<td>1.4</td><td>People</td><td>organisation</td>" in written
    assert "Not shown here: no check" in written


@pytest.mark.usefixtures("node")
def test_the_chinese_page_has_a_word_for_each_word_of_the_english_one() -> None:
    document = small(verification_report(check("opa.runs", ok=False)))
    document["witnessed_heads"] = {"llm1": "head"}
    document["standard"]["unreviewed"] = True
    english, chinese = (
        Page(report_html.page(document, judged(document), each)).text for each in report_html.LANGUAGES
    )
    same = {text.strip() for text, other in zip(english, chinese, strict=True) if text == other}
    assert same & report_html.CHINESE.keys() == set()


@pytest.mark.usefixtures("node")
def test_oscal_says_satisfied_of_a_met_control_alone() -> None:
    document = small(verification_report(check("opa.runs", ok=False)))
    (result,) = report_oscal.results(document, judged(document), NOW)["assessment-results"]["results"]
    states = {each["target"]["target-id"]: each["target"]["status"]["state"] for each in result["findings"]}
    assert states == {
        "c-1.1": "satisfied",
        "c-1.2": "not-satisfied",
        "c-1.3": "not-satisfied",
        "c-1.4": "not-satisfied",
    }
    seen = {each["uuid"]: each["description"] for each in result["observations"]}
    related = [seen[each["observation-uuid"]] for each in result["findings"][1]["related-observations"]]
    assert "opa.runs on llm1: failed" in related


@pytest.mark.usefixtures("node")
def test_oscal_has_each_identifier_once() -> None:
    document = small()
    (result,) = report_oscal.results(document, judged(document), NOW)["assessment-results"]["results"]
    entries = [*result["observations"], *result["findings"], *result["local-definitions"]["inventory-items"]]
    assert len({each["uuid"] for each in entries}) == len(entries)


@pytest.mark.usefixtures("node")
def test_diff_names_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = made(tmp_path / "one")
    observe(monkeypatch, verification_report(check("opa.runs", ok=False)))
    runs.SERIAL.write_text("8\n")
    second = made(tmp_path / "two")
    capsys.readouterr()
    assert cli.main(["audit", "diff", str(first), str(second)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "bundle_serial: 7 -> 8",
        "control 1.2: met -> not met",
        "opa.runs on llm1: ok -> failed",
    ]


@pytest.mark.usefixtures("node")
def test_diff_compares_no_report_that_does_not_verify(tmp_path: Path) -> None:
    path = made(tmp_path / "out")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(LlmkeepError, match="the bytes around them"):
        report.diff(argparse.Namespace(before=path, after=path, verifier=None))


@pytest.mark.usefixtures("node")
def test_a_report_that_another_key_signed_is_refused() -> None:
    other = Signer(verifier().name, bytes(32)).verifier
    content = report.archive(small(), scanned(), None, other, bytes(32), NOW)
    with pytest.raises(ArchiveRefused, match="it is signed by"):
        verified(content, verifier())


@pytest.mark.usefixtures("node")
def test_the_same_results_make_the_same_archive() -> None:
    document = small()
    first, second = (
        report.archive(document, scanned(), None, verifier(), runs.seed(), NOW) for _ in range(2)
    )
    assert first == second


def test_a_report_has_the_state_of_vulnerabilities(node: Path, tmp_path: Path) -> None:
    bundle_with_advisories.write(tmp_path / "srv/llmkeep/bundle/current", datetime.now(UTC))
    found = verified(made(node.parent / "out").read_bytes(), verifier())
    scan = json.loads(found.files["vulnerabilities.json"])
    assert {each["id"] for each in scan["hosts"]["llm1"]["findings"]} >= {"CVE-2099-0001", "CVE-2099-0010"}
    assert scan["hosts"]["ops1"]["unknown"] == ["it did not answer"]
    assert json.loads(found.files["vulnerabilities.vex.json"])["bomFormat"] == "CycloneDX"
    assert b"CVE-2099-0001" in found.files["report.en.html"]
    assert "存在未知项".encode() in found.files["report.zh.html"]


def test_an_auditor_reads_what_is_open_and_who_accepted_what(
    node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle_with_advisories.write(tmp_path / "srv/llmkeep/bundle/current", datetime.now(UTC))
    (tmp_path / "etc/llmkeep/waivers").mkdir(parents=True)
    (tmp_path / "etc/llmkeep/waivers/a.yml").write_text(
        "- {id: CVE-2099-0001, package: openssl, reason: No such client., owner: ops@example.org, until: 2999-01-01}"
    )
    path = made(node.parent / "out")
    capsys.readouterr()
    assert proof.main(["verify-report", str(path), "--verifier", verifier().text]) == 0
    printed = capsys.readouterr().out
    assert "llm1: 2 vulnerabilities open, 1 unknown\nops1: 0 vulnerabilities open, 1 unknown\n" in printed
    assert "llm1: CVE-2099-0001 in openssl accepted by ops@example.org until 2999-01-01\n" in printed


@pytest.mark.parametrize("content", [b"", b"[]", b'{"hosts": 3}', b'{"hosts": {"a": {"findings": [{}]}}}'])
def test_a_scan_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(ArchiveRefused, match="is signed, but is not a scan"):
        vulnerabilities.lines(content)


def test_a_report_without_an_sbom_says_so(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(node.parent / "out")
    assert b"No SBOM was made" in verified(path.read_bytes(), verifier()).files["report.en.html"]
    assert proof.main(["verify-report", str(path), "--verifier", verifier().text]) == 0
    assert "SBOM of the hosts: none was made" in capsys.readouterr().out


@pytest.mark.parametrize("language", report_html.LANGUAGES)
def test_no_value_of_a_scan_becomes_markup(language: str, tmp_path: Path) -> None:
    plain = scanned(
        tmp_path, scanned_estate.waiver("2099-03-01"), scanned_estate.waiver("2099-01-01", "CVE-2099-0002")
    )
    bad = hostile(plain)
    for host in bad["hosts"].values():
        for finding, original in zip(
            host["findings"],
            plain["hosts"]["llm1"]["findings"] if host["findings"] else [],
            strict=True,
        ):
            finding |= {name: original[name] for name in ("severity", "state")}
    bad["hosts"] = {f"{name}{HOSTILE}": host for name, host in bad["hosts"].items()}
    written = report_vulnerabilities.section(bad, language)
    assert Page(written).tags == Page(report_vulnerabilities.section(plain, language)).tags
    assert not Page(written).attributes
    assert not {"\x1b", "\u202e", "\0"} & set(written)


def test_the_chinese_section_has_a_word_for_each_word_of_the_english_one(tmp_path: Path) -> None:
    scan = scanned(tmp_path, scanned_estate.waiver("2099-03-01"))
    pair = (Page(report_vulnerabilities.section(scan, each)).text for each in report_html.LANGUAGES)
    same = {text.strip() for text, other in zip(*pair, strict=True) if text == other}
    assert same & report_html.CHINESE.keys() == set()
