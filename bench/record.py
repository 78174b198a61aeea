"""Record what a command prints on a terminal as an SVG: python bench/record.py docs/images/make-lab.svg make lab

The colours are the command's own; overwritten output (the clock of a step in progress) is not in the picture.
"""

import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 100, 60
MOVES = re.compile(r"\x1b\[\??[0-9;]*[A-Zhl]|\x1b\][^\x07]*\x07")
CLOCK = re.compile(r"[\u2800-\u28ff] .*\d:\d\d:\d\d")


def picture(text: str, title: str, target: str) -> None:
    """Write what a terminal showed as an SVG."""
    lines = [MOVES.sub("", line) for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    shown = [line.rstrip() for line in lines if line.strip() and not CLOCK.search(Text.from_ansi(line).plain)]
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text(f"# {title}", style="bold"))
        for line in shown:
            console.print(Text.from_ansi(line))
        console.save_svg(target, title=title)


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
    picture(seen.decode("utf-8", "replace"), " ".join(command), target)
    return code


if __name__ == "__main__":
    sys.exit(main())
