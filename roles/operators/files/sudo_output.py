#!/usr/bin/python3
"""Lists finished sessions of operators on a ledger, and limits the space of sudo's recordings.

`sudo_output.py append SESSIONS LEDGER LOG MIB` adds a line for each session that has ended, then removes the oldest listed
sessions until all fill MIB at most. Exit code 1 if something is left undone, which it names. `sudo_output.py check SESSIONS
LEDGER` prints the finding of the role's check as JSON, and changes nothing.

SESSIONS is sudo's `iolog_dir`, LOG its `logfile`. docs/audit/audit-record.md describes a line; each is chained to the one
before by its number and SHA-256. Beyond 4,096 lines, only the last 2,048 and their sessions are kept.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Any

SESSION = re.compile(r"(?P<second>(?P<user>[a-z][a-z0-9-]*)-\d{8}T\d{6})-[0-9A-Za-z]{6}")
FILES = {"log", "log.json", "timing", "stdin", "stdout", "stderr", "ttyin", "ttyout"}
# How sudo ends a line of its log. A caller chooses the folder in it, so only the last TSID counts, in lines of its user only.
ENDED = re.compile(
    r".{15} : (?P<user>[a-z][a-z0-9-]*) : TTY=.* ; TSID=(?P<second>(?P=user)-\d{8}T\d{6})-XXXXXX ; COMMAND=.*"
    r" ; EXIT=(?P<code>\d{1,2}|1\d\d|2[0-4]\d|25[0-5])"
)
BREAKGLASS = "breakglass"  # runs anything, so its arguments may be secret
FIRST_PREVIOUS = "0" * 64
MOST_LINES, FEWEST_LINES = 4096, 2048
LEDGER_BYTES = 64 << 20
MOST_BYTES = 16 << 20  # of log.json, which has the caller's environment, and of the end of sudo's log
MOST_LETTERS, MOST_WORDS = 1024, 32
SETTLED_SECONDS = 60  # after which a session without an exit code in sudo's log is listed without one
CLOCK_SECONDS = 60  # by which a clock may have been set since a session began
LATE_SECONDS = 900  # the timer starts within eleven minutes
PROC = Path("/proc")


def regular_file(name: str | Path, folder: int | None = None) -> BufferedReader:
    """This user's own regular file, not through a link. OSError. Opening does not wait for the other end of a FIFO."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise OSError(f"{name} is no regular file of root's")
    return os.fdopen(descriptor, "rb")


@contextmanager
def own_folder(name: str | Path, folder: int | None = None) -> Iterator[int]:
    """The descriptor of a folder that only this user may change. OSError."""
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise OSError(f"{name} is not root's alone to change")
        yield descriptor
    finally:
        os.close(descriptor)


def names(folder: int) -> list[str]:
    return sorted(os.listdir(folder))  # of a descriptor


# ------------------------------------------------------------ the ledger
def hash_of(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def read(ledger: str, folder: int) -> list[bytes]:
    """Its complete lines without their ends. ValueError if one does not follow the one before."""
    try:
        with regular_file(ledger, folder) as file:
            whole = file.read(LEDGER_BYTES + 1)
    except FileNotFoundError:
        return []
    if len(whole) > LEDGER_BYTES:
        raise ValueError(f"{ledger} has more than {LEDGER_BYTES >> 20} MiB, which it never reaches by itself")
    lines = whole.split(b"\n")[:-1]
    for before, line in zip([b"", *lines], lines, strict=False):
        entry = json.loads(line)
        number, previous = (
            (json.loads(before)["number"] + 1, hash_of(before))
            if before
            else (entry["number"], entry["previous"])
        )
        if (entry["number"], entry["previous"]) != (number, previous):
            raise ValueError(f"line {number} of {ledger} does not follow the one before: it was altered")
    return lines


def write(ledger: str, folder: int, lines: list[bytes], new: list[bytes]) -> None:
    """Append the NEW lines durably, after its LINES; a line after those, torn by a power cut, is cut off."""
    descriptor = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    with os.fdopen(descriptor, "wb") as file:
        file.seek(sum(len(line) + 1 for line in lines))
        file.truncate()
        file.writelines(line + b"\n" for line in new)
        file.flush()
        os.fsync(file.fileno())
    os.fsync(folder)


def replace(ledger: str, folder: int, lines: list[bytes]) -> None:
    aside = f".{ledger}.new"
    write(aside, folder, [], lines)
    os.replace(aside, ledger, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


# ------------------------------------------------------------ sessions
def exit_codes(log: Path) -> dict[str, list[int]]:
    """By user and second, the exit codes in the end of sudo's log."""
    codes: dict[str, list[int]] = {}
    try:
        with regular_file(log) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_BYTES))
            for line in file:
                if ended := ENDED.fullmatch(line.rstrip(b"\n").decode(errors="replace")):
                    codes.setdefault(ended["second"], []).append(int(ended["code"]))
    except FileNotFoundError:
        pass
    return codes


