"""What a bundle was built from is signed apart, equal bundles of two teams are equal, and NOTICE names what is of others."""

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import small_bundle

from llmkeep import cli
from llmkeep.bundle import bill, build, cache, manifest, notice, provenance, signing
from llmkeep.bundle.lock import Artifact
from llmkeep.bundle.manifest import BundleRefused

WHEEL = Artifact("cffi.whl", "2.1", "9" * 64, 1, "MIT License", "pkg:pypi/cffi@2.1")
BASH = Artifact("bash.deb", "5", "8" * 64, 1, "GPL-3+", "pkg:deb/debian/bash@5?arch=amd64")
RELEASE = """-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA512

Date: {date}
SHA256:
 {digest} 1 main/binary-amd64/Packages

-----BEGIN PGP SIGNATURE-----
{signature}
"""


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The keys of two teams."""
    return (
        small_bundle.signing_keys(tmp_path_factory.mktemp("one")),
        small_bundle.signing_keys(tmp_path_factory.mktemp("other")),
    )


def made(folder: Path, keys: Path, commit: str = "git:abc", digest: str = "1") -> Path:
    """A bundle with a statement, by the steps of a build."""
    small_bundle.write(folder, keys)
    signer = signing.fingerprint(keys / "keyring.pgp")
    index = folder / "apt/dists/trixie/InRelease"
    index.parent.mkdir(parents=True)
    index.write_text(RELEASE.format(date=signer[:3], digest=digest, signature=signer))
    (folder / manifest.NAME).unlink()
    (folder / manifest.SIGNATURE).unlink()
    how = provenance.Build(
        "lab", commit, "2" * 64, "3" * 64, signer, "2026-12-02T08:00:00Z", "2026-12-02T08:01:00Z"
    )
    statement = provenance.statement(how, build._entries(folder, {}), {"cffi==2.1": WHEEL})
    with signing.signer(signing.key_file(keys), None) as key:
        (folder / provenance.NAME).write_bytes(provenance.envelope(statement, key, signer))
    small_bundle.sign(folder, keys, 7, 30)
    return folder


def refusal(folder: Path, keys: Path) -> str:
    with pytest.raises(BundleRefused) as refused:
        provenance.verified(folder, keys / "keyring.pgp")
    return str(refused.value)


def test_the_statement_says_what_the_files_were_built_from(
    tmp_path: Path, teams: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "bundle", teams[0], "git:abc-dirty")
    assert cli.main(["bundle", "provenance", str(folder), "--keyring", str(teams[0] / "keyring.pgp")]) == 0
    statement = json.loads(capsys.readouterr().out)
    assert (statement["_type"], statement["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    files = [each for each in manifest.read(folder).files if each.path != provenance.NAME]
    assert statement["subject"] == [{"name": "files", "digest": {"sha256": bill.sums(files)}}]
    assert statement["predicate"]["buildDefinition"]["resolvedDependencies"] == [
        {"uri": "git+urn:llmkeep:tree", "digest": {"gitCommit": "abc"}, "annotations": {"changed": True}},
        {"uri": "pkg:pypi/cffi@2.1", "name": "cffi==2.1", "digest": {"sha256": "9" * 64}},
    ]
    signer = signing.fingerprint(teams[0] / "keyring.pgp")
    assert statement["predicate"]["runDetails"]["builder"]["id"] == f"urn:llmkeep:builder:{signer}"


def test_sqv_alone_checks_the_signature_over_dsse(tmp_path: Path, teams: tuple[Path, Path]) -> None:
    envelope = json.loads((made(tmp_path / "bundle", teams[0]) / provenance.NAME).read_bytes())
    payload = base64.b64decode(envelope["payload"])
    (tmp_path / "encoded").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d " % len(payload) + payload)
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["sqv", "--keyring", str(teams[0] / "keyring.pgp"), "--signature-file"]
    done = subprocess.run(
        [*command, tmp_path / "signature", tmp_path / "encoded"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == envelope["signatures"][0]["keyid"]


def altered(folder: Path, keys: Path, change: Any) -> None:
    """Change the envelope, and sign the manifest anew: what the envelope's own signature has to notice."""
    path = folder / provenance.NAME
    envelope = json.loads(path.read_bytes())
    change(envelope)
    path.write_text(json.dumps(envelope))
    small_bundle.sign(folder, keys, 7, 30)


