"""The bundle's signing key in real SoftHSM: `sqv`, apt and bootstrap's check take what it signs; its PIN is shown once."""

import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from softhsm import SOFTHSM, double, faulty

from llmkeep import cli
from llmkeep.bundle import build, signing
from llmkeep.errors import LlmkeepError
from llmkeep.passphrase import PassphraseError

TOKEN = "llmkeep-bundle"


@pytest.fixture(scope="module")
def escrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("escrow")
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-subj", "/CN=escrow"]
    subprocess.run(
        [*argv, "-keyout", folder / "key", "-out", folder / "pem"], check=True, capture_output=True
    )
    return folder / "pem"


@pytest.fixture
def keys(tmp_path: Path, escrow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of keys as `llmkeep keys init` makes it with a token; its PIN is in `user-pin` beside it."""
    hsm = double(tmp_path, monkeypatch)
    hsm.make_tokens(tokens=[TOKEN])
    (tmp_path / "user-pin").chmod(0o600)
    monkeypatch.setenv("FAULTY_HSM_MODULE", SOFTHSM)
    module = ["--module", faulty(tmp_path), "--token", TOKEN]
    files = ["--escrow", str(escrow), "--passphrase-file", str(tmp_path / "user-pin")]
    assert cli.main(["keys", "init", str(tmp_path / "keys"), *files, *module]) == 0
    return tmp_path / "keys"


def test_what_it_signs_is_verified_by_sqv_alone(keys: Path, tmp_path: Path) -> None:
    file = tmp_path / "MANIFEST.json"
    file.write_text("{}")
    with signing.signer(build.Keys(keys).signing, tmp_path / "user-pin") as key:
        signing.sign(key, file, tmp_path / "signature")
    signature = (tmp_path / "signature").read_bytes()
    signer = signing.verify(keys / "keyring.pgp", file, b"{}", signature)
    assert signer == signing.fingerprint(keys / "keyring.pgp")
    with pytest.raises(signing.SignatureRefused):
        signing.verify(keys / "keyring.pgp", file, b"{ }", signature)


def test_no_private_key_and_no_pin_is_in_a_file(keys: Path, tmp_path: Path) -> None:
    pin = (tmp_path / "user-pin").read_bytes()
    assert sorted(path.name for path in keys.iterdir()) == [
        "escrow.pem", "keyring.pgp", "revocation.pgp", "signing-pkcs11.json",
    ]  # fmt: skip
    for path in keys.iterdir():
        assert b"PRIVATE" not in path.read_bytes()
        assert pin not in path.read_bytes()


@pytest.mark.parametrize(
    "text", ["Origin: llmkeep\n", "- a dash\n--- three\nFrom here \t\n\n\nend", "ends\n\n", "ä\n"]
)
def test_a_cleartext_signature_holds_for_every_text(keys: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "Release").write_text(text)
    with signing.signer(build.Keys(keys).signing, tmp_path / "user-pin") as key:
        signing.sign_inline(key, tmp_path / "Release", tmp_path / "InRelease")
    argv = ["sqv", "--keyring", str(keys / "keyring.pgp"), "--cleartext", "--output", str(tmp_path / "out")]
    subprocess.run([*argv, str(tmp_path / "InRelease")], check=True)
    stripped = "\n".join(line.rstrip(" \t") for line in text.removesuffix("\n").split("\n"))
    assert (tmp_path / "out").read_text().rstrip("\n") == stripped.rstrip("\n")


def test_the_revocation_certificate_ends_the_key(keys: Path, tmp_path: Path) -> None:
    file = tmp_path / "content"
    file.write_text("{}")
    with signing.signer(build.Keys(keys).signing, tmp_path / "user-pin") as key:
        signing.sign(key, file, tmp_path / "signature")
    revoked = (keys / "keyring.pgp").read_bytes()
    end = revoked.index(b"\xcd\xff")  # before the user ID, where a revocation of the key belongs
    (tmp_path / "revoked.pgp").write_bytes(
        revoked[:end] + (keys / "revocation.pgp").read_bytes() + revoked[end:]
    )
    with pytest.raises(signing.SignatureRefused, match="revoked"):
        signing.verify(tmp_path / "revoked.pgp", file, b"{}", (tmp_path / "signature").read_bytes())


def test_a_wrong_pin_is_shown_to_the_token_once(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_HSM_LOGINS", str(tmp_path / "logins"))
    (wrong := tmp_path / "wrong").write_text("not this one")
    wrong.chmod(0o600)
    with pytest.raises(PassphraseError, match="pin_wrong"), signing.signer(build.Keys(keys).signing, wrong):
        pass
    assert (tmp_path / "logins").read_text() == "login\n"
    with (
        pytest.raises(LlmkeepError, match="pin_held_back"),
        signing.signer(build.Keys(keys).signing, tmp_path / "user-pin"),
    ):
        pass
    assert (tmp_path / "logins").read_text() == "login\n"


def test_another_key_in_the_tokens_place_signs_nothing(keys: Path, tmp_path: Path) -> None:
    settings = keys / "signing-pkcs11.json"
    told = json.loads(settings.read_bytes())
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    form = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    settings.write_text(json.dumps({**told, "public": other.public_bytes(*form).hex()}))
    with (
        pytest.raises(LlmkeepError, match="not the one that hosts trust"),
        signing.signer(settings, tmp_path / "user-pin"),
    ):
        pass


def test_its_pin_is_not_changed_here_and_a_damaged_description_is_named(
    keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["keys", "passphrase", str(keys)]) == 1
    assert "with the HSM's own tool" in capsys.readouterr().err
    assert cli.main(["keys", "init", str(keys), "--module", SOFTHSM]) == 1
    assert "belong together" in capsys.readouterr().err
    (keys / "signing-pkcs11.json").write_text("{")
    with (
        pytest.raises(LlmkeepError, match="restore it from a backup"),
        signing.signer(keys / "signing-pkcs11.json", None),
    ):
        pass
