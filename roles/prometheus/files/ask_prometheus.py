"""Prints what Prometheus and Alertmanager on this host report, for their checks.

ask_prometheus.py NAME SECONDS targets NUMBER | rules | alertmanagers | cluster WANTED | samples | retention | stranger

NAME is the host's full name, as in its certificate. `targets`, `alertmanagers`, `cluster` and `samples` wait up to
SECONDS, for the first scrape after a start. Before it Prometheus replays its log and answers 503: that may take REPLAY
seconds. They do not wait for a stopped unit.
"""

import http.client
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from typing import Any
from urllib.parse import quote

name, patience, verb, *words = sys.argv[1], float(sys.argv[2]), *sys.argv[3:]
PORTS = {"prometheus": 9090, "alertmanager": 9093}
UNITS = ["prometheus.service", "prometheus-alertmanager.service"]
REPLAY = 120
DAYS = {"y": 365, "w": 7, "d": 1}  # as Prometheus prints them: 1y for 365d


class NotReady(Exception):
    """Prometheus replays its log."""


def ask(path: str, port: int = PORTS["prometheus"], *, certificate: bool = True) -> Any:
    """The JSON of a GET; raises OSError if the server refuses the client, NotReady while it replays its log."""
    context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
    if certificate:
        context.load_cert_chain("/etc/llmkeep/pki/host.pem", "/etc/llmkeep/pki/host.key")
    connection = http.client.HTTPConnection(name, port, timeout=10)
    connection.sock = context.wrap_socket(
        socket.create_connection(("127.0.0.1", port), timeout=10), server_hostname=name
    )
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read()
    if answer.status == http.client.SERVICE_UNAVAILABLE:
        raise NotReady(text.decode(errors="replace").strip())
    return json.loads(text)


def until(question: Any, expected: str | None = None, seconds: float = 0) -> str:
    """The answer to `question` once it is EXPECTED (None: any), or after SECONDS, which begin once the log is replayed."""
    begun = time.monotonic()
    end = begun + seconds
    while True:
        try:
            answer = str(question())
            if expected in (None, answer):
                return answer
        except NotReady as error:
            answer = f"not ready: {error}"
            end = min(time.monotonic() + 1, begun + REPLAY) + seconds
        except (OSError, http.client.HTTPException) as error:
            answer = f"no answer: {error}"
            if stopped():
                return answer
        if time.monotonic() > end:
            return answer
        time.sleep(0.5)


def stopped() -> bool:
    """Whether one of the units neither runs nor starts."""
    states = subprocess.run(["systemctl", "is-active", *UNITS], capture_output=True, text=True, check=False)
    return bool({"inactive", "failed"} & {*states.stdout.split()})


def targets() -> str:
    endpoints = ask("/api/v1/targets?state=active")["data"]["activeTargets"]
    down = [
        f"{one['labels']['job']} of {one['labels']['instance']}: {one['lastError'] or one['health']}"
        for one in endpoints
        if one["health"] != "up"
    ]
    return "; ".join(down) or f"{len(endpoints)} targets are up"


def rules() -> str:
    entries = [rule for group in ask("/api/v1/rules")["data"]["groups"] for rule in group["rules"]]
    broken = [f"{rule['name']}: {rule.get('lastError')}" for rule in entries if rule["health"] == "err"]
    return "; ".join(broken) or f"{len(entries)} rules, none broken"


def alertmanagers() -> str:
    receivers = [one["name"] for one in ask("/api/v2/receivers", PORTS["alertmanager"])]
    return f"{len(ask('/api/v1/alertmanagers')['data']['activeAlertmanagers'])} with {', '.join(receivers)}"


def cluster() -> str:
    status = ask("/api/v2/status", PORTS["alertmanager"])["cluster"]
    sentences = {"ready": f"{len(status['peers'])} know each other", "disabled": "no others"}
    return sentences.get(status["status"], str(status["status"]))


def samples() -> str:
    """Whether scrapes are stored: targets are up even while the disk is full."""
    [age] = ask(f"/api/v1/query?query={quote('time()-max(timestamp(up))')}")["data"]["result"] or [None]
    if age is None:
        return "no sample is younger than 5 minutes"
    seconds = float(age["value"][1])
    return (
        "the newest sample is recent" if seconds <= patience else f"the newest sample is {seconds:.0f} s old"
    )


def retention() -> str:
    flags = ask("/api/v1/status/flags")["data"]
    days = re.findall(r"(\d+)([a-z]+)", flags["storage.tsdb.retention.time"])
    size = re.findall(r"(\d+)([KMGTPE]?)i?B", flags["storage.tsdb.retention.size"])
    return (
        f"{sum(int(number) * DAYS[unit] for number, unit in days)} days, "
        f"{sum(int(number) * 1024 ** ' KMGTPE'.index(unit or ' ') for number, unit in size)} bytes"
    )


def stranger(program: str) -> str:
    try:
        ask("/-/healthy", PORTS[program], certificate=False)
    except OSError as error:
        return f"{program}: {getattr(error, 'reason', error)}"
    except ValueError:  # its answer is not JSON
        pass
    return f"{program} answers"


if verb == "targets":
    print(until(targets, f"{words[0]} targets are up", patience))
elif verb == "rules":
    print(until(rules))
elif verb == "alertmanagers":
    print(until(alertmanagers, "1 with operators, heartbeat", patience))
elif verb == "cluster":
    print(until(cluster, words[0], patience))
elif verb == "samples":
    print(until(samples, "the newest sample is recent", patience))
elif verb == "retention":
    print(until(retention))
else:
    print("\n".join(map(stranger, PORTS)))
