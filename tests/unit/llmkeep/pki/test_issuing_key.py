"""The issuing key in real SoftHSM: moved there, used by `llmkeep pki sign`, and shown by a handshake."""

import json
import multiprocessing
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from plugin_modules import ROOT
from power_cut import losing_power
from small_authority import DOMAIN, NAMES, opened_with, openssl_accepts
from softhsm import SOFTHSM, Double, double, faulty, pkcs11

from llmkeep import cli
from llmkeep.pki import authority as pki
from llmkeep.pki import issuing, revoking
from llmkeep.pki.authority import PkiError
from llmkeep.pki.issuing_key import HsmKey
from llmkeep.places import Places
from llmkeep.sealing import SealError

TOKEN, LABEL = "llmkeep-issuing", "llmkeep issuing"


def required(source: str) -> str:
    """What the role's check asks of `llmkeep pki status --json`."""
    text = (ROOT / "roles/pki/tasks/verify.yml").read_text()
    match = re.search(r"match: '(.*pki_key_source.*)'", text)
    assert match
    return match[1].replace("{{ pki_key_source }}", source)


@pytest.fixture(scope="session")
def escrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("escrow")
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:3072", "-noenc", "-subj", "/CN=escrow"]
    subprocess.run(
        [*argv, "-keyout", folder / "escrow.key", "-out", folder / "escrow.pem"],
        check=True,
        capture_output=True,
    )
    return folder / "escrow.pem"


