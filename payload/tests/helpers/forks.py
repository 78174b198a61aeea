"""Starts programs by forked_programs.py; each is a child of this process."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

PROGRAMS = (
    "llmserve.gateway.process",
    "llmserve.engine.server",
    "llmserve.engine.echo",
    "llmserve.documents.intake",
    "llmproof.cli",
    "llmweb.cli",
    "uvloop",
)
WITH_TORCH = ("llmserve.engine.naive", "llmserve.engine.continuous", "llmserve.engine.embed")
ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER, see prctl(2)
LOCK = Lock()
ORIGINS: dict[tuple[str, ...], subprocess.Popen[str]] = {}


def origin(imports: tuple[str, ...]) -> subprocess.Popen[str]:
    """The process that forks; it ends with this one."""
    if imports not in ORIGINS:
        command = [sys.executable, str(Path(__file__).with_name("forked_programs.py")), *imports]
        ORIGINS[imports] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return ORIGINS[imports]


def end_origins() -> None:
    """End the processes that fork, and wait for them: their CPU seconds are those of the tests."""
    while ORIGINS:
        _, process = ORIGINS.popitem()
        process.communicate()


class Fork:
    """`python -m MODULE`, with what tests use of a Popen."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        errors: Path,
        torch: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self.waiting = Lock()
        words = [module, list(arguments), dict(environment), str(Path.cwd()), str(output), str(errors)]
        with LOCK:
            process = origin(PROGRAMS + WITH_TORCH if torch else PROGRAMS)
            assert process.stdin
            assert process.stdout
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.prctl(ADOPT_ORPHANS, 1, 0, 0, 0) == 0
            try:
                process.stdin.write(json.dumps(words) + "\n")
                process.stdin.flush()
                self.pid = int(process.stdout.readline())
            finally:
                libc.prctl(ADOPT_ORPHANS, 0, 0, 0, 0)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        with self.waiting:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; subprocess.TimeoutExpired after TIMEOUT seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
