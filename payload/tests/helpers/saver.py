"""Processes that save checkpoints until they are killed. The content identifies its step and rank."""

import errno
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from llmtrain.exits import Refusal
from llmtrain.run.checkpoint import Checkpoint, Checkpoints

KEY = bytes(range(32))
SIZE = 100_000


def content(step: int, rank: int, size: int) -> dict[str, bytes]:
    """The files that a rank writes at a step: three, one of them in a subdirectory."""
    chance = random.Random(f"{step} {rank}")  # noqa: S311 - not a secret
    return {
        f"rank{rank}.pt": chance.randbytes(size),
        f"tag/rank{rank}.safetensors": chance.randbytes(size // 3),
        f"rng{rank}": chance.randbytes(100),
    }


def write(folder: Path, step: int, rank: int = 0, size: int = SIZE) -> None:
    """Write the files in several writes each, so that a kill can come in between."""
    for name, data in content(step, rank, size).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb", buffering=0) as file:
            for at in range(0, len(data), 1 << 14):
                file.write(data[at : at + (1 << 14)])


def save(checkpoints: Checkpoints, step: int, size: int = SIZE) -> Path:
    """Save this rank's files."""
    return checkpoints.save(
        step, partial(write, step=step, rank=checkpoints.rank, size=size), {"cursor": step * 7}
    )


def is_whole(found: Checkpoint, rank: int = 0, size: int = SIZE) -> bool:
    """Whether all files of a rank at this step are as they were written."""
    wanted = content(found.step, rank, size).items()
    return found.state == {"cursor": found.step * 7} and all(
        (found.folder / name).read_bytes() == data for name, data in wanted
    )


Tell = Callable[[Any], None]


def resume(checkpoints: Checkpoints, tell: Tell) -> None:
    """Reports the step, whether this rank's files are complete, world size and nodes; or None."""
    found = checkpoints.latest_good()
    tell(found and (found.step, is_whole(found, checkpoints.rank), found.world_size, found.nodes))


def resume_and_save(checkpoints: Checkpoints, tell: Tell) -> None:
    """Saves forever; reports the step it resumes from, and each step whose save has returned."""
    found = checkpoints.latest_good()
    if found and not is_whole(found, checkpoints.rank):
        raise AssertionError(f"step {found.step} differs from what was written")
    step = found.step if found else 0
    while True:
        tell(step)
        step += 1
        save(checkpoints, step)


def save_two(checkpoints: Checkpoints, tell: Tell) -> None:
    """Saves steps 10 and 20."""
    for step in (10, 20):
        save(checkpoints, step)


def fill(checkpoints: Checkpoints, tell: Tell) -> None:
    """A save for which the second rank has no space: reports the exit code, then as `resume`."""

    def fails_on_one(folder: Path) -> None:
        if checkpoints.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    try:
        checkpoints.save(30, fails_on_one, {})
    except Refusal as refusal:
        tell(refusal.code)
    resume(checkpoints, tell)


class Ranks:
    """Processes that run `work(checkpoints, tell)`; if there are several, each is a rank of a gloo group.

    They are on one node with one directory, or each on a node of its own with a numbered subdirectory. They are
    forked from one process that has imported torch and has no threads.
    """

    def __init__(
        self, directory: Path, ranks: int, nodes: int, work: Callable[[Checkpoints, Tell], None]
    ) -> None:
        self.processes, self.ends = [], []
        meeting = directory.parent / f"meeting-{os.urandom(6).hex()}"
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["saver", "torch.distributed"])
        for rank in range(ranks):
            place, local = (directory / str(rank), 0) if nodes > 1 else (directory, rank)
            environment = {"LOCAL_RANK": str(local), "GROUP_RANK": str(rank if nodes > 1 else 0)}
            here, there = server.Pipe(duplex=False)
            process = server.Process(target=run, args=(place, rank, ranks, meeting, environment, work, there))
            process.start()
            there.close()
            self.processes.append(process)
            self.ends.append(here)

    def said(self) -> list[list[Any]]:
        """Everything that each process has reported until its end."""
        everything: list[list[Any]] = []
        for end, process in zip(self.ends, self.processes, strict=True):
            everything.append([])
            try:
                while True:
                    everything[-1].append(end.recv())
            except EOFError:
                process.join()
        return everything

    def killed(self) -> list[list[Any]]:
        """Kill all with SIGKILL; returns what each had reported. All are stopped first, so that none sees another one
        end.
        """
        for number in [process.pid for process in self.processes if process.pid]:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGSTOP)
        for process in self.processes:
            process.kill()
        return self.said()


def run(
    place: Path, rank: int, ranks: int, meeting: Path, environment: dict[str, str],
    work: Callable[[Checkpoints, Tell], None], end: Connection,
) -> None:  # fmt: skip
    """Runs in the child process."""
    os.environ |= environment
    try:
        if ranks > 1:
            import torch.distributed

            torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=ranks)
        work(Checkpoints(place, KEY, last=2), end.send)
    except Exception as error:
        end.send(error)
    os._exit(0)
