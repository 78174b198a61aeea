"""A model's signature by OpenSSF's model signing decides at intake, by the key that the operator names.

`signed/` was made by model-signing 1.1.1: `model_signing sign key model --private_key KEY --signature model.sig`.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import model_add
import pytest
import sharded_deepseek
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from llmkeep import cli
from llmkeep.bundle.cache import sha256
from llmkeep.models import signature
from llmkeep.models.refusal import DAMAGED, UNFIT, ModelRefused

SIGNED = Path(__file__).parent / "signed"
KEY = ec.generate_private_key(ec.SECP384R1())
PASSPHRASE = "six random words of a test"
FILES = {"config.json": "1" * 64, "model.safetensors": "2" * 64}


def public(folder: Path, key: Any = KEY) -> Path:
    """The public part of a key, in PEM."""
    path = folder / "maker.pem"
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path.write_bytes(pem)
    return path


def statement(files: dict[str, str], **more: Any) -> dict[str, Any]:
    """What model-signing 1.x says of files."""
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in files.values())).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [
                {"name": name, "digest": digest, "algorithm": "sha256"} for name, digest in files.items()
            ],
        },
        **more,
    }


def signed(folder: Path, made: dict[str, Any], key: ec.EllipticCurvePrivateKey = KEY) -> Path:
    """A signature of a statement, as model-signing writes it."""
    payload, kind = json.dumps(made).encode(), "application/vnd.in-toto+json"
    encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    raw = key.sign(encoded, ec.ECDSA(signature.HASHES[key.curve.name]))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"sig": base64.b64encode(raw).decode(), "keyid": ""}],
    }
    hint = hashlib.sha256(public(folder, key).read_bytes()).hexdigest()
    path = folder / "model.sig"
    path.write_text(
        json.dumps({"verificationMaterial": {"publicKey": {"hint": hint}}, "dsseEnvelope": envelope})
    )
    return path


def refusal(file: Path, key: Path) -> ModelRefused:
    with pytest.raises(ModelRefused) as refused:
        signature.read(file, key)
    return refused.value


def test_a_signature_of_openssf_s_program_is_read() -> None:
    found = signature.read(SIGNED / "model.sig", SIGNED / "maker.pem")
    assert (found.name, sorted(found.files)) == (
        "model",
        ["1_Pooling/config.json", "config.json", "model.safetensors"],
    )
    assert found.files["1_Pooling/config.json"] == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name
)
def test_each_of_its_curves_is_read(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    file = signed(tmp_path, statement(FILES), key)
    assert signature.read(file, public(tmp_path, key)).files == FILES


def test_another_key_or_a_changed_statement_is_refused(tmp_path: Path) -> None:
    file = signed(tmp_path, statement(FILES))
    other = public(tmp_path, ec.generate_private_key(ec.SECP384R1()))
    assert "give its maker's key" in str(refusal(file, other))
    document = json.loads(file.read_text())
    document["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement({})).encode()).decode()
    file.write_text(json.dumps(document))
    assert "was not signed by" in str(refusal(file, public(tmp_path)))


@pytest.mark.parametrize(
    "made",
    [
        statement(FILES, predicateType="https://slsa.dev/provenance/v1"),
        statement(FILES, subject=[{"name": "model", "digest": {"sha256": "0" * 64}}]),
        statement(FILES, subject=[]),
        statement(
            FILES, predicate={"serialization": {"method": "shards", "hash_type": "sha256"}, "resources": []}
        ),
        statement(FILES, predicate=[]),
        {},
    ],
)
def test_a_statement_that_cannot_be_compared_is_refused(tmp_path: Path, made: dict[str, Any]) -> None:
    assert refusal(signed(tmp_path, made), public(tmp_path)).code == UNFIT


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"verificationMaterial": {"certificate": {}}}']
)
def test_what_is_no_signature_with_a_key_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.sig").write_text(text)
    assert refusal(tmp_path / "model.sig", public(tmp_path)).code == DAMAGED


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = signed(tmp_path, statement(FILES))
    assert refusal(file, public(tmp_path, ed25519.Ed25519PrivateKey.generate())).code == UNFIT
    (tmp_path / "none.pem").write_text("-----BEGIN PUBLIC KEY-----\n")
    assert refusal(file, tmp_path / "none.pem").code == UNFIT


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory whose maker signed all of it."""
    folder = sharded_deepseek.write(tmp_path / "DeepSeek-Tiny")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): sha256(path) for path in paths}
    signed(tmp_path, statement(files)).rename(folder / "model.sig")
    return Path(folder)


def added(model: Path, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    given = words or ("--maker-key", model.parent / "maker.pem")
    return model_add.run(capsys, model, model.parent / "candidate", *given)


def test_a_model_that_its_maker_signed_is_taken_and_says_so(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = added(model, capsys)
    assert code == 0, text
    maker = model_add.provenance(model.parent / "candidate")["maker"]
    assert maker == {"key": sha256(model.parent / "maker.pem"), "signature": sha256(model / "model.sig")}


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors", "tokenizer.json"])
def test_a_file_that_its_maker_did_not_sign_so_is_refused(
    model: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((model / name).read_bytes())
    content[-2] ^= 1
    (model / name).write_bytes(content)
    code, text = added(model, capsys)
    assert (code, f"{name} has sha256" in text, "its maker signed" in text) == (DAMAGED, True, True)
    assert not (model.parent / "candidate").exists()


def test_a_file_that_was_added_or_taken_away_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "special_tokens_map.json").write_text("{}")
    assert "its maker signed nothing of that name" in added(model, capsys)[1]
    (model / "special_tokens_map.json").unlink()
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "tokenizer.json").unlink()
    code, text = added(model, capsys)
    assert (code, "is missing, although its maker signed it" in text) == (DAMAGED, True)


def test_a_signature_without_its_makers_key_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = added(model, capsys, "--signature", model / "model.sig")
    assert (code, "cannot be verified without its maker's key" in text) == (UNFIT, True)


def test_a_model_without_a_signature_is_refused_where_one_is_demanded(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.sig").unlink()
    code, text = added(model, capsys)
    assert (code, "is not a signature: give the file" in text) == (DAMAGED, True)


def sign(folder: Path, file: Path, *given: object) -> int:
    """`llmkeep model sign` with a key of passphrase PASSPHRASE."""
    key, word = file.parent / "own.pem", file.parent / "passphrase"
    word.write_text(f"{PASSPHRASE}\n")
    word.chmod(0o600)
    key.write_bytes(
        KEY.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(PASSPHRASE.encode()),
        )
    )
    argv = ["model", "sign", folder, "--key", key, "--passphrase-file", word, "--signature", file, *given]
    return int(cli.main([str(word) for word in argv]))


def test_a_model_that_we_sign_is_taken_elsewhere_by_our_key(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.sig").unlink()
    file = model.parent / "own.sig"
    assert sign(model, file) == 0
    code, text = added(model, capsys, "--maker-key", public(model.parent), "--signature", file)
    assert code == 0, text
    config = model / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    with pytest.raises(ModelRefused, match=r"config\.json has sha256"):
        signature.read(file, public(model.parent)).require({"config.json": sha256(config)})


def test_no_signature_is_made_of_links_or_into_the_model(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sign(model, model.parent / "own.sig", "--signature", model / "own.sig") == UNFIT
    (model / "link").symlink_to("config.json")
    assert sign(model, model.parent / "own.sig") == UNFIT
    assert "link is not a regular file" in capsys.readouterr().err
    assert not (model.parent / "own.sig").exists()
