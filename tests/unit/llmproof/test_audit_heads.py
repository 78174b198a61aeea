"""Heads: RFC 6962's tree, C2SP's checkpoint and signed note, byte for byte."""

import base64
import hashlib
from pathlib import Path

import pytest
from audit_records import NAME, SEED
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from llmproof import heads
from llmproof.heads import Head, HeadError, Signer, Tree, Verifier

# The inputs and roots that Certificate Transparency's implementations test themselves with.
LEAVES = [bytes.fromhex(leaf) for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657",
          "606162636465666768696a6b6c6d6e6f")]  # fmt: skip
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def recursive(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word by word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\1" + recursive(leaves[:split]) + recursive(leaves[split:])).digest()


def test_roots_are_those_of_certificate_transparency() -> None:
    tree = Tree()
    assert tree.root().hex() == ROOTS[0]
    for leaf, root in zip(LEAVES, ROOTS[1:], strict=True):
        tree.add(leaf)
        assert tree.root().hex() == root


def test_a_tree_that_grows_has_the_root_of_the_whole_at_each_size() -> None:
    leaves, tree = [b"leaf %d" % number for number in range(300)], Tree()
    for size, leaf in enumerate(leaves, start=1):
        tree.add(leaf)
        assert tree.root() == recursive(leaves[:size])
        assert len(tree.peaks) == size.bit_count()


def test_the_verifier_key_of_the_specifications_example_is_read() -> None:
    key = Verifier("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    assert (key.name, key.key_hash.hex()) == ("PeterNeumann", "c74f20a3")


def test_a_note_made_by_hand_opens_and_is_what_the_signer_writes() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SEED)
    public = b"\x01" + key.public_key().public_bytes_raw()
    key_hash = hashlib.sha256(b"log.example\n" + public).digest()[:4]
    root = bytes.fromhex(ROOTS[8])
    text = b"log.example\n8\n" + base64.b64encode(root) + b"\n"
    signature = base64.b64encode(key_hash + key.sign(text))
    note = text + b"\n" + b"\xe2\x80\x94 log.example " + signature + b"\n"
    verifier = Verifier(f"log.example+{key_hash.hex()}+{base64.b64encode(public).decode()}")
    assert verifier.open(note) == Head(8, root)
    assert Signer("log.example", SEED).sign(Head(8, root)) == note
    assert Signer("log.example", SEED).verifier.text == verifier.text


@pytest.mark.parametrize("time", ["", "2027-01-31T08:00:00.000001Z"])
def test_a_head_of_which_any_byte_is_changed_does_not_open(time: str) -> None:
    signer = Signer(NAME, SEED)
    note = signer.sign(Head(12345, bytes(range(32)), time))
    opened = signer.verifier.open(note)
    assert (opened.size, opened.time) == (12345, time)
    for position in range(len(note)):
        for other in (1, 2, 3, 32, 128):
            changed = bytearray(note)
            changed[position] ^= other
            with pytest.raises(HeadError):
                signer.verifier.open(bytes(changed))


def test_another_keys_or_another_names_head_does_not_open() -> None:
    note = Signer(NAME, SEED).sign(Head(1, bytes(32)))
    for other in (Signer(NAME, bytes(32)), Signer("llm-audit/other", SEED)):
        with pytest.raises(HeadError, match="not by"):
            other.verifier.open(note)


@pytest.mark.parametrize(
    "text",
    ["", "name", "name+00000000+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW", "PeterNeumann+c74f20a3+AR",
     "Peter Neumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"],
)  # fmt: skip
def test_what_is_no_verifier_key_is_told(text: str) -> None:
    with pytest.raises(HeadError, match="is not a verifier key"):
        Verifier(text)


def test_a_seed_that_is_none_is_refused_and_not_shown() -> None:
    with pytest.raises(HeadError, match="64 hex digits") as refused:
        heads.seed_of("secret" * 10)
    assert "secret" not in str(refused.value)
    assert heads.seed_of("0f" * 32 + "\n") == b"\x0f" * 32


def test_a_file_of_heads_is_split_at_any_torn_end(tmp_path: Path) -> None:
    signer = Signer(NAME, SEED)
    notes = [signer.sign(Head(size, bytes(32))) for size in (1, 2, 3)]
    data = b"".join(note + b"\n" for note in notes)
    assert heads.split(data) == (notes, b"")
    second = len(notes[0]) + 1 + len(notes[1]) + 1
    for cut in range(second, len(data)):
        assert heads.split(data[:cut]) == (notes[:2], data[second:cut])
    assert heads.read(tmp_path / "none") == ([], b"")


@pytest.mark.parametrize(("name", "seed"), [("a b", SEED), ("a+b", SEED), ("", SEED), (NAME, SEED[:-1])])
def test_a_signer_needs_a_name_that_a_note_can_carry_and_a_whole_seed(name: str, seed: bytes) -> None:
    with pytest.raises(HeadError, match="correct the wrong one"):
        Signer(name, seed)


def test_a_verifier_key_of_another_kind_than_ed25519_is_refused() -> None:
    public = b"\x02" + Signer(NAME, SEED).verifier.public
    key_hash = hashlib.sha256(f"{NAME}\n".encode() + public).digest()[:4]
    with pytest.raises(HeadError, match="is not a verifier key"):
        Verifier(f"{NAME}+{key_hash.hex()}+{base64.b64encode(public).decode()}")


@pytest.mark.parametrize(
    "more", ["yesterday", "2027-01-31T08:00:00Z", "2027-01-31T08:00:00.000001Z\nand more"]
)
def test_a_head_has_one_line_behind_its_root_and_that_is_its_time(more: str) -> None:
    text = Head(5, bytes(32), more).text(NAME)
    with pytest.raises(ValueError, match="not have the format of a head:"):
        heads.stated(text)
