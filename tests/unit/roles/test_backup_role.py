"""What role backup makes of an inventory, and its programs, without a control node."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import ROOT
from rendered_role import absent, content, hardened, rendered

from llmkeep.backup.commands import Settings
from llmkeep.backup.repository import BackupError, Repository

ROLE = ROOT / "roles/backup"
VARIABLES = yaml.safe_load((ROLE / "vars/main.yml").read_text())
SFTP = "sftp:backup@10.0.0.9:/srv/backup"


def made(folder: Path, **variables: Any) -> Any:
    wanted = {
        "service": "lookup('ansible.builtin.template', 'llmkeep-backup.service.j2')",
        "exposure": "__backup_exposure",
    }
    given = {"role_path": str(ROLE), **variables}
    hosts = {"ops1.estate.internal": "10.0.0.1"}
    return rendered(folder, "backup", wanted, "ops1", hosts, given, configured=True)


def accepted(place: str) -> bool:
    """Whether `llmkeep backup` takes the place."""
    try:
        Repository(place)
    except BackupError:
        return False
    return True


@pytest.mark.parametrize(
    "place",
    ["/srv/backup", SFTP, "/", "srv/backup", "/srv/a b", "/srv/$HOME", "sftp:host:/x", "sftp:a@b:x", "s3:x"],
)
def test_the_role_refuses_what_the_program_would_refuse(place: str) -> None:
    assert bool(re.match(VARIABLES["__backup_place"], place)) == accepted(place)


def test_without_a_repository_everything_is_removed(tmp_path: Path) -> None:
    tree = made(tmp_path)
    names = [
        "/etc/llmkeep/backup.json",
        *(f"/etc/systemd/system/llmkeep-backup.{kind}" for kind in ("service", "timer")),
    ]
    assert absent(tree) == names
    assert tree["tree"]["directories"] == []
    assert re.match(VARIABLES["__backup_place"], "")


def test_the_program_reads_the_settings_that_the_role_writes(tmp_path: Path) -> None:
    kept = {"daily": 3, "weekly": 2, "monthly": 1}
    tree = made(tmp_path, backup_repository=SFTP, backup_keep=kept, backup_paths=["/root/inventory"])
    assert Settings(**json.loads(content(tree, "/backup.json"))) == Settings(SFTP, kept, ["/root/inventory"])


@pytest.mark.parametrize("place", ["/srv/backup", SFTP])
def test_the_unit_is_hardened_and_has_the_network_only_for_sftp(place: str, tmp_path: Path) -> None:
    tree = made(tmp_path, backup_repository=place)
    lines = tree["service"].splitlines()
    in_folder = place != SFTP
    assert ("PrivateNetwork=yes" in lines) == ("IPAddressDeny=any" in lines) == in_folder
    assert (f"ReadWritePaths=-{place}" in lines) == in_folder
    assert [entry["path"] for entry in tree["tree"]["directories"]] == [place] * in_folder
    hardened(tmp_path, "llmkeep-backup.service", tree["service"], int(tree["exposure"]))


# ---------------------------------------------------------------- the first backup
def begun(folder: Path, code: int) -> tuple[int, str]:
    """Exit code and output of first-backup.sh, where systemctl ends with CODE, and journalctl says why."""
    for name, body in (
        ("systemctl", f'echo "$@" >> {folder}/asked; exit {code}'),
        ("journalctl", "echo a reason"),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    program = (ROLE / "files/first-backup.sh").read_text()
    done = subprocess.run(
        ["sh", "-c", program, "backup", str(folder / "verified.json"), "/srv/backup"],
        env={"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize("verified", [None, "/srv/backup2", SFTP])
def test_a_backup_is_made_at_once_where_none_in_the_repository_is_verified(
    verified: str | None, tmp_path: Path
) -> None:
    if verified:
        (tmp_path / "verified.json").write_text(json.dumps({"created": 1.0, "repository": verified}))
    assert begun(tmp_path, 0) == (0, "backed up to /srv/backup\n")
    assert (tmp_path / "asked").read_text() == "start llmkeep-backup.service\n"
    assert begun(tmp_path, 1) == (1, "a reason\n")


def test_a_verified_backup_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "verified.json").write_text(json.dumps({"created": 1.0, "repository": "/srv/backup"}))
    assert begun(tmp_path, 1) == (0, "")
    assert not (tmp_path / "asked").exists()


# ---------------------------------------------------------------- the newest verified backup
def findings(path: Path) -> dict[str, Any]:
    program = (ROLE / "files/verified_backup.py").read_text()
    done = subprocess.run(
        [sys.executable, "-c", program, path, "/srv/backup"], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout)["checks"])


@pytest.mark.parametrize(
    ("hours", "repository", "holds"),
    [
        (1, "/srv/backup", (True, True)),
        (47, "/srv/other", (True, False)),
        (49, "/srv/backup", (False, True)),
        (-2, "/srv/backup", (False, True)),
    ],
)
def test_age_and_place_of_the_newest_verified_backup_are_judged(
    hours: int, repository: str, holds: tuple[bool, bool], tmp_path: Path
) -> None:
    path = tmp_path / "verified.json"
    path.write_text(json.dumps({"created": time.time() - hours * 3600, "repository": repository}))
    checks = findings(path)
    assert (checks["recent"]["ok"], checks["repository"]["ok"]) == holds
    assert checks["recent"]["observed"] == f"made {hours} hours ago"
    assert checks["repository"]["observed"] == f"in {repository}"


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"created": 1}', '{"created": "x", "repository": "/srv/backup"}']
)
def test_no_verified_backup_holds_where_the_note_is_missing_or_unreadable(
    text: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "verified.json"
    if text is not None:
        path.write_text(text)
    for finding in findings(path).values():
        assert finding["ok"] is False
        assert finding["observed"].startswith("no verified backup: ")
