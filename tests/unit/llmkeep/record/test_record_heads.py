"""playbooks/files/record_heads.py, which root runs on a host, reads a folder of the record's user as that user."""

import base64
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_modules import ROOT

PROGRAM = (ROOT / "playbooks/files/record_heads.py").read_text()
USER = "nobody"  # an account that every Debian has; it stands in for llm-audit
BLOCK = 4 << 20


@pytest.fixture
def folder() -> Iterator[Path]:
    """A record's folder that USER reaches and may write to."""
    place = Path(tempfile.mkdtemp(prefix="record-", dir="/tmp"))
    place.chmod(0o755)
    (place / "record").mkdir()
    for name, content in (("verifier", "key\n"), ("heads", "0123456789"), ("tip", "tip")):
        (place / "record" / name).write_text(content)
    if os.geteuid() == 0:
        shutil.chown(place / "record", USER)
    yield place / "record"
    shutil.rmtree(place)


def answer(folder: Path, kept: int = 4, user: str = USER, seen: bytes = b"") -> list[str]:
    words = [user, str(folder), str(kept), base64.b64encode(seen).decode(), str(folder.parent / "seen")]
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return done.stdout.split("\n")


def prefix(*blocks: bytes) -> str:
    """As `split --bytes=4M --filter=sha256sum | sha256sum` prints it."""
    return hashlib.sha256(
        "".join(f"{hashlib.sha256(block).hexdigest()}  -\n" for block in blocks).encode()
    ).hexdigest()


def decoded(line: str) -> str:
    return base64.b64decode(line).decode()


def test_an_answer_has_the_verifier_a_hash_of_the_prefix_the_new_heads_and_the_tip(folder: Path) -> None:
    begin, verifier, digest, new, tip = answer(folder)
    assert (begin, verifier, digest, decoded(new), decoded(tip)) == (
        "record",
        "key",
        prefix(b"0123"),
        "456789",
        "tip",
    )


def test_heads_are_hashed_by_blocks_and_read_up_to_a_bound(folder: Path) -> None:
    heads = b"a" * BLOCK + b"b" * BLOCK
    (folder / "heads").write_bytes(heads)
    _, _, digest, new, _ = answer(folder, BLOCK + 5)
    assert (digest, len(decoded(new))) == (prefix(b"a" * BLOCK, b"b" * 5), 192 << 10)


@pytest.mark.parametrize("size", [1, 3])
def test_fewer_heads_than_were_kept_are_another_prefix(folder: Path, size: int) -> None:
    (folder / "heads").write_bytes(b"0123"[:size])
    assert answer(folder)[2:4] == [prefix(b"0123"[:size]), ""]


@pytest.mark.parametrize("name", ["verifier", "heads", "tip"])
@pytest.mark.parametrize("kind", ["link", "FIFO", "folder", "none"])
def test_anything_but_a_regular_file_is_none(name: str, kind: str, folder: Path) -> None:
    (folder / name).rename(folder / "aside")
    if kind == "link":
        (folder / name).symlink_to("aside")
    elif kind == "FIFO":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    _, *lines = answer(folder)
    absent = {"verifier": ["none", prefix(b"0123"), "456789", "tip"],
              "heads": ["key", prefix(), "", "tip"],
              "tip": ["key", prefix(b"0123"), "456789", ""]}[name]  # fmt: skip
    assert [*lines[:2], *map(decoded, lines[2:])] == absent


def test_a_folder_that_is_a_link_or_not_there_and_a_user_that_does_not_exist_have_no_record(
    folder: Path,
) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert answer(folder.parent / "link")[1] == answer(folder.parent / "absent")[1] == "none"


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone becomes another user")
def test_root_reads_nothing_that_the_records_user_may_not(folder: Path) -> None:
    (folder / "heads").chmod(0o600)
    assert answer(folder)[2:4] == [prefix(), ""]
    assert answer(folder, user="no-such-user")[1] == "none"


def test_a_statement_of_the_last_look_is_left_for_all_to_read(folder: Path) -> None:
    answer(folder, seen=b"seen")
    head = folder.parent / "seen/head"
    assert (head.read_bytes(), head.stat().st_mode & 0o777, head.stat().st_uid) == (
        b"seen",
        0o644,
        os.geteuid(),
    )
    assert not list(head.parent.glob(".*"))
