"""A model in a directory of this machine."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmkeep.errors import printable
from llmkeep.models import contents
from llmkeep.models.contents import File
from llmkeep.models.refusal import DAMAGED, UNFIT, ModelRefused
from llmkeep.resumable import CHUNK, Resumable, progress

DEEPER = "1_Pooling"  # the only folder in which a file of a model may lie


class Folder:
    """A source of files without stated digests; they are hashed while they are copied."""

    checked_by = "hashed here"

    def __init__(self, path: Path, source: str | None = None) -> None:
        self.path = path
        self.name = path.resolve().name
        self.source = source or f"directory {self.name}"
        self.purl, self.facts = "", dict[str, str]()

    def files(self) -> list[File]:
        """The files in the folder. Refuses links, and weights that are shorter than their headers say."""
        files = []
        for path in sorted(self.path.iterdir()):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                files += [self._file(each) for each in sorted(path.iterdir()) if path.name == DEEPER]
                continue
            files.append(self._file(path))
        for file in files:
            if contents.TENSORS.fullmatch(file.path):
                with self._opened(file.path) as stream:
                    contents.check_weights(stream, file.path, file.size, None)
        return files

    def folders(self) -> list[str]:
        """The skipped folders."""
        return sorted(
            f"{path.name}/" for path in self.path.iterdir() if path.is_dir() and path.name != DEEPER
        )

    def copy(self, file: File, target: Resumable) -> None:
        """Copy a file; bytes already in TARGET are compared instead."""
        with (
            self._opened(file.path) as opened,
            progress(opened, file.size, file.path) as stream,
        ):
            while chunk := stream.read(CHUNK):
                target.write(chunk)
        if target.tell() != file.size:
            raise ModelRefused(
                DAMAGED,
                f"{self.path / file.path} had {file.size} bytes and then {target.tell()}: "
                "wait until it is complete, and run it again",
            )

    def _file(self, path: Path) -> File:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) and not (stat.S_ISDIR(status.st_mode)):
            what = f"a link to {path.readlink()}" if path.is_symlink() else "not a plain file"
            raise ModelRefused(
                UNFIT,
                f"{path} is {printable(what)}: a link can lead anywhere. Copy the model with `cp -rL`, and give the copy",
            )
        return File(str(path.relative_to(self.path)), status.st_size)

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        path = self.path / name
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ModelRefused(UNFIT, f"{path} is not a plain file: copy the model, and give the copy")
            yield stream