def oldest_sudo() -> float:
    """When the oldest sudo that runs as this user began, in seconds since the epoch; infinity if none runs."""
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    began = [math.inf]
    for path in PROC.glob("[0-9]*"):
        try:
            own, text = path.stat().st_uid == os.geteuid(), (path / "stat").read_text()
        except OSError:  # it has ended
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        if own and name == "sudo":
            began.append(boot + int(rest.split()[19]) / os.sysconf("SC_CLK_TCK"))
    return min(began)


def end_of(session: int) -> float:
    """When sudo closed the session and made `timing` read-only, in seconds since the epoch; infinity if it did not."""
    try:
        status = os.stat("timing", dir_fd=session, follow_symlinks=False)
    except FileNotFoundError:
        return math.inf
    return status.st_ctime if stat.S_IMODE(status.st_mode) == 0o400 else math.inf


def digest(session: int) -> tuple[str, int]:
    """What `LC_ALL=C sha256sum -- * | sha256sum` prints in the folder, and the bytes of its files. OSError."""
    whole, size = hashlib.sha256(), 0
    for name in names(session):
        if name not in FILES:
            raise OSError(f"{name[:64]!a} is no file that sudo writes")
        with regular_file(name, session) as file:
            whole.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
            size += os.fstat(file.fileno()).st_size
    return whole.hexdigest(), size


def text(field: object) -> str | None:
    """A field that every reader shows unchanged; None for any other."""
    usable = isinstance(field, str) and len(field) <= MOST_LETTERS and field.isascii() and field.isprintable()
    return str(field) if usable else None


