"""A question to each model of a host: at the sockets of its gateways, and at those of engines that it offers to other hosts,
since a gateway may pass the question on to another host's.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

SECONDS = 60.0  # for one answer
LINE_BYTES = 1024 * 1024
KEYS = Path("/etc/credstore.encrypted")
# Of a model as modules take it. With `socket`: the engine there is asked; `http`: it is a server of OpenAI's API.
MODEL = {
    "name": {"type": "str", "required": True},
    "embeds": {"type": "bool", "default": False},
    "socket": {"type": "path"},
    "http": {"type": "bool", "default": False},
    "credential": {"type": "str", "default": ""},
}
REFUSED = (400, 401, 403, 404, 422)  # asking again changes nothing


class Failed(Exception):
    """A model does not answer; the message says what its gateway said."""


def engines(models: list[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """Those that are asked at engines of the host whose files lie below ROOT, by their sockets there."""
    return [
        model | {"socket": str(root / model["socket"].lstrip("/"))} for model in models if model["socket"]
    ]


def sockets(folder: Path) -> list[Path]:
    """The gateways of this host."""
    return sorted(folder.glob("*.sock"))


def ask(place: Path, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    """Status of one request and its JSON, or the text where it is none; status 0 and the reason where there is no answer."""
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
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as problem:
            return 0, f"{type(problem).__name__}: {problem}"
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text[:300].decode(errors="replace")


def within(answer: Any, *path: str | int) -> Any:
    """What lies at that place of an answer; None if it has no such place."""
    try:
        for step in path:
            answer = answer[step]
    except (KeyError, IndexError, TypeError):
        return None
    return answer


def frame_of(place: Path, kinds: tuple[str, ...], request: dict[str, Any] | None = None) -> dict[str, Any]:
    """The first frame of such a kind that an engine sends (payload/llmserve/protocol.py). Raises OSError or ValueError."""
    end = time.monotonic() + SECONDS
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(SECONDS)
        link.connect(str(place))
        if request:
            link.sendall(json.dumps(request).encode() + b"\n")
        with link.makefile("rb") as lines:
            while time.monotonic() < end and (line := lines.readline(LINE_BYTES)):
                frame = json.loads(line)
                if isinstance(frame, dict) and frame.get("kind") in kinds:
                    return frame
    raise OSError(f"it ended, or sent no {' or '.join(kinds)} within {SECONDS:g} s")


def beat(model: dict[str, Any]) -> dict[str, Any]:
    """What an engine says of itself each second; nothing if it does not answer, or speaks OpenAI's API."""
    if model["http"]:
        return {}
    try:
        return frame_of(Path(model["socket"]), ("beat",))
    except (OSError, ValueError):
        return {}


def is_engine_ready(model: dict[str, Any]) -> bool:
    """Whether an engine takes requests."""
    if model["http"]:
        return ask(Path(model["socket"]), "GET", "/health")[0] == 200
    state = beat(model)
    return bool(state) and not state.get("stalled") and not state.get("leaving")


def is_ready(folder: Path, engines: list[dict[str, Any]]) -> bool:
    """Whether a host takes requests: its engines, and one of its gateways, if it has some, with no engine on quarantined GPUs
    alone.
    """
    gateways = sockets(folder)
    return (
        bool(gateways or engines)
        and (not gateways or any(ask(place, "GET", "/readyz")[0] == 200 for place in gateways))
        and all(is_engine_ready(engine) for engine in engines)
    )


def in_flight(folder: Path, engines: list[dict[str, Any]]) -> int:
    """Requests that the gateways have begun to answer, and those of engines that other hosts' gateways use."""
    engaged: int = sum(beat(engine).get("requests", 0) for engine in engines)
    answers = [ask(place, "GET", "/drainz") for place in sockets(folder)]
    return engaged + sum(within(answer, "in_flight") or 0 for status, answer in answers if status == 200)


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
    reply = answer if isinstance(answer, str) else json.dumps(answer)
    return status not in REFUSED, "" if good else f"{model['name']} at {place}: {status} {reply[:300]}"


def engine_complaint(model: dict[str, Any]) -> tuple[bool, str]:
    """The same of an engine's own socket."""
    place = Path(model["socket"])
    if model["http"]:
        return complaint(place, model, credential(model["credential"]))
    text = f"{uuid.uuid4().hex[:8]}: say a word."
    request: dict[str, Any] = {"kind": "generate", "id": 1, "stream": False, "max_tokens": 8}
    # A model without a chat template uses the prompt.
    request |= (
        {"inputs": [text]}
        if model["embeds"]
        else {"messages": [{"role": "user", "content": text}], "prompt": text}
    )
    try:
        frame = frame_of(place, ("done", "failed"), request)
    except (OSError, ValueError) as problem:
        return True, f"{model['name']} at {place}: {type(problem).__name__}: {problem}"
    good = frame["kind"] == "done" and bool(frame.get("text" if model["embeds"] else "completion_tokens"))
    again = frame.get("status") not in REFUSED
    return again, "" if good else f"{model['name']} at {place}: {str(frame)[:300]}"


def credential(name: str) -> str:
    """A sealed credential of this host; empty where there is none, which the server then refuses."""
    argv = ["systemd-creds", "decrypt", f"--name={name}", str(KEYS / name), "-"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout if name else ""


def complaints(folder: Path, model: dict[str, Any], key: str) -> list[tuple[bool, str]]:
    """The same of all sockets at which a model is asked."""
    if model.get("socket"):
        return [engine_complaint(model)]
    return [complaint(place, model, key) for place in sockets(folder)]


def answered(folder: Path, models: list[dict[str, Any]], key: str, seconds: float) -> None:
    """Return once each gateway and engine has answered for each model; raises Failed after so many seconds, or at a refusal."""
    end = time.monotonic() + seconds
    for model in models:
        while True:
            outcomes = complaints(folder, model, key)
            wrong = [reason for _, reason in outcomes if reason] if outcomes else [f"{folder} has no gateway"]
            if not wrong:
                break
            final = any(reason and not again for again, reason in outcomes)
            if final or time.monotonic() > end:
                raise Failed(f"no answer within {seconds:g} s: {wrong[0]}" if not final else wrong[0])
            time.sleep(1)


def quiet(folder: Path, engines: list[dict[str, Any]], seconds: float) -> int:
    """Wait until gateways and engines have answered what they began; how many requests are left after so many seconds."""
    end = time.monotonic() + seconds
    while (left := in_flight(folder, engines)) and time.monotonic() < end:
        time.sleep(0.5)
    return left
