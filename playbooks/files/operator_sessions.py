"""operator_sessions.py LEDGER NUMBER: lines of the ledger of operators' sessions (role operators) from line NUMBER on.

After a line `sessions`, since a login shell may print something before, whole lines in base64, of at most 192 KiB a time,
or `none`. It waits for the writer, so that no line is read that a power cut could take back.
"""

import base64
import fcntl
import json
import os
import stat
import sys
from pathlib import Path

NEW_BYTES = 192 << 10


def main(ledger: str, number: str) -> None:
    print("sessions")
    path = Path(ledger)
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(folder, fcntl.LOCK_SH)
        descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        print("none")
        return
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        print("none")
        return
    new = b""
    with os.fdopen(descriptor, "rb") as file:
        for line in file:
            # One that cannot be read is for the control node to judge.
            try:
                known = json.loads(line)["number"] < int(number)
            except (ValueError, LookupError, TypeError):
                known = False
            if len(new) + len(line) > NEW_BYTES:
                break
            if not known and line.endswith(b"\n"):
                new += line
    print(base64.b64encode(new).decode(), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
