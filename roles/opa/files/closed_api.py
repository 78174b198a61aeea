"""OPA's status for each part of its API that only an administrator would use, one per line.

One process requests all of them, since Python starts slowly.
"""

import http.client
import socket

SOCKET = "/run/opa/opa.sock"
SECONDS = 5
REQUESTS = (
    ("PUT", "/v1/policies/llm", "package llm.authz"),
    ("GET", "/v1/policies", None),
    ("GET", "/v1/data", None),
    ("PUT", "/v1/data/llm/roles", "{}"),
    ("POST", "/v1/data/llm", "{}"),
    ("POST", "/v1/query", '{"query": "data"}'),
    ("POST", "/v1/compile", '{"query": "data"}'),
    ("GET", "/v1/config", None),
    ("GET", "/metrics", None),
)


def status(method: str, path: str, body: str | None) -> str:
    """What OPA answers, or why it does not."""
    connection = http.client.HTTPConnection("opa")
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.settimeout(SECONDS)
        connection.sock.connect(SOCKET)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as problem:
        return f"{SOCKET}: {problem}"
    finally:
        connection.close()


if __name__ == "__main__":
    for request in REQUESTS:
        print(status(*request))
