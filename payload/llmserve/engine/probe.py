"""`llm-serve probe`: whether an engine goes on, for service managers that ask rather than listen, such as kubelet."""

import socket
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
