"""Writes policy.pem and bundle.tar.gz into a folder: the tree's own policy, signed, with rates that nobody uses up."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "payload/tests/helpers"))

from authority import PUBLIC_KEY, signed_bundle

folder = Path(sys.argv[1])
(folder / "policy.pem").write_bytes(PUBLIC_KEY)
(folder / "bundle.tar.gz").write_bytes(signed_bundle())
