"""ask_monitors.py PORT CERTIFICATE KEY PATH HOST…: each host's answer to GET PATH: whether it has series, else its status.

CERTIFICATE and KEY may be empty: the client then has none. After a start Prometheus listens within START seconds. It answers 503
while it replays its log, and has no series before its first scrape: this may take REPLAY seconds.
"""

import http.client
import json
import ssl
import sys
import time

START, REPLAY = 10, 120
port, certificate, key, path, *hosts = sys.argv[1:]
context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
if certificate:
    context.load_cert_chain(certificate, key)
begun = time.monotonic()


def ask(host: str) -> tuple[str, int]:
    """The answer, and for how many seconds a start of Prometheus may explain it."""
    connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        if "/query?" in path and answer.status == http.client.OK:
            return ("has series", 0) if json.loads(body)["data"]["result"] else ("has no series", REPLAY)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__, START
    patience = {http.client.BAD_GATEWAY: START, http.client.SERVICE_UNAVAILABLE: REPLAY}
    return str(answer.status), patience.get(answer.status, 0)


for host in hosts:
    answer, patience = ask(host)
    while time.monotonic() - begun < patience:
        time.sleep(0.5)
        answer, patience = ask(host)
    print(host, answer)
