"""Known vulnerabilities in a report: the scan of the hosts, as the control node signed it."""

import json
from typing import Any

from llmproof.archive import ArchiveRefused

SCAN = "vulnerabilities.json"
OPEN, UNDETERMINED = "open", "undetermined"


def lines(content: bytes) -> list[str]:
    """A line for each host, then one for each finding that an owner accepted. Raises ArchiveRefused if it is not a scan."""
    try:
        scan = json.loads(content)
        accepted = [
            f"{name}: {each['id']} in {each['package']} accepted by {each['waiver']['owner']} until {each['waiver']['until']}"
            for name, host in scan["hosts"].items()
            for each in host["findings"]
            if each["waiver"] and not each["waiver"]["expired"]
        ]
        return [*(f"{name}: {_counted(host)}" for name, host in scan["hosts"].items()), *accepted]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArchiveRefused(
            f"{SCAN} is signed, but is not a scan ({type(error).__name__}: {error})"
        ) from error


def _counted(host: dict[str, Any]) -> str:
    bare = [each for each in host["findings"] if not each["waiver"] or each["waiver"]["expired"]]
    unknown = len(host["unknown"]) + sum(each["state"] == UNDETERMINED for each in bare)
    return f"{sum(each['state'] == OPEN for each in bare)} vulnerabilities open, {unknown} unknown"
