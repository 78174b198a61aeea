"""Clients of one address, each the official one, which asks again where it got no answer. Run from a seat in the lab's network.

Reads a JSON object from standard input: `url`, `ca`, `keys` (one a client), `retries` and `seconds` (of each attempt), and
`until`, a path: they end once that file is there; with `stream`, as streams, each whole answer of which is parsed; with `count`,
a path, to which they append a byte for each answer.
Prints a list: of each request when it began and was answered (time.time()) and its id, or what the last attempt said.
"""

import json
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai

given = json.load(sys.stdin)
told: list[dict[str, Any]] = []


def ask(number: int, key: str) -> None:
    # A connection whose host is gone says nothing more: only its client's own deadline ends it.
    http_client = httpx2.Client(verify=ssl.create_default_context(cafile=given["ca"]))
    with openai.OpenAI(
        base_url=given["url"],
        api_key=key,
        http_client=http_client,
        timeout=given["seconds"],
        max_retries=given["retries"],
    ) as api:
        while not Path(given["until"]).exists():
            began = time.time()
            words = f"client {number} at {began}"
            seen: dict[str, Any] = {"began": began}
            try:
                raw = api.completions.with_raw_response.create(
                    model="echo", prompt=words, max_tokens=8, stream=given.get("stream", False)
                )
                answer = raw.parse()
                parts = answer if given.get("stream") else [answer]
                text = "".join(part.choices[0].text for part in parts)
                seen |= {"id": raw.headers["x-request-id"], "right": text.strip() == words}
            except openai.OpenAIError as problem:
                seen["failed"] = repr(problem)
            told.append(seen | {"answered": time.time()})
            if "count" in given:
                with Path(given["count"]).open("ab") as file:
                    file.write(b".")
            time.sleep(1)  # a key has 60 requests a minute


clients = [threading.Thread(target=ask, args=each) for each in enumerate(given["keys"])]
for client in clients:
    client.start()
for client in clients:
    client.join()
print(json.dumps(told))
