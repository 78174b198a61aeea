"""A report counts a control as met only where each check held on each host, and each byte of it is signed."""

import hashlib
import io
import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from llmproof import archive as signed_archive
from llmproof import cli, report
from llmproof.archive import ArchiveRefused, packed
from llmproof.heads import Head, Signer
from llmproof.report import judged, reasons, verified

SEED = bytes(range(32))
RECORD = Signer("llmkeep-audit/ops1", SEED)
TIME = datetime(2027, 1, 31, 8, tzinfo=UTC)


def check(name: str, state: str = "ok") -> dict[str, str]:
    return {"id": name, "title": name, "expected": "exit 0", "observed": "exit 0", "state": state}


def host(*checks: dict[str, str], roles: tuple[str, ...] = ("base",), answers: bool = True) -> dict[str, Any]:
    verified_roles = [*roles] if answers else []
    return {"roles": [*roles], "verified": verified_roles, "answers": answers, "checks": [*checks]}


def results(*controls: dict[str, Any], hosts: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    standard = {"id": "cis", "title": "CIS", "version": "1", "source": "", "reviewed_by": "nobody"}
    return {
        "format": 1,
        "standard": standard | {"controls": [*controls]} | more,
        "conditional": ["base.sometimes"],
        "record_head": RECORD.sign(Head(3, bytes(32), "2027-01-31T08:00:00.000000Z")).decode(),
        "hosts": {"llm1": host(check("base.one"), check("base.two"))} if hosts is None else hosts,
    }


BOTH = {"id": "1", "title": "one", "checks": ["base.one", "base.two"]}


def verdict(document: dict[str, Any]) -> str:
    (each,) = judged(document)
    return str(each["verdict"])


def test_a_control_is_met_where_each_check_held_on_each_host() -> None:
    hosts = {name: host(check("base.one"), check("base.two")) for name in ("llm1", "llm2")}
    assert verdict(results(BOTH, hosts=hosts)) == "met"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("failed", "not met"),
        ("error", "not shown"),
        ("accepted", "not shown"),
        ("not enforceable", "not shown"),
        ("skipped", "not shown"),
        ("undeclared", "not shown"),
        ("Ok", "not shown"),
        ("", "not shown"),
    ],
)
@pytest.mark.parametrize("place", ["llm1", "llm2"])
def test_one_check_on_one_host_that_did_not_hold_is_enough(state: str, expected: str, place: str) -> None:
    hosts = {name: host(check("base.one"), check("base.two")) for name in ("llm1", "llm2")}
    hosts[place]["checks"][1]["state"] = state
    assert verdict(results(BOTH, hosts=hosts)) == expected


def test_a_check_with_two_results_has_the_worse_one() -> None:
    hosts = {"llm1": host(check("base.one", "failed"), check("base.one"), check("base.two"))}
    assert verdict(results(BOTH, hosts=hosts)) == "not met"


def test_a_check_that_a_host_did_not_run_shows_nothing() -> None:
    assert verdict(results(BOTH, hosts={"llm1": host(check("base.one"))})) == "not shown"


def test_a_host_that_does_not_answer_shows_nothing() -> None:
    hosts = {"llm1": host(check("base.one"), check("base.two")), "llm2": host(answers=False)}
    assert verdict(results(BOTH, hosts=hosts)) == "not shown"


def test_a_host_without_the_role_is_not_asked() -> None:
    hosts = {"llm1": host(check("base.one"), check("base.two")), "db": host(roles=("redis",))}
    assert verdict(results(BOTH, hosts=hosts)) == "met"


def test_checks_that_no_host_is_to_run_show_nothing() -> None:
    assert verdict(results(BOTH, hosts={"db": host(roles=("redis",))})) == "not shown"
    assert verdict(results(BOTH, hosts={})) == "not shown"


def test_a_check_that_settings_do_not_ask_for_counts_neither_for_nor_against() -> None:
    control = {"id": "1", "title": "one", "checks": ["base.one", "base.sometimes"]}
    assert verdict(results(control, hosts={"llm1": host(check("base.one"))})) == "met"
    alone = {"id": "1", "title": "one", "checks": ["base.sometimes"]}
    assert verdict(results(alone, hosts={"llm1": host(check("base.one"))})) == "not shown"


def test_a_role_whose_checks_could_not_run_excuses_none_of_them() -> None:
    control = {"id": "1", "title": "one", "checks": ["base.one", "base.sometimes"]}
    hosts = {"llm1": host(check("base.one")) | {"verified": []}}
    assert verdict(results(control, hosts=hosts)) == "not shown"


@pytest.mark.parametrize(
    ("control", "more", "expected"),
    [
        (BOTH | {"partly": "not all"}, {}, "partly"),
        ({"id": "1", "title": "one", "missing": "no check"}, {}, "no check"),
        ({"id": "1", "title": "one"}, {}, "no check"),
        ({"id": "1", "title": "one", "checks": []}, {}, "no check"),
        (BOTH | {"organisation": True}, {}, "organisation"),
        (BOTH, {"unreviewed": True}, "unreviewed"),
    ],
)
def test_what_checks_do_not_show_whole_is_not_met(
    control: dict[str, Any], more: dict[str, Any], expected: str
) -> None:
    assert verdict(results(control, **more)) == expected


