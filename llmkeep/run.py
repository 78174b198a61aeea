"""The operator's verbs that run Ansible: `llmkeep site | verify | run`, through ansible-runner.

What Ansible prints is printed as it comes. Nothing of a run stays on disk: its working folder lies in memory
and goes with it.
Exit codes: 0 done, and all checks hold; 1 a host failed, a check does not hold, or the run was refused;
130 interrupted.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ansible_runner

from llmkeep.errors import LlmkeepError
from llmkeep.record import runs as record
from llmkeep.record.runs import INSTALLED, recorded

GRACE_SECONDS = 15


class RunError(LlmkeepError):
    """The run cannot start. The message says what is wrong, the value seen, and the way out."""


def tree() -> Path:
    """The tree whose playbooks are run: this checkout, or what the bundle brought."""
    checkout = Path(__file__).resolve().parent.parent
    for place in (checkout, INSTALLED):
        if (place / "site.yml").is_file():
            return place
    raise RunError(
        f"neither {checkout} nor {INSTALLED} has a site.yml: "
        "run bootstrap from the stick, or work in a checkout"
    )


def inventory(given: str, root: Path) -> Path:
    """An inventory as the operator names it: from where they stand, or else from the tree."""
    for place in (Path.cwd() / given, root / given):
        if place.exists():
            return place.resolve()
    raise RunError(f"there is no inventory {given!r}, neither here nor in {root}: "
                   f"give a file or folder with -i; {root}/inventory/example is one to copy")  # fmt: skip


@dataclass
class Heard:
    """What a run said that is worth more than its output: what failed, and why; what was counted.

    `asked`: tasks whose standard output is kept, in `said` by task and host.
    """

    failures: list[str] = field(default_factory=list)
    hosts: list[dict[str, object]] = field(default_factory=list)
    asked: frozenset[str] = frozenset()
    said: dict[tuple[str, str], str] = field(default_factory=dict)

    def event(self, event: dict[str, Any]) -> bool:
        """Called by ansible-runner for each event; False keeps it from writing the event to disk."""
        data = event.get("event_data", {})
        if event.get("event") in ("runner_on_failed", "runner_on_unreachable"):
            message = (data.get("res") or {}).get("msg", "no message")
            self.failures.append(f"{data.get('host')}: {data.get('task')}: {message}")
        elif event.get("event") == "playbook_on_stats":
            self.hosts = record.counted(data)
        elif event.get("event") == "runner_on_ok" and data.get("task") in self.asked:
            self.said[data["task"], data["host"]] = (data.get("res") or {}).get("stdout", "")
        return False


class Interruption:
    """Ctrl-C, or a stop by systemd: Ansible is asked to end its workers itself, and killed only if it does not.

    ansible-runner asks once a second whether to kill; its own answer to Ctrl-C would leave tasks running unattended.
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
) -> tuple[int, Heard]:
    """Run one playbook; its exit code and what was heard, of the tasks ASKED also their output."""
    root = tree()
    heard, interruption = Heard(asked=asked), Interruption()
    work = Path(tempfile.mkdtemp(prefix="llmkeep-", dir=_memory()))
    try:
        collection = work / "collections/ansible_collections/llmkeep/estate"
        collection.parent.mkdir(parents=True)
        collection.symlink_to(root)
        environment = {
            "ANSIBLE_CONFIG": str(root / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(work / "collections"),
            "TMPDIR": str(work),
            # ansible-playbook lies beside this Python, whether or not that folder is on the operator's PATH.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        }
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
            event_handler=heard.event,
            cancel_callback=interruption,
            quiet=quiet,
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if interruption.asked_at is not None:
        print("llmkeep: interrupted; run it again, what is done is kept", file=sys.stderr)
        return 130, heard
    return int(done.rc != 0), heard


def _memory() -> str | None:
    """A folder in memory that only this user reads, where there is one."""
    for name in (
        os.environ.get("TMPDIR"),
        "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR"),
    ):
        if name and os.access(name, os.W_OK):
            return name
    return None


def _words(given: argparse.Namespace) -> list[str]:
    """What the operator said, in ansible-playbook's words."""
    words = [word for name in ("limit", "tags", "skip_tags") if getattr(given, name) for word in
             (f"--{name.replace('_', '-')}", getattr(given, name))]  # fmt: skip
    words += [word for value in given.extra_vars for word in ("--extra-vars", value)]
    words += ["--check"] * given.check + ["--diff"] * given.diff + ["-v"] * given.verbose
    return words + list(given.ansible)


def _run(given: argparse.Namespace) -> int:
    root = tree()
    playbook = next(
        (place for place in (Path.cwd() / given.playbook, root / given.playbook) if place.is_file()), None
    )
    if playbook is None:
        known = ", ".join(sorted(f"playbooks/{path.name}" for path in (root / "playbooks").glob("*.yml")))
        raise RunError(
            f"there is no playbook {given.playbook!r}, neither here nor in {root}: "
            f"take site.yml or one of {known}"
        )
    inventories = [inventory(place, root) for place in given.inventory]
    with recorded(root, playbook.resolve(), inventories, given) as outcome:
        code, heard = play(playbook.resolve(), inventories, _words(given))
        outcome.code, outcome.hosts = code, heard.hosts
    return code


def _verify(given: argparse.Namespace) -> int:
    root = tree()
    inventories = [inventory(place, root) for place in given.inventory]
    with tempfile.TemporaryDirectory(prefix="llmkeep-", dir=_memory()) as folder:
        report = given.report.resolve() if given.report else Path(folder) / "report.json"
        report.unlink(missing_ok=True)
        if given.limit:
            given.limit += ",localhost"  # who writes the report
        words = [*_words(given), "--extra-vars", json.dumps({"verify_report": str(report)})]
        with recorded(root, (root / "playbooks/verify.yml").resolve(), inventories, given) as outcome:
            code, heard = play(root / "playbooks/verify.yml", inventories, words, quiet=given.json)
            outcome.code, outcome.hosts = code, heard.hosts
            if report.exists():
                outcome.not_enforceable = json.loads(report.read_text()).get("not_enforceable", [])
        if given.json and report.exists():
            print(report.read_text(), end="")
        elif given.json:
            print(json.dumps({"ok": False, "checks": 0, "hosts": {}, "failures": heard.failures}))
        if not report.exists():
            print("llmkeep: the checks could not be run to their end, so nothing is proved", file=sys.stderr)
            return code or 1
    return code


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`llmkeep site | verify | run`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-i", "--inventory", action="append", required=True, help="file or folder; may be repeated"
    )
    common.add_argument("-l", "--limit", help="only these hosts")
    common.add_argument("-t", "--tags", help="only these roles")
    common.add_argument("--skip-tags", help="all but these roles")
    common.add_argument(
        "-e", "--extra-vars", action="append", default=[], metavar="VARS", help="as for ansible-playbook"
    )
    common.add_argument("-C", "--check", action="store_true", help="say what would change, change nothing")
    common.add_argument("-D", "--diff", action="store_true", help="show what changes in files")
    common.add_argument("-v", "--verbose", action="count", default=0, help="more, up to -vvvv")
    common.add_argument(
        "--unrecorded", metavar="REASON", help="run even if the audit record cannot be written; told loudly"
    )
    common.add_argument("ansible", nargs="*", help="more words for ansible-playbook, after --")
    parser = subparsers.add_parser(
        "site", parents=[common], help="bring the estate to what the inventory says"
    )
    parser.set_defaults(run=_run, playbook="site.yml")
    parser = subparsers.add_parser(
        "verify", parents=[common], help="check by check, what is true now; changes nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the report and nothing else")
    parser.add_argument("--report", type=Path, help="keep the report in this file")
    parser.set_defaults(run=_verify)
    # Its own parent, before the common one: the playbook comes first, more words for Ansible come last.
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("playbook", help="as playbooks/renew.yml")
    parser = subparsers.add_parser("run", parents=[named, common], help="run one playbook")
    parser.set_defaults(run=_run)
