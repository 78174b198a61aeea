"""Every run of a playbook from the control node leaves an intent before Ansible starts and an outcome after it.

The record lies in /var/log/llmkeep-audit (see llmproof/chain.py). It is written on a control node: with the bundle's
tree, or if there is a sealed seed. A developer's checkout elsewhere writes nothing.
"""

import argparse
import json
import os
import pwd
import shlex
import subprocess
import sys
import syslog
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmkeep import source_tree
from llmkeep.bundle import manifest
from llmkeep.bundle.manifest import BundleRefused
from llmkeep.durable import write
from llmkeep.errors import LlmkeepError
from llmkeep.sealing import SealError, unseal
from llmproof.chain import Chain, ChainError
from llmproof.heads import HeadError, seed_of

FOLDER = Path("/var/log/llmkeep-audit")
CREDENTIAL = "llmkeep-audit.seed"
SEALED_SEED = Path("/etc/credstore.encrypted") / CREDENTIAL
SERIAL = Path("/var/lib/llmkeep/serial")
# Beside it, what metrics say of the last run of all roles on all hosts; its time is the file's.
APPLIED = "applied.json"  # serial of the bundle that `llmkeep site` brought to all of them
VERIFIED = "verified.json"  # report of `llmkeep verify`
VULNERABLE = "vulnerable.json"  # numbers of `llmkeep cve`

type Event = dict[str, object]


class RecordError(LlmkeepError):
    """The record cannot be written. The message says what is wrong and what to do."""


@dataclass
class Outcome:
    """The outcome of a run. `hosts`: Ansible's recap per host. `not_enforceable`, `accepted`: as in the report."""

    code: int | None = None
    hosts: list[dict[str, object]] = field(default_factory=list)
    not_enforceable: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)


def is_kept(tree: Path) -> bool:
    """Whether runs of this tree on this host are recorded."""
    return tree == source_tree.INSTALLED or SEALED_SEED.exists() or _given_seed().exists()


def seed() -> bytes:
    """The signing key's seed: from systemd, or unsealed."""
    if _given_seed().exists():
        return seed_of(_given_seed().read_text())
    if not SEALED_SEED.exists():
        raise RecordError(f"{SEALED_SEED} does not exist: create it with `llmkeep audit init`")
    return seed_of(unseal(SEALED_SEED.read_bytes(), CREDENTIAL).decode())


def append(*events: Event) -> None:
    """Write EVENTS, all or none, and a signed head over them, waiting for other writers; RecordError on failure."""
    try:
        with Chain(FOLDER, seed(), wait=True) as chain:
            chain.sign()  # what a run that was killed left without a head
            chain.append(events)
            chain.sign()
    except (ChainError, HeadError, SealError, OSError) as error:
        raise RecordError(f"the audit record {FOLDER} cannot be written: {error}") from error


def whole_run(inventory: str) -> argparse.ArgumentParser:
    """Options of a verb that runs a playbook on all its hosts; `inventory`: the one by default."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "-i", "--inventory", action="append", help=f"file or folder; may be repeated ({inventory})"
    )
    parser.add_argument(
        "--unrecorded",
        metavar="REASON",
        help="run even if the audit record cannot be written; REASON goes to the journal",
    )
    none = {"limit": None, "tags": None, "skip_tags": None, "check": False, "diff": False}
    parser.set_defaults(**none, extra_vars=[], ansible=[])
    return parser


@contextmanager
def recorded(
    tree: Path, playbook: Path, inventories: list[Path], given: argparse.Namespace, more: Event | None = None
) -> Iterator[Outcome]:
    """Record a run: its intent before, its outcome after. After a RecordError at the start it must not run.

    `more`: fields of the event that replace those of a mere run.
    """
    outcome = Outcome()
    if not is_kept(tree):
        yield outcome
        return
    event = described(tree, playbook, inventories, given) | (more or {})
    try:
        append({**event, "event.outcome": "unknown", "llmkeep.audit.phase": "intent"})
    except RecordError as error:
        if not given.unrecorded:
            raise RecordError(f"{error}. Runs without a record are refused; nothing was changed. Fix this, or give "
                "--unrecorded REASON, which goes to the journal") from error  # fmt: skip
        shout(f"{who()} runs {playbook} WITHOUT AN AUDIT RECORD, reason: {given.unrecorded} ({error})")
    before = time.monotonic_ns()
    try:
        yield outcome
    finally:
        result = "success" if outcome.code == 0 else "failure"
        end: Event = {"event.outcome": result, "llmkeep.audit.phase": "outcome", "process.exit_code": outcome.code,
               "event.duration": time.monotonic_ns() - before, "llmkeep.run.hosts": outcome.hosts}  # fmt: skip
        if outcome.not_enforceable:
            end["llmkeep.checks.not_enforceable"] = outcome.not_enforceable
        if outcome.accepted:
            end["llmkeep.checks.accepted"] = outcome.accepted
        try:
            append({**event, **end})
        except RecordError as error:
            shout(f"{playbook} has finished (exit code {outcome.code}), but this is not on record: {error}")
            if not given.unrecorded:
                raise RecordError(
                    f"the run has finished, but its outcome is not on record: {error}"
                ) from error


def note(name: str, tree: Path, given: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write a run's results (FOUND) for the metrics, unless it was limited to some hosts or roles, or a preview.

    Arguments for Ansible may limit it too: a run with any writes nothing.
    """
    if is_kept(tree) and not (given.limit or given.tags or given.skip_tags or given.check or given.ansible):
        write(SERIAL.with_name(name), json.dumps(found).encode() + b"\n", 0o600)