def files(document: dict[str, Any] | None = None) -> dict[str, bytes]:
    document = results(BOTH) if document is None else document
    return {
        "results.json": json.dumps(document).encode(),
        "verdicts.json": json.dumps(judged(document)).encode(),
        "report.en.html": b"<p>hello",
    }


def archive(contents: dict[str, bytes] | None = None, signer: Signer | None = None) -> bytes:
    signer = signer or Signer("llmkeep-audit/ops1/report", SEED)
    return packed(files() if contents is None else contents, signer, TIME)


def with_sbom(unknown: list[str]) -> dict[str, bytes]:
    """A report's files with what one host has installed: a program of no bundle. UNKNOWN: what the summary says of it."""
    document = {
        "components": [{"bom-ref": "miner", "properties": [{"name": "llmkeep:origin", "value": "unknown"}]}]
    }
    content = json.dumps(document).encode()
    host = {
        "answers": True,
        "sha256": hashlib.sha256(content).hexdigest(),
        "components": 1,
        "unknown": unknown,
    }
    summary = {
        "format": 1, "begun": "", "ended": "", "bundle_serial": 1,
        "hosts": {"llm1": host | {"problem": "", "missing": [], "skipped": []}},
    }  # fmt: skip
    return {**files(), "sbom.json": json.dumps(summary).encode(), "hosts/llm1.cdx.json": content}


def test_a_report_has_what_hosts_installed() -> None:
    found = verified(archive(with_sbom(["miner"])), RECORD.verifier)
    assert found.installed is not None
    assert (found.installed.complete, list(found.installed.documents)) == (True, ["llm1"])
    assert verified(archive(), RECORD.verifier).installed is None


def test_a_report_whose_summary_hides_a_component_is_refused() -> None:
    assert "sbom.json does not follow from hosts/llm1.cdx.json" in refusal(archive(with_sbom([])))
    lacking = with_sbom(["miner"])
    del lacking["hosts/llm1.cdx.json"]
    assert "its documents do not match the hosts" in refusal(archive(lacking))


def members(packed_: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(packed_)) as tar:
        return [(each, tar.extractfile(each).read()) for each in tar]  # type: ignore[union-attr]


def again(parts: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in parts:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def refusal(packed_: bytes) -> str:
    with pytest.raises(ArchiveRefused) as refused:
        verified(packed_, RECORD.verifier)
    return str(refused.value)


def test_a_report_verifies_by_the_key_of_the_record() -> None:
    found = verified(archive(), RECORD.verifier)
    assert (found.head.size, found.head.time) == (3, "2027-01-31T08:00:00.000000Z")
    assert found.counts() == {**dict.fromkeys(report.VERDICT_NAMES, 0), "met": 1}
    assert found.files["report.en.html"] == b"<p>hello"


def test_the_same_report_has_the_same_bytes() -> None:
    assert archive() == archive()


def test_any_byte_that_changed_is_noticed() -> None:
    good = archive()
    end = len(good.rstrip(b"\0"))
    for place in [*range(0, end, 41), *range(end, len(good), 997), len(good) - 1]:
        changed = bytearray(good)
        changed[place] ^= 1
        assert refusal(bytes(changed)), place


def test_a_trimmed_archive_is_refused_wherever_it_ends() -> None:
    good = archive()
    for size in range(0, len(good), 499):
        assert refusal(good[:size]), size


def test_a_changed_file_is_named() -> None:
    parts = members(archive())
    parts[2] = (parts[2][0], b"<p>HELLO")
    assert "report.en.html has SHA-256" in refusal(again(parts))


def test_a_file_that_was_taken_out_is_named() -> None:
    parts = members(archive())
    assert "report.en.html is missing" in refusal(again(parts[:2] + parts[3:]))


def test_a_file_that_was_put_in_is_named() -> None:
    parts = members(archive())
    assert "more.html was not signed" in refusal(again([(tarfile.TarInfo("more.html"), b"x"), *parts]))


def test_files_in_another_order_are_refused() -> None:
    parts = members(archive())
    assert "another order" in refusal(again([parts[1], parts[0], *parts[2:]]))


@pytest.mark.parametrize("more", [b"x", b"\0" * 512, archive()])
def test_bytes_after_the_end_are_refused(more: bytes) -> None:
    assert "the bytes around them" in refusal(archive() + more)


def test_a_file_after_the_signature_is_refused() -> None:
    assert "does not end with" in refusal(again([*members(archive()), (tarfile.TarInfo("more"), b"x")]))


def test_a_file_that_is_there_twice_is_refused() -> None:
    parts = members(archive())
    assert "is a duplicate" in refusal(again([parts[0], *parts]))


def test_a_link_is_refused() -> None:
    link = tarfile.TarInfo("report.zh.html")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    assert "not a plain file" in refusal(again([(link, b""), *members(archive())]))


def test_a_sparse_file_is_refused_before_its_holes_are_read() -> None:
    member = tarfile.TarInfo("holes")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"77777777777\0"  # its size with holes: 8 GiB
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    assert "'holes' is a duplicate, or is not a plain file" in refusal(bytes(header) + archive())


def test_other_metadata_of_a_file_is_refused() -> None:
    parts = members(archive())
    parts[0][0].mode = 0o4755
    assert "the bytes around them" in refusal(again(parts))


def test_a_report_of_another_key_is_refused() -> None:
    other = Signer("llmkeep-audit/ops1/report", bytes(32))
    assert "not by llmkeep-audit/ops1/report+" in refusal(archive(signer=other))


def test_the_signature_of_another_report_is_refused() -> None:
    other = members(archive(files() | {"report.en.html": b"other"}))
    assert "files differs from what was signed" in refusal(again([*members(archive())[:-1], other[-1]]))


def test_a_head_of_the_record_signs_no_report() -> None:
    assert "signature: it is signed by llmkeep-audit/ops1 about llmkeep-audit/ops1" in refusal(
        archive(signer=RECORD)
    )


def test_a_report_signs_no_head_of_the_record() -> None:
    document = results(BOTH)
    document["record_head"] = Signer("llmkeep-audit/ops1/report", SEED).sign(Head(3, bytes(32))).decode()
    assert "the head of the record in results.json" in refusal(archive(files(document)))


def test_verdicts_that_do_not_follow_are_refused_whoever_signed_them() -> None:
    failed = results(BOTH, hosts={"llm1": host(check("base.one", "failed"), check("base.two"))})
    assert "verdicts.json does not follow from results.json" in refusal(
        archive(files(failed) | {"verdicts.json": files()["verdicts.json"]})
    )


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b'{"format": 1}', b"\xff", b"[" * 100_000, b'{"format": 2}']
)
def test_what_is_signed_and_no_report_is_refused(content: bytes) -> None:
    assert "it" in refusal(archive(files() | {"results.json": content}))


