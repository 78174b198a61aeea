"""Layers as archives: the same bytes on any builder, and nothing in them that gives rights."""

import gzip
import hashlib
import os
import stat
import tarfile
from pathlib import Path

import pytest

from llmkeep.errors import LlmkeepError
from llmkeep.image import archive
from llmkeep.image.archive import Layer

EPOCH = 1_700_000_000


def tree(folder: Path, names: list[str], moment: int) -> Path:
    """A tree whose files were written in this order, at this time."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        path.chmod(0o644)
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (moment, moment))
        if path.is_dir():
            path.chmod(0o755)
    return folder


def members(layer: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(layer) as file:
        return {member.name: member for member in file}


def test_the_order_and_the_time_of_writing_leave_no_trace(tmp_path: Path) -> None:
    names = ["usr/b", "usr/a", "usr/ä", "etc/c"]
    first = archive.write("a", tree(tmp_path / "1", names, EPOCH + 1), tmp_path / "1.gz", EPOCH)
    second = archive.write("a", tree(tmp_path / "2", names[::-1], EPOCH + 9999), tmp_path / "2.gz", EPOCH)
    assert first == second
    assert (tmp_path / "1.gz").read_bytes() == (tmp_path / "2.gz").read_bytes()


def test_a_file_that_is_older_keeps_its_time(tmp_path: Path) -> None:
    archive.write("a", tree(tmp_path / "1", ["f"], EPOCH - 5), tmp_path / "1.gz", EPOCH)
    assert members(tmp_path / "1.gz")["f"].mtime == EPOCH - 5


def test_digest_size_and_diff_id_are_those_of_the_bytes(tmp_path: Path) -> None:
    layer = archive.write("a", tree(tmp_path / "1", ["f"], EPOCH), tmp_path / "1.gz", EPOCH)
    content = (tmp_path / "1.gz").read_bytes()
    assert layer == Layer("a", _digest(content), len(content), _digest(gzip.decompress(content)))
    assert archive.unpacked(tmp_path / "1.gz") == layer.diff_id


def test_setuid_and_setgid_are_taken_away_and_sticky_stays(tmp_path: Path) -> None:
    root = tree(tmp_path / "1", ["su", "wall", "tmp/f"], EPOCH)
    for name, mode in {"su": 0o4755, "wall": 0o2755, "tmp": 0o1777}.items():
        (root / name).chmod(mode)
    archive.write("a", root, tmp_path / "1.gz", EPOCH)
    modes = {name: oct(member.mode) for name, member in members(tmp_path / "1.gz").items()}
    assert modes == {"su": "0o755", "wall": "0o755", "tmp": "0o1777", "tmp/f": "0o644"}


def test_links_stay_links(tmp_path: Path) -> None:
    root = tree(tmp_path / "1", ["b"], EPOCH)
    (root / "a").hardlink_to(root / "b")
    (root / "c").symlink_to("/nowhere")
    archive.write("a", root, tmp_path / "1.gz", EPOCH)
    found = {name: (member.type, member.linkname) for name, member in members(tmp_path / "1.gz").items()}
    assert found == {
        "a": (tarfile.REGTYPE, ""),
        "b": (tarfile.LNKTYPE, "a"),
        "c": (tarfile.SYMTYPE, "/nowhere"),
    }


def test_refuses_a_device(tmp_path: Path) -> None:
    root = tree(tmp_path / "1", ["f"], EPOCH)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with pytest.raises(LlmkeepError, match="null is a device"):
        archive.write("a", root, tmp_path / "1.gz", EPOCH)


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
