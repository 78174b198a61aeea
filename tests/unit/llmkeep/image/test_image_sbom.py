"""What the SBOM of an image lists beside packages and wheels."""

import shutil
from pathlib import Path

from llmkeep.bundle import build, lock, manifest
from llmkeep.bundle.manifest import Entry, Manifest
from llmkeep.image import sbom
from llmkeep.image.contents import Source
from llmkeep.source_tree import TREE

PACKAGE = Entry("apt/pool/base.deb", 1, "0" * 64, "", "MIT", "deb", "pkg:deb/debian/base@1?arch=all")


def test_scripts_of_the_pages_are_components_as_npm_publishes_them(tmp_path: Path) -> None:
    shutil.copytree(TREE / lock.VENDORED, tmp_path / "bundle/tree" / lock.VENDORED)
    shutil.copy(TREE / lock.VENDORED.with_suffix(".yml"), tmp_path / "bundle/tree" / lock.VENDORED.parent)
    entries = build._entries(tmp_path / "bundle", lock.vendored(tmp_path / "bundle/tree"))
    signed = Manifest(manifest.BUNDLE, 1, "lab", "", "", "", "", "", [PACKAGE, *entries])
    status = tmp_path / "debian" / sbom.STATUS
    status.parent.mkdir(parents=True)
    status.write_text("Package: base\nVersion: 1\nArchitecture: all\n")
    bill = sbom.document(Source(tmp_path, signed, "serving", [], 0), [tmp_path / "debian"], "sha256:0", "")
    scripts = {each["purl"]: each for each in bill["components"] if each["purl"] != PACKAGE.purl}
    assert list(scripts) == ["pkg:npm/dompurify@3.5.0", "pkg:npm/marked@18.2.1"]
    marked = scripts["pkg:npm/marked@18.2.1"]
    assert (marked["name"], marked["version"]) == ("marked", "18.2.1")
    assert marked["licenses"] == [{"license": {"name": "MIT"}}]
    (script,) = (entry for entry in entries if entry.path.endswith("/marked.esm.js"))
    assert marked["hashes"] == [{"alg": "SHA-256", "content": script.sha256}]
