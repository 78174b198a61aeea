"""gateway_policy.py ENGINE PORT…: the findings of two checks of the gateways with metrics at these ports.

`engine`: every gateway's decisions come from ENGINE. `revision`: every gateway decides by the policy revision in place.
Gateways look for a new policy each second; together they get PATIENCE seconds.
"""

import json
import re
import sys
import time
import urllib.request
from pathlib import Path

REVISION = Path("/var/lib/llmkeep/policy/revision")
PATIENCE = 10.0


def shown(port: str) -> tuple[list[str], str]:
    """A gateway's engines and its revision; empty if it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return [], ""
    revision = re.search(r"^llm_policy_revision (\d+)", text, re.MULTILINE)
    return re.findall(r'^llm_policy_engine\{engine="(\w+)"\} 1', text, re.MULTILINE), revision[
        1
    ] if revision else ""


def shown_in_time(port: str, revision: str, end: float) -> tuple[list[str], str]:
    while (answer := shown(port))[1] not in (revision, "") and time.monotonic() < end:
        time.sleep(0.25)
    return answer


def main() -> None:
    engine, ports, revision = sys.argv[1], sys.argv[2:], REVISION.read_text().strip()
    end = time.monotonic() + PATIENCE
    answers = {port: shown_in_time(port, revision, end) for port in ports}
    findings = {
        "engine": {
            "ok": all(engines == [engine] for engines, _ in answers.values()),
            "observed": ", ".join(
                f"port {port}: {' and '.join(engines) or 'none'}" for port, (engines, _) in answers.items()
            ),
        },
        "revision": {
            "ok": all(shown == revision for _, shown in answers.values()),
            "observed": f"in place {revision}; "
            + ", ".join(f"port {port}: {shown or 'none'}" for port, (_, shown) in answers.items()),
        },
    }
    print(json.dumps({"checks": findings}))


if __name__ == "__main__":
    main()
