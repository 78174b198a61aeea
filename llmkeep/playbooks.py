"""Run playbooks with ansible-runner, whose output is printed as it comes.

The bundle's tree is compared with its signed manifest before each run; a developer's checkout has none, and runs as it is.
A run leaves nothing on disk: its working folder is in memory and is removed, if need be by the next run.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import ansible_runner
import yaml

from llmkeep import durable, source_tree
from llmkeep.bundle import manifest
from llmkeep.errors import LlmkeepError
from llmkeep.places import Places

GRACE_SECONDS = 15
WORKING = "llmkeep-run-"  # begins the names of runs' working folders
INI_SECTION = re.compile(r"^\[[\w.:-]+\]\s*$", re.MULTILINE)
# Tasks whose message is put on record: of roles/_common, and of role kubernetes.
ACCEPTS = frozenset({"Accept an untested system", "Accept an older image"})
NOISE = ("[WARNING]", "<<< caused by >>>")  # of Ansible's messages, which say the same again
PLACES = Places()


class RunError(LlmkeepError):
    """The run cannot start. The message says what is wrong, the value seen, and what to do."""


def verified_tree() -> Path:
    """The tree to run playbooks from.

    Raises RunError if the bundle's tree has a changed, missing or extra file. Python files beside signed ones would
    run too, and so would bytecode: `__pycache__` is refused like any other file.
    """
    root = source_tree.located()
    if root == source_tree.INSTALLED:
        _require_signed(root.resolve())
    return root


@cache
def _require_signed(tree: Path) -> None:
    """The manifest's signature and serial, then every file; not its age, since a run may be needed to renew or revoke."""
    way_out = (
        "Nothing was run. If you did not make this change, keep a copy of the tree; then run `bootstrap` again from "
        "the medium"
    )
    try:
        highest = manifest.highest_serial(PLACES.bundle_serial)
        signed = manifest.authentic(tree.parent, PLACES.bundle_keyring, manifest.BUNDLE, highest)
    except LlmkeepError as error:
        raise RunError(f"{tree.parent} is not a bundle to run playbooks from: {error}\n{way_out}") from error
    prefix = f"{source_tree.INSTALLED.name}/"
    entries = [
        replace(entry, path=entry.path.removeprefix(prefix))
        for entry in signed.files
        if entry.path.startswith(prefix)
    ]
    if problems := manifest.differences(tree, entries, set()):
        raise RunError(
            f"{tree} differs from the signed tree of bundle {signed.serial}:\n  {manifest.shown(problems)}\n{way_out}"
        )


def inventory_path(path: str, root: Path) -> Path:
    """Path of an inventory in YAML, relative to the working directory or else to the tree."""
    for place in (Path.cwd() / path, root / path):
        if place.exists():
            require_yaml(place)
            return place.resolve()
    raise RunError(f"there is no inventory {path!r}, neither here nor in {root}: "
                   f"give a file or folder with -i; {root}/inventory/example is one to copy")  # fmt: skip


def listed(inventories: list[Path], root: Path) -> dict[str, Any]:
    """Groups, and `_meta.hostvars`, as `ansible-inventory --list` prints them; LlmkeepError if it fails."""
    words = [word for path in inventories for word in ("-i", str(path))]
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible-inventory"), *words, "--list"],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    if done.returncode:
        raise LlmkeepError(f"ansible-inventory cannot read it: {done.stderr.strip()}")
    groups: dict[str, Any] = json.loads(done.stdout)
    return groups


