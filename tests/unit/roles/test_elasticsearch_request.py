"""elasticsearch-request, which a starting Elasticsearch's unit waits by."""

import runpy
import subprocess
import sys
from typing import Any

import pytest
from plugin_modules import ROOT

PROGRAM = ROOT / "roles/elasticsearch/files/elasticsearch_request.py"


def test_it_ends_once_the_process_that_it_waits_for_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program: dict[str, Any] = runpy.run_path(str(PROGRAM))
    gone = subprocess.Popen(["true"])
    gone.wait()
    times: list[bool] = []

    def asked(*_: object) -> tuple[bool, str]:
        times.append(True)
        assert len(times) == 1, "it asks on"
        return False, "connection refused"

    monkeypatch.setitem(program["main"].__globals__, "asked", asked)
    monkeypatch.setattr(
        sys,
        "argv",
        ["x", "--as", "anonymous", "--until", "^200", "280", "--while", str(gone.pid), "GET", "/"],
    )
    assert program["main"]() == 1
    assert capsys.readouterr().out == f"process {gone.pid} has ended: connection refused\n"
