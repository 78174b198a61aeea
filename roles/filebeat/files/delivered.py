#!/usr/bin/python3
"""delivered.py SECONDS: is what this host logs acknowledged?

Logs one line, and waits until one more event is acknowledged: by Elasticsearch, or by Logstash, whose queue has it.
Filebeat may just have started. A document that Elasticsearch refuses (400) is counted as dropped, and lost: since
Filebeat's start none may have been.
"""

import http.client
import json
import socket
import subprocess
import sys
import time

SOCKET = "/run/filebeat/stats.sock"


def counted() -> dict[str, int]:
    """Filebeat's counters of events since its start, those that were taken (acked) and refused for good (dropped) among them."""
    link = http.client.HTTPConnection("filebeat")
    link.sock = socket.socket(socket.AF_UNIX)
    try:
        link.sock.settimeout(5)
        link.sock.connect(SOCKET)
        link.request("GET", "/stats")
        events: dict[str, int] = json.loads(link.getresponse().read())["libbeat"]["output"]["events"]
        return events
    finally:
        link.close()


def main() -> int:
    if subprocess.run(["systemctl", "is-active", "--quiet", "filebeat.service"], check=False).returncode:
        print("filebeat.service is not active")
        return 1
    end = time.monotonic() + float(sys.argv[1])
    before, state = None, "nothing"
    while time.monotonic() < end:
        try:
            events = counted()
            now, dropped = events["acked"], events["dropped"]
        except (OSError, KeyError, http.client.HTTPException) as problem:
            state = f"{SOCKET}: {problem}"
        else:
            if before is None:
                before = now
                subprocess.run(["logger", "--tag", "llmkeep-verify", "is this delivered?"], check=True)
            elif now > before and dropped:
                print(
                    f"{dropped} documents were refused by Elasticsearch and lost since Filebeat started: see "
                    "`journalctl -u filebeat`, then restart it"
                )
                return 1
            elif now > before:
                print("delivered")
                return 0
            state = f"{now} events are acknowledged"
        time.sleep(0.2)
    print(f"no event was acknowledged within {sys.argv[1]} s: {state}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
