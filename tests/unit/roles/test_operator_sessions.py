"""Sessions of operators on the ledger of their host, and what is removed of them."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from plugin_modules import ROOT
from rendered_role import content, rendered
from sudo_sessions import Host, lacking, loaded, log_line, real, session, sudo

ALICE, BOB = "alice-20261203T063958-0DCnna", "bob-20261203T064001-aSceQC"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = loaded()
    monkeypatch.setattr(module, "SETTLED_SECONDS", 0)
    return module


@pytest.fixture
def host(program: ModuleType, tmp_path: Path) -> Host:
    return Host(program, tmp_path)


def test_a_session_that_has_ended_is_listed_once(host: Host) -> None:
    session(host.sessions, ALICE)
    host.log.write_text(log_line(ALICE, 3))
    assert host.append() == []
    assert host.append() == []
    (entry,) = host.entries()
    shown = ("number", "session", "user", "run_as", "command", "arguments", "exit", "interrupted", "started")
    assert [entry[name] for name in shown] == [
        1,
        ALICE,
        "alice",
        "root",
        "/usr/bin/systemctl",
        ["status", "nginx.service"],
        3,
        False,
        "2026-12-03T06:39:58+00:00",
    ]
    assert host.check() == (True, "sessions are as listed, 1 so far")


def test_a_line_says_nothing_of_the_callers_environment(host: Host) -> None:
    session(host.sessions, ALICE)
    host.append()
    assert "canary" not in host.ledger.read_text()


def test_the_digest_is_the_one_that_sha256sum_prints(host: Host) -> None:
    made = session(host.sessions, ALICE)
    host.append()
    command = "LC_ALL=C sha256sum -- * | sha256sum"
    printed = subprocess.run(["sh", "-c", command], cwd=made, capture_output=True, text=True, check=True)
    assert host.entries()[0]["sha256"] == printed.stdout.split()[0]


def test_lines_are_chained(host: Host) -> None:
    session(host.sessions, ALICE)
    host.append()
    session(host.sessions, BOB)
    host.append()
    first, second = host.ledger.read_bytes().splitlines()
    assert json.loads(first)["previous"] == "0" * 64
    assert json.loads(second)["previous"] == hashlib.sha256(first).hexdigest()
    assert json.loads(second)["number"] == 2


def test_a_session_that_runs_is_not_listed(
    host: Host, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    session(host.sessions, ALICE, ended=False)
    monkeypatch.setattr(program, "oldest_sudo", lambda: time.time() - 1)
    assert host.append() == []
    assert host.entries() == [] if host.ledger.exists() else True
    assert host.check()[0]


def test_a_session_whose_sudo_is_gone_was_interrupted(
    host: Host, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    session(host.sessions, ALICE, ended=False)
    host.log.write_text(log_line(ALICE, 0))
    monkeypatch.setattr(program, "oldest_sudo", lambda: time.time() + 3600)
    host.append()
    (entry,) = host.entries()
    assert (entry["interrupted"], entry["exit"]) == (True, None)


def test_without_a_sudo_none_is_the_oldest(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "PROC", tmp_path)
    assert program.oldest_sudo() == math.inf


def test_a_process_called_sudo_is_as_old_as_it_is(program: ModuleType, tmp_path: Path) -> None:
    shutil.copy("/usr/bin/sleep", tmp_path / "sudo")
    before = time.time()
    process = subprocess.Popen([tmp_path / "sudo", "60"])
    try:
        assert before - 1 < program.oldest_sudo() < time.time() + 1
    finally:
        process.kill()
        process.wait()


def test_a_session_waits_for_its_exit_code(
    host: Host, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "SETTLED_SECONDS", 60)
    session(host.sessions, ALICE)
    host.append()
    assert not host.ledger.exists()
    host.log.write_text(log_line(ALICE, 0))
    host.append()
    assert host.entries()[0]["exit"] == 0


@pytest.mark.parametrize(
    ("log", "code"),
    [
        (log_line(ALICE, 1).replace("EXIT=1", "SIGNAL=TERM ; EXIT=143"), 143),
        (log_line(ALICE, 4, folder="/tmp/ ; TSID=alice-20261203T063900-XXXXXX ; COMMAND=y"), 4),
        (log_line(ALICE, 0) + log_line(ALICE, 1), None),
        (log_line(ALICE, 256), None),
        (log_line(ALICE, 0).replace(": alice :", ": bob :"), None),
        (log_line(ALICE, 0).replace(": alice :", ": alice : command not allowed ;"), None),
        (log_line(ALICE, 0).replace(" ; EXIT=0", ""), None),
        ("", None),
    ],
    ids=[
        "signal",
        "forged folder",
        "two of a second",
        "no code",
        "another user's",
        "refused",
        "begun",
        "none",
    ],
)
def test_the_exit_code_is_that_of_the_sessions_own_line(host: Host, log: str, code: int | None) -> None:
    session(host.sessions, ALICE)
    host.log.write_text(log)
    host.append()
    assert host.entries()[0]["exit"] == code


def test_two_sessions_of_a_second_have_no_exit_code(host: Host) -> None:
    session(host.sessions, ALICE)
    session(host.sessions, f"{ALICE[:-6]}AAAAAA")
    host.log.write_text(log_line(ALICE, 0))
    host.append()
    assert [entry["exit"] for entry in host.entries()] == [None, None]


def test_arguments_of_the_break_glass_account_are_not_listed(host: Host) -> None:
    session(host.sessions, ALICE.replace("alice", "breakglass"), runargv=["mysql", "--password=canary"])
    host.append()
    (entry,) = host.entries()
    assert (entry["user"], entry["command"], entry["arguments"]) == ("breakglass", "/usr/bin/systemctl", None)
    assert "canary" not in host.ledger.read_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"command": "/tmp/\x1b[2J", "runargv": ["x", "\n"]},
        {"command": "/" + "x" * 2000, "runargv": ["x", *["y"] * 33]},
        {"command": 5, "runargv": ["x", 5]},
        {"command": None, "runargv": ["x", "y" * 600, "z" * 600]},
    ],
    ids=["control characters", "too long", "numbers", "long together"],
)
def test_a_field_that_not_every_reader_shows_is_not_listed(host: Host, fields: dict[str, Any]) -> None:
    session(host.sessions, ALICE, **fields)
    assert host.append() == []
    assert (host.entries()[0]["command"], host.entries()[0]["arguments"]) == (None, None)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"timestamp": {"seconds": 1e999}}', "[" * 100_000])
def test_a_session_that_sudo_could_not_describe_is_listed(host: Host, text: str) -> None:
    (session(host.sessions, ALICE) / "log.json").write_text(text)
    assert host.append() == []
    assert (host.entries()[0]["user"], host.entries()[0]["started"]) == ("alice", None)


def test_the_oldest_listed_sessions_go_first(host: Host) -> None:
    names = [f"alice-20261203T06395{second}-AAAAAA" for second in (2, 1, 0)]
    for name in names:
        session(host.sessions, name, size=1 << 20)
    assert host.append(mib=2) == []
    assert [path.name for path in host.sessions.iterdir()] == names[:1], "two and their folders exceed 2 MiB"
    assert [entry["session"] for entry in host.entries()] == names[::-1]
    assert host.check()[0]


def test_a_session_that_is_not_listed_is_not_removed(
    host: Host, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "oldest_sudo", lambda: 0.0)
    session(host.sessions, ALICE, ended=False, size=2 << 20)
    (problem,) = host.append(mib=1)
    assert "sessions that are not listed fill 2 MiB, 1 are the most" in problem
    assert (host.sessions / ALICE).exists()


def test_the_ledger_is_shortened_with_its_sessions(
    host: Host, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "MOST_LINES", 4)
    monkeypatch.setattr(program, "FEWEST_LINES", 2)
    for second in range(5):
        session(host.sessions, f"alice-20261203T06395{second}-AAAAAA")
    host.append()
    assert [entry["number"] for entry in host.entries()] == [4, 5]
    assert len(list(host.sessions.iterdir())) == 2
    host.append()
    session(host.sessions, BOB)
    host.append()
    assert [entry["number"] for entry in host.entries()] == [4, 5, 6]
    assert host.check() == (True, "sessions are as listed, 6 so far")


def test_what_a_power_cut_tore_is_written_again(host: Host) -> None:
    session(host.sessions, ALICE)
    host.append()
    whole = host.ledger.read_bytes()
    host.ledger.write_bytes(whole[:-40])
    assert host.append() == []
    assert host.ledger.read_bytes() == whole


def test_a_line_that_was_altered_is_named_and_nothing_is_added_or_removed(host: Host) -> None:
    for name in (ALICE, BOB):
        session(host.sessions, name)
    host.append()
    host.ledger.write_text(host.ledger.read_text().replace('"alice"', '"carol"'))
    assert "line 2 of ledger does not follow the one before: it was altered" in host.check()[1]
    before = host.ledger.read_bytes()
    session(host.sessions, "alice-20261203T070000-AAAAAA")
    words = [str(host.sessions), str(host.ledger), str(host.log), "0"]
    assert host.program.main("append", *words) == 1
    assert host.ledger.read_bytes() == before
    assert len(list(host.sessions.iterdir())) == 3


@pytest.mark.parametrize("what", ["ttyout", "timing", "log.json"])
def test_a_session_that_was_altered_is_named(host: Host, what: str) -> None:
    made = session(host.sessions, ALICE)
    host.append()
    (made / what).chmod(0o600)
    (made / what).write_text("other")
    assert host.check() == (False, f"{ALICE} is not what was listed: it was altered")


def test_a_session_that_has_long_ended_and_is_not_listed_is_named(
    host: Host, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "LATE_SECONDS", -1)
    session(host.sessions, ALICE)
    assert host.check() == (False, f"{ALICE} has ended and is not listed")


def writable(folder: Path) -> None:
    session(folder, ALICE).chmod(0o722)


def linked(folder: Path) -> None:
    session(folder.parent, ALICE)
    (folder / ALICE).symlink_to(folder.parent / ALICE)


def with_a_link(folder: Path) -> None:
    made = session(folder, ALICE)
    (made / "ttyout").unlink()
    (made / "ttyout").symlink_to("/etc/hostname")


def with_a_fifo(folder: Path) -> None:
    os.mkfifo(session(folder, ALICE) / "ttyin")


def with_another_file(folder: Path) -> None:
    (session(folder, ALICE) / "notes").write_text("")


@pytest.mark.parametrize("make", [writable, linked, with_a_link, with_a_fifo, with_another_file])
def test_a_session_that_sudo_did_not_make_so_is_named_and_neither_listed_nor_removed(
    host: Host, make: Any
) -> None:
    make(host.sessions)
    problems = host.append(mib=0)
    assert any(problem.startswith(f"{ALICE} is not listed: ") for problem in problems)
    assert not host.ledger.exists()
    assert (host.sessions / ALICE).exists()


def test_a_folder_that_sudo_does_not_make_is_named(host: Host) -> None:
    (host.sessions / "-rf").mkdir()
    assert host.check() == (False, "'-rf': sudo makes no such folder")


def rules(folder: Path) -> str:
    """Those of role operators, with its group's folder below FOLDER, for alice who may run three programs."""
    (folder / "role").mkdir()
    made = rendered(
        folder / "role",
        "operators",
        {},
        "ops1",
        {"ops1.estate.internal": "10.0.0.1"},
        {"role_path": str(ROOT / "roles/operators")},
        configured=True,
    )
    text = content(made, "/sudoers.d/llmkeep-operators").replace("/var/log/", f"{folder}/")
    programs = ", ".join(f"/usr/bin/{name}" for name in ("echo", "false", "cat"))
    return f"{text}alice ALL = (root) {programs}\n"


@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_sessions_of_the_real_sudo_are_listed_with_their_exit_codes(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.program, "SETTLED_SECONDS", 60)
    where = tmp_path / "x ; TSID=alice-20261203T063958-XXXXXX ; COMMAND=y"
    where.mkdir()
    long = "x" * 1000
    commands = [
        sudo("echo", long),
        "sleep 1.1",
        sudo("false"),
        sudo("id"),
        "sleep 1.1",
        sudo("cat", "/nowhere"),
    ]
    real(tmp_path, rules(tmp_path), commands, where)
    assert host.append() == []
    shown = [(entry["command"], entry["arguments"], entry["exit"]) for entry in host.entries()]
    assert shown == [
        ("/usr/bin/echo", [long], 0),
        ("/usr/bin/false", [], 1),
        ("/usr/bin/cat", ["/nowhere"], 1),
    ]
    assert host.check() == (True, "sessions are as listed, 3 so far")
