#!/usr/bin/python3
"""logstash-stats [--seconds N] [--while PID] QUESTION: what Logstash on this host reports of its pipeline; exit 0 if well.

answers    its API answers.
delivers   its queue is empty, or gets shorter at its end.
refused    documents dropped since its start because they came with another host's certificate.
dead       documents that Elasticsearch refused since Logstash's start; they are in the dead letter queue.
queue      kind and size of its queue.
anonymous  its answer without a password.

--seconds: retry this long until it is well. --while: but no longer than this process lives.
"""

import argparse
import base64
import http.client
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PORT = 9600
USER = "llmkeep"
CREDENTIAL = "logstash.api"


def authorization() -> dict[str, str]:
    done = subprocess.run(
        ["systemd-creds", "decrypt", f"--name={CREDENTIAL}", f"/etc/credstore.encrypted/{CREDENTIAL}", "-"],
        capture_output=True,
        check=True,
    )
    return {"Authorization": f"Basic {base64.b64encode(USER.encode() + b':' + done.stdout).decode()}"}


def asked(headers: dict[str, str]) -> tuple[int, Any]:
    link = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
    try:
        link.request("GET", "/_node/stats/pipelines", headers=headers)
        answer = link.getresponse()
        return answer.status, json.loads(answer.read() or "{}")
    finally:
        link.close()


def of(plugins: list[Any], name: str) -> Any:
    return next((plugin for plugin in plugins if plugin["id"] == name), {})


def verdict(question: str, pipeline: Any, before: int) -> tuple[bool, str]:
    """Whether it is well, and what to print. BEFORE: number of documents already sent at the first request."""
    queued, out = pipeline["queue"].get("events_count", 0), pipeline["events"]["out"]
    filters, outputs = pipeline["plugins"]["filters"], pipeline["plugins"]["outputs"]
    refused = of(filters, "foreign").get("events", {}).get("in", 0)
    dead = of(outputs, "streams").get("documents", {}).get("dlq_routed", 0)
    match question:
        case "delivers":
            return queued == 0 or out > before, f"{queued} in the queue, {out} delivered"
        case "refused":
            return refused == 0, f"{refused} refused"
        case "dead":
            return dead == 0, f"{dead} dead"
        case "queue":
            return (
                True,
                f"{pipeline['queue']['type']} {pipeline['queue']['capacity']['max_queue_size_in_bytes']}",
            )
    return True, "it answers"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--while", dest="process", metavar="PID")
    parser.add_argument("question", choices=["answers", "delivers", "refused", "dead", "queue", "anonymous"])
    options = parser.parse_args()
    headers = {} if options.question == "anonymous" else authorization()
    end = time.monotonic() + options.seconds
    before: int | None = None
    while True:
        well, state = False, ""
        try:
            status, answer = asked(headers)
            if options.question == "anonymous":
                well, state = status == 401, str(status)
            elif status == 200:
                pipeline = answer["pipelines"]["main"]
                before = pipeline["events"]["out"] if before is None else before
                well, state = verdict(options.question, pipeline, before)
            else:
                state = f"its API answers {status}"
        except (OSError, ValueError, KeyError, http.client.HTTPException) as problem:
            state = f"127.0.0.1:{PORT}: {problem!r}"
        if well or time.monotonic() >= end:
            print(state)
            return 0 if well else 1
        if options.process and not Path("/proc", options.process).exists():
            print(f"process {options.process} has ended: {state}")
            return 1
        time.sleep(0.3)


if __name__ == "__main__":
    sys.exit(main())
