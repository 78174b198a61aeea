"""release_id.py BUNDLE FOLDER: the name that a release of these wheels gets on a host."""

import json
import sys
from pathlib import Path

from ansible_collections.llmkeep.estate.plugins.module_utils.bundle.mirror import entries
from ansible_collections.llmkeep.estate.plugins.modules.release import release_id

print(release_id(entries(json.loads(Path(sys.argv[1], "MANIFEST.json").read_text()), sys.argv[2])))
