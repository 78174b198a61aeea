"""What the SBOM of an image lists beside packages and wheels."""

import shutil
from pathlib import Path

import pytest

from llmkeep.bundle import build, lock, manifest
from llmkeep.bundle.manifest import Entry, Manifest
from llmkeep.errors import LlmkeepError
from llmkeep.image import contents, sbom
from llmkeep.image.contents import Source
from llmkeep.source_tree import TREE

DIGEST, TIME = f"sha256:{'1' * 64}", "2026-12-02T08:57:07Z"
PACKAGE = Entry("apt/pool/base.deb", 1, "0" * 64, "", "MIT", "deb", "pkg:deb/debian/base@1?arch=all")


def test_scripts_of_the_pages_are_components_as_npm_publishes_them(tmp_path: Path) -> None:
    shutil.copytree(TREE / lock.VENDORED, tmp_path / "bundle/tree" / lock.VENDORED)
    shutil.copy(TREE / lock.VENDORED.with_suffix(".yml"), tmp_path / "bundle/tree" / lock.VENDORED.parent)
    entries = build._entries(tmp_path / "bundle", lock.vendored(tmp_path / "bundle/tree"))
    signed = Manifest(manifest.BUNDLE, 1, "lab", "", "", "", "", "", [PACKAGE, *entries])
    status = tmp_path / "debian" / sbom.STATUS
    status.parent.mkdir(parents=True)
    status.write_text("Package: base\nVersion: 1\nArchitecture: all\n")
    bill = sbom.document(Source(tmp_path, signed, [], [], 0), [tmp_path / "debian"], DIGEST, TIME)
    scripts = {each["purl"]: each for each in bill["components"] if each["purl"] != PACKAGE.purl}
    assert list(scripts) == ["pkg:npm/dompurify@3.5.0", "pkg:npm/marked@18.2.1"]
    marked = scripts["pkg:npm/marked@18.2.1"]
    assert (marked["name"], marked["version"]) == ("marked", "18.2.1")
    assert marked["licenses"] == [{"license": {"id": "MIT"}}]
    (script,) = (entry for entry in entries if entry.path.endswith("/marked.esm.js"))
    assert marked["hashes"] == [{"alg": "SHA-256", "content": script.sha256}]


@pytest.fixture
def two_environments(tmp_path: Path) -> Source:
    """Ours and vLLM's: both have a distribution `shared`, and each another version of `torch`. Layers lie in LAYERS."""
    releases = {"serving": ("shared-1", "torch-2"), "vllm": ("shared-1", "torch-3")}
    wheels = [
        Entry(
            f"wheels/{each}/{release}-py3-none-any.whl", 1, "0" * 64, "", "MIT", "wheel", f"pkg:pypi/{purl}"
        )
        for each, found in releases.items()
        for release in found
        for purl in [release.replace("-", "@")]
    ]
    for each, found in releases.items():
        for release in found:
            (
                tmp_path / "tree" / contents.VENVS[each] / f"lib/python3/site-packages/{release}.dist-info"
            ).mkdir(parents=True)
    status = tmp_path / "tree" / sbom.STATUS
    status.parent.mkdir(parents=True)
    status.write_text("Package: base\nVersion: 1\nArchitecture: all\n")
    signed = Manifest(manifest.BUNDLE, 1, "gpu", "", "", "", "", "", [PACKAGE, *wheels])
    return Source(tmp_path, signed, list(releases), [], 0)


def test_what_two_environments_share_is_one_component(two_environments: Source) -> None:
    bill = sbom.document(two_environments, [two_environments.bundle / "tree"], DIGEST, TIME)
    purls = [each["purl"] for each in bill["components"] if each["purl"] != PACKAGE.purl]
    assert purls == ["pkg:pypi/shared@1", "pkg:pypi/torch@2", "pkg:pypi/torch@3"]


def test_refuses_a_version_that_only_the_other_environment_has(two_environments: Source) -> None:
    tree = two_environments.bundle / "tree"
    (tree / contents.VENVS["vllm"] / "lib/python3/site-packages/torch-2.dist-info").mkdir()
    with pytest.raises(LlmkeepError, match=r"torch-2\.dist-info, which is not a wheel of"):
        sbom.document(two_environments, [tree], DIGEST, TIME)
