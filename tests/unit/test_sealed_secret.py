"""sealed_secret with a stand-in for systemd-creds that keeps a record of how it was called."""

import hashlib
from pathlib import Path

import pytest
from plugin_modules import load

sealed_secret = load("modules.sealed_secret")

STAND_IN = """#!/bin/sh
echo "$@" >> "$0.calls"; env >> "$0.calls"
case "$1" in encrypt) printf 'sealed:'; base64 ;; decrypt) sed 's/^sealed://' | base64 -d ;; esac
"""


@pytest.fixture
def creds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin/systemd-creds"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


@pytest.mark.usefixtures("creds")
def test_the_digest_is_that_of_the_sealed_text_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "store/name"
    digest = sealed_secret.make(path, "name", 32)
    secret = sealed_secret.systemd_creds("decrypt", "name", path.read_bytes())
    assert len(secret) == 64
    assert hashlib.sha256(secret).hexdigest() == digest == sealed_secret.digest_of(path, "name")
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_secret_is_in_no_argument_and_no_environment(tmp_path: Path, creds: Path) -> None:
    path = tmp_path / "store/name"
    sealed_secret.make(path, "name", 32)
    secret = sealed_secret.systemd_creds("decrypt", "name", path.read_bytes()).decode()
    assert secret not in Path(f"{creds}.calls").read_text()


def test_a_credential_that_does_not_open_is_left_and_the_way_out_is_said(tmp_path: Path, creds: Path) -> None:
    path = tmp_path / "name"
    path.write_bytes(b"sealed by a key that is gone")
    creds.write_text("#!/bin/sh\necho 'Failed to decrypt: wrong key' >&2\nexit 1\n")
    with pytest.raises(sealed_secret.Refused, match=r"wrong key.*remove the file and run again"):
        sealed_secret.digest_of(path, "name")
    assert path.read_bytes() == b"sealed by a key that is gone"
