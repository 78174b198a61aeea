#!/usr/bin/python3
"""elasticsearch-request [OPTION…] METHOD PATH [BODY]: one question to this host's Elasticsearch.

Prints status and answer. Speaks TLS 1.3 with the host's certificate. BODY is JSON, or `-`: it is read from standard input.
--as USER: by the sealed password of `elastic` (the superuser, the default) or `bootstrap` (of the first start), or `anonymous`.
--until PATTERN SECONDS: asks again, for so many seconds, until what it would print matches the regular expression.
--while PID: asks again no longer than this process lives.
Exit 0: it answered, and so. Exit 1: it prints what Elasticsearch said, or why nothing came.
"""

import argparse
import base64
import http.client
import re
import ssl
import subprocess
import sys
import time
from pathlib import Path

PKI = Path("/etc/llmkeep/pki")
WHERE = Path("/etc/llmkeep/elasticsearch.address")  # one line: NAME PORT


def password(user: str) -> str:
    """The password in the sealed credential of this user."""
    name = f"elasticsearch.{user}"
    done = subprocess.run(
        ["systemd-creds", "decrypt", f"--name={name}", f"/etc/credstore.encrypted/{name}", "-"],
        capture_output=True,
        check=True,
    )
    return done.stdout.decode()


def headers(user: str) -> dict[str, str]:
    fields = {"Content-Type": "application/json"}
    if user != "anonymous":
        token = base64.b64encode(f"elastic:{password(user)}".encode()).decode()
        fields["Authorization"] = f"Basic {token}"
    return fields


def asked(method: str, path: str, body: str | None, fields: dict[str, str]) -> tuple[bool, str]:
    """Whether an answer came, and what it is."""
    name, port = WHERE.read_text().split()
    context = ssl.create_default_context(cafile=str(PKI / "root.pem"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(PKI / "host.pem", PKI / "host.key")
    link = http.client.HTTPSConnection(name, int(port), timeout=30, context=context)
    try:
        link.request(method, path, body.encode() if body else None, fields)
        answer = link.getresponse()
        return True, f"{answer.status} {answer.read().decode().strip()}"
    except (OSError, http.client.HTTPException) as problem:
        return False, f"{name}:{port}: {problem}"
    finally:
        link.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--as", dest="user", default="elastic", choices=["elastic", "bootstrap", "anonymous"])
    parser.add_argument("--until", nargs=2, default=["", "0"], metavar=("PATTERN", "SECONDS"))
    parser.add_argument("--while", dest="process", metavar="PID")
    parser.add_argument("method")
    parser.add_argument("path")
    parser.add_argument("body", nargs="?")
    options = parser.parse_args()
    fields = headers(options.user)
    body = sys.stdin.read() if options.body == "-" else options.body
    pattern, seconds = options.until
    end = time.monotonic() + float(seconds)
    while True:
        answered, text = asked(options.method, options.path, body, fields)
        if answered and re.search(pattern, text):
            print(text)
            return 0
        if time.monotonic() >= end:
            print(text)
            return 1
        if options.process and not Path("/proc", options.process).exists():
            print(f"process {options.process} has ended: {text}")
            return 1
        time.sleep(0.3)


if __name__ == "__main__":
    sys.exit(main())
