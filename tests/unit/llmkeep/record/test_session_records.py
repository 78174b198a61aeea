"""Operators' sessions, from a ledger that the host's own program writes into the control node's record."""

import base64
import json
import subprocess
import sys
import syslog
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from audit_records import SEED, record
from plugin_modules import ROOT
from sudo_sessions import Host, loaded, session

from llmkeep import cli
from llmkeep.record import findings, runs, sessions, witness
from llmkeep.record.runs import RecordError
from llmproof.chain import files, lines

ALL = """
all:
  vars: {ansible_connection: local, ansible_python_interpreter: /usr/bin/python3}
  children:
    control: {hosts: {ops1: {}}}
    operators: {hosts: {llm1: {}}}
"""
NAME = "alice-20261203T06{:04d}-AAAAAA"


def answered(program: Path, ledger: Path, taken: int) -> str:
    argv = [sys.executable, "-I", str(program), str(ledger), str(taken)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


class Estate:
    """A host with a ledger, llm1, and a control node with a record."""

    def __init__(self, root: Path, host: Host) -> None:
        self.root, self.host = root, host

    def session(self, number: int, user: str = "alice", **fields: Any) -> None:
        session(self.host.sessions, NAME.format(number).replace("alice", user), **fields)
        assert self.host.append() == []

    def answer(self) -> str:
        """As the host answers."""
        program = ROOT / "playbooks/files/operator_sessions.py"
        taken = sessions.numbers(witness.KEPT).get("llm1", 0)
        return answered(program, self.host.ledger, taken)

    def look(self, answer: str | None = None) -> list[str]:
        return sessions.collect(witness.KEPT, {"llm1": self.answer() if answer is None else answer})

    def events(self) -> list[dict[str, Any]]:
        """Of sessions, on the control node's record."""
        events = (json.loads(line) for path in files(runs.FOLDER) for line in lines(path))
        return [event for event in events if event.get("event.action") == "sudo"]

    def numbers(self) -> list[int]:
        return [event["llmkeep.session.number"] for event in self.events()]


@pytest.fixture
def estate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Estate]:
    program = loaded()
    monkeypatch.setattr(program, "SETTLED_SECONDS", 0)
    made = Estate(tmp_path, Host(program, tmp_path))
    (tmp_path / "hosts.yml").write_text(ALL)
    (tmp_path / "witness").mkdir()
    monkeypatch.setattr(witness, "KEPT", tmp_path / "witness")
    monkeypatch.setattr(witness, "COPY", tmp_path / "copy")
    monkeypatch.setattr(sessions, "LEDGER", made.host.ledger)
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "own")
    monkeypatch.setattr(runs, "SEALED_SEED", tmp_path / "seed")
    monkeypatch.setattr(runs, "unseal", lambda sealed, _name: sealed)
    monkeypatch.setattr(syslog, "syslog", lambda _level, _text: None)
    (tmp_path / "seed").write_text(SEED.hex())
    record(tmp_path / "own", 5, head_each=5)
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as memory:
        monkeypatch.setenv("TMPDIR", memory)
        yield made


def test_a_session_comes_to_be_on_record_and_a_rewritten_ledger_is_a_finding(estate: Estate) -> None:
    look = ["audit", "collect", "-i", str(estate.root / "hosts.yml")]
    estate.session(1)
    assert cli.main(look) == 0
    assert estate.numbers() == [1]
    estate.host.ledger.write_text(estate.host.ledger.read_text().replace("nginx", "other"))
    assert cli.main(look) == 3
    known = findings.load(witness.KEPT)
    assert known is not None
    (finding,) = known.altered.values()
    assert "the ledger of sessions on llm1 has no line 1 as it was copied" in finding.what
    assert cli.main(["audit", "verify", str(runs.FOLDER)]) == 0


def test_a_session_is_on_record_once(estate: Estate) -> None:
    estate.session(1)
    estate.look()
    assert estate.look() == []
    assert estate.numbers() == [1]


