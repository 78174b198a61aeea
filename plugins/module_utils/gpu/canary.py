"""A question to each model of a host, asked at the sockets of its own gateways."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
import uuid
from pathlib import Path
from typing import Any

SECONDS = 60.0  # for one answer
REFUSED = (400, 401, 403, 404, 422)  # asking again changes nothing


class Failed(Exception):
    """A model does not answer; the message says what its gateway said."""


def sockets(folder: Path) -> list[Path]:
    """The gateways of this host."""
    return sorted(folder.glob("*.sock"))


def ask(place: Path, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    """Status and JSON of one request; status 0 and the reason where there is no answer."""
    connection = http.client.HTTPConnection("gateway", timeout=SECONDS)
    headers = {"Connection": "close", "Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    with contextlib.closing(connection):
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(SECONDS)
            connection.sock.connect(str(place))
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, ValueError, http.client.HTTPException) as problem:
            return 0, f"{type(problem).__name__}: {problem}"


def within(answer: Any, *path: str | int) -> Any:
    """What lies at that place of an answer; None if it has no such place."""
    try:
        for step in path:
            answer = answer[step]
    except (KeyError, IndexError, TypeError):
        return None
    return answer


def is_ready(folder: Path) -> bool:
    """Whether a gateway is ready, with no engine on quarantined GPUs alone."""
    return any(ask(place, "GET", "/readyz")[0] == 200 for place in sockets(folder))


def in_flight(folder: Path) -> int:
    """Requests that the gateways have begun to answer."""
    answers = [ask(place, "GET", "/drainz") for place in sockets(folder)]
    return sum(within(answer, "in_flight") or 0 for status, answer in answers if status == 200)


def complaint(place: Path, model: dict[str, Any], key: str) -> tuple[bool, str]:
    """Whether it is worth asking again, and why the model has not answered; an empty reason if it has.

    The question is a new one each time: a gateway answers one that it knows from its cache.
    """
    text = f"{uuid.uuid4().hex[:8]}: say a word."
    if model["embeds"]:
        status, answer = ask(place, "POST", "/v1/embeddings", {"model": model["name"], "input": text}, key)
        good = status == 200 and bool(within(answer, "data", 0, "embedding"))
    else:
        chat = {"model": model["name"], "messages": [{"role": "user", "content": text}], "max_tokens": 8}
        status, answer = ask(place, "POST", "/v1/chat/completions", chat, key)
        if status == 400 and within(answer, "error", "code") == "no_chat_template":
            plain = {"model": model["name"], "prompt": text, "max_tokens": 8}
            status, answer = ask(place, "POST", "/v1/completions", plain, key)
        tokens = within(answer, "usage", "completion_tokens")
        good = status == 200 and isinstance(tokens, int) and tokens > 0
    told = answer if isinstance(answer, str) else json.dumps(answer)
    return status not in REFUSED, "" if good else f"{model['name']} at {place}: {status} {told[:300]}"


def answered(folder: Path, models: list[dict[str, Any]], key: str, seconds: float) -> None:
    """Return once each gateway has answered for each model; raises Failed after so many seconds, or at a refusal."""
    end = time.monotonic() + seconds
    for model in models:
        while True:
            found = [complaint(place, model, key) for place in sockets(folder)]
            wrong = [reason for _, reason in found if reason] if found else [f"{folder} has no gateway"]
            if not wrong:
                break
            final = any(reason and not again for again, reason in found)
            if final or time.monotonic() > end:
                raise Failed(f"no answer within {seconds:g} s: {wrong[0]}" if not final else wrong[0])
            time.sleep(1)


def quiet(folder: Path, seconds: float) -> int:
    """Wait until the gateways have answered what they began; how many requests are left after so many seconds."""
    end = time.monotonic() + seconds
    while (left := in_flight(folder)) and time.monotonic() < end:
        time.sleep(0.5)
    return left
