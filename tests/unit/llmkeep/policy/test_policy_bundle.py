"""A policy bundle is what OPA takes for one, and neither llmkeep nor OPA takes one that was touched."""

import gzip
import io
import json
import os
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import policies
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from llmkeep.places import Places
from llmkeep.policy import bundle as policy
from llmkeep.policy import source as policy_source
from llmproof import policy_bundle
from llmproof.policy_bundle import DAMAGED, EXPIRED, REPLAYED, UNSIGNED, PolicyRefused

SIGNED = [
    ".manifest",
    "llm/aliases/data.json",
    "llm/authz/authz.rego",
    "llm/collections/data.json",
    "llm/experiments/data.json",
    "llm/groups/data.json",
    "llm/meta/data.json",
    "llm/rates/data.json",
    "llm/roles/data.json",
    "llm/tenants/data.json",
    "llm/validate/validate.rego",
]
type Files = dict[str, bytes]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A control node with a bundle."""
    with pytest.MonkeyPatch.context() as patch:
        found = policies.control_node(tmp_path_factory.mktemp("control"), patch)
        policy.build(found, policies.SOURCE, found.policy_bundle, 90)
    return found


def claims(packed: bytes) -> dict[str, str]:
    """The signed hashes by file, regardless of the signer."""
    (token,) = json.loads(policy_bundle.unpacked(packed)[".signatures.json"])["signatures"]
    signed = jwt.decode(token, options={"verify_signature": False})
    return {file["name"]: file["hash"] for file in signed["files"]}


def resigned(
    files: Files, key: ec.EllipticCurvePrivateKey, algorithm: str = "ES256", key_id: str = "policy"
) -> Files:
    """The same signed words under another key, algorithm or name."""
    (token,) = json.loads(files[".signatures.json"])["signatures"]
    words = jwt.decode(token, options={"verify_signature": False})
    anew = jwt.encode(words, key if algorithm != "none" else "", algorithm, headers={"kid": key_id})
    return files | {".signatures.json": json.dumps({"signatures": [anew]}).encode()}


def flipped(name: str) -> Callable[[Files], Files]:
    """One bit of one file changed, so that it stays text."""

    def flip(files: Files) -> Files:
        content = bytearray(files[name])
        place = max(0, content.find(b"e"))
        content[place] ^= 1
        return files | {name: bytes(content)}

    return flip


def foreign(files: Files) -> Files:
    return resigned(files, ec.generate_private_key(ec.SECP256R1()))


def other_signature(files: Files) -> Files:
    content = bytearray(files[".signatures.json"])
    content[-20] = ord("B") if content[-20] == ord("A") else ord("A")
    return files | {".signatures.json": bytes(content)}


def another_role(files: Files) -> Files:
    return files | {"llm/more/data.json": b"{}"}


def without(name: str) -> Callable[[Files], Files]:
    return lambda files: {path: content for path, content in files.items() if path != name}


DAMAGE: dict[str, tuple[Callable[[Files], Files], int]] = {
    "a stripped signature": (without(".signatures.json"), UNSIGNED),
    "a foreign key": (foreign, UNSIGNED),
    "a signature by no algorithm": (lambda files: resigned(files, ec.generate_private_key(ec.SECP256R1()), "none"), UNSIGNED),
    "a changed signature": (other_signature, UNSIGNED),
    "an extra data file": (another_role, DAMAGED),
    "an extra module": (lambda files: files | {"llm/more/more.rego": b"package llm.more\n"}, DAMAGED),
    "a missing file": (without("llm/rates/data.json"), DAMAGED),
    **{f"one flipped bit of {name}": (flipped(name), DAMAGED) for name in SIGNED},
}  # fmt: skip


def test_llmkeep_and_opa_take_the_bundle_that_was_built(places: Places, tmp_path: Path) -> None:
    found = policy_bundle.judged(
        places.policy_bundle.read_bytes(), places.policy_public.read_bytes(), minimum=1
    )
    assert found.revision == 1
    assert sorted(found.modules) == ["llm/authz/authz.rego", "llm/validate/validate.rego"]
    assert found.data["llm"]["roles"]["analyst"]["actions"] == ["GET /generate"]
    with policies.serving(places.policy_bundle, places.policy_public, tmp_path) as address:
        question = {"subject": "a", "tenant": "t", "roles": ["analyst"], "action": "GET /generate"}
        answer = policies.Connection(address).ask("/v1/data/llm/authz/decision", {"input": question})
        assert (answer["result"]["allow"], answer["result"]["revision"]) == (True, 1)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bundle_that_was_touched_is_refused(places: Places, damage: str) -> None:
    touch, code = DAMAGE[damage]
    bad = policy_source.packed(touch(policy_bundle.unpacked(places.policy_bundle.read_bytes())))
    with pytest.raises(PolicyRefused) as refused:
        policy_bundle.judged(bad, places.policy_public.read_bytes())
    assert refused.value.code == code


@pytest.mark.parametrize("damage", DAMAGE)
def test_opa_refuses_what_llmkeep_refuses(places: Places, damage: str, tmp_path: Path) -> None:
    bad = tmp_path / "bundle.tar.gz"
    bad.write_bytes(
        policy_source.packed(DAMAGE[damage][0](policy_bundle.unpacked(places.policy_bundle.read_bytes())))
    )
    words = "signature|digest mismatch"
    with pytest.raises(ChildProcessError, match=words), policies.serving(bad, places.policy_public, tmp_path):
        pytest.fail("opa serves it")


def test_a_signature_under_another_name_is_refused(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        policy, "unseal", lambda sealed, _: sealed.removeprefix(b"sealed llmkeep.policy-key:")
    )
    files = policy_bundle.unpacked(places.policy_bundle.read_bytes())
    key = policy.signing_key(places)
    good = policy_source.packed(resigned(files, key))
    assert policy_bundle.judged(good, places.policy_public.read_bytes()).revision == 1
    with pytest.raises(PolicyRefused, match="not for the key 'policy'"):
        policy_bundle.judged(
            policy_source.packed(resigned(files, key, key_id="other")), places.policy_public.read_bytes()
        )


def test_an_older_revision_and_an_expired_bundle_are_refused(places: Places) -> None:
    packed, key = places.policy_bundle.read_bytes(), places.policy_public.read_bytes()
    end = policy_bundle.judged(packed, key).expires
    for code, minimum, moment in ((REPLAYED, 2, datetime.now(UTC)), (EXPIRED, 1, end)):
        with pytest.raises(PolicyRefused) as refused:
            policy_bundle.judged(packed, key, minimum, moment)
        assert refused.value.code == code
    assert policy_bundle.judged(packed, key, 1, end - timedelta(seconds=1)).revision == 1


ODD: dict[str, tuple[Callable[[Files], Files], str]] = {
    "a file of another kind": (lambda files: files | {"llm/roles/data.yaml": b"{}"}, "does not belong in a policy"),
    "a path that leads out": (lambda files: files | {"../llm/a/data.json": b"{}"}, "does not belong in a policy"),
    "a second word on the same data": (lambda files: files | {"llm/roles/analyst/data.json": b"{}"}, "repeats content of"),
    "a manifest of another revision": (
        lambda files: files | {".manifest": b'{"revision": "2", "roots": ["llm"]}'}, "do not agree",
    ),
    "roots that claim everything": (
        lambda files: files | {".manifest": b'{"revision": "1", "roots": [""]}'}, "do not agree",
    ),
    "no date": (lambda files: files | {"llm/meta/data.json": b'{"revision": 1}'}, "not a policy of llmkeep"),
    "data that is no JSON": (lambda files: files | {"llm/roles/data.json": b"{"}, "not a policy of llmkeep"),
}  # fmt: skip


@pytest.mark.parametrize("oddity", ODD)
def test_what_llmkeep_never_makes_is_refused_whoever_signed_it(places: Places, oddity: str) -> None:
    touch, said = ODD[oddity]
    files = touch(without(".signatures.json")(policy_bundle.unpacked(places.policy_bundle.read_bytes())))
    with pytest.raises(PolicyRefused, match=said) as refused:
        policy_bundle.parsed(files)
    assert refused.value.code == DAMAGED


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE])
def test_a_name_that_is_there_twice_or_is_no_file_is_refused(places: Places, kind: bytes) -> None:
    content = io.BytesIO(gzip.decompress(places.policy_bundle.read_bytes()))
    with tarfile.open(fileobj=content, mode="a") as tar:
        member = tarfile.TarInfo("llm/roles/data.json")
        member.type, member.linkname = kind, "llm/rates/data.json"
        tar.addfile(member, io.BytesIO())
    with pytest.raises(PolicyRefused, match="is a duplicate, or not a plain file"):
        policy_bundle.judged(gzip.compress(content.getvalue()), places.policy_public.read_bytes())


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_torn_file_is_refused(places: Places, cut: int) -> None:
    with pytest.raises(PolicyRefused) as refused:
        policy_bundle.judged(places.policy_bundle.read_bytes()[:cut], places.policy_public.read_bytes())
    assert refused.value.code in (DAMAGED, UNSIGNED)


def test_a_file_that_unpacks_to_too_much_is_refused(places: Places) -> None:
    bomb = policy_source.packed({"llm/zeros/data.json": bytes(policy_bundle.LIMIT)})
    assert len(bomb) < 100_000
    with pytest.raises(PolicyRefused, match="unpacked, which is too large for a policy"):
        policy_bundle.judged(bomb, places.policy_public.read_bytes())


def test_the_same_source_gives_the_same_bytes_but_for_the_signature() -> None:
    source, key = policy_source.read(policies.SOURCE), ec.generate_private_key(ec.SECP256R1())
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    first, second = (policy_source.pack(source, 7, moment, key) for _ in range(2))
    assert without(".signatures.json")(policy_bundle.unpacked(first)) == without(".signatures.json")(
        policy_bundle.unpacked(second)
    )
    assert claims(first) == claims(second)
    assert policy_source.packed({"b": b"1", "a": b"2"}) == policy_source.packed({"a": b"2", "b": b"1"})


def opas_own_hashes(files: Files, folder: Path) -> dict[str, str]:
    """What `opa sign` signs for these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", folder.parent / "key.pem"], check=True
    )  # fmt: skip
    subprocess.run(
        [policies.opa(), "sign", "--signing-key", folder.parent / "key.pem", "--signing-alg", "ES256", "--bundle", ".",
         "--output-file-path", folder.parent],
        check=True, cwd=folder, env={"PATH": os.environ["PATH"], "HOME": str(folder)},
    )  # fmt: skip
    (token,) = json.loads((folder.parent / ".signatures.json").read_bytes())["signatures"]
    signed = jwt.decode(token, options={"verify_signature": False})
    return {file["name"]: file["hash"] for file in signed["files"]}


