"""What Prometheus and Alertmanager on this host say, for their checks.

ask_prometheus.py NAME SECONDS targets NUMBER | rules | alertmanagers | flags FLAG… | stranger

NAME is the host's full name, as its certificate has it. `targets` and `alertmanagers` wait up to SECONDS: after a start the
first scrape is to come.
"""

import http.client
import json
import socket
import ssl
import sys
import time
from typing import Any

name, patience, verb, *words = sys.argv[1:]
PORTS = {"prometheus": 9090, "alertmanager": 9093}


def ask(path: str, port: int = PORTS["prometheus"], *, certificate: bool = True) -> Any:
    """The JSON of a GET; raises OSError where the server refuses the client."""
    context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
    if certificate:
        context.load_cert_chain("/etc/llmkeep/pki/host.pem", "/etc/llmkeep/pki/host.key")
    connection = http.client.HTTPConnection(name, port, timeout=10)
    connection.sock = context.wrap_socket(
        socket.create_connection(("127.0.0.1", port), timeout=10), server_hostname=name
    )
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())


def until(wanted: str, seen: Any) -> str:
    """What `seen` says, once it says what is wanted or time is up."""
    end = time.monotonic() + float(patience)
    while True:
        try:
            said = str(seen())
        except (OSError, http.client.HTTPException) as error:
            said = f"no answer: {error}"
        if said == wanted or time.monotonic() > end:
            return said
        time.sleep(0.5)


def targets() -> str:
    found = ask("/api/v1/targets?state=active")["data"]["activeTargets"]
    down = [
        f"{one['labels']['job']} of {one['labels']['instance']}: {one['lastError'] or one['health']}"
        for one in found
        if one["health"] != "up"
    ]
    return "; ".join(down) or f"{len(found)} targets are up"


def rules() -> str:
    found = [rule for group in ask("/api/v1/rules")["data"]["groups"] for rule in group["rules"]]
    broken = [f"{rule['name']}: {rule.get('lastError')}" for rule in found if rule["health"] == "err"]
    return "; ".join(broken) or f"{len(found)} rules, none broken"


def alertmanagers() -> str:
    receivers = [one["name"] for one in ask("/api/v2/receivers", PORTS["alertmanager"])]
    return f"{len(ask('/api/v1/alertmanagers')['data']['activeAlertmanagers'])} with {', '.join(receivers)}"


def stranger(program: str) -> str:
    try:
        ask("/-/healthy", PORTS[program], certificate=False)
    except OSError as error:
        return f"{program}: {getattr(error, 'reason', error)}"
    except ValueError:  # its answer is no JSON
        pass
    return f"{program} answers"


if verb == "targets":
    print(until(f"{words[0]} targets are up", targets))
elif verb == "rules":
    print(rules())
elif verb == "alertmanagers":
    print(until("1 with operators", alertmanagers))
elif verb == "flags":
    flags = ask("/api/v1/status/flags")["data"]
    print("\n".join(f"{flag}={flags[flag]}" for flag in words))
else:
    print("\n".join(map(stranger, PORTS)))