def test_an_event_says_who_ran_what_with_which_result(estate: Estate) -> None:
    estate.session(1)
    assert estate.look() == []
    (event,) = estate.events()
    fields = (
        "host.name",
        "user.name",
        "user.effective.name",
        "process.executable",
        "process.args",
        "event.start",
    )
    assert [event[name] for name in fields] == [
        "llm1",
        "alice",
        "root",
        "/usr/bin/systemctl",
        ["status", "nginx.service"],
        "2026-12-03T06:39:58+00:00",
    ]
    assert (event["event.kind"], event["event.outcome"]) == ("event", "unknown")
    assert event["llmkeep.session.sha256"] == estate.host.entries()[0]["sha256"]


def test_a_session_of_the_break_glass_account_is_an_alert_without_arguments(estate: Estate) -> None:
    estate.session(1, user="breakglass", runargv=["bash", "-c", "canary"])
    estate.look()
    (event,) = estate.events()
    assert (event["event.kind"], event["user.name"]) == ("alert", "breakglass")
    assert "canary" not in json.dumps(event)


def test_sessions_of_several_looks_are_one_append_each(estate: Estate) -> None:
    for number in range(3):
        estate.session(number)
    estate.look()
    heads = (runs.FOLDER / "heads").read_bytes().count(b"\xe2\x80\x94")
    for number in range(3, 6):
        estate.session(number)
    estate.look()
    assert estate.numbers() == [1, 2, 3, 4, 5, 6]
    assert (runs.FOLDER / "heads").read_bytes().count(b"\xe2\x80\x94") == heads + 1


def test_a_look_that_was_cut_off_before_it_took_the_line_puts_nothing_on_record_twice(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    estate.session(1)
    with monkeypatch.context() as cut:
        cut.setattr(sessions.Ledger, "take", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            estate.look()
    estate.session(2)
    assert estate.look() == []
    assert estate.numbers() == [1, 2]


def test_no_line_is_taken_that_cannot_be_recorded(estate: Estate) -> None:
    estate.session(1)
    (estate.root / "seed").unlink()
    with pytest.raises(RecordError):
        estate.look()
    assert sessions.numbers(witness.KEPT) == {}
    (estate.root / "seed").write_text(SEED.hex())
    estate.look()
    assert estate.numbers() == [1]


def test_a_backlog_is_taken_in_several_looks(estate: Estate) -> None:
    for number in range(3):
        session(estate.host.sessions, NAME.format(number), runargv=["x", "y" * 1000])
    estate.host.append()
    line = estate.host.ledger.read_bytes().splitlines()[0]
    assert len(line) > 1000
    # The limit stands in the program that hosts run.
    text = (ROOT / "playbooks/files/operator_sessions.py").read_text()
    program = estate.root / "program.py"
    program.write_text(text.replace("192 << 10", str(2 * len(line) + 100)))
    for taken, numbers in ((0, [1, 2]), (2, [1, 2, 3])):
        assert estate.look(answered(program, estate.host.ledger, taken)) == []
        assert estate.numbers() == numbers


def test_a_host_without_a_ledger_says_nothing(estate: Estate) -> None:
    assert estate.answer() == "sessions\nnone\n"
    assert estate.look() == []


def test_a_ledger_behind_a_link_is_none(estate: Estate) -> None:
    estate.host.ledger.symlink_to("/etc/passwd")
    assert estate.answer() == "sessions\nnone\n"


def begun_anew(estate: Estate) -> None:
    estate.host.ledger.unlink()
    estate.host.append()
    estate.host.ledger.write_text(estate.host.ledger.read_text().replace('"exit":null', '"exit":0'))


def removed(estate: Estate) -> None:
    estate.host.ledger.unlink()


def shortened(estate: Estate) -> None:
    lines = estate.host.ledger.read_bytes().splitlines(keepends=True)
    estate.host.ledger.write_bytes(b"".join(lines[:-1]))


def trimmed_past(estate: Estate) -> None:
    estate.session(8)
    lines = estate.host.ledger.read_bytes().splitlines(keepends=True)
    estate.host.ledger.write_bytes(lines[-1])


@pytest.mark.parametrize("alter", [begun_anew, removed, shortened, trimmed_past])
def test_a_ledger_that_does_not_go_on_is_named_with_the_way_out(
    estate: Estate, alter: Callable[[Estate], None]
) -> None:
    for number in range(2):
        estate.session(number)
    estate.look()
    alter(estate)
    (problem,) = estate.look()
    assert "the ledger of sessions on llm1 has no line 2 as it was copied. Save " in problem
    assert estate.look() == [problem], "a finding is one, however often it is seen"
    assert estate.numbers() == [1, 2]


def test_a_host_that_was_set_up_anew_begins_anew(estate: Estate) -> None:
    estate.session(1)
    estate.look()
    begun_anew(estate)
    (witness.KEPT / "llm1/sessions").unlink()
    assert estate.look() == []
    assert [event.get("process.exit_code") for event in estate.events()] == [None, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", 0),
        ("number", True),
        ("session", "../../etc/passwd"),
        ("session", "alice-20261203T060000-AAAAAA\n"),
        ("user", "root"),
        ("started", "2026-13-03T06:39:58+00:00"),
        ("run_as", "\x1b[2J"),
        ("command", "x" * 1025),
        ("command", ["x"]),
        ("arguments", ["x"] * 33),
        ("arguments", ["x" * 600, "y" * 600]),
        ("arguments", "x"),
        ("arguments", [5]),
        ("exit", 256),
        ("exit", "0"),
        ("exit", 1.0),
        ("interrupted", 0),
        ("bytes", -1),
        ("sha256", "A" * 64),
        ("previous", "0" * 63),
        ("more", 1),
    ],
)
def test_a_line_with_another_value_is_a_finding_that_quotes_none_of_it(
    estate: Estate, field: str, value: object
) -> None:
    estate.session(1)
    entry = estate.host.entries()[0] | {field: value}
    estate.host.ledger.write_text(json.dumps(entry) + "\n")
    (problem,) = estate.look()
    reason = "its form" if field == "more" else field
    assert f"line 1 of the ledger of sessions on llm1 is invalid: {reason}. " in problem
    assert estate.events() == []


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"{}", b"5", b"\xff", b'{"number":1,"number":2}', b"[" * 5000, b"x" * 9000, b"NaN"]
)
def test_a_line_that_is_no_session_is_a_finding(estate: Estate, line: bytes) -> None:
    answer = f"sessions\r\n{base64.b64encode(line + b'\n').decode()}"
    (problem,) = estate.look(answer)
    assert "line 1 of the ledger of sessions on llm1 is invalid: its " in problem