def test_opas_own_signing_gives_the_same_hashes(places: Places, tmp_path: Path) -> None:
    packed = places.policy_bundle.read_bytes()
    files = without(".signatures.json")(policy_bundle.unpacked(packed))
    assert sorted(files) == SIGNED
    assert opas_own_hashes(files, tmp_path / "files") == claims(packed)


def test_data_of_any_kind_is_written_in_the_form_that_opa_hashes(tmp_path: Path) -> None:
    odd: Any = {
        "ключ": ["管理员", "👩‍🚀", "<a href='x'>&amp;</a>", "\u2028\u2029", "\x7f\x01\t\n\b\f", '"\\/'],
        "b": {"z": None, "a": [True, False, [], {}]},
        "é": 1, "e\u0301": -2, "": 2**53 + 1, "~": 10**30, "﷐": 0.5, "𐀀": "",
    }  # fmt: skip
    source = policy_source.Source({"llm/a/a.rego": "package llm.a\n"}, {}, {"llm/odd": odd})
    packed = policy_source.pack(
        source, 1, datetime(2030, 1, 1, tzinfo=UTC), ec.generate_private_key(ec.SECP256R1())
    )
    files = without(".signatures.json")(policy_bundle.unpacked(packed))
    assert json.loads(files["llm/odd/data.json"]) == odd
    assert opas_own_hashes(files, tmp_path / "files") == claims(packed)


