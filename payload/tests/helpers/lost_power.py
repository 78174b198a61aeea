"""A power cut at each flush, simulated by a model of a disk: what was never flushed may or may not be there.

Linux guarantees that a file's content is on disk after its fsync, and a directory's entries after the directory's.
`Disk` takes a snapshot of a directory tree at each fsync; `Cut.restore` creates what may be found after a cut: each
directory with its entries as of its last flush or as of the cut, each file with its content as of either, or half of
it. Tests on real disks run on lab hosts (tests/lab/kernels/lost_saves.py).
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
    """Files and directory entries by inode."""

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
    returned: int  # number of saves that had returned

    def restore(self, target: Path, chance: random.Random | None) -> None:
        """Create what may be found afterwards; without `chance`, only what is durable."""
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
    """Watches `root`; `cuts` has a moment before and after each flush. Call `saved` after each save."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.returned = root, 0
        self.cuts: list[Cut] = []
        self.held: dict[int, int] = {}  # keeps files open, so that inode numbers are not reused
        self.one_at_a_time = threading.Lock()
        self.durable = self.look()
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.flushed)

    def flushed(self, descriptor: int) -> None:
        """Replaces os.fsync."""
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
        """A snapshot of the tree."""
        seen = Content({}, {})
        for folder, folders, files in os.walk(self.root):
            place = Path(folder)
            numbers = {name: self.number(place / name) for name in (*folders, *files)}
            seen.folders[self.number(place)] = numbers
            seen.files |= {numbers[name]: (place / name).read_bytes() for name in files}
        return seen

    def number(self, path: Path) -> int:
        """The inode number."""
        number = path.stat().st_ino
        if number not in self.held:
            self.held[number] = os.open(path, os.O_RDONLY)
        return number

    def close(self) -> None:
        """Close the files that were kept open."""
        for descriptor in self.held.values():
            os.close(descriptor)

    def cut(self) -> None:
        """Add the current moment to `cuts`."""
        number = self.root.stat().st_ino
        self.cuts.append(Cut(number, self.durable.copy(), self.look(), self.returned))

    def saved(self) -> None:
        """Note that a save has returned."""
        self.returned += 1
        self.cut()
