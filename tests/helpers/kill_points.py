"""Runs in a process of their own that die before or after the Nth call of chosen functions, as by kill -9."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


class KillPoints:
    """`functions`: owner and name of each function before and after which a run may be killed."""

    def __init__(self, count: Path, functions: list[tuple[Any, str]]) -> None:
        self.count, self.functions = count, functions
        self.run_id = self.at = 0

    def step(self) -> None:
        """One more point, in whichever process of the run; here it may end."""
        with self.count.open("a") as stream:
            stream.write(".")
        if self.count.stat().st_size == self.at:
            os.kill(self.run_id, signal.SIGKILL)
            os._exit(9)

    def run(self, work: Callable[[], None], at: int = 0) -> str:
        """ "done", "killed", or what WORK raised. It is killed at the point AT, 0 for never."""
        self.count.write_text("")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self.run_id, self.at = os.getpid(), at
            for owner, name in self.functions:
                setattr(owner, name, self.around(getattr(owner, name)))
            said = b"done"
            try:
                work()
            except Exception as problem:
                said = f"{type(problem).__name__}: {problem}".encode()
            os.write(writer, said)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            said_to_us = stream.read()
        os.waitpid(child, 0)
        return said_to_us or "killed"

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*words: Any, **more: Any) -> Any:
            self.step()
            result = function(*words, **more)
            self.step()
            return result

        return wrapped

    def points(self, work: Callable[[], None]) -> int:
        """Number of points in a run that is not killed."""
        if (outcome := self.run(work)) != "done":
            raise AssertionError(outcome)
        return len(self.count.read_text())
