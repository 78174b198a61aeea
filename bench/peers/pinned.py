"""pinned.py REPORT: what pip would install (`pip install --dry-run --report REPORT`), as requirements with their hashes."""

import json
import sys
from pathlib import Path

for each in sorted(
    json.loads(Path(sys.argv[1]).read_text())["install"],
    key=lambda each: str(each["metadata"]["name"]).lower(),
):
    digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
    print(f"{each['metadata']['name']}=={each['metadata']['version']} --hash=sha256:{digest}")
