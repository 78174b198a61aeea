"""Background processes, identified by process id and start time so that no other process is ever signalled."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError


@dataclass(frozen=True)
class Stat:
    """Fields of /proc/PID/stat; `start` is in clock ticks since boot."""

    state: str
    group: int
    session: int
    start: int


def stat(pid: int) -> Stat | None:
    """State of a process; None if it has ended or is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return Stat(fields[0], int(fields[2]), int(fields[3]), int(fields[19]))


@dataclass(frozen=True)
class Daemon:
    """A process of the lab, recorded in a file; it leads a session of its own."""

    record: Path

    def start(
        self,
        command: Sequence[str],
        cwd: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
        pipe_output: bool = False,
    ) -> int:
        """Start it and record its process id and start time. Returns the process id.

        With `pipe_output` its output reaches the log through a pipe and a `cat` (user-mode-linux polls its
        console, and a regular file cannot be polled). Its standard input stays open.
        """
        open_end, held_end = os.pipe()  # the child holds both ends, so that it never reads an end of file
        writer: subprocess.Popen[bytes] | None = None
        with log.open("ab") as output:
            if pipe_output:
                writer = subprocess.Popen(
                    ["cat"],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    cwd="/",
                )
            child = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=open_end,
                stdout=writer.stdin if writer else output,
                stderr=subprocess.STDOUT,
                env=dict(environment) if environment is not None else None,
                pass_fds=(held_end,),
                start_new_session=True,
            )
        os.close(open_end)
        os.close(held_end)
        if writer and writer.stdin:
            writer.stdin.close()
        state = stat(child.pid)
        if state is None:
            raise LabError(f"{command[0]} ended as soon as it started: see {log}")
        staged = self.record.with_suffix(".new")
        staged.write_text(json.dumps({"pid": child.pid, "start": state.start}), encoding="utf-8")
        staged.replace(self.record)
        return child.pid

    def pid(self) -> int | None:
        """Its process id while it is running."""
        recorded = self._recorded()
        if recorded is None:
            return None
        pid, start = recorded
        state = stat(pid)
        return pid if state is not None and state.start == start else None

    def members(self) -> list[int]:
        """Every process of its session, including children that outlived the recorded one."""
        recorded = self._recorded()
        if recorded is None:
            return []
        leader, start = recorded
        state = stat(leader)
        if state is not None and state.start != start:
            return []  # the number belongs to someone else now, who could not have it while the session lived
        members = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                member = stat(int(entry.name))
                if member is not None and member.session == leader and member.start >= start:
                    members.append(int(entry.name))
        return members

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of its session."""
        for pid in self.members():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self, seconds: float = 10.0) -> None:
        """Kill its whole session (SIGKILL) and delete the record; LabError if a process is left after `seconds`."""
        deadline = time.monotonic() + seconds
        while members := self.members():
            self.signal(signal.SIGKILL)
            if time.monotonic() > deadline:
                raise LabError(f"processes {members} do not end: look at them with ps, then run this again")
            time.sleep(0.02)
        self.record.unlink(missing_ok=True)

    def _recorded(self) -> tuple[int, int] | None:
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
            return int(content["pid"]), int(content["start"])
        except (FileNotFoundError, ValueError, KeyError):
            return None
