"""record_heads.py USER RECORD KEPT SEEN SEEN_FOLDER [VOLUME]: what a witness asks of the record in folder RECORD.

The witness has KEPT bytes of its heads. After a line `record`, since a login shell may print something before, one line each: the
verifier or `none`, a hash of as much as the witness has, what comes after that (at most 192 KiB a time), the tip: the head that
was to be signed last. More at a time would be lost: ansible-runner drops a result of 700,000 characters or more, and raw's output
is in it twice.
SEEN, in base64, is what the last look saw: it is left in SEEN_FOLDER, for the writer to compare before it signs.
Where VOLUME, a mount unit, is there and not mounted, as while a host boots, nothing can be said of the record: `shut`.
Root reads as USER, to whom the folder belongs: a link that USER makes there leads to nothing of root's.
"""

import base64
import hashlib
import io
import os
import pwd
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES, NEW_BYTES, LINE_BYTES = 4 << 20, 192 << 10, 1024


def leave(seen: bytes, folder: Path) -> None:
    """Replace SEEN_FOLDER/head durably, unless it has these bytes."""
    head, aside = folder / "head", folder / ".head.new"
    if not head.exists() or head.read_bytes() != seen:
        folder.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(seen)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(head)


def shut(volume: str) -> bool:
    """The mount unit exists and is not active."""
    with suppress(FileNotFoundError):
        known, active = (
            subprocess.run(["systemctl", *words, volume], capture_output=True, check=False).returncode == 0
            for words in (["cat"], ["is-active", "--quiet"])
        )
        return known and not active
    return False


def opened(folder: int, name: str) -> BinaryIO:
    """A regular file of the folder; empty where there is none. Opening never waits, as it would for the other end of a FIFO."""
    with suppress(OSError):
        file = os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder), "rb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
    return io.BytesIO()


def main(user: str, record: str, kept: str, seen: str, left: str, volume: str = "") -> None:
    os.umask(0o022)
    print("record")
    if seen:
        leave(base64.b64decode(seen), Path(left))
    if volume and shut(volume):
        print("shut")
        return
    try:
        if user and os.geteuid() == 0:
            account = pwd.getpwnam(user)
            os.setgroups([])
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
        folder = os.open(record, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (KeyError, OSError):
        print("none")
        return
    with opened(folder, "verifier") as file:
        line = file.readline(LINE_BYTES).decode("ascii", "backslashreplace").rstrip("\n")
    print(line or "none")
    with opened(folder, "heads") as file:
        blocks, rest = hashlib.sha256(), int(kept)
        while rest and (block := file.read(min(rest, BLOCK_BYTES))):
            blocks.update(f"{hashlib.sha256(block).hexdigest()}  -\n".encode())
            rest -= len(block)
        print(blocks.hexdigest())
        print(base64.b64encode(file.read(NEW_BYTES)).decode())
    with opened(folder, "tip") as file:
        print(base64.b64encode(file.read(LINE_BYTES)).decode(), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
