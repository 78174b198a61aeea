"""Accounts of operators: what is made, what is locked, and whose processes end."""

import os
import subprocess
from pathlib import Path

import pytest
from plugin_modules import load

module = load("modules.operator_accounts")
PASSWD = """root:x:0:0:root:/root:/bin/bash
alice:x:1001:990::/home/alice:/bin/bash
carol:x:1002:1002::/home/carol:/bin/bash
mallory:x:1003:990::/home/mallory:/bin/bash
trent:x:1004:990::/home/trent:/usr/sbin/nologin
"""
SHADOW = """root:*:20000:0:99999:7:::
alice:!:20000:0:-1:7::20819:
carol:!:20000:0:99999:7:::
mallory:!:20000:0:-1:7:::
trent:!:20000:0:-1:7::1:
"""
PRESENT = module.accounts_of(PASSWD, SHADOW)


def changes(declared: dict[str, str], present: object = PRESENT) -> list[str]:
    return [step.change for step in module.steps(declared, present, 990, "llm-operators")]


def test_who_was_removed_is_locked_before_others_are_let_in() -> None:
    lock, make = module.steps({"alice": "2027-01-01", "bob": ""}, PRESENT, 990, "llm-operators")
    assert lock.command == [
        "usermod",
        "--lock",
        "--expiredate",
        "1",
        "--shell",
        "/usr/sbin/nologin",
        "mallory",
    ]
    assert (make.change, make.command[:3], make.command[-1]) == (
        "account: bob",
        ["useradd", "--gid", "llm-operators"],
        "bob",
    )


def test_a_host_that_is_as_declared_is_left_alone() -> None:
    declared = {"alice": "2027-01-01", "mallory": ""}
    assert changes(declared) == []


@pytest.mark.parametrize("declared", [{"alice": ""}, {"alice": "2027-01-02"}])
def test_another_end_is_taken_over(declared: dict[str, str]) -> None:
    assert "account: alice" in changes(declared)


@pytest.mark.parametrize("secret", ["", "$y$j9T$x"])
def test_a_password_is_locked(secret: str) -> None:
    present = module.accounts_of(PASSWD, SHADOW.replace("alice:!", f"alice:{secret}"))
    assert "account: alice" in changes({"alice": "2027-01-01"}, present)


def test_an_operator_who_returns_is_let_in_again() -> None:
    assert "account: trent" in changes({"trent": ""})


def test_an_account_that_is_no_operators_is_refused() -> None:
    with pytest.raises(module.Refused, match=r"carol is an account of this host .*nothing was changed"):
        changes({"carol": ""})


def test_processes_are_known_by_their_user_and_by_whose_login_they_are_of(tmp_path: Path) -> None:
    for number, uid, login in (
        (10, 1003, "4294967295"),
        (11, 0, "1003"),
        (12, 0, "4294967295"),
        (13, 1001, "1001"),
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "status").write_text(f"Name:\tsh\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nGid:\t0\n")
        (folder / "loginuid").write_text(login)
    assert module.processes({1003}, tmp_path) == [10, 11]


def test_sessions_end(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(module, "processes", lambda _: [child.pid] if child.poll() is None else [])
    module.end_sessions({os.geteuid()})
    assert child.wait() == -9