def test_a_report_of_a_newer_format_is_refused() -> None:
    assert "it has format 2, but this program reads 1" in refusal(
        archive(files(results(BOTH) | {"format": 2}))
    )


def test_an_archive_that_is_too_large_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signed_archive, "LIMIT", len(archive()) - 1)
    assert "no archive has more than" in refusal(archive())


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b", bytes(10240)])
def test_what_is_no_archive_is_refused(content: bytes) -> None:
    assert refusal(content)


def test_the_program_proves_a_report_and_prints_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = {"llm1": host(check("base.one", "failed"), check("base.two")), "l\x1b[2J2": host(answers=False)}
    (tmp_path / "report.tar").write_bytes(archive(files(results(BOTH, hosts=hosts))))
    words = ["verify-report", str(tmp_path / "report.tar"), "--verifier", RECORD.verifier.text]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "as signed by llmkeep-audit/ops1+" in printed
    assert "CIS, mapping reviewed by nobody, on 2 hosts\n1 not met\n" in printed
    assert "\nnot met: base.one failed on llm1: 1\n" in printed
    assert "l\\x1b[2J2 did not answer" in printed
    assert "\x1b" not in printed
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["silent"] == ["l\x1b[2J2"]


def cause(*rows: tuple[str, str, str], verdict: str = "not shown") -> dict[str, object]:
    checks = [{"check": check, "host": name, "state": state} for check, name, state in rows]
    return {"control": "1", "verdict": verdict, "checks": checks}


def test_controls_with_the_same_cause_are_one_line_and_met_ones_none() -> None:
    audited = ("hardening.events", "llm1", "not enforceable"), ("hardening.events", "ops1", "not enforceable")
    first, second = cause(*audited), cause(*audited) | {"control": "2"}
    assert reasons([first, second, cause(verdict="met")]) == [
        "not shown: hardening.events not enforceable on llm1, ops1: 1, 2"
    ]


def test_a_check_that_settings_do_not_ask_for_is_a_cause_only_where_none_was_asked_for() -> None:
    undeclared = ("backup.is_recent", "ops1", "undeclared")
    (alone,) = reasons([cause(undeclared)])
    assert alone == "not shown: backup.is_recent undeclared on ops1: 1"
    (beside,) = reasons([cause(undeclared, ("base.one", "ops1", "error"), ("base.two", "ops1", "ok"))])
    assert beside == "not shown: base.one error on ops1: 1"
    assert reasons([cause()]) == ["not shown: no host ran its checks: 1"]


def test_the_program_refuses_an_altered_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.tar").write_bytes(archive() + b"x")
    (tmp_path / "verifier").write_text(RECORD.verifier.text)
    words = ["verify-report", str(tmp_path / "report.tar"), "--verifier", str(tmp_path / "verifier")]
    assert cli.main(words) == cli.ALTERED
    assert "the bytes around them are not those of an archive" in capsys.readouterr().out
