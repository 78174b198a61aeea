#!/usr/bin/python3
"""verified_backup.py FILE REPOSITORY: age of the newest verified backup, and whether it is in REPOSITORY, as named findings.

FILE is what `llmkeep backup verify` wrote. A backup dated in the future has a wrong age, and counts as old.
"""

import json
import sys
import time
from pathlib import Path

OLDEST = 2 * 86400  # seconds, as in the alert BackupTooOld


def main() -> None:
    path, repository = Path(sys.argv[1]), sys.argv[2]
    try:
        verified = json.loads(path.read_bytes())
        hours = (time.time() - float(verified["created"])) / 3600
        findings = {
            "recent": (-1 < hours < OLDEST / 3600, f"made {hours:.0f} hours ago"),
            "repository": (verified["repository"] == repository, f"in {verified['repository']}"),
        }
    except (OSError, ValueError, TypeError, KeyError) as problem:
        observed = f"no verified backup: {problem!r}; see journalctl -u llmkeep-backup"
        findings = dict.fromkeys(("recent", "repository"), (False, observed))
    checks = {name: {"ok": ok, "observed": observed} for name, (ok, observed) in findings.items()}
    print(json.dumps({"checks": checks}))


if __name__ == "__main__":
    main()
