"""The escrow key is made apart, opens by its passphrase alone, and the estate takes only a certificate that fits."""

import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import terminal

from llmkeep import cli, escrow, passphrase
from llmkeep.escrow import EscrowError

ROOT = Path(__file__).resolve().parents[3]
WORD = "six words that are hard to guess"


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the offline machine has: key, certificate, and the passphrase in a file."""
    folder = tmp_path_factory.mktemp("offline")
    file = folder / "passphrase"
    file.write_text(WORD + "\n")
    file.chmod(0o600)
    assert cli.main(["keys", "escrow", str(folder / "escrow"), "--passphrase-file", str(file)]) == 0
    return folder


def documented(begin: str) -> list[str]:
    """The commands in docs/operate/keys.md that begin with these words."""
    lines = re.sub(r" \\\n\s*", " ", (ROOT / "docs/operate/keys.md").read_text()).splitlines()
    return [line.strip() for line in lines if line.strip().startswith(begin)]


def certificate(folder: Path, *options: str) -> Path:
    """A certificate by another program."""
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-subj", "/CN=other", *options]
    argv += ["-keyout", str(folder / "other.key"), "-out", str(folder / "other.pem")]
    subprocess.run(argv, check=True, capture_output=True)
    return folder / "other.pem"


def test_the_key_is_readable_by_its_owner_alone_and_is_encrypted(offline: Path) -> None:
    key = offline / "escrow/escrow.key"
    assert key.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert key.stat().st_mode & 0o777 == 0o400
    assert (offline / "escrow").stat().st_mode & 0o777 == 0o700


def test_the_fingerprint_is_openssls(offline: Path) -> None:
    (command,) = documented("openssl x509")
    said = subprocess.run(command.split(), cwd=offline / "escrow", check=True, capture_output=True, text=True)
    mark = escrow.fingerprint(escrow.load(offline / "escrow/escrow.pem"))
    assert said.stdout.strip().split("=")[1].replace(":", "").lower() == mark


def test_what_is_encrypted_to_it_opens_by_the_documented_command_and_its_passphrase(
    offline: Path, tmp_path: Path
) -> None:
    sealed = escrow.encrypt_to(offline / "escrow/escrow.pem", b"the root key")
    (tmp_path / "root-key.cms").write_bytes(sealed)
    (tmp_path / "escrow.key").write_bytes((offline / "escrow/escrow.key").read_bytes())
    (command,) = documented("openssl cms")
    code, screen = terminal.run(command.split(), ["a wrong passphrase"], tmp_path)
    assert code != 0, screen
    code, screen = terminal.run(command.split(), [WORD], tmp_path)
    assert code == 0, screen
    assert (tmp_path / "root.key").read_bytes() == b"the root key"
    assert WORD not in screen


def test_a_key_made_with_the_documented_openssl_commands_is_taken_and_opens(tmp_path: Path) -> None:
    made, requested = documented("openssl genpkey")[0].replace("4096", "3072"), documented("openssl req")[0]
    code, screen = terminal.run(["sh", "-c", made], [WORD, WORD], tmp_path)
    assert code == 0, screen
    code, screen = terminal.run(["sh", "-c", requested], [WORD], tmp_path)
    assert code == 0, screen
    (tmp_path / "sealed").write_bytes(escrow.encrypt_to(tmp_path / "escrow.pem", b"a secret"))
    (file := tmp_path / "passphrase").write_text(WORD)
    file.chmod(0o600)
    assert escrow.decrypt(tmp_path / "sealed", tmp_path / "escrow.key", file) == b"a secret"


def test_tells_a_wrong_passphrase_from_a_wrong_key(offline: Path, tmp_path: Path) -> None:
    (tmp_path / "sealed").write_bytes(escrow.encrypt_to(certificate(tmp_path), b"a secret"))
    (wrong := tmp_path / "wrong").write_text("not the passphrase")
    wrong.chmod(0o600)
    key = offline / "escrow/escrow.key"
    with pytest.raises(passphrase.PassphraseError, match="the passphrase does not open"):
        escrow.decrypt(tmp_path / "sealed", key, wrong)
    with pytest.raises(EscrowError, match="use the escrow key that the bundle was made with"):
        escrow.decrypt(tmp_path / "sealed", key, offline / "passphrase")


def test_never_replaces_a_key(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (offline / "escrow/escrow.key").read_bytes()
    assert (
        cli.main(
            ["keys", "escrow", str(offline / "escrow"), "--passphrase-file", str(offline / "passphrase")]
        )
        == 1
    )
    assert "already exists" in capsys.readouterr().err
    assert (offline / "escrow/escrow.key").read_bytes() == before


@pytest.mark.parametrize("given", ["key", "both", "text", "public key"])
def test_takes_nothing_but_a_certificate(given: str, offline: Path, tmp_path: Path) -> None:
    key, pem = (offline / f"escrow/escrow.{kind}" for kind in ("key", "pem"))
    contents = {"key": key.read_bytes(), "both": pem.read_bytes() + key.read_bytes(), "text": b"hello"}
    contents["public key"] = b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    (file := tmp_path / "escrow.pem").write_bytes(contents[given])
    private = given in ("key", "both")
    with pytest.raises(
        EscrowError, match="holds a private key.*delete it here" if private else "is not a certificate"
    ):
        escrow.load(file)


def test_refuses_a_certificate_that_may_not_encrypt_keys(tmp_path: Path) -> None:
    with pytest.raises(EscrowError, match="lacks keyEncipherment"):
        escrow.load(certificate(tmp_path, "-addext", "keyUsage=critical,digitalSignature"))


def test_refuses_another_algorithm_than_rsa(tmp_path: Path) -> None:
    with pytest.raises(EscrowError, match="holds ECPublicKey"):
        escrow.load(certificate(tmp_path, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384"))


@pytest.mark.parametrize("days", [-30, 3700])
def test_refuses_a_certificate_that_has_expired_or_is_not_valid_yet(offline: Path, days: int) -> None:
    moment = datetime.now(UTC) + timedelta(days=days)
    with pytest.raises(EscrowError, match=re.escape(f"and it is {moment:%Y-%m-%d}")):
        escrow.load(offline / "escrow/escrow.pem", moment)
