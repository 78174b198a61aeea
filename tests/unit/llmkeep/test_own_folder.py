"""`durable.own`: a working folder below a place that others write to."""

import hashlib
import os
from pathlib import Path

import model_add
import numpy as np
import pytest
import sharded_deepseek
import small_gguf

from llmkeep import durable
from llmkeep.bundle import join
from llmkeep.errors import LlmkeepError
from llmkeep.models.folder import Folder

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives folders away")
NOBODY = 65534


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder as /tmp is."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    return tmp_path / "shared"


def test_a_folder_is_made_and_taken_again_and_nobody_else_may_write_there(shared: Path) -> None:
    before = os.umask(0)
    try:
        for _ in range(2):
            with durable.own(shared / "work"):
                (shared / "work/inner").mkdir(exist_ok=True)
                (shared / "work/inner/file").touch()
    finally:
        os.umask(before)
    for path in (shared / "work", *(shared / "work").rglob("*")):
        assert not path.stat().st_mode & 0o022


@pytest.mark.parametrize("name", ["work", "work/models/victim", "work/config.json"])
def test_a_link_is_refused_and_not_followed(name: str, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (shared / name).parent.mkdir(parents=True, exist_ok=True)
    (shared / name).symlink_to(tmp_path / "victim")
    with pytest.raises(LlmkeepError, match="link"), durable.own(shared / "work"):
        pass


@pytest.mark.parametrize("name", ["work", "work/models", "work/models/config.json"])
@pytest.mark.parametrize("change", [pytest.param("owner", marks=AS_ROOT), "mode"])
def test_a_folder_that_another_user_may_change_is_refused(name: str, change: str, shared: Path) -> None:
    (shared / "work/models").mkdir(parents=True)
    (shared / "work/models/config.json").touch()
    if change == "owner":
        os.chown(shared / name, NOBODY, NOBODY)
    else:
        (shared / name).chmod(0o777)
    with (
        pytest.raises(LlmkeepError, match=f"{name} is (owned by user|accessible to others)"),
        durable.own(shared / "work"),
    ):
        pass


@pytest.mark.parametrize("change", [pytest.param("owner", marks=AS_ROOT), "mode"])
def test_a_place_where_another_user_may_exchange_the_folder_is_refused(change: str, tmp_path: Path) -> None:
    (tmp_path / "open/inner").mkdir(parents=True)
    if change == "owner":
        os.chown(tmp_path / "open", NOBODY, NOBODY)
        (tmp_path / "open").chmod(0o1777)
    else:
        (tmp_path / "open").chmod(0o777)
    with pytest.raises(LlmkeepError, match="give another place"), durable.own(tmp_path / "open/inner/work"):
        pass
    assert not (tmp_path / "open/inner/work").exists()


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that this user alone may write to."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/config.json").write_text("{}")
    return tmp_path / "victim/config.json"


def planted(hidden: Path, name: str, victim: Path) -> None:
    """What another user makes of HIDDEN: a link to the victim's folder in the place of NAME."""
    (hidden / name).parent.mkdir(parents=True)
    (hidden / name).symlink_to(victim.parent)
    for path in (hidden, *hidden.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


@AS_ROOT
def test_model_add_writes_nothing_through_a_folder_that_another_user_made(
    shared: Path, victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sharded_deepseek.write(tmp_path / "DeepSeek-Tiny")
    digest = hashlib.sha256(Folder(model).source.encode()).hexdigest()
    planted(shared / f".candidate.partial-{digest[:8]}", "models/deepseek-tiny", victim)
    code, said = model_add.run(capsys, model, shared / "candidate")
    assert (code, f"owned by user {NOBODY}" in said) == (1, True), said
    assert (victim.read_text(), (shared / "candidate").exists()) == ("{}", False)


@AS_ROOT
def test_model_add_converts_nothing_into_a_folder_that_another_user_made(
    shared: Path, victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {"output_norm.weight": np.ones(32, np.float32)}
    small_gguf.write_gguf(tmp_path / "victim.gguf", weights)
    (shared / ".candidate.gguf").symlink_to(victim.parent)
    code, said = model_add.run(capsys, tmp_path / "victim.gguf", shared / "candidate")
    assert (code, ".candidate.gguf is not a folder, or is a symbolic link" in said) == (1, True), said
    assert [path.name for path in victim.parent.iterdir()] == ["config.json"]


@AS_ROOT
def test_join_takes_nothing_into_a_folder_that_another_user_made(shared: Path, victim: Path) -> None:
    planted(shared / ".joined.joining", "models/deepseek-tiny", victim)
    with (
        pytest.raises(LlmkeepError, match=f"owned by user {NOBODY}"),
        join._working(shared / ".joined.joining"),
    ):
        pass
