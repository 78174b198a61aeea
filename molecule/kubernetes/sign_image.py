"""sign_image LAB FOLDER: image.json in FOLDER, with its signature by the throw-away key that signs the lab's bundle."""

import json
import sys
from pathlib import Path

from llmkeep.bundle import signing

lab, folder = map(Path, sys.argv[1:])
record, signature = folder / "image.json", folder / "image.json.sig"
document = {
    "type": "image",
    "serial": 1,
    "expires": "2999-01-01T00:00:00Z",
    "name": "llmkeep",
    "variant": "cpu",
    "digest": f"sha256:{'a' * 64}",
}
record.write_text(json.dumps(document))
signature.unlink(missing_ok=True)
with signing.signer(signing.key_file(lab / "keys"), lab / "passphrase") as key:
    signing.sign(key, record, signature)