@dataclass(frozen=True)
class Estate:
    """A control node with its authority, an HSM with a token for it, and the machine that has the escrow key."""

    places: Places
    hsm: Double
    escrow: Path
    root_key: Path

    def settings(self, **more: Any) -> dict[str, Any]:
        pin = {
            "pin": str(self.hsm.folder / "user-pin"),
            "pin_name": "",
        }
        way = {"module": SOFTHSM, "address": "", "user": "", "seconds": 20}
        return {**way, **pin, "token": TOKEN, "label": LABEL, **more}

    def certified(self, csr: bytes) -> bytes:
        root = self.places.root_certificate.read_bytes()
        return issuing.certify(csr, root, self.root_key, self.escrow.with_suffix(".key"))

    def move(self, **more: Any) -> str:
        return issuing.adopt(self.places, self.certified(issuing.request(self.places, self.settings(**more))))

    def sign(self, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
        names = x509.SubjectAlternativeName(pki.general_names(NAMES))
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        asked = csr.add_extension(names, critical=False)
        signed = asked.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        return pki.sign(self.places, signed.public_bytes(serialization.Encoding.PEM), NAMES, "llm1")


@pytest.fixture
def estate(tmp_path: Path, escrow: Path, monkeypatch: pytest.MonkeyPatch) -> Estate:
    monkeypatch.setattr(pki, "seal", lambda secret, _: b"sealed:" + secret)
    monkeypatch.setattr(pki, "unseal", lambda sealed, _: sealed.removeprefix(b"sealed:"))
    hsm = double(tmp_path, monkeypatch)
    hsm.make_tokens(tokens=[TOKEN, "llmkeep"])
    places = Places(tmp_path / "host")
    pki.init(places, DOMAIN, escrow, list(pki.NETWORKS))
    away = tmp_path / "root-key.cms"
    places.root_key.rename(away)
    return Estate(places, hsm, escrow, away)


def test_a_certificate_signed_in_the_hsm_verifies_and_no_key_lies_on_the_control_node(estate: Estate) -> None:
    assert re.search(required("file"), json.dumps(pki.status(estate.places)))
    before = estate.sign()
    assert "not revoked" in estate.move()
    after = estate.sign()
    assert openssl_accepts(estate.places, after, "-verify_hostname", NAMES[0])
    assert openssl_accepts(estate.places, before), "what was issued before the move is good until it ends"
    assert re.search(required("hsm"), json.dumps(pki.status(estate.places)))
    assert not re.search(required("file"), json.dumps(pki.status(estate.places)))
    pin = (estate.hsm.folder / "user-pin").read_bytes()
    for path in (path for path in estate.places.root.rglob("*") if path.is_file()):
        assert b"PRIVATE KEY" not in path.read_bytes(), path
        assert pin not in path.read_bytes(), path


def test_the_three_commands_move_it(
    estate: Estate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(issuing, "Places", lambda: estate.places)

    def said(*words: str) -> tuple[bytes, str]:
        assert cli.main(["issuing", *words]) == 0
        out, err = capfdbinary.readouterr()
        return out, err.decode().removeprefix("sha256 of its public key: ")[:64]

    asking = ("request", "--module", SOFTHSM, "--token", TOKEN)
    assert cli.main(["issuing", *asking]) == 1
    assert b"gives no PIN" in capfdbinary.readouterr().err
    shutil.copy(estate.hsm.folder / "user-pin", estate.places.issuing_key.with_name("llmkeep.issuing-pin"))
    csr, asked = said(*asking)
    (tmp_path / "csr").write_bytes(csr)
    given = ("--root-key", str(estate.root_key), "--escrow-key", str(estate.escrow.with_suffix(".key")))
    root = str(estate.places.root_certificate)
    certificate, certified = said("certify", "--csr", str(tmp_path / "csr"), "--root", root, *given)
    assert asked == certified
    (tmp_path / "issuing.pem").write_bytes(certificate)
    assert b"run site.yml" in said("adopt", "--certificate", str(tmp_path / "issuing.pem"))[0]
    assert openssl_accepts(estate.places, estate.sign())


def test_the_key_was_made_in_the_token_signs_and_does_nothing_else(estate: Estate) -> None:
    estate.move()

    def said(session: Any) -> dict[str, bool]:
        key = session.find({pkcs11.CLASS: pkcs11.PRIVATE_KEY, pkcs11.LABEL: LABEL.encode()})[0]
        wanted = (
            "SIGN",
            "LOCAL",
            "ALWAYS_SENSITIVE",
            "NEVER_EXTRACTABLE",
            "EXTRACTABLE",
            "DERIVE",
            "DECRYPT",
            "UNWRAP",
        )
        return {name: session.is_set(key, getattr(pkcs11, name)) for name in wanted}

    assert [name for name, yes in estate.hsm.by_hand(said, TOKEN).items() if yes] == [
        "SIGN",
        "LOCAL",
        "ALWAYS_SENSITIVE",
        "NEVER_EXTRACTABLE",
    ]


def test_a_tls_1_3_handshake_takes_the_certificate_that_the_hsm_signed(
    estate: Estate, tmp_path: Path
) -> None:
    estate.move()
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "host.pem").write_bytes(estate.sign(key))
    (tmp_path / "host.key").write_bytes(pki.private(key))
    server = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-cert", "host.pem", "-cert_chain", "host.pem"]
    with subprocess.Popen(
        [*server, "-key", "host.key", "-tls1_3", "-naccept", "1"],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as serving:  # fmt: skip
        assert serving.stdout is not None
        port = next(line.split(":")[-1].strip() for line in serving.stdout if line.startswith("ACCEPT"))
        root = str(estate.places.root_certificate)
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", root, "-x509_strict", "-brief",
             "-verify_return_error", "-verify_hostname", NAMES[0]],
            input="Q\n", capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        serving.kill()
    assert done.returncode == 0, done.stderr
    assert "Verification: OK" in done.stderr
    assert "X25519MLKEM768" in done.stderr


def test_the_key_in_the_hsm_signs_the_revocation_list(estate: Estate) -> None:
    revoking.publish(estate.places)
    estate.move()
    assert revoking.publish(estate.places).signed
    assert not revoking.publish(estate.places).signed


def test_the_roots_list_is_signed_where_the_escrow_key_is(
    estate: Estate, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    estate.places.root_list.unlink()
    given = ["--root", estate.places.root_certificate, "--root-key", estate.root_key]
    given += ["--escrow-key", estate.escrow.with_suffix(".key")]
    assert cli.main(["issuing", "root-list", *map(str, given)]) == 0
    estate.places.root_list.write_bytes(capfdbinary.readouterr().out)
    assert revoking.publish(estate.places).signed


def test_the_same_key_gets_a_new_certificate_and_another_one_takes_over(estate: Estate) -> None:
    estate.move()
    first = pki.load(estate.places.issuing_certificate)
    estate.move()
    second = pki.load(estate.places.issuing_certificate)
    assert first.serial_number != second.serial_number
    assert first.public_key() == second.public_key()
    estate.move(label="another")
    assert pki.load(estate.places.issuing_certificate).public_key() != first.public_key()
    assert openssl_accepts(estate.places, estate.sign())


@pytest.mark.parametrize("cut", range(3))
def test_a_move_that_lost_power_is_ended_by_the_next(
    estate: Estate, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    certificate = estate.certified(issuing.request(estate.places, estate.settings()))

    def unlink(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as power:
        power.setattr(issuing, "write", losing_power(cut))
        power.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            issuing.adopt(estate.places, certificate)
    if cut < 2:
        estate.sign()
    issuing.adopt(estate.places, certificate)
    assert not estate.places.issuing_key.exists()
    assert openssl_accepts(estate.places, estate.sign())


def test_a_key_that_was_replaced_in_the_token_signs_nothing(estate: Estate) -> None:
    estate.move()

    def delete(session: Any) -> None:
        for key in session.find({pkcs11.LABEL: LABEL.encode()}):
            session.destroy(key)

    estate.hsm.by_hand(delete, TOKEN)
    with pytest.raises(SealError, match="has no key llmkeep issuing"):
        estate.sign()
    HsmKey.made(estate.settings())
    with pytest.raises(SealError, match="does not match the issuing certificate"):
        estate.sign()
    with pytest.raises(SealError, match="does not match the issuing certificate"):
        pki.status(estate.places)
    assert not estate.places.issued.exists()


def test_a_wrong_pin_is_tried_once_in_all_and_no_pin_while_the_token_warns(
    estate: Estate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_HSM_MODULE", SOFTHSM)
    monkeypatch.setenv("FAULTY_HSM_LOGINS", str(tmp_path / "logins"))
    estate.move(module=faulty(tmp_path))
    (tmp_path / "logins").unlink()
    right = (estate.hsm.folder / "user-pin").read_text()
    estate.hsm.seal("user-pin", "not this one")

    # As site.yml does: for many hosts at once, each by a process of its own.
    fork = multiprocessing.get_context("fork")
    heard = fork.SimpleQueue()

    def told() -> None:
        with pytest.raises(SealError) as refusal:
            estate.sign()
        heard.put(str(refusal.value))

    hosts = [fork.Process(target=told) for _ in range(4)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(20)
        assert host.exitcode == 0
    said = [heard.get() for _ in hosts]
    assert sum("tried once" in words for words in said) == 1
    assert sum("rejected the PIN" in words and "before" in words for words in said) == 3
    assert (tmp_path / "logins").read_text() == "login\n"
    estate.hsm.seal("user-pin", right)
    # SoftHSM warns after one wrong PIN.
    with pytest.raises(SealError, match="pin_held_back"):
        estate.sign()
    estate.hsm.by_hand(lambda _: None, TOKEN)
    monkeypatch.setenv("FAULTY_HSM_FLAGS", "0x10000")
    with pytest.raises(SealError, match="pin_held_back"):
        estate.sign()
    assert (tmp_path / "logins").read_text() == "login\n"
    monkeypatch.delenv("FAULTY_HSM_FLAGS")
    assert openssl_accepts(estate.places, estate.sign())


def test_certify_refuses_a_request_for_another_name_and_a_root_key_that_is_another(
    estate: Estate, tmp_path: Path
) -> None:
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    other = csr.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA384())
    with pytest.raises(PkiError, match=r"but must be for 'CN=estate\.internal issuing'"):
        estate.certified(other.public_bytes(serialization.Encoding.PEM))
    pki.init(Places(tmp_path / "other"), DOMAIN, estate.escrow, [])
    estate.root_key.unlink()
    Places(tmp_path / "other").root_key.rename(estate.root_key)
    assert b"PRIVATE KEY" in opened_with(estate.escrow, estate.root_key)
    with pytest.raises(PkiError, match="the key of another root"):
        estate.certified(issuing.request(estate.places, estate.settings()))


def test_adopt_refuses_another_estates_certificate_a_leaf_and_a_key_that_is_not_in_the_hsm(
    estate: Estate, tmp_path: Path
) -> None:
    before = estate.places.issuing_certificate.read_bytes()
    other = Places(tmp_path / "other")
    pki.init(other, DOMAIN, estate.escrow, [])
    issuing.request(estate.places, estate.settings())
    with pytest.raises(PkiError, match="certificate was not issued by"):
        issuing.adopt(estate.places, other.issuing_certificate.read_bytes())
    with pytest.raises(PkiError, match="certificate was not issued by"):
        issuing.adopt(estate.places, estate.sign())
    with pytest.raises(PkiError, match="is not a valid issuing certificate"):
        issuing.adopt(estate.places, estate.places.root_certificate.read_bytes())
    with pytest.raises(SealError, match="does not match the issuing certificate"):
        issuing.adopt(estate.places, before)
    assert estate.places.issuing_certificate.read_bytes() == before
    assert estate.places.issuing_key.exists()


def test_adopt_without_a_request_is_told_what_to_begin_with(estate: Estate) -> None:
    with pytest.raises(PkiError, match="start with `llmkeep issuing request`"):
        issuing.adopt(estate.places, estate.places.issuing_certificate.read_bytes())
