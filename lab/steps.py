"""Progress of a command: one line per step with its duration. All other output goes to a log."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lab.errors import LabError

HEARTBEAT_SECONDS = 15.0  # in a plain log; a terminal shows a clock instead
LAST_LINES = 15  # of a log, shown where its command failed


class Steps:
    """Prints progress on `console` and writes logs to `logs`; with `loud`, the logs are printed too."""

    def __init__(self, console: Console, logs: Path, loud: bool = False) -> None:
        self.console = console
        self.logs = logs
        self.loud = loud or os.environ.get("V") == "1"
        self._lock = threading.Lock()

    def line(self, seconds: float, text: str) -> None:
        """Print a completed step and its duration."""
        with self._lock:
            self.console.print(f"[cyan]{seconds:7.1f} s[/]  {escape(text)}", soft_wrap=True)

    @contextmanager
    def step(self, text: str) -> Iterator[Callable[[str], None]]:
        """Print TEXT with its duration at the end. Yields a function that shows the current detail."""
        started = time.monotonic()
        with self._alive(text) as now:
            yield now
        self.line(time.monotonic() - started, text)

    @contextmanager
    def series(self) -> Iterator[Callable[[str], None]]:
        """Yields a function that begins a step and ends the previous one; "step: detail" continues the step."""
        current: list[tuple[str, float]] = []
        with self._alive("") as now:

            def begin(text: str) -> None:
                name = text.partition(": ")[0]
                if not current or current[-1][0] != name:
                    end()
                    current.append((name, time.monotonic()))
                now(text)

            def end() -> None:
                if current:
                    name, started = current.pop()
                    self.line(time.monotonic() - started, name)

            yield begin
        end()

    def run(
        self,
        command: Sequence[str],
        log: str,
        heard: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run a command; each line of its output goes to the log LOG and to `heard`. LabError if it fails."""
        self.logs.mkdir(parents=True, exist_ok=True)
        place = self.logs / f"{log}.log"
        with (
            place.open("w", encoding="utf-8") as written,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                encoding="utf-8",
                errors="replace",
            ) as running,
        ):
            try:
                for raw in running.stdout or ():
                    line = raw.rstrip("\r\n")
                    print(line, file=written, flush=True)
                    if self.loud:
                        print(line, file=sys.stdout, flush=True)
                    heard(line)
            except BaseException:
                running.terminate()
                raise
        if running.returncode:
            last = place.read_text(encoding="utf-8").splitlines()[-LAST_LINES:]
            raise LabError("\n  ".join([f"exit code {running.returncode}; the end of {place}:", *last]))

    @contextmanager
    def _alive(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show that TEXT is in progress: by a clock on a terminal, by periodic lines in a plain log."""
        detail = [text]

        def now(sentence: str) -> None:
            detail[0] = sentence

        if self.console.is_terminal and not self.loud:
            columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task(text)

                def shown(sentence: str) -> None:
                    now(sentence)
                    progress.update(task, description=detail[0][: self.console.width - 14])

                yield shown
            return
        done = threading.Event()
        started = time.monotonic()

        def beat() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                with self._lock:
                    passed = time.monotonic() - started
                    self.console.print(f"      … {passed:4.0f} s  {detail[0]}", markup=False, soft_wrap=True)

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield now
        finally:
            done.set()


class RoleTimes:
    """Reads the output of ansible-playbook and reports the duration of each role when the next one begins."""

    TASK = re.compile(r"(?:TASK|RUNNING HANDLER) \[(?:llmkeep\.estate\.)?(?:(\w+) : )?(.*)\] \*")
    RESULT = re.compile(r"(ok|changed|fatal|failed): \[([\w.-]+)")

    def __init__(self, steps: Steps, now: Callable[[str], None]) -> None:
        self.steps = steps
        self.now = now
        self.role = ""
        self.started = time.monotonic()
        self.changed: dict[str, int] = {}

    def __call__(self, line: str) -> None:
        """Process one line."""
        if line.startswith("PLAY "):
            self._begin("")
        elif task := self.TASK.match(line):
            # A role's own tasks, or the floor that all roles share.
            if (role := task[1]) and not role.startswith("_") and role != self.role:
                self._begin(role)
            self.now(f"{self.role or 'preflight'}: {task[2]}")
        elif result := self.RESULT.match(line):
            self.changed[result[2]] = self.changed.get(result[2], 0) + (result[1] == "changed")

    def _begin(self, role: str) -> None:
        seconds = time.monotonic() - self.started
        for host, changed in self.changed.items():
            if self.role:
                self.steps.line(seconds, f"{host:8} {self.role:14} {f'{changed} changed' if changed else ''}")
        self.role, self.started, self.changed = role, time.monotonic(), {}
