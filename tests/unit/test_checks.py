"""checks: what is not exactly as expected has failed; a crash is never a pass."""

import sys
import time
from typing import Any

import pytest
from plugin_modules import load

checks = load("module_utils.checks")


def check(code: str, **parts: Any) -> dict[str, Any]:
    defaults = {"id": "role.it", "argv": [sys.executable, "-c", code], "rc": 0, "stdout": None, "match": None}
    result: dict[str, Any] = checks.run({**defaults, "timeout": 10, **parts})
    return result


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
        "expected": "exit 0, output 'TLSv1.3'",
        "observed": "exit 0, output 'TLSv1.2'",
        "ok": False,
    }