def _another_builder(envelope: dict[str, Any]) -> None:
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["runDetails"]["builder"]["id"] = "urn:llmkeep:builder:us"
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_another_builder, "is not signed by a key of"),
        (lambda envelope: envelope.update(signatures=[]), "cannot be read"),
        (lambda envelope: envelope.update(payload="%"), "cannot be read"),
        (
            lambda envelope: envelope.update(payload=base64.b64encode(b"[" * 100_000).decode()),
            "cannot be read",
        ),
        (lambda envelope: envelope.update(payloadType="text/plain"), "not as provenance"),
        (lambda envelope: envelope["signatures"].append({}), "cannot be read"),
    ],
)
def test_an_altered_statement_is_refused(
    tmp_path: Path, teams: tuple[Path, Path], change: Any, words: str
) -> None:
    folder = made(tmp_path / "bundle", teams[0])
    altered(folder, teams[0], change)
    assert words in refusal(folder, teams[0])


def test_the_statement_of_another_bundle_is_refused(tmp_path: Path, teams: tuple[Path, Path]) -> None:
    folder = made(tmp_path / "bundle", teams[0])
    (folder / "models/small/weights").write_text("other")
    small_bundle.sign(folder, teams[0], 8, 30)
    assert "it belongs to another bundle" in refusal(folder, teams[0])


def test_a_bundle_without_a_statement_is_told(tmp_path: Path, teams: tuple[Path, Path]) -> None:
    assert "has no provenance.json" in refusal(small_bundle.write(tmp_path / "bundle", teams[0]), teams[0])


def compared(first: Path, second: Path) -> int:
    return cli.main(["bundle", "compare", str(first), str(second)])


def test_bundles_of_two_teams_with_the_same_content_are_equal(
    tmp_path: Path, teams: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = made(tmp_path / "one", teams[0]), made(tmp_path / "other", teams[1], "git:def")
    assert cache.sha256(one / "bootstrap") != cache.sha256(other / "bootstrap")
    assert compared(one, other) == 0
    assert "equal content: each byte but keys, signatures and dates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("models/small/weights", b"other"),
        ("bootstrap", b"rm -rf /\n"),
        ("apt/dists/trixie/InRelease", b"Date: x\nSHA256:\n other\n"),
        ("tree/more.yml", b"more"),
    ],
)
def test_each_difference_in_content_is_named(
    tmp_path: Path, teams: tuple[Path, Path], path: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = made(tmp_path / "one", teams[0]), made(tmp_path / "other", teams[1])
    (other / path).parent.mkdir(exist_ok=True)
    (other / path).write_bytes(content)
    small_bundle.sign(other, teams[1], 7, 30)
    assert compared(one, other) == 1
    error = capsys.readouterr().err
    assert f"their content differs in 1 places:\n  {path}: " in error
    assert compared(other, one) == 1


def test_a_bundle_that_is_not_as_its_manifest_says_is_equal_to_none(
    tmp_path: Path, teams: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = made(tmp_path / "one", teams[0])
    other = Path(shutil.copytree(one, tmp_path / "other"))
    (other / "models/small/weights").write_bytes(b"\1" * 5000)
    assert compared(one, other) == manifest.DAMAGED
    assert "models/small/weights has sha256" in capsys.readouterr().err


def test_notice_names_what_is_of_others_by_licence_once() -> None:
    text = notice.text([WHEEL, BASH, WHEEL])
    assert text.endswith(
        "\nGPL-3.0-or-later\n  pkg:deb/debian/bash@5?arch=amd64\n\nMIT\n  pkg:pypi/cffi@2.1\n"
    )
    assert text == notice.text([BASH, WHEEL])