@pytest.mark.parametrize("answer", ["", "sessions\n", "sessions\n%%%", "none", "sessions\nnone\nmore"])
def test_an_answer_without_the_last_line_is_a_finding(estate: Estate, answer: str) -> None:
    estate.session(1)
    estate.look()
    (problem,) = estate.look(answer)
    assert "llm1" in problem
    assert estate.numbers() == [1]


def test_breakglass_with_arguments_is_refused(estate: Estate) -> None:
    estate.session(1, user="breakglass")
    estate.host.ledger.write_text(
        estate.host.ledger.read_text().replace('"arguments":null', '"arguments":["x"]')
    )
    assert "is invalid: arguments" in estate.look()[0]


def test_lines_before_one_that_does_not_follow_are_taken(estate: Estate) -> None:
    for number in range(3):
        estate.session(number)
    lines = estate.host.ledger.read_bytes().splitlines(keepends=True)
    estate.host.ledger.write_bytes(lines[0] + lines[2])
    (problem,) = estate.look()
    assert "line 2 of the ledger of sessions on llm1 does not follow the one before" in problem
    assert estate.numbers() == [1]


def test_what_a_hosts_shell_prints_is_no_part_of_its_answer(estate: Estate) -> None:
    estate.session(1)
    assert estate.look(f"Welcome\r\n{estate.answer()}") == []
    assert estate.numbers() == [1]


def test_a_damaged_line_here_stops_no_look_at_heads(estate: Estate) -> None:
    (witness.KEPT / "llm1").mkdir()
    (witness.KEPT / "llm1/sessions").write_text("damaged\n")
    estate.session(1)
    assert sessions.numbers(witness.KEPT) == {}
    with pytest.raises(RecordError, match="was not written by the witness"):
        estate.look()