def description(session: int, user: str) -> dict[str, object]:
    """Some fields of sudo's log.json, None if one cannot be read. Never the environment, which may have secrets."""
    try:
        with regular_file("log.json", session) as file:
            written = file.read(MOST_BYTES)
        fields: dict[str, Any] = json.loads(written)
        began = datetime.fromtimestamp(int(fields["timestamp"]["seconds"]), UTC).isoformat()
        run_as, command, words = text(fields["runuser"]), text(fields["command"]), fields["runargv"][1:]
    except (FileNotFoundError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return {"started": None, "run_as": None, "command": None, "arguments": None}
    arguments = [text(word) for word in words] if user != BREAKGLASS and len(words) <= MOST_WORDS else [None]
    shown = None if None in arguments or sum(map(len, words)) > MOST_LETTERS else arguments
    return {"started": began, "run_as": run_as, "command": command, "arguments": shown}


def facts(session: int, name: str, codes: list[int], interrupted: bool) -> dict[str, object]:
    """The ledger's fields of a session."""
    user = name.rsplit("-", 2)[0]
    whole, size = digest(session)
    code = codes[0] if len(codes) == 1 and not interrupted else None
    about = {"session": name, "user": user, **description(session, user), "exit": code}
    return about | {"interrupted": interrupted, "bytes": size, "sha256": whole}


def append(sessions: Path, ledger: Path, log: Path, mib: int) -> list[str]:
    """List ended sessions, remove those beyond the limits; returns what is left undone. OSError, ValueError."""
    problems: list[str] = []
    with own_folder(ledger.parent) as state, own_folder(sessions) as folder:
        fcntl.flock(state, fcntl.LOCK_EX)
        lines = read(ledger.name, state)
        # Before a session is read: one that ends meanwhile was not interrupted.
        oldest, codes, now = oldest_sudo(), exit_codes(log), time.time()
        matches = [match for match in map(SESSION.fullmatch, names(folder)) if match]
        seconds = Counter(each["second"] for each in matches)
        present = {json.loads(line)["session"] for line in lines}
        new: list[bytes] = []
        for each in sorted(matches, key=lambda each: each["second"][len(each["user"]) :]):
            if each[0] in present:
                continue
            try:
                with own_folder(each[0], folder) as session:
                    end = end_of(session)
                    interrupted = end == math.inf
                    if interrupted and oldest <= os.fstat(session).st_mtime + CLOCK_SECONDS:
                        continue  # it runs
                    own = codes.get(each["second"], []) if seconds[each["second"]] == 1 else []
                    if not own and end < math.inf and now - end < SETTLED_SECONDS:
                        continue  # sudo is about to log its exit code
                    about = facts(session, each[0], own, interrupted)
            except OSError as error:
                problems.append(f"{each[0]} is not listed: {error}")
                continue
            last = [*lines, *new][-1:]
            number = json.loads(last[0])["number"] + 1 if last else 1
            entry = {"number": number, **about, "previous": hash_of(last[0]) if last else FIRST_PREVIOUS}
            new.append(json.dumps(entry, separators=(",", ":")).encode())
        if new:
            write(ledger.name, state, lines, new)
        lines += new
        bound(folder, lines, mib << 20, problems)
        if len(lines) > MOST_LINES:
            replace(ledger.name, state, lines[-FEWEST_LINES:])
    return problems


def space(folder: int, name: str) -> int:
    """Bytes that the session uses on the disk."""
    with own_folder(name, folder) as session:
        return 512 * sum(
            os.stat(file, dir_fd=session, follow_symlinks=False).st_blocks for file in [".", *names(session)]
        )


def bound(folder: int, lines: list[bytes], most: int, problems: list[str]) -> None:
    """Remove sessions whose lines go, and the oldest listed ones until all fill MOST bytes."""
    sizes: dict[str, int] = {}
    for name in names(folder):
        try:
            sizes[name] = space(folder, name)
        except OSError as error:
            problems.append(f"{name[:64]!a} is left as it is: {error}")
    total, going = sum(sizes.values()), len(lines) - FEWEST_LINES if len(lines) > MOST_LINES else 0
    for place, line in enumerate(lines):
        name = json.loads(line)["session"]
        if name in sizes and (place < going or total > most):
            shutil.rmtree(name, dir_fd=folder)
            total -= sizes[name]
    if total > most:
        problems.append(
            f"sessions that are not listed fill {total >> 20} MiB, {most >> 20} are the most: end those that run for long"
        )


def check(sessions: Path, ledger: Path) -> tuple[bool, str]:
    """The ledger is intact and agrees with each session's files. OSError, ValueError."""
    wrong = []
    with own_folder(ledger.parent) as state, own_folder(sessions) as folder:
        fcntl.flock(state, fcntl.LOCK_SH)
        lines = [json.loads(line) for line in read(ledger.name, state)]
        expected = {line["session"]: line["sha256"] for line in lines}
        for name in names(folder):
            try:
                if not SESSION.fullmatch(name):
                    raise OSError("sudo makes no such folder")
                with own_folder(name, folder) as session:
                    if name in expected and digest(session)[0] != expected[name]:
                        wrong.append(f"{name} is not what was listed: it was altered")
                    elif name not in expected and time.time() - end_of(session) > LATE_SECONDS:
                        wrong.append(f"{name} has ended and is not listed")
            except OSError as error:
                wrong.append(f"{name[:64]!a}: {error}")
    last = lines[-1]["number"] if lines else 0
    return not wrong, ", ".join(wrong) or f"sessions are as listed, {last} so far"


def finding(sessions: Path, ledger: Path) -> dict[str, object]:
    """The result of the check. A check that could not run does not pass."""
    try:
        holds, observed = check(sessions, ledger)
    except (OSError, ValueError, LookupError, TypeError) as problem:
        holds, observed = False, f"{type(problem).__name__}: {problem}"
    return {"ok": holds, "observed": observed}


def main(verb: str, sessions: str, ledger: str, *bounds: str) -> int:
    if verb == "check":
        print(json.dumps({"checks": {"sessions": finding(Path(sessions), Path(ledger))}}))
        return 0
    log, mib = bounds
    try:
        problems = append(Path(sessions), Path(ledger), Path(log), int(mib))
    except (OSError, ValueError, LookupError, TypeError) as problem:
        problems = [f"{ledger} or {sessions} cannot be gone on with: {problem}"]
    for each in problems:
        print(each, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
