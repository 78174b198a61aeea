"""Checkpoints under lost writes. Runs as root on a host whose kernel has dm-log-writes, with this tree's parts in a folder.

Checkpoints are saved on an ext4 below dm-log-writes, which keeps each write in the order in which flushes made it
durable; each save that has returned leaves a mark. Then a power cut is played at each flush of that log, once with
nothing of what lay between it and the next flush, and once with a random half of it. Whatever is on the disk then, the
last save that had returned, or the one after it, must be found whole.

    python3 tests/lab/kernels/lost_saves.py FOLDER CUTS SEED

FOLDER is empty and takes 0.5 GB; CUTS are played, one of each of so many equal stretches, or all if it is 0.
Exit code 0, or 1 if a checkpoint was lost.
"""

import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "payload"), str(ROOT / "payload/tests/helpers")]
from llmtrain.run.checkpoint import Checkpoints
from saver import KEY, is_whole, save
from write_log import FLUSH, FUA, Entry, apply, blank, entries, logged, loop, mark, spread, tool

DISK_SIZE = 64 << 20
SIZE = 300_000  # of a save's biggest file
STEPS = (10, 20, 30, 40)  # two are kept: so old ones are taken away, too


@contextmanager
def mounted(device: Path, place: Path) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    tool("mount", device, place)
    try:
        yield place / "checkpoints"
    finally:
        tool("umount", place)


def record(root: Path) -> None:
    """Save once, below dm-log-writes."""
    blank(root / "disk", DISK_SIZE)
    with logged(root / "disk", root / "log") as device:
        tool("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        with mounted(device, root / "mounted") as directory:
            os.sync()
            mark("0")
            checkpoints = Checkpoints(directory, KEY, last=2)
            for step in STEPS:
                save(checkpoints, step, SIZE)
                mark(str(step))
            os.close(checkpoints.lock)  # the disk can be unmounted


@dataclass(frozen=True)
class Cut:
    """The log up to DURABLE is on the disk, and maybe a part of what follows up to PARTLY; RETURNED is the last step whose
    save had returned, 0 for none."""

    durable: int
    partly: int
    returned: int


def cuts(log: Sequence[Entry]) -> Iterator[Cut]:
    """One at each flush after the first mark, whose disk has a file system; in order."""
    durable, returned, begun = 0, 0, False
    for number, entry in enumerate(log):
        if entry.mark.isdigit():  # dm-log-writes makes one of its own at the end
            begun, returned = True, int(entry.mark)
        elif entry.flags & (FLUSH | FUA):
            if begun:
                yield Cut(durable, number, returned)
            durable = number + 1
    yield Cut(durable, len(log), returned)


def found(directory: Path) -> str:
    """The step that a trainer would resume from, and whether it is whole."""
    checkpoints = Checkpoints(directory, KEY, last=2)
    try:
        checkpoint = checkpoints.latest_good()
        return f"{checkpoint.step} {is_whole(checkpoint, size=SIZE)}" if checkpoint else "0 True"
    finally:
        os.close(checkpoints.lock)


def after(root: Path, log: Sequence[Entry], cut: Cut, chance: random.Random | None) -> str:
    """`found` after the cut; with `chance`, a half of what was not durable is there, too."""
    disk = root / "replayed"
    blank(disk, DISK_SIZE)
    between = [
        entry for entry in log[cut.durable : cut.partly] if entry.length and chance and chance.random() < 0.5
    ]
    apply(root / "log", [*log[: cut.durable], *between], disk)
    with loop(disk) as device, mounted(device, root / "mounted") as directory:
        return found(directory)


def main(root: Path, count: int, seed: int) -> int:
    root.mkdir(exist_ok=True)
    record(root)
    log = entries(root / "log")
    every = list(cuts(log))
    tried, chance = spread(every, count, seed), random.Random(seed)  # noqa: S311
    print(f"{len(log)} entries, {len(every)} flushes after the file system was made, {len(tried)} tried")
    failures = newer = 0
    for cut in tried:
        for luck in (None, chance):
            try:
                said = after(root, log, cut, luck)
            except Exception as problem:
                said = f"{type(problem).__name__}: {problem}"
            good = said in (f"{cut.returned} True", f"{cut.returned + 10} True")
            newer += said == f"{cut.returned + 10} True"
            failures += not good
            print(
                f"{cut}{', a half of the rest' if luck else ''}: {said}{'' if good else ' LOST'}", flush=True
            )
    shutil.rmtree(root / "mounted", ignore_errors=True)
    print(
        f"seed {seed}: {len(tried)} cuts, {2 * len(tried)} disks, {newer} found the save that was cut, {failures} failed"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