def require_yaml(place: Path) -> None:
    """Raise RunError, with file and line, for a file that is not YAML: Ansible would ignore a `hosts.ini` in a folder."""
    for path in sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]:
        if path.name.startswith(".") or path.suffix in (".md", ".txt"):
            continue
        text = path.read_text(errors="replace")
        if path.suffix in (".ini", ".cfg") or INI_SECTION.search(text):
            raise RunError(
                f"{path} is an INI inventory, but only YAML is supported: convert it with "
                f"`ansible-inventory -i {path} --list --yaml`"
            )
        try:
            yaml.compose(text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            raise RunError(f"{path}{line} is not YAML: {error.problem}") from error


@dataclass
class RunResults:
    """Results of a run: failures with their reasons, and Ansible's recap.

    `accepted`: untested systems and older images that the inventory accepts. `faults`: of the inventory.
    `complaints`: Ansible's messages outside of tasks. `asked`: tasks whose standard output or message is kept, in
    `outputs` by task and host.
    """

    failures: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    hosts: list[dict[str, object]] = field(default_factory=list)
    asked: frozenset[str] = frozenset()
    outputs: dict[tuple[str, str], str] = field(default_factory=dict)

    def event(self, event: dict[str, Any]) -> bool:
        """Called by ansible-runner for each event; False keeps it from writing the event to disk."""
        data = event.get("event_data", {})
        if event.get("event") in ("runner_on_failed", "runner_on_unreachable"):
            message = (data.get("res") or {}).get("msg", "no message")
            self.faults += (data.get("res") or {}).get("faults", [])
            self.failures.append(f"{data.get('host')}: {data.get('task')}: {message}")
        elif event.get("event") == "playbook_on_stats":
            self.hosts = counted(data)
        elif (
            event.get("event") == "verbose"
            and (sentence := event.get("stdout"))
            and not sentence.startswith(NOISE)
        ):
            self.complaints.append(sentence)
        elif event.get("event") == "runner_on_ok" and data.get("task") in ACCEPTS:
            if (sentence := (data.get("res") or {}).get("msg", "")) not in self.accepted:
                self.accepted.append(sentence)
        elif event.get("event") == "runner_on_ok" and data.get("task") in self.asked:
            result = data.get("res") or {}
            self.outputs[data["task"], data["host"]] = result.get("stdout", result.get("msg", ""))
        return False


def counted(stats: dict[str, Any]) -> list[dict[str, object]]:
    """Ansible's recap, one entry per host."""
    kinds = {"ok": "ok", "changed": "changed", "failed": "failures", "unreachable": "dark"}
    hosts = sorted({host for kind in kinds.values() for host in stats.get(kind) or {}})
    return [
        {"host.name": host, **{name: (stats.get(kind) or {}).get(host, 0) for name, kind in kinds.items()}}
        for host in hosts
    ]


class Interruption:
    """Handles Ctrl-C and systemd's stop: Ansible is asked to end its workers, and killed only if it does not.

    ansible-runner polls once a second whether to kill; its own handling of Ctrl-C would leave tasks running unattended.
    """

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.passed_on = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, *_: object) -> None:
        self.asked_at = self.asked_at or time.monotonic()

    def __call__(self) -> bool:
        if self.asked_at is None:
            return False
        if not self.passed_on:
            self.passed_on = True
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGINT)
        return time.monotonic() - self.asked_at > GRACE_SECONDS


def play(
    playbook: Path,
    inventories: list[Path],
    words: list[str],
    quiet: bool = False,
    asked: frozenset[str] = frozenset(),
    most_bytes: int = 0,
) -> tuple[int, RunResults]:
    """Run one playbook; returns its exit code and results, including the output of the tasks ASKED.

    `most_bytes`: limit for the output of one command or the size of one file from a host; 0 for no limit. The task
    fails if a host sends more.
    """
    root = verified_tree()
    if PLACES.restoring.exists():
        raise RunError(
            f"{PLACES.restoring}: a restore of the control node was interrupted; nothing was run. Finish it with "
            "`llmkeep backup "
            "restore`"
        )
    results, interruption = RunResults(asked=asked), Interruption()
    with working_folder() as work:
        collection = work / "collections/ansible_collections/llmkeep/estate"
        collection.parent.mkdir(parents=True)
        collection.symlink_to(root)
        environment = {
            "ANSIBLE_CONFIG": str(root / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(work / "collections"),
            "TMPDIR": str(work),
            "PYTHONDONTWRITEBYTECODE": "1",  # the tree stays as it was signed
            # ansible-playbook lies beside this Python, whether or not that folder is on the operator's PATH.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        }
        if most_bytes:
            environment["ANSIBLE_SSH_TRANSFER_METHOD"] = "sftp"
            for name, program in (("SSH", "bounded_ssh.py"), ("SFTP", "bounded_sftp.sh")):
                environment[f"LLMKEEP_{name}_BYTES"] = str(most_bytes)
                environment[f"ANSIBLE_{name}_EXECUTABLE"] = str(root / "playbooks/files" / program)
        if not sys.stdout.isatty():
            environment["ANSIBLE_NOCOLOR"] = "1"
        options = [word for place in inventories for word in ("-i", str(place))]
        done = ansible_runner.run(
            private_data_dir=str(work),
            project_dir=str(root),
            playbook=str(playbook),
            cmdline=shlex.join([*options, *words]),
            envvars=environment,
            settings={"suppress_env_files": True, "pexpect_timeout": 1},
            event_handler=results.event,
            cancel_callback=interruption,
            quiet=quiet,
        )
    if interruption.asked_at is not None:
        print("llmkeep: interrupted; run it again to continue", file=sys.stderr)
        return 130, results
    return int(done.rc != 0), results


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder in memory for one run. Folders of killed runs are removed first: they may contain users' text."""
    made = Path(tempfile.mkdtemp(prefix=".llmkeep-", dir=memory()))
    for other in made.parent.glob(f"{WORKING}*"):
        with suppress(LlmkeepError, OSError):  # of a run that is at work, or gone meanwhile
            if other.lstat().st_uid == os.geteuid():
                with durable.alone(other):
                    shutil.rmtree(other, ignore_errors=True)
    with durable.alone(made):
        # Not before it is locked does it have a name that others look for.
        work = made.rename(made.with_name(made.name.replace(".llmkeep-", WORKING)))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def memory() -> str | None:
    """A folder in memory that only this user can read, or None."""
    for name in (
        os.environ.get("TMPDIR"),
        "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR"),
    ):
        if name and os.access(name, os.W_OK):
            return name
    return None
