"""Record what a command prints on a terminal as an SVG: python bench/record.py docs/make-lab.svg make lab

The colours and the last state of each line are the command's own; the spinner of a step in progress is not in the picture.
"""

import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 100, 60
# Lines that were drawn over: a progress bar is erased before the line that takes its place.
ERASED = re.compile(r"[^\n]*\x1b\[2K")
MOVES = re.compile(r"\x1b\[\??[0-9;]*[A-Zhl]|\x1b\][^\x07]*\x07")


def main() -> int:
    """Run the command in a terminal of its own, shown here too. Its exit code."""
    target, *command = sys.argv[1:]
    os.environ.update(COLUMNS=str(COLUMNS), LINES=str(ROWS), TERM="xterm-256color")
    seen = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        seen.extend(data)
        return data

    code = os.waitstatus_to_exitcode(pty.spawn(command, read))
    text = seen.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "")
    lines = [MOVES.sub("", ERASED.sub("", line)).rstrip() for line in text.split("\n")]
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"), force_terminal=True)  # noqa: SIM115
    console.print(Text(f"# {' '.join(command)}", style="bold"))
    console.print(Text.from_ansi("\n".join(line for line in lines if line)))
    console.save_svg(target, title=" ".join(command))
    return code


if __name__ == "__main__":
    sys.exit(main())
