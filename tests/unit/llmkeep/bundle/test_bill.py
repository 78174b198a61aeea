"""The SBOM of a bundle: everything in its manifest, as CycloneDX 1.6, always the same."""

from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from llmkeep import cli
from llmkeep.bundle import bill, manifest
from llmkeep.bundle.manifest import Entry, Manifest

DEB = "pkg:deb/debian/libstdc%2B%2B6@1%3A14.2?arch=amd64"


def entry(path: str, purl: str = "", licence: str = "MIT", digit: str = "1") -> Entry:
    return Entry(path, 1, digit * 64, "", licence, "git:abc" if not purl else "deb", purl)


ENTRIES = [
    entry("apt/pool/libstdc++6.deb", DEB, "GPL-3+ with Bison exception", "2"),
    entry("bin/opa", "pkg:golang/github.com/open-policy-agent/opa@v1.22.2", digit="3"),
    entry("docs/_static/doctools.js", "pkg:pypi/sphinx@9.2.0", digit="c"),
    entry("docs/_static/searchtools.js", "pkg:pypi/sphinx@9.2.0", digit="d"),
    entry("docs/docs/README.html", digit="e"),
    entry("docs/searchindex.js", digit="f"),
    entry("models/small/config.json", "pkg:pypi/small@1", digit="4"),
    entry("models/small/model.safetensors", "pkg:pypi/small@1", digit="5"),
    entry("tree/site.yml", digit="6"),
    entry("tree/payload/llmweb/static/vendor/marked.esm.js", "pkg:npm/marked@18.2.1", digit="7"),
    entry("tree/payload/llmweb/static/vendor/marked.LICENSE", "pkg:npm/marked@18.2.1", digit="8"),
    entry("wheels/control/cffi-2.1-cp313.whl", "pkg:pypi/cffi@2.1", digit="9"),
    entry("wheels/serving/cffi-2.1-cp313.whl", "pkg:pypi/cffi@2.1", digit="9"),
    entry("wheels/serving/llmkeep_core-0.1.0-py3-none-any.whl", digit="a"),
    entry("wheels/serving/requirements.txt", digit="b"),
]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    listed = Manifest(
        manifest.BUNDLE, 7, "lab", "2026-12-02T08:57:07Z", "2027-12-02T08:57:07Z", "A" * 40, "", "", ENTRIES
    )
    manifest.write(tmp_path, listed)
    return tmp_path


def test_each_file_of_the_manifest_is_in_a_component(bundle: Path) -> None:
    found = {(each["type"], each["name"]): each for each in bill.of_bundle(bundle)["components"]}
    assert set(found) == {
        ("library", "libstdc++6"),
        ("application", "opa"),
        ("machine-learning-model", "small"),
        ("application", "llmkeep-tree"),
        ("application", "llmkeep-docs"),
        ("library", "sphinx"),
        ("library", "marked"),
        ("library", "cffi"),
        ("library", "llmkeep-core"),
        ("file", "wheels/serving/requirements.txt"),
    }
    assert found["library", "libstdc++6"]["licenses"] == [
        {"expression": "GPL-3.0-or-later WITH Bison-exception-2.2"}
    ]
    assert found["library", "libstdc++6"]["version"] == "1:14.2"
    assert found["library", "marked"]["hashes"] == [{"alg": "SHA-256", "content": "7" * 64}]


def test_a_model_has_the_sha256_of_its_files_sums(bundle: Path) -> None:
    models = [each for each in ENTRIES if each.path.startswith("models/")]
    changed = [models[0], entry(models[1].path, models[1].purl, digit="f")]
    (model,) = (each for each in bill.of_bundle(bundle)["components"] if each["name"] == "small")
    sums = model["hashes"][0]["content"]
    assert sums == bill.sums(models, "models/small/")
    assert bill.sums(changed, "models/small/") != sums


def test_the_schema_of_cyclonedx_accepts_it(bundle: Path) -> None:
    made = bill.encoded(bill.of_bundle(bundle)).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(made) is None
    broken = made.replace('"type": "library"', '"type": "nonsense"')
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


def test_the_command_writes_the_same_bytes_each_time(bundle: Path, tmp_path: Path) -> None:
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file in files:
        assert cli.main(["sbom", "bundle", str(bundle), "--out", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sbom", "bundle", str(tmp_path)]) == manifest.DAMAGED
    assert "has no MANIFEST.json" in capsys.readouterr().err


def test_another_manifest_gives_another_serial_number(bundle: Path) -> None:
    before = bill.of_bundle(bundle)["serialNumber"]
    listed = manifest.read(bundle)
    listed.serial += 1
    manifest.write(bundle, listed)
    assert bill.of_bundle(bundle)["serialNumber"] != before
