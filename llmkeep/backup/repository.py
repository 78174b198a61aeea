"""A restic repository, in a folder or on another host, and the password that opens it.

restic encrypts and authenticates the repository's content. The password is sealed to the control node, and a copy
encrypted to the escrow certificate is stored beside the repository: the repository is useless by itself, but
sufficient together with the escrow key.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from llmkeep.durable import write
from llmkeep.errors import LlmkeepError, printable
from llmkeep.sealing import in_memory

PASSWORD = "password.cms"  # noqa: S105 the name of a file, in the repository's folder
ELSEWHERE = re.compile(r"sftp:(?P<host>[A-Za-z0-9][\w.-]*@[\w.-]+):(?P<folder>/[\w./-]+)", re.ASCII)
FOLDER = re.compile(r"/[\w./-]+", re.ASCII)
# restic's exit codes (restic.readthedocs.io, "Exit codes").
PARTIAL, MISSING, LOCKED, WRONG_PASSWORD = 3, 10, 11, 12
WHOLE = "llmkeep"  # tag of each backup
SECONDS = 6 * 3600  # of one run of restic


class BackupError(LlmkeepError):
    """A backup was refused or failed. The message says what is wrong, the value seen, and what to do."""


class Missing(BackupError):
    """The repository does not exist."""


class Partial(BackupError):
    """A backup was made without files that disappeared while it ran, or that could not be read."""


def made_at(snapshot: Mapping[str, Any]) -> datetime:
    """The time at which a backup was made."""
    return datetime.fromisoformat(snapshot["time"])


@dataclass(frozen=True)
class Repository:
    """Location of backups: a folder's path, or `sftp:USER@HOST:/FOLDER`."""

    location: str

    def __post_init__(self) -> None:
        if not ELSEWHERE.fullmatch(self.location) and not FOLDER.fullmatch(self.location):
            raise BackupError(
                f"{printable(self.location)} is not a backup location: give the absolute path of a folder, or "
                "sftp:USER@HOST:/FOLDER"
            )

    @property
    def _elsewhere(self) -> re.Match[str] | None:
        return ELSEWHERE.fullmatch(self.location)

    # ---------------------------------------------------------------- the password beside it
    def keep_password(self, encrypted: bytes) -> None:
        """Write the encrypted password beside the repository, whose folder exists."""
        if self._elsewhere is None:
            return write(Path(self.location, PASSWORD), encrypted, 0o444)
        with tempfile.NamedTemporaryFile(prefix="llmkeep-") as file:
            file.write(encrypted)
            file.flush()
            self._sftp(f"put {file.name} {self._elsewhere['folder']}/{PASSWORD}")
            return None

    def encrypted_password(self) -> bytes:
        """The encrypted password beside the repository; BackupError if there is none."""
        if self._elsewhere is None:
            path = Path(self.location, PASSWORD)
            if not path.is_file():
                raise BackupError(
                    f"there is no {path}: give the folder that `llmkeep backup create` wrote, on a disk that is mounted"
                )
            return path.read_bytes()
        with tempfile.TemporaryDirectory(prefix="llmkeep-") as folder:
            copy = Path(folder, PASSWORD)
            self._sftp(f"get {self._elsewhere['folder']}/{PASSWORD} {copy}")
            return copy.read_bytes()

    def _sftp(self, line: str) -> None:
        assert self._elsewhere is not None  # noqa: S101 both callers ask
        argv = ["sftp", "-q", "-o", "BatchMode=yes", "-b", "-", self._elsewhere["host"]]
        done = subprocess.run(
            argv, input=line + "\n", capture_output=True, text=True, check=False, timeout=300
        )
        if done.returncode:
            words = printable(" ".join(done.stderr.split()))
            raise BackupError(
                f"`{line.split()[0]}` of {PASSWORD} at {self.location} failed: {words}. That host must be in known_hosts, "
                "and must accept this host's root by SSH key"
            )

    # ---------------------------------------------------------------- restic
    def restic(self, password: bytes, *words: str, folder: Path = Path("/")) -> str:
        """Standard output of a restic command, run in FOLDER; BackupError with restic's own message if it fails."""
        code, output, error = self._ran(password, words, folder)
        if code == LOCKED:  # perhaps by a run that was killed, which `unlock` finds out
            self._ran(password, ("unlock",), folder)
            code, output, error = self._ran(password, words, folder)
        if code:
            kind = {MISSING: Missing, PARTIAL: Partial}.get(code, BackupError)
            raise kind(self._failure(code, words[0], error))
        return output

    def snapshots(self, password: bytes, *words: str) -> list[dict[str, Any]]:
        """restic's description of each backup, oldest first."""
        rows = json.loads(self.restic(password, "snapshots", "--json", "--tag", WHOLE, *words) or "[]") or []
        return sorted(rows, key=made_at)

    def _ran(self, password: bytes, words: tuple[str, ...], folder: Path) -> tuple[int, str, str]:
        with in_memory(password) as secret:
            argv = [
                "restic",
                "--no-cache",
                "--quiet",
                "--repo",
                self.location,
                "--password-file",
                str(secret),
            ]
            try:
                done = subprocess.run(
                    [*argv, *words],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                    timeout=SECONDS,
                    cwd=folder,
                )
            except FileNotFoundError as error:
                raise BackupError(
                    "restic is not installed: run bootstrap from a bundle that has it"
                ) from error
        return done.returncode, done.stdout, done.stderr

    def _failure(self, code: int, verb: str, error: str) -> str:
        words = printable(" ".join(error.split()))[-600:]
        reasons = {
            MISSING: "there is no repository: give the one that `llmkeep backup create` writes to to to to",
            LOCKED: "another restic process is using it: wait for it to finish",
            WRONG_PASSWORD: "this password does not open it, so it belongs to another estate: give another location",
            PARTIAL: "some files could not be read: run it again",
        }
        reason = reasons.get(code, "if the disk is full, make room; then run it again, existing data is kept")
        return f"{self.location}: restic {verb} ended with {code}: {words}. {reason}"
