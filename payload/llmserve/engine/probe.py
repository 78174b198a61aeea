"""llm-probe: exit 1 unless the engine behind a socket makes progress, for service managers that ask rather than listen.

kubelet starts it every few seconds, so it is a program of its own, without what `llm-serve` imports.
"""

import argparse
import http.client
import socket
import sys
import time
from pathlib import Path

import yaml

from llmserve.protocol import LINE_LIMIT, Beat, Hello, ProtocolError, decode


def trouble(path: Path, seconds: float) -> str | None:
    """Why the engine on the UNIX socket `path` should be restarted, or None if it reports progress within `seconds`."""
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
        return f"{path}: this is not an engine: specify the `socket` of its configuration"
    if beat.stalled:
        return f"{path}: {hello.model} has work and makes no progress: restart the engine"
    return None


def vllm_trouble(path: Path, seconds: float) -> str | None:
    """Why vLLM on the UNIX socket `path` does not answer, or None if it says within `seconds` that it is healthy."""
    connection = http.client.HTTPConnection("vllm")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(seconds)
        connection.sock = link
        try:
            link.connect(str(path))
            connection.request("GET", "/health", headers={"Connection": "close"})
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return f"{path}: {error}: look at the engine's log"
    return None if status == 200 else f"{path}: vLLM answers GET /health with {status}: look at its log"


def load_seconds(config: Path, base: float, rate: float) -> float:
    """How long the model of a configuration may take to start: BASE, plus the time to read each byte twice (to verify and to load
    it) at RATE MB/s.
    """
    folder = Path(yaml.safe_load(config.read_text())["model"]["path"])
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    return base + 2 * size / (rate * 1e6)


def never_loads(path: Path, seconds: float, allowed: float) -> str | None:
    """Wait until vLLM answers; returns why it did not within the allowed seconds, or None."""
    end = time.monotonic() + allowed
    while reason := vllm_trouble(path, seconds):
        if time.monotonic() > end:
            return (
                f"{reason}. The {allowed:.0f} s that --base and --rate allow are over: "
                "raise --base, or lower --rate for a slow disk"
            )
        time.sleep(1)
    return None


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="llm-probe", description=__doc__)
    parser.add_argument("socket", type=Path, help="`socket` of the engine's configuration")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="seconds that it may take to answer (default: 5)"
    )
    parser.add_argument("--vllm", action="store_true", help="the engine is vLLM")
    parser.add_argument(
        "--loads",
        type=Path,
        metavar="CONFIG",
        help="with --vllm: wait until it has loaded the model of this engine.yaml",
    )
    parser.add_argument(
        "--base", type=float, default=600, help="with --loads: seconds for any model (default: 600)"
    )
    parser.add_argument(
        "--rate", type=float, default=200, help="with --loads: MB/s at which weights are read (default: 200)"
    )
    options = parser.parse_args()
    if options.loads:
        allowed = load_seconds(options.loads, options.base, options.rate)
        reason = never_loads(options.socket, options.seconds, allowed)
    else:
        reason = (vllm_trouble if options.vllm else trouble)(options.socket, options.seconds)
    if reason:
        print(f"llm-probe: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
