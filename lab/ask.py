"""A question to the model, as a user of the estate sends it: through the edge, by TLS 1.3, with an API key."""

import re
import ssl
import subprocess
import time
from collections.abc import Callable
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


def ask(door: Door, question: str, show: Callable[[str], None] = lambda _: None) -> Answer:
    """Send the question by OpenAI's client; `show` is called with each part of the answer as it arrives.

    The model computes the answer even if the estate has one in its cache, so the times are the model's.
    """
    import httpx2  # both take a second that no other command of the lab shall wait
    import openai

    target = urlsplit(door.url)
    context = ssl.create_default_context(cafile=str(door.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    http_client = httpx2.Client(verify=context, timeout=SECONDS)
    key = door.key_file.read_text(encoding="ascii").strip()
    pieces: list[str] = []
    first, last, tokens = 0.0, 0.0, 0
    try:
        with openai.OpenAI(
            base_url=f"{door.url}/v1", api_key=key, http_client=http_client, max_retries=0
        ) as client:
            model = client.models.list().data[0].id
            started = time.monotonic()
            for event in client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                max_tokens=64,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_headers={"Cache-Control": "no-cache"},
            ):
                if piece := event.choices and event.choices[0].delta.content:
                    last = time.monotonic()
                    first = first or last
                    pieces.append(piece)
                    show(piece)
                if event.usage:
                    tokens = event.usage.completion_tokens
    except openai.APIConnectionError as error:
        why = error.__cause__ or error
        raise LabError(f"{door.url} does not answer: {why}; `lab status` shows which hosts are up") from None
    except openai.APIStatusError as error:
        raise LabError(f"the edge answered {error.status_code}: {error.message}") from None
    except openai.APIError as error:
        raise LabError(f"the answer broke off: {error.message}") from None
    if not pieces:
        raise LabError("the answer is empty: `lab exec llm1 -- journalctl -u 'llm-*'` may say why")
    pace = (tokens - 1) / (last - first) if tokens > 1 and last > first else None
    version, group = handshake(door.ca, target.hostname or "", target.port or 443)
    return Answer(model, "".join(pieces), first - started, tokens, pace, version, group)


def handshake(ca: Path, host: str, port: int) -> tuple[str, str]:
    """Protocol and key exchange group of a handshake with the edge."""
    command = ["openssl", "s_client", "-connect", f"{host}:{port}", "-servername", host]
    command += ["-CAfile", str(ca), "-verify_return_error", "-verify_hostname", host]
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        raise LabError(f"openssl s_client was refused by {host}:{port}: {done.stderr.strip()[-300:]}")
    version = re.search(r"^New, (\S+), Cipher", done.stdout, re.M)
    group = re.search(
        r"^Negotiated TLS1\.3 group: (\S+)|^(?:Server|Peer) Temp Key: ([^,\n]+)", done.stdout, re.M
    )
    return version[1] if version else "none", (group[1] or group[2]) if group else "unknown"
