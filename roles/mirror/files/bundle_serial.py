"""bundle_serial.py MANIFEST SEEN: exit 1 where the bundle's serial is older than the newest one seen here."""

import json
import sys
from pathlib import Path


def main() -> int:
    served = int(json.loads(Path(sys.argv[1]).read_text())["serial"])
    seen = int(Path(sys.argv[2]).read_text())
    print(f"served {served}, seen {seen}")
    return int(served < seen)


if __name__ == "__main__":
    sys.exit(main())
