#!/usr/bin/python3
"""kibana-dashboards FOLDER VERB: the dashboards in FOLDER, ID.json each, and those of this host's Kibana.

check: prints, a line each, what Kibana has otherwise than FOLDER: dashboard, field, both values. Keys that Kibana adds are
no difference.
apply: puts each that differs, and prints what differed.
status: prints how Kibana is.
anonymous: prints how Kibana answers a request without a login, and headers that protect browsers.
All but `anonymous` first wait until Kibana is available, `check` for five seconds, the others for four minutes.
Exit 0: there is no difference, or there is none any more. Exit 1: there is, or Kibana did not answer; what is printed says so.
"""

import http.client
import json
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PKI = Path("/etc/llmkeep/pki")
WHERE = Path("/etc/llmkeep/kibana.address")  # one line: NAME PORT
KEY = "kibana.dashboards"
HEADERS = ("strict-transport-security", "x-frame-options", "referrer-policy")


class Refused(Exception):
    """Kibana did not do what it was asked; the message says what it answered and what to do."""


def authorization() -> dict[str, str]:
    """The header that has the API key in the sealed credential."""
    words = ["systemd-creds", "decrypt", f"--name={KEY}", f"/etc/credstore.encrypted/{KEY}", "-"]
    key = subprocess.run(words, capture_output=True, check=True).stdout
    return {"Authorization": f"ApiKey {b64encode(key).decode()}"}


def ask(method: str, path: str, more: dict[str, str], body: Any = None) -> tuple[int, dict[str, str], bytes]:
    """Status, headers by their lower-case names, and body of the answer."""
    name, port = WHERE.read_text().split()
    context = ssl.create_default_context(cafile=str(PKI / "root.pem"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    link = http.client.HTTPSConnection(name, int(port), timeout=30, context=context)
    try:
        headers = {"kbn-xsrf": "true", "Content-Type": "application/json"} | more
        link.request(method, path, None if body is None else json.dumps(body), headers)
        answer = link.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        link.close()


def wait(seconds: float, headers: dict[str, str]) -> str:
    """How Kibana is once it is available; Refused if it is not within so many SECONDS."""
    end = time.monotonic() + seconds
    while True:
        try:
            status, _, body = ask("GET", "/api/status", headers)
            level = json.loads(body)["status"]["overall"]["level"] if status == 200 else f"status {status}"
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as problem:
            level = f"{type(problem).__name__}: {problem}"
        if level == "available":
            return level
        if time.monotonic() >= end:
            raise Refused(
                f"Kibana is not available after {seconds:.0f} s: {level}. See `journalctl -u kibana`"
            )
        time.sleep(0.3)


def differences(actual: Any, expected: Any, where: str) -> Iterator[str]:
    """Fields that ACTUAL has otherwise than EXPECTED, by their names."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key, value in expected.items():
            yield from differences(actual.get(key), value, f"{where}.{key}" if where else key)
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        for number, (there, here) in enumerate(zip(actual, expected, strict=True)):
            yield from differences(there, here, f"{where}[{number}]")
    elif isinstance(expected, list) and isinstance(actual, list):
        yield f"{where} has {len(actual)} entries, and git has {len(expected)}"
    elif actual != expected:
        yield f"{where} is {json.dumps(actual)[:120]}, and git has {json.dumps(expected)[:120]}"


def compared(path: Path, headers: dict[str, str]) -> list[str]:
    """What is different of one dashboard, a line each."""
    status, _, body = ask("GET", f"/api/dashboards/{path.stem}", headers)
    if status == 404:
        return [f"dashboard {path.stem}: Kibana does not have it"]
    if status != 200:
        raise Refused(f"GET of dashboard {path.stem}: Kibana answered {status}: {body.decode()[:500]}")
    content = json.loads(body)["data"]
    return [
        f"dashboard {path.stem}: {line}" for line in differences(content, json.loads(path.read_text()), "")
    ]


def put(path: Path, headers: dict[str, str]) -> None:
    status, _, body = ask("PUT", f"/api/dashboards/{path.stem}", headers, json.loads(path.read_text()))
    if not 200 <= status < 300:
        raise Refused(f"PUT of dashboard {path.stem}: Kibana answered {status}: {body.decode()[:500]}")


def run(folder: Path, verb: str) -> int:
    if verb == "anonymous":
        status, headers, _ = ask("GET", "/api/dashboards", {})
        print(status, *(f"{name}: {headers.get(name, 'missing')}" for name in HEADERS), sep="\n")
        return 0
    login = authorization()
    level = wait(5 if verb == "check" else 240, login)
    if verb == "status":
        print(level)
    else:
        lines = []
        for path in sorted(folder.glob("*.json")):
            different = compared(path, login)
            if different and verb == "apply":
                put(path, login)
            lines += different
        if lines:
            print("\n".join(lines))
        return 1 if lines and verb == "check" else 0
    return 0


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[2] not in ("check", "apply", "status", "anonymous"):
        print(__doc__)
        return 2
    try:
        return run(Path(sys.argv[1]), sys.argv[2])
    except (Refused, OSError, http.client.HTTPException, subprocess.CalledProcessError) as problem:
        print(problem)
        return 1


if __name__ == "__main__":
    sys.exit(main())