def test_the_policy_of_a_bundle_is_what_its_files_say(places: Places) -> None:
    packed = places.policy_bundle.read_bytes()
    files = policy_bundle.unpacked(packed)
    found = policy_bundle.judged(packed, places.policy_public.read_bytes())
    assert found.modules == {name: files[name].decode() for name in SIGNED if name.endswith(".rego")}
    assert found.data == {
        "llm": {
            part: json.loads(files[f"llm/{part}/data.json"])
            for part in (
                "aliases",
                "collections",
                "experiments",
                "groups",
                "meta",
                "rates",
                "roles",
                "tenants",
            )
        }
    }


def signed_anew(revision: int) -> tuple[bytes, bytes]:
    """A bundle of this revision and the public key of who signed it."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    moment = datetime(2130, 1, 1, tzinfo=UTC)
    return policy_source.pack(policy_source.read(policies.SOURCE), revision, moment, key), public


def test_any_revision_is_taken_where_none_was_accepted_before() -> None:
    assert policy_bundle.judged(*signed_anew(0)).revision == 0


def test_a_bundle_may_be_exactly_as_long_as_the_limit(places: Places) -> None:
    tar = gzip.decompress(places.policy_bundle.read_bytes())
    longest = tar + bytes(policy_bundle.LIMIT - len(tar))
    assert policy_bundle.unpacked(gzip.compress(longest)) == policy_bundle.unpacked(gzip.compress(tar))
    with pytest.raises(PolicyRefused, match="unpacked, which is too large for a policy"):
        policy_bundle.unpacked(gzip.compress(longest + b"\0"))


def test_no_more_is_unpacked_than_a_policy_may_have() -> None:
    bomb = gzip.compress(bytes(8 * policy_bundle.LIMIT))
    tracemalloc.start()
    try:
        with pytest.raises(PolicyRefused, match="unpacked, which is too large for a policy"):
            policy_bundle.unpacked(bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 * policy_bundle.LIMIT
    finally:
        tracemalloc.stop()


def test_a_bundle_that_is_compressed_twice_is_refused(places: Places) -> None:
    with pytest.raises(PolicyRefused, match="it is not a bundle"):
        policy_bundle.unpacked(gzip.compress(places.policy_bundle.read_bytes()))
