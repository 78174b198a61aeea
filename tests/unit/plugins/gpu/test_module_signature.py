"""Signatures of kernel modules, made by real openssl and by a key in real SoftHSM, verified without loading a module."""

import lzma
import os
import subprocess
from pathlib import Path

import pytest
from driver_builds import KEY, signer
from plugin_modules import ROOT, load
from softhsm import double

module_signature = load("module_utils.gpu.module_signature")
signing = load("module_utils.gpu.signing")

BODY = b"\x7fELF, as far as a signature is concerned" * 40
PROGRAM = ROOT / "plugins/module_utils/gpu/module_signature.py"


def key(folder: Path, name: str) -> Path:
    """The certificate (DER) of a new key, whose files are in the folder."""
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-nodes", "-subj", f"/CN={name}"]
    files = ["-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"]
    subprocess.run(["openssl", "req", "-quiet", "-x509", *kind, *files], check=True)
    certificate = folder / f"{name}.der"
    subprocess.run(
        ["openssl", "x509", "-in", f"{folder}/{name}.pem", "-outform", "DER", "-out", certificate], check=True
    )
    return certificate


def signed(folder: Path, name: str, without: str = "-nocerts") -> bytes:
    """The body with a signature as sign-file of the kernel appends it, WITHOUT the signer's certificate."""
    (folder / "body").write_bytes(BODY)
    how = ["-binary", "-noattr", *without.split(), "-outform", "DER", "-md", "sha256"]
    files = ["-signer", f"{folder}/{name}.pem", "-inkey", f"{folder}/{name}.key", "-in", f"{folder}/body"]
    made = subprocess.run(["openssl", "cms", "-sign", *how, *files], capture_output=True, check=True).stdout
    tail = bytes([0, 0, module_signature.PKCS7, 0, 0, 0, 0, 0]) + len(made).to_bytes(4, "big")
    return bytes(BODY + made + tail + module_signature.MAGIC)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return key(tmp_path, "own")


@pytest.mark.parametrize("name", ["standin.ko", "standin.ko.xz"])
def test_a_signed_module_passes(tmp_path: Path, certificate: Path, name: str) -> None:
    module = tmp_path / name
    content = signed(tmp_path, "own")
    module.write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    assert module_signature.faults([module], certificate) == []


@pytest.mark.parametrize(
    ("flipped", "reason"),
    [(100, "does not verify"), (len(BODY) + 40, "does not verify|damaged"), (-30, "damaged"), (-1, "not signed")],
)  # fmt: skip
def test_a_flipped_byte_is_refused(tmp_path: Path, certificate: Path, flipped: int, reason: str) -> None:
    content = bytearray(signed(tmp_path, "own"))
    content[flipped] ^= 0xFF
    (tmp_path / "standin.ko").write_bytes(content)
    with pytest.raises(module_signature.Unsigned, match=reason):
        module_signature.verify(tmp_path / "standin.ko", certificate)


@pytest.mark.parametrize("without", ["-nocerts", ""])
def test_a_stranger_s_signature_is_refused_also_with_its_certificate(
    tmp_path: Path, certificate: Path, without: str
) -> None:
    key(tmp_path, "stranger")
    (tmp_path / "standin.ko").write_bytes(signed(tmp_path, "stranger", without))
    with pytest.raises(module_signature.Unsigned, match="signer certificate not found"):
        module_signature.verify(tmp_path / "standin.ko", certificate)


@pytest.mark.parametrize("content", [b"", BODY, module_signature.MAGIC, b"short" + module_signature.MAGIC])
def test_what_has_no_signature_is_refused(tmp_path: Path, certificate: Path, content: bytes) -> None:
    (tmp_path / "standin.ko").write_bytes(content)
    with pytest.raises(module_signature.Unsigned):
        module_signature.verify(tmp_path / "standin.ko", certificate)


def test_the_program_refuses_to_have_verified_nothing(certificate: Path) -> None:
    done = subprocess.run(["python3.13", PROGRAM, certificate], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "there is no module to verify\n")


def test_the_certificate_is_the_hsm_s_key_s_and_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way, public_pem = signer(double(tmp_path, monkeypatch))
    assert not signing.certifies(way.certificate, public_pem)
    signing.certify(way, KEY, "llm1 kernel modules")
    assert signing.certifies(way.certificate, public_pem)
    told = subprocess.run(
        ["openssl", "x509", "-inform", "DER", "-in", way.certificate, "-noout", "-ext", "extendedKeyUsage"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Code Signing, 1.3.6.1.4.1.2312.16.1.2" in told.stdout
    assert not signing.certifies(key(tmp_path, "other"), public_pem)


def test_the_pin_is_in_no_file_and_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = double(tmp_path, monkeypatch)
    pin = (lab.folder / "user-pin").read_text()
    way = signing.Signing(tmp_path / "modules.der", "/c", "unix:path=/s", str(lab.folder / "user-pin"))
    with signing.shown_pin(way) as (environment, passed):
        assert pin not in " ".join(environment.values())
        assert Path(environment["LLMKEEP_MODULE_PIN"]).read_text() == pin
        assert "/memfd:" in str(Path(environment["LLMKEEP_MODULE_PIN"]).readlink())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(passed[0])
