"""checks: what is not exactly as expected has failed; a crash is never a pass."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from called_module import called
from plugin_modules import load

checks = load("module_utils.config.checks")
module = load("modules.role_checks")


def check(code: str, **parts: Any) -> dict[str, Any]:
    result: dict[str, Any] = checks.run([told(code, **parts)])[0]
    return result


def told(code: str, **parts: Any) -> dict[str, Any]:
    """A check as the module has it."""
    defaults = {
        "id": "role.it",
        "title": "It is",
        "argv": [sys.executable, "-c", code],
        "rc": 0,
        "stdout": None,
        "match": None,
    }
    return {**dict.fromkeys(checks.OPTIONS), **defaults, "timeout": 10, **parts}


@pytest.mark.parametrize(
    ("code", "parts", "ok"),
    [
        ("pass", {}, True),
        ("raise SystemExit(1)", {}, False),
        ("raise SystemExit(1)", {"rc": 1}, True),
        ("pass", {"rc": 1}, False),
        ("print('yes')", {"stdout": "yes"}, True),
        ("print('yes, but')", {"stdout": "yes"}, False),
        ("print('a'); print('b: 2')", {"match": "^b: [0-9]$"}, True),
        ("print('b: x')", {"match": "^b: [0-9]$"}, False),
        ("import sys; sys.stderr.write('alert 70')", {"match": "alert 70"}, True),
        ("print('yes'); raise SystemExit(3)", {"stdout": "yes"}, False),
    ],
)
def test_passes_only_what_is_as_expected(code: str, parts: dict[str, Any], ok: bool) -> None:
    assert check(code, **parts)["ok"] is ok


NOT_HERE = (
    'print(\'{"checks": {"part": {"ok": %s, "observed": "off", "not_enforceable": "a container cannot"}}}\')'
)


def test_a_finding_that_its_host_cannot_have_is_neither_a_pass_nor_a_failure() -> None:
    result = check(NOT_HERE % "false", named="part")
    assert (result["ok"], result["not_enforceable"]) == (False, "a container cannot")
    assert not checks.has_failed(result)


def test_a_finding_that_holds_is_a_pass_whatever_reason_it_gives() -> None:
    assert "not_enforceable" not in check(NOT_HERE % "true", named="part")


@pytest.mark.parametrize("name", ["another", ""])
def test_no_reason_of_another_finding_excuses_one(name: str) -> None:
    assert checks.has_failed(check(NOT_HERE % "false", named=name))


def test_a_probe_that_hangs_fails_and_is_ended_with_its_children() -> None:
    begun = time.monotonic()
    result = check("import subprocess; subprocess.run(['sleep', '60'])", timeout=1)
    assert result["ok"] is False
    assert "within 1 s" in result["observed"]
    assert time.monotonic() - begun < 20


def test_a_probe_that_crashes_fails_even_where_nothing_was_expected_of_it() -> None:
    result = check("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", rc=-11)
    assert result["ok"] is False
    assert "SIGSEGV" in result["observed"]


def test_a_program_that_is_missing_fails() -> None:
    result = check("", argv=["/no/such/program"], rc=127)
    assert result["ok"] is False
    assert "/no/such/program" in result["observed"]


def test_a_result_says_what_was_expected_and_what_was_seen() -> None:
    result = check("print('TLSv1.2')", stdout="TLSv1.3")
    assert result == {
        "id": "role.it",
        "title": "It is",
        "expected": "exit 0, output 'TLSv1.3'",
        "observed": "exit 0, output 'TLSv1.2'",
        "ok": False,
    }


FINDINGS = """
from pathlib import Path
with Path({log!r}).open("a") as log: log.write("started\\n")
print('{{"checks": {{"one": {{"ok": true, "observed": "1 of 1"}}, "two": {{"ok": false, "observed": "2 lacks"}}}}}}')
raise SystemExit(1)
"""


def test_findings_of_one_program_are_asked_by_one_start(tmp_path: Path) -> None:
    code = FINDINGS.format(log=str(tmp_path / "log"))
    names = ("one", "two", "three")
    results = checks.run([told(code, id=f"role.{name}", named=name) for name in names])
    assert [result["ok"] for result in results] == [True, False, False]
    assert [result["observed"] for result in results][:2] == ["1 of 1", "2 lacks"]
    assert "there is no result for three" in results[2]["observed"]
    assert (tmp_path / "log").read_text() == "started\n"


@pytest.mark.parametrize("code", ["print('{')", "raise SystemExit(3)", 'print(\'{"checks": {"it": true}}\')'])
def test_a_finding_that_is_not_told_has_failed(code: str) -> None:
    result = check(code, named="it")
    assert (result["ok"], result["expected"]) == (False, "it holds")
    assert "there is no result for it" in result["observed"]


def test_what_a_host_cannot_enforce_is_told_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(module.AnsibleModule, "warn", lambda _, text: warned.append(text))
    monkeypatch.setattr(checks.limits, "lacking", lambda _: "the kernel refuses bpf()")
    proof = {"id": "base.refuses", "title": "It refuses", "argv": ["false"], "limit": "IPAddressDeny"}
    given = [proof, {"id": "base.it", "title": "It is", "argv": ["true"]}]
    told = called(module, {"checks": given}, capsys)
    assert "failed" not in told
    assert [check["ok"] for check in told["checks"]] == [False, True]
    assert told["checks"][0]["not_enforceable"] == "the kernel refuses bpf()"
    assert warned == ["base.refuses is not enforceable on this host: the kernel refuses bpf()"]


def test_what_the_inventory_accepts_is_told_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(module.AnsibleModule, "warn", lambda _, text: warned.append(text))
    given = [
        {"id": f"base.{program}", "title": "It is", "argv": [program], "accepted": "never tested"}
        for program in ("false", "true")
    ]
    told = called(module, {"checks": given}, capsys)
    assert "failed" not in told
    assert [(check["ok"], check.get("accepted")) for check in told["checks"]] == [
        (False, "never tested"),
        (True, None),
    ]
    assert warned == ["base.false does not hold, which is accepted: never tested"]


@pytest.mark.parametrize("wrong", [{}, {"argv": ["true"], "units": {"a": 1}}, {"units": {"a.service": 1}}])
def test_a_check_is_a_command_or_a_limit_of_units(
    wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(module, {"checks": [{"id": "role.it", "title": "It is", **wrong}]}, capsys)["failed"]