def described(tree: Path, playbook: Path, inventories: list[Path], given: argparse.Namespace) -> Event:
    """Description of a run and its operator, without secrets."""
    name = playbook.relative_to(tree.resolve()) if playbook.is_relative_to(tree.resolve()) else playbook
    event: Event = {
        "event.kind": "event",
        "event.category": ["configuration"],
        "event.action": f"run {name}",
        "event.type": ["info" if given.check else "change"],
        "llmkeep.run.id": str(uuid.uuid4()),
        "user.name": who(),
        "process.args": words(given),
        "llmkeep.inventory": [str(place) for place in inventories],
        "llmkeep.tree.revision": revision(tree),
        "llmkeep.bundle.serial": SERIAL.read_text().strip() if SERIAL.exists() else None,
    }
    return event | ({"event.reason": given.unrecorded} if given.unrecorded else {})


def who() -> str:
    """The operator: the user that sudo names, else the login user, else the owner of this process."""
    if name := os.environ.get("SUDO_USER"):
        return name
    try:
        return os.getlogin()
    except OSError:  # no terminal: a timer
        return pwd.getpwuid(os.geteuid()).pw_name


def words(given: argparse.Namespace) -> list[str]:
    """The operator's arguments; of variables only the names, of arguments for Ansible only the options: either may be secret."""
    said = [word for name in ("limit", "tags", "skip_tags") if getattr(given, name)
            for word in (f"--{name.replace('_', '-')}", getattr(given, name))]  # fmt: skip
    for text in given.extra_vars:
        said += ["--extra-vars", *variables(text)]
    said += ["--check"] * given.check + ["--diff"] * given.diff
    for word in given.ansible:
        # -eNAME=VALUE is one word, and --extra-vars may be shortened.
        said.append(
            word.split("=")[0] if word.startswith("--") else word[:2] if word.startswith("-") else "…"
        )
    return said


def variables(text: str) -> list[str]:
    """The variable names in one --extra-vars argument, in any format that Ansible reads."""
    if text.startswith("@"):
        return [text]  # a file's name
    try:
        if text.lstrip()[:1] in ("{", "["):
            return sorted(map(str, dict(yaml.safe_load(text))))
        return [pair.split("=", 1)[0] for pair in shlex.split(text) if "=" in pair]
    except (yaml.YAMLError, ValueError, TypeError):
        return ["…"]


def revision(tree: Path) -> str:
    """The commit of the tree, according to its bundle or its checkout."""
    from llmkeep.bundle import build  # the resolvers: not for the rest

    bundle = tree.resolve().parent
    try:
        if (bundle / manifest.NAME).exists():
            found = (entry.source for entry in manifest.read(bundle).files if entry.path == "tree/site.yml")
            return next(found, "unknown")
        return build.revision(tree)
    except (BundleRefused, OSError, subprocess.CalledProcessError):
        return "unknown"


def shout(text: str) -> None:
    """Print to the terminal and log to the journal."""
    print(f"llmkeep: {text}", file=sys.stderr)
    syslog.openlog("llmkeep", facility=syslog.LOG_AUTHPRIV)
    syslog.syslog(syslog.LOG_CRIT, text)


def _given_seed() -> Path:
    return Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / CREDENTIAL
