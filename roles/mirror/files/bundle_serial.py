"""bundle_serial.py MANIFEST SEEN: exit 1 if it is not a bundle's manifest, or is older than the newest one seen here."""

import json
import sys
from pathlib import Path


def main() -> int:
    manifest = json.loads(Path(sys.argv[1]).read_text())
    kind, served = manifest.get("type"), int(manifest["serial"])
    highest = int(Path(sys.argv[2]).read_text())
    print(f"served {kind} {served}, seen {highest}")
    return int(kind != "bundle" or served < highest)


if __name__ == "__main__":
    sys.exit(main())
