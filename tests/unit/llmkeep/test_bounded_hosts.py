"""What a host sends is bounded here, whatever it says: output of commands, files that are fetched, archives that are unpacked."""

import gzip
import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from plugin_modules import ROOT

from llmkeep import playbooks

# Stand-ins: each runs here what it is to run on a host; `sftp` sends 50 MB for the file `endless`.
SSH = """#!/bin/sh
for command; do :; done
exec sh -c "$command"
"""
SFTP = """#!/bin/sh
read -r _ source file
case $source in *endless) exec head -c 50000000 /dev/zero > "$file" ;; esac
exec cp "$source" "$file"
"""
HOSTS = """
all:
  vars: {ansible_connection: ssh, ansible_python_interpreter: /usr/bin/python3}
  children: {serve: {hosts: {llm1: {}}}, train: {hosts: {train1: {ansible_connection: local}}}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With a host, and files on it."""
    for name, program in (("ssh", SSH), ("sftp", SFTP)):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts.yml").write_text(HOSTS)
    for name in ("endless", "short"):
        (tmp_path / name).write_text("short")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as memory:
        monkeypatch.setenv("TMPDIR", memory)
        yield tmp_path


def played(
    folder: Path, task: dict[str, object], hosts: str = "serve", most_bytes: int = 1_000_000
) -> list[str]:
    """Failures of a play of this task."""
    play = {"hosts": hosts, "gather_facts": False, "tasks": [{"name": "Task", **task}]}
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    places = [folder / "hosts.yml"]
    return playbooks.play(folder / "play.yml", places, [], quiet=True, most_bytes=most_bytes)[1].failures


@pytest.mark.parametrize("name", ["short", "endless"])
def test_a_fetched_file_ends_at_the_bound(name: str, folder: Path) -> None:
    arguments = {"src": f"{folder}/{name}", "dest": f"{folder}/fetched", "flat": True}
    failures = played(folder, {"ansible.builtin.fetch": arguments})
    assert [failure.partition(":")[0] for failure in failures] == (["llm1"] if name == "endless" else [])
    assert (folder / "fetched").stat().st_size <= 1_000_000


def test_a_journal_that_is_fetched_by_another_hosts_task_ends_at_the_bound(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKEEP_SFTP_BYTES", "1000000")
    tasks = (
        (ROOT / "playbooks/tasks/take_journal.yml")
        .read_text()
        .replace("{{ playbook_dir }}", f"{ROOT}/playbooks")
    )
    (variables,) = (
        task["vars"] for task in yaml.safe_load(tasks) if "ansible_sftp_executable" in task.get("vars", {})
    )
    arguments = {"src": f"{folder}/endless", "dest": f"{folder}/fetched", "flat": True}
    fetched = {"ansible.builtin.fetch": arguments, "delegate_to": "llm1", "vars": variables}
    assert "failed to transfer file" in "".join(played(folder, fetched, "train", most_bytes=0))
    assert (folder / "fetched").stat().st_size <= 1_000_000


def test_a_commands_output_ends_at_the_bound(folder: Path) -> None:
    assert played(folder, {"ansible.builtin.raw": "echo short"}) == []
    assert "more than 1000000 bytes" in played(folder, {"ansible.builtin.raw": "yes"})[0][-1000:]


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone becomes another user")
@pytest.mark.parametrize(("size", "code"), [(50_000, 0), (150_000, 2)])
def test_a_journal_is_unpacked_up_to_a_bound(size: int, code: int) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("rated-20261127T08.jsonl")
        member.size = size
        tar.addfile(member, io.BytesIO(bytes(size)))
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        place.chmod(0o777)
        (place / "archive").write_bytes(gzip.compress(archive.getvalue()))
        words = ["take", "nobody", str(place), str(place / "archive"), "100000"]
        program = (ROOT / "playbooks/files/journal-take.sh").read_text()
        done = subprocess.run(["sh", "-c", program, *words], check=False, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert sum(path.stat().st_size for path in place.glob("*.jsonl")) <= 100_000
