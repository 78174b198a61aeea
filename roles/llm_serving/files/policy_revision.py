"""policy_revision.py PORT…: exit 1 at the first gateway whose metrics do not show the policy revision in place.

Gateways look for a new policy each second, so each is given five.
"""

import re
import sys
import time
import urllib.request
from pathlib import Path

REVISION = Path("/var/lib/llmkeep/policy/revision")
TRIES, PAUSE_SECONDS = 20, 0.25


def shown(port: str) -> float | None:
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        found = re.search(r"^llm_policy_revision (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else None


def main() -> None:
    wanted = int(REVISION.read_text())
    for port in sys.argv[1:]:
        for _ in range(TRIES):
            if (seen := shown(port)) == wanted:
                break
            time.sleep(PAUSE_SECONDS)
        else:
            sys.exit(f"the gateway of port {port} judges by {seen}, in place is {wanted}")


if __name__ == "__main__":
    main()
