"""A question to the model, as a user of the estate sends it: through the edge, by TLS 1.3, with an API key."""

import http.client
import json
import re
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lab.door import Door
from lab.errors import LabError

SECONDS = 120.0


@dataclass(frozen=True)
class Answer:
    """The model's answer, its durations in seconds, and its tokens per second (None for too few to measure)."""

    model: str
    text: str
    time_to_first_token: float
    tokens: int
    tokens_per_second: float | None
    tls_version: str
    key_exchange_group: str


def events(lines: Iterator[bytes]) -> Iterator[str]:
    """The data of server-sent events."""
    for line in lines:
        if line.startswith(b"data:"):
            yield line[5:].strip().decode("utf-8")


def ask(door: Door, question: str, show: Callable[[str], None] = lambda _: None) -> Answer:
    """Send the question; `show` is called with each part of the answer as it arrives.

    The model computes the answer even if the estate has one in its cache, so the times are the model's.
    """
    target = urlsplit(door.url)
    context = ssl.create_default_context(cafile=str(door.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    key = door.key_file.read_text(encoding="ascii").strip()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    link = http.client.HTTPSConnection(
        target.hostname or "", target.port or 443, timeout=SECONDS, context=context
    )
    try:
        link.connect()
        version = link.sock.version() if isinstance(link.sock, ssl.SSLSocket) else None
        link.request("GET", "/v1/models", headers=headers)
        model = str(json.loads(_good(link.getresponse()).read())["data"][0]["id"])
        wanted = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 64,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = time.monotonic()
        uncached = {**headers, "Cache-Control": "no-cache"}
        link.request("POST", "/v1/chat/completions", body=json.dumps(wanted), headers=uncached)
        response = _good(link.getresponse())
        pieces: list[str] = []
        first, last, tokens = 0.0, 0.0, 0
        for data in events(iter(response.readline, b"")):
            if data == "[DONE]":
                break
            event = json.loads(data)
            if "error" in event:
                raise LabError(f"the answer broke off: {event['error'].get('message', event['error'])}")
            for choice in event.get("choices", []):
                if piece := choice.get("delta", {}).get("content"):
                    last = time.monotonic()
                    first = first or last
                    pieces.append(piece)
                    show(piece)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (OSError, http.client.HTTPException) as error:
        raise LabError(f"nobody answers at {door.url}: {error}; `lab status` shows what runs") from None
    finally:
        link.close()
    if not pieces:
        raise LabError("the answer is empty: `lab exec llm1 -- journalctl -u 'llm-*'` may say why")
    pace = (tokens - 1) / (last - first) if tokens > 1 and last > first else None
    group = key_exchange_group(door.ca, target.hostname or "", target.port or 443)
    return Answer(model, "".join(pieces), first - started, tokens, pace, version or "none", group)


def key_exchange_group(ca: Path, host: str, port: int) -> str:
    """The key exchange group of a TLS 1.3 handshake with the edge."""
    command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-servername", host, "-tls1_3"]
    command += ["-CAfile", str(ca), "-verify_return_error", "-verify_hostname", host]
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        raise LabError(f"openssl s_client was refused by {host}:{port}: {done.stderr.strip()[-300:]}")
    match = re.search(
        r"^Negotiated TLS1\.3 group: (\S+)|^(?:Server|Peer) Temp Key: ([^,\n]+)", done.stdout, re.M
    )
    return (match[1] or match[2]) if match else "unknown"


def _good(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if response.status != 200:
        body = response.read(2000).decode("utf-8", "replace")
        raise LabError(f"the edge answered {response.status} {response.reason}: {body}")
    return response
