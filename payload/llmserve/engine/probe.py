"""llm-probe: exit 1 unless the engine behind a socket makes progress, for service managers that ask rather than listen.

kubelet starts it every few seconds, so it is a program of its own, without what `llm-serve` imports.
"""

import argparse
import socket
import sys
from pathlib import Path

from llmserve.protocol import LINE_LIMIT, Beat, Hello, ProtocolError, decode


def trouble(path: Path, seconds: float) -> str | None:
    """Why the engine on the UNIX socket `path` should be replaced, or None if it says within `seconds` that it goes on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(seconds)
        try:
            link.connect(str(path))
            with link.makefile("rb") as frames:
                hello = decode(frames.readline(LINE_LIMIT))
                beat = decode(frames.readline(LINE_LIMIT))
        except (OSError, ProtocolError) as error:
            return f"{path}: {error}: look at the engine's log"
    if not isinstance(hello, Hello) or not isinstance(beat, Beat):
        return f"{path}: this is no engine: give the `socket` of its configuration"
    if beat.stalled:
        return f"{path}: {hello.model} has work and makes no progress: restart the engine"
    return None


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="llm-probe", description=__doc__)
    parser.add_argument("socket", type=Path, help="`socket` of the engine's configuration")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="how long it may take to answer (default: 5)"
    )
    options = parser.parse_args()
    if reason := trouble(options.socket, options.seconds):
        print(f"llm-probe: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
