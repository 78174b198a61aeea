"""Root follows no path that a service can change: what would happen to /etc/shadow happens to no file."""

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from plugin_modules import load

files = load("module_utils.config.files")
SERVICE = 65534
PLUGINS = Path("plugins")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to a service")
ACTIONS: dict[str, Callable[[Path], object]] = {
    "write": lambda path: files.write_file(path, b"new", 0, 0, 0o644),
    "link": lambda path: files.link(path, "elsewhere"),
    "remove": files.remove,
    "read": files.read,
    "set owner and mode": lambda path: files.set_attributes(path, 0, 0, 0o644),
    "make a directory": lambda path: files.make_directory(path.with_name("made"), 0o755),
    "make directories": lambda path: files.make_directories(path.with_name("made") / "below", 0o755),
}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that only root reads."""
    path = tmp_path / "shadow"
    path.write_text("root:secret")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("depth", [0, 1], ids=["its folder", "a folder above"])
def test_root_changes_nothing_where_a_service_owns(
    depth: int, action: str, secret: Path, tmp_path: Path
) -> None:
    """The service may have put anything there, a link to the secret among it."""
    owned = tmp_path / "service"
    place = owned / "kept" if depth else owned
    place.mkdir(parents=True)
    (place / "file").symlink_to(secret)
    os.chown(owned, SERVICE, SERVICE)
    with pytest.raises(files.Unsafe, match="give it to root"):
        ACTIONS[action](place / "file")
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("root:secret", 0o600)
    assert [path.name for path in place.iterdir()] == ["file"]


def test_a_folder_that_all_may_write_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(files.Unsafe, match="mode 0777"):
        files.write_file(tmp_path / "open/file", b"", 0, 0, 0o644)


def test_a_link_of_a_service_in_a_folder_of_all_is_not_followed(secret: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    (tmp_path / "tmp/way").symlink_to(secret.parent)
    os.chown(tmp_path / "tmp/way", SERVICE, SERVICE, follow_symlinks=False)
    with pytest.raises(files.Unsafe, match=f"a link of uid {SERVICE}"):
        files.write_file(tmp_path / "tmp/way/shadow", b"", 0, 0, 0o644)
    assert secret.read_text() == "root:secret"


def test_a_link_of_root_is_followed_to_a_folder_of_root(tmp_path: Path) -> None:
    (tmp_path / "real/below").mkdir(parents=True)
    (tmp_path / "real/back").symlink_to("../real/below")
    (tmp_path / "way").symlink_to("real")
    files.write_file(tmp_path / "way/back/file", b"new", 0, 0, 0o640)
    assert (tmp_path / "real/below/file").read_bytes() == b"new"
    (tmp_path / "real/round").symlink_to("round")
    with pytest.raises(OSError, match="Too many levels"):
        files.write_file(tmp_path / "real/round/file", b"", 0, 0, 0o640)


def test_the_last_part_of_a_path_is_never_followed(secret: Path, tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to(secret)
    with pytest.raises(OSError, match="Too many levels"):
        files.set_attributes(tmp_path / "file", 0, 0, 0o644)
    with pytest.raises(OSError, match="Too many levels"):
        files.read(tmp_path / "file")
    files.write_file(tmp_path / "file", b"new", 0, 0, 0o644)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("root:secret", 0o600)


def test_a_pipe_that_is_put_there_holds_no_reader_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(OSError, match="it is not a regular file"):
        files.read(tmp_path / "file")


@pytest.mark.parametrize("path", sorted(PLUGINS.rglob("*.py")), ids=str)
def test_no_plugin_sets_owner_or_mode_by_path(path: Path) -> None:
    if path == PLUGINS / "module_utils/config/files.py":
        return
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    by_path = {"chown", "lchown", "chmod", "lchmod"}
    assert [each.attr for each in calls if isinstance(each, ast.Attribute) and each.attr in by_path] == []
