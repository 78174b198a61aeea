"""Kills of a round of learning from ratings: when, of what, and that it is then started again, as systemd or an operator would.

A kill is three random numbers. Of a service they say after which of the step's conversations, how much later, and which one is
killed; of a command, whether its CPU time or its first output is waited for, how much longer, and which of its processes is
killed. A command that ends before its kill leaves that to the last step.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from service import Process, Service
from training_job import ranks

PATIENCE = 600.0  # seconds, for a busy machine
CLIENTS = 4  # at a time
SHORTLY = 0.1  # seconds, within which a service or what writes is killed
TICKS = os.sysconf("SC_CLK_TCK")

type Kill = tuple[float, float, float]


def planned(kills: int, steps: Sequence[str], chance: random.Random) -> dict[str, deque[Kill]]:
    """So many kills, no step more than one ahead of another."""
    each, more = divmod(kills, len(steps))
    chosen = [*steps] * each + chance.sample(steps, more)
    plan: dict[str, deque[Kill]] = {step: deque() for step in steps}
    for step in chosen:
        plan[step].append((chance.random(), chance.random(), chance.random()))
    return plan


class Killer:
    """Runs the steps of a round, and kills what the plan says."""

    def __init__(self, service: Service, plan: dict[str, deque[Kill]]) -> None:
        self.service = service
        self.plan = plan
        self.killed: list[str] = []
        self.late: list[Kill] = []

    def converse[Of](self, step: str, talk: Callable[[Of], object], people: Sequence[Of]) -> None:
        """Have clients talk, a few at a time, while services are killed."""
        kills = sorted(self.plan[step])
        self.plan[step].clear()
        done: list[Of] = []
        failed = threading.Event()

        def talked(one: Of) -> None:
            try:
                talk(one)
            except BaseException:
                failed.set()
                raise
            done.append(one)

        def kill() -> None:
            for when, later, which in kills:
                while len(done) < int(when * len(people)) and not failed.is_set():
                    time.sleep(0.002)
                time.sleep(later * SHORTLY)
                self.kill_service(step, which)

        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            killing = pool.submit(kill)
            list(pool.map(talked, people))
            killing.result()

    def kill_service(self, step: str, which: float) -> None:
        """Kill the gateway, the audit writer or an engine, and start it again."""
        service = self.service
        running: dict[str, Process | None] = {"gateway": service.gateway, "writer": service.writer}
        running |= dict(service.engines)
        name = list(running)[int(which * len(running))]
        victim = running[name]
        assert victim
        victim.process.kill()
        victim.ended()
        self.killed.append(f"{step}: {name}")
        if name == "gateway":
            service.start_gateway()
        elif name == "writer":
            service.start_writer()
        else:
            service.start_engine(name)

    def carry_out(
        self, step: str, arguments: list[str], cpu_seconds: float, done: Path, writes: Callable[[], bool]
    ) -> None:
        """Run a command until it is done, again after each kill. It takes about so many CPU seconds, and `done` is last."""
        log = self.service.folder / f"{step}.log"
        kills = self.plan[step]
        while not done.exists():
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, *arguments], stdout=output, stderr=output, start_new_session=True
                )
            killed = bool(kills) and self.kill_within(step, process, kills.popleft(), cpu_seconds, writes)
            code = process.wait(PATIENCE)
            assert killed or code == 0, f"{step}: {code}, {log.read_text()[-3000:]}"
            if code == 0:
                break
        self.late += kills
        kills.clear()

    def kill_within(
        self,
        step: str,
        process: subprocess.Popen[bytes],
        kill: Kill,
        cpu_seconds: float,
        writes: Callable[[], bool],
    ) -> bool:
        """Kill one of the command's processes; False if it had ended."""
        by_output, later, which = kill
        while not writes() if by_output > 0.5 else cpu(process) < later * cpu_seconds:
            if process.poll() is not None:
                self.late.append(kill)
                return False
            time.sleep(0.002)
        if by_output > 0.5:
            time.sleep(later * SHORTLY)
        every = processes(process)
        victim = every[int(which * len(every))]
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            victim = 0
        if victim == process.pid:
            with suppress(ProcessLookupError):  # systemd kills the others of the unit
                os.killpg(process.pid, signal.SIGKILL)
        if victim == 0 or (victim == process.pid and process.wait() != -signal.SIGKILL):
            self.late.append(kill)
            return False
        self.killed.append(
            step if len(every) == 1 else f"{step}: process {every.index(victim)} of {len(every)}"
        )
        return True


def processes(command: subprocess.Popen[bytes]) -> list[int]:
    """The command's process, and those of a training job that are alive."""
    try:
        return [command.pid, *ranks(command)]
    except (FileNotFoundError, ProcessLookupError):  # one ended meanwhile
        return [command.pid]


def cpu(command: subprocess.Popen[bytes]) -> float:
    """CPU seconds of a command's processes."""
    total = 0
    for pid in processes(command):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS
