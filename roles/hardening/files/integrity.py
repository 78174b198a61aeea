#!/usr/bin/python3
"""Compares system files with AIDE's database, and names those that neither llmkeep nor a package explains.

integrity compare   the first time it makes the database; later it compares, and exits with 1 where a difference is unexplained
integrity accept    compares, prints every difference, and takes the files as they are for the database

The outcome of the last comparison is /var/lib/llmkeep-integrity/last.json. A difference is explained where the file is as llmkeep
wrote it (/var/lib/llmkeep-written/sha256.json), or as its package has it by dpkg's list. Root on this host can change all these.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CONFIGURATION = "/etc/aide/aide.conf"
DATABASE = Path("/var/lib/aide/aide.db")
NEW = DATABASE.with_suffix(".db.new")
LAST = Path("/var/lib/llmkeep-integrity/last.json")
WRITTEN = Path("/var/lib/llmkeep-written/sha256.json")
PACKAGES = Path("/var/lib/dpkg/info")
FAILED = 14  # AIDE's exit codes from here on are errors; below, bits that say which differences there are


def aide(verb: str) -> dict[str, object]:
    """AIDE's report. Ends the program where AIDE fails."""
    done = subprocess.run(
        ["aide", f"--{verb}", f"--config={CONFIGURATION}"], capture_output=True, text=True, check=False
    )
    try:
        if done.returncode >= FAILED:
            raise ValueError(f"exit {done.returncode}")
        report: dict[str, object] = dict(json.loads(done.stdout))
    except (ValueError, TypeError) as problem:
        sys.exit(f"integrity: aide --{verb} failed ({problem}): {done.stderr.strip()[-600:]}")
    return report


def digest(path: str, algorithm: str) -> str:
    """Of a regular file; empty where there is none."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError:
        return ""


def packaged() -> dict[str, str]:
    """MD5 of each file that a package has, by dpkg's lists."""
    sums: dict[str, str] = {}
    for each in PACKAGES.glob("*.md5sums"):
        for line in each.read_text(errors="replace").splitlines():
            value, _, name = line.partition("  ")
            sums["/" + name] = value
    return sums


def unexplained(paths: list[str]) -> list[str]:
    """Those that are neither as llmkeep wrote them nor as their packages have them."""
    if not paths:
        return []
    try:
        written = dict(json.loads(WRITTEN.read_text()))
    except (OSError, ValueError, TypeError):
        written = {}
    sums = packaged()
    return [
        path
        for path in paths
        if not (
            (path in written and written[path] == digest(path, "sha256"))
            # A merged /usr has a file by two names, and dpkg's lists have either.
            or any(
                sums.get(name) == digest(path, "md5")
                for name in (path, path.removeprefix("/usr"))
                if name in sums
            )
        )
    ]


def differences(report: dict[str, object]) -> list[str]:
    """Paths of files that were added, removed or changed, without folders, which change with them."""
    paths: set[str] = set()
    for kind in ("added", "removed", "changed"):
        entries = report.get(kind)
        if isinstance(entries, dict):
            paths |= {path for path, flags in entries.items() if not str(flags).startswith("d")}
    return sorted(paths)


def note(unknown: list[str], explained: int, accepted: bool) -> None:
    LAST.parent.mkdir(mode=0o700, exist_ok=True)
    outcome = {"time": int(time.time()), "unexplained": unknown, "explained": explained, "accepted": accepted}
    aside = LAST.with_suffix(".new")
    aside.write_text(json.dumps(outcome) + "\n")
    aside.replace(LAST)


def main() -> int:
    if sys.argv[1:] not in (["compare"], ["accept"]):
        sys.exit("usage: integrity compare | accept")
    if not DATABASE.exists():
        aide("init")
        NEW.replace(DATABASE)
        note([], 0, accepted=True)
        print("made the database of system files")
        return 0
    accept = sys.argv[1] == "accept"
    paths = differences(aide("update" if accept else "check"))
    unknown = unexplained(paths)
    for path in unknown:
        print(f"{'accepted' if accept else 'changed'}: {path.encode('unicode_escape').decode('ascii')}")
    print(f"{len(paths)} differences, {len(paths) - len(unknown)} of them by llmkeep or a package")
    if accept:
        NEW.replace(DATABASE)
    note([] if accept else unknown, len(paths) - len(unknown), accept)
    return 1 if unknown and not accept else 0


if __name__ == "__main__":
    sys.exit(main())
