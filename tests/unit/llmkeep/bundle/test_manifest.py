"""A bundle that is not exactly what was signed is refused, with its reason, and nothing is changed."""

import datetime
import os
import shutil
from pathlib import Path

import pytest
import small_bundle
from hypothesis import given
from hypothesis import strategies as st

from llmkeep import cli
from llmkeep.bundle import commands as bundle
from llmkeep.bundle import manifest, signing
from llmkeep.bundle.manifest import BundleRefused
from llmkeep.errors import LlmkeepError


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(small_bundle.signing_keys(tmp_path_factory.mktemp("keys")))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(small_bundle.signing_keys(tmp_path_factory.mktemp("foreign")))


@pytest.fixture
def folder(tmp_path: Path, keys: Path) -> Path:
    return Path(small_bundle.write(tmp_path / "bundle", keys))


def test_accepts_what_was_signed(folder: Path, keys: Path) -> None:
    found = manifest.verify(folder, keys / "keyring.pgp", manifest.BUNDLE, highest=7)
    assert found.serial == 7
    assert found.signer == signing.fingerprint(keys / "keyring.pgp")
    assert {entry.path for entry in found.files} >= {"bootstrap", "keyring.pgp", "models/small/weights"}


@pytest.mark.parametrize("kind", [manifest.RELEASE, "image", ""])
def test_refuses_a_manifest_that_the_same_key_signed_as_something_else(
    kind: str, folder: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_bundle.sign(folder, keys, 7, 30, kind)
    command = ["bundle", "verify", str(folder), "--keyring", str(keys / "keyring.pgp")]
    assert cli.main(command) == manifest.UNSIGNED
    assert f"is signed as '{kind}', but 'bundle' is needed" in capsys.readouterr().err


def test_lists_the_files_of_a_bundle_of_before_there_were_types(folder: Path) -> None:
    """The bundle before this one lies on the mirror, and releases are linked from what it lists."""
    path = folder / manifest.NAME
    path.write_text(path.read_text().replace(' "type": "bundle",\n', ""))
    assert "models/small/weights" in {entry.path for entry in manifest.read(folder).files}


@pytest.mark.parametrize("damage", small_bundle.DAMAGE)
def test_refuses_a_bundle_with(damage: str, folder: Path, keys: Path, foreign: Path) -> None:
    do, code, words = small_bundle.DAMAGE[damage]
    do(folder, foreign)
    before = small_bundle.snapshot(folder)
    with pytest.raises(BundleRefused) as refusal:
        manifest.verify(folder, keys / "keyring.pgp", manifest.BUNDLE)
    assert refusal.value.code == code
    assert words in str(refusal.value)
    assert small_bundle.snapshot(folder) == before


def test_refuses_an_older_serial_than_it_accepted_before(folder: Path, keys: Path) -> None:
    with pytest.raises(BundleRefused, match="serial 7 is older than 8") as refusal:
        manifest.verify(folder, keys / "keyring.pgp", manifest.BUNDLE, highest=8)
    assert refusal.value.code == manifest.REPLAYED


def test_refuses_an_expired_bundle(folder: Path, keys: Path) -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=31)
    with pytest.raises(BundleRefused, match="expired at") as refusal:
        manifest.verify(folder, keys / "keyring.pgp", manifest.BUNDLE, now=later)
    assert refusal.value.code == manifest.EXPIRED


def test_refuses_a_manifest_that_is_another_one_once_its_signature_was_checked(
    folder: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(folder, forged)
    (forged / "models/small/weights").write_bytes(b"forged")
    small_bundle.sign(forged, keys, 7, 30)
    (forged / manifest.SIGNATURE).write_bytes((folder / manifest.SIGNATURE).read_bytes())
    sqv = tmp_path / "bin/sqv"
    sqv.parent.mkdir()
    sqv.write_text(f'#!/bin/sh\n/usr/bin/sqv "$@" || exit\ncp -R {forged}/. {folder}\n')
    sqv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sqv.parent}:{os.environ['PATH']}")
    with pytest.raises(BundleRefused, match="models/small/weights has") as refusal:
        manifest.verify(folder, keys / "keyring.pgp", manifest.BUNDLE)
    assert refusal.value.code == manifest.DAMAGED


def test_refuses_a_manifest_of_another_format(folder: Path, keys: Path) -> None:
    text = (folder / manifest.NAME).read_text()
    (folder / manifest.NAME).write_text(text.replace('"format": 1', '"format": 2'))
    signing.sign(keys / "signing.key", folder / manifest.NAME, folder / "again")
    (folder / "again").replace(folder / manifest.SIGNATURE)
    with pytest.raises(BundleRefused, match="format 2"):
        manifest.verify(folder, keys / "keyring.pgp", manifest.BUNDLE)


def test_the_command_tells_each_refusal_by_its_exit_code(
    folder: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "serial"
    command = ["bundle", "verify", str(folder), "--keyring", str(keys / "keyring.pgp"), "--seen", str(seen)]
    assert cli.main(command) == 0
    seen.write_text("8\n")
    assert cli.main(command) == manifest.REPLAYED
    assert "use one with that serial or a later one" in capsys.readouterr().err
    assert cli.main([*command[:-4], "--keyring", "/nowhere"]) == 1
    assert "--keyring" in capsys.readouterr().err
    assert bundle.__doc__ is not None
    assert "3 unsigned" in bundle.__doc__


@pytest.mark.parametrize("path", ["a\nb", 'a"b', "a b", "../a\\b", "a/", "/a", ""])
def test_a_path_that_a_shell_could_misread_never_gets_into_a_manifest(
    path: str, tmp_path: Path, folder: Path
) -> None:
    found = manifest.read(folder)
    found.files = [manifest.Entry(path, 0, "0" * 64, "", "", "", "")]
    with pytest.raises(LlmkeepError, match="cannot go into a bundle"):
        manifest.write(tmp_path, found)


@given(
    st.lists(
        st.from_regex(manifest.SAFE_PATH, fullmatch=True).filter(manifest.safe), unique=True, max_size=5
    ),
    st.text(),
)
def test_what_is_written_is_read_back(paths: list[str], licence: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files = [manifest.Entry(path, 1, "f" * 64, "text/plain", licence, "", "") for path in sorted(paths)]
        made = manifest.Manifest(manifest.BUNDLE, 3, "lab", "", "", "", "", "", files)
        manifest.write(Path(folder), made)
        assert manifest.read(Path(folder)) == made
