"""A real terminal, at which a test types what a program asks for."""

import os
import pty
import subprocess
import termios
import time
from pathlib import Path


def run(argv: list[str], answers: list[str], folder: Path) -> tuple[int, str]:
    """Run a program in FOLDER with a terminal of its own; returns the exit code and what was on the screen.

    Each question, which ends with a colon and is answered without echo, gets the next answer.
    """
    ours, theirs = pty.openpty()
    started = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *argv], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder
    )
    os.close(theirs)
    left, screen, asked = list(answers), b"", 0
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # the last process has closed it
            break
        if not more:
            break
        screen += more
        if left and screen[asked:].rstrip(b" ").endswith(b":"):
            asked = len(screen)
            while (
                started.poll() is None and termios.tcgetattr(ours)[3] & termios.ECHO
            ):  # asked first, echo stopped then
                time.sleep(0.001)
            os.write(ours, left.pop(0).encode() + b"\n")
    os.close(ours)
    return started.wait(), screen.decode()
