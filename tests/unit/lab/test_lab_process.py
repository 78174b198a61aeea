"""The lab ends its own processes, all of them, and no other."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from lab.process import Daemon, stat


def test_kills_children_too_and_forgets(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "it.json")
    daemon.start(["sh", "-c", "sleep 60 & sleep 60"], cwd=tmp_path, log=tmp_path / "log")
    deadline = time.monotonic() + 30
    while len(daemon.members()) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    members = daemon.members()
    assert len(members) == 3
    daemon.kill()
    assert all(stat(pid) is None for pid in members)
    assert daemon.pid() is None
    assert not daemon.record.exists()


def test_children_that_outlived_their_leader_are_found(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "it.json")
    leader = daemon.start(["sh", "-c", "sleep 60 & sleep 0.2"], cwd=tmp_path, log=tmp_path / "log")
    deadline = time.monotonic() + 30
    while daemon.pid() is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert daemon.pid() is None
    assert len(daemon.members()) == 1
    assert leader not in daemon.members()
    daemon.kill()
    assert daemon.members() == []


def test_a_process_id_that_was_given_to_someone_else_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    ) as other:
        seen = stat(other.pid)
        assert seen is not None
        daemon = Daemon(tmp_path / "it.json")
        daemon.record.write_text(json.dumps({"pid": other.pid, "start": seen.start - 1}), encoding="utf-8")
        assert daemon.pid() is None
        daemon.kill()
        assert other.poll() is None
        other.kill()


def test_a_broken_record_names_nobody(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "it.json")
    daemon.record.write_text("{", encoding="utf-8")
    assert daemon.pid() is None
    assert daemon.members() == []
    assert os.getpid() not in daemon.members()
