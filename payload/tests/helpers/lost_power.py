"""A power cut at each flush, by a model of a disk: what was never flushed may or may not be there.

Linux promises that a file's content is on the disk after its fsync, and a folder's names after the folder's. `Disk`
looks at a directory at each fsync; `Cut.restore` makes what a machine may find there after a cut: each folder with its
names at its last flush or at the cut, each file with its content then or at the cut, or a half of it. Real disks are
for lab hosts (tests/lab/kernels/lost_saves.py).
"""

import os
import random
import shutil
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Content:
    """Files and folders' names, by inode."""

    files: dict[int, bytes]
    folders: dict[int, dict[str, int]]

    def copy(self) -> "Content":
        return Content(dict(self.files), dict(self.folders))


@dataclass
class Cut:
    """A moment: what is durable, and what programs see."""

    root: int
    durable: Content
    visible: Content
    returned: int  # how many saves had returned

    def restore(self, target: Path, chance: random.Random | None) -> None:
        """What may be found after it; without `chance`, only what is durable."""
        shutil.rmtree(target, ignore_errors=True)
        self._restore(self.root, target, chance)

    def _restore(self, number: int, target: Path, chance: random.Random | None) -> None:
        if number in self.durable.folders or number in self.visible.folders:
            target.mkdir(mode=0o700)
            ways = [each.folders[number] for each in (self.durable, self.visible) if number in each.folders]
            names = chance.choice(ways) if chance else self.durable.folders.get(number, {})
            for name, inside in names.items():
                self._restore(inside, target / name, chance)
            return
        now = self.visible.files.get(number, b"")
        contents = (
            [self.durable.files[number]] if number in self.durable.files else [b"", now[: len(now) // 2]]
        )
        target.write_bytes(chance.choice([*contents, now]) if chance and now else contents[0])
        target.chmod(0o600)


class Disk:
    """Below `root`, from now on; `cuts` has one before and one after each flush. Say `returned` after each save."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.returned = root, 0
        self.cuts: list[Cut] = []
        self.held: dict[int, int] = {}  # open files: an inode's number is not given to another meanwhile
        self.one_at_a_time = threading.Lock()
        self.durable = self.look()
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.flushed)

    def flushed(self, descriptor: int) -> None:
        """Instead of os.fsync."""
        with self.one_at_a_time:
            self.cut()
            self.fsync(descriptor)
            status, now = os.fstat(descriptor), self.look()
            if stat.S_ISDIR(status.st_mode):
                self.durable.folders[status.st_ino] = now.folders[status.st_ino]
            else:
                self.durable.files[status.st_ino] = now.files[status.st_ino]
            self.cut()

    def look(self) -> Content:
        """What is there now."""
        seen = Content({}, {})
        for folder, folders, files in os.walk(self.root):
            place = Path(folder)
            numbers = {name: self.number(place / name) for name in (*folders, *files)}
            seen.folders[self.number(place)] = numbers
            seen.files |= {numbers[name]: (place / name).read_bytes() for name in files}
        return seen

    def number(self, path: Path) -> int:
        """Its inode."""
        number = path.stat().st_ino
        if number not in self.held:
            self.held[number] = os.open(path, os.O_RDONLY)
        return number

    def close(self) -> None:
        """Let go of what was looked at."""
        for descriptor in self.held.values():
            os.close(descriptor)

    def cut(self) -> None:
        """One more moment to look at."""
        number = self.root.stat().st_ino
        self.cuts.append(Cut(number, self.durable.copy(), self.look(), self.returned))

    def saved(self) -> None:
        """A save has returned."""
        self.returned += 1
        self.cut()
