"""Processes that save until they are killed. What they write says which step and rank it is of."""

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
    """The files that a rank writes at a step: three, of which one is in a folder."""
    chance = random.Random(f"{step} {rank}")  # noqa: S311 - content, no secret
    return {
        f"rank{rank}.pt": chance.randbytes(size),
        f"tag/rank{rank}.safetensors": chance.randbytes(size // 3),
        f"rng{rank}": chance.randbytes(100),
    }


def write(folder: Path, step: int, rank: int = 0, size: int = SIZE) -> None:
    """In several writes a file, so that a kill can come between."""
    for name, data in content(step, rank, size).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb", buffering=0) as file:
            for at in range(0, len(data), 1 << 14):
                file.write(data[at : at + (1 << 14)])


def save(checkpoints: Checkpoints, step: int, size: int = SIZE) -> Path:
    """One save of this rank's files."""
    return checkpoints.save(
        step, partial(write, step=step, rank=checkpoints.rank, size=size), {"cursor": step * 7}
    )


def is_whole(found: Checkpoint, rank: int = 0, size: int = SIZE) -> bool:
    """Whether a rank's files of its step are there, each as it was written."""
    wanted = content(found.step, rank, size).items()
    return found.state == {"cursor": found.step * 7} and all(
        (found.folder / name).read_bytes() == data for name, data in wanted
    )


Tell = Callable[[Any], None]


def resume(checkpoints: Checkpoints, tell: Tell) -> None:
    """Tells the step, whether this rank's files are whole, world size and nodes; or None."""
    found = checkpoints.latest_good()
    tell(found and (found.step, is_whole(found, checkpoints.rank), found.world_size, found.nodes))


def resume_and_save(checkpoints: Checkpoints, tell: Tell) -> None:
    """Without an end; tells the step that it resumes from, and each whose save has returned."""
    found = checkpoints.latest_good()
    if found and not is_whole(found, checkpoints.rank):
        raise AssertionError(f"step {found.step} is not what was written")
    step = found.step if found else 0
    while True:
        tell(step)
        step += 1
        save(checkpoints, step)


def save_two(checkpoints: Checkpoints, tell: Tell) -> None:
    """Steps 10 and 20."""
    for step in (10, 20):
        save(checkpoints, step)


def fill(checkpoints: Checkpoints, tell: Tell) -> None:
    """A save for which the second rank has no space; tells the exit code. Then `resume`."""

    def fails_on_one(folder: Path) -> None:
        if checkpoints.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    try:
        checkpoints.save(30, fails_on_one, {})
    except Refusal as refusal:
        tell(refusal.code)
    resume(checkpoints, tell)


class Ranks:
    """Processes, each a rank of a gloo group if there are several, that do `work(checkpoints, tell)`.

    They are of one node with one directory, or each of a node of its own, with the directory's folder of its number.
    They are forked from one process that has imported torch and has no threads.
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
        """What each told, until its end."""
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
        """kill -9 of all; what each had told. First they stand still: none lives to see another one's end."""
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
    """In the child."""
    os.environ |= environment
    try:
        if ranks > 1:
            import torch.distributed

            torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=ranks)
        work(Checkpoints(place, KEY, last=2), end.send)
    except Exception as error:
        end.send(error)
    os._exit(0)
