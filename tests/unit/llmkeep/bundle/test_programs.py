"""A program of the lock comes from the cache, the mirror folder or its source, and always with the lock's bytes."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmkeep import cli
from llmkeep.bundle import cache, lock, programs
from llmkeep.bundle.lock import Artifact, Lock
from llmkeep.errors import LlmkeepError

BYTES = b"#!/bin/sh\necho it runs\n"
ENTRY: dict[str, Any] = {
    "module": "example.org/tool",
    "version": "v1.2.3",
    "licence": "MIT",
    "mirror": "tool/tool.zst",
    "toolchain": "go1.26.8",
    "go": ["install", "-trimpath", "example.org/tool@v1.2.3"],
}


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The lock's entry for BYTES, an empty cache, no mirror folder, no `go`."""
    (tmp_path / "tool").write_bytes(BYTES)
    digest = cache.sha256(tmp_path / "tool")
    artifact = Artifact("tool", "1.2.3", digest, len(BYTES), "MIT", "pkg:golang/example.org/tool@v1.2.3")
    monkeypatch.setattr(lock, "load", lambda: Lock(programs={"tool": artifact}))
    monkeypatch.setattr(lock, "catalogue", lambda: {"programs": {"tool": ENTRY}})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMKEEP_MIRROR", raising=False)
    (tmp_path / "bin").mkdir()
    for program in ("cat", "cp", "sh", "zstd"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program) or "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return artifact


def packed(folder: Path, content: bytes = BYTES) -> Path:
    """A mirror folder with the program."""
    (folder / "tool").mkdir(parents=True)
    subprocess.run(["zstd", "-q", "-o", folder / "tool/tool.zst"], input=content, check=True)
    return folder


def stand_in_for_go(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """The suite does not ask for Go: this records how it was called."""
    folder.mkdir()
    (folder / "go").write_text(f"#!/bin/sh\n{does}\n")
    (folder / "go").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_mirror_folders_program_is_unpacked_once_and_runs(tmp_path: Path, pinned: Artifact) -> None:
    path = programs.find("tool", packed(tmp_path / "mirror"))
    assert path == cache.blob(pinned.sha256)
    assert subprocess.run([path], capture_output=True, check=True).stdout == b"it runs\n"
    (tmp_path / "mirror/tool/tool.zst").unlink()
    assert programs.find("tool") == path


def test_the_environment_names_the_mirror_folder(
    tmp_path: Path, pinned: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKEEP_MIRROR", str(packed(tmp_path / "mirror")))
    assert programs.find("tool") == cache.blob(pinned.sha256)


@pytest.mark.usefixtures("pinned")
def test_what_cannot_be_had_is_none_with_each_reason_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert programs.find("tool", tmp_path / "empty") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "tool 1.2.3 is not available: mirror: there is no" in line
    assert "source: there is no `go` on PATH" in line


def test_other_bytes_than_the_locks_are_not_handed_out(
    tmp_path: Path, pinned: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert programs.find("tool", packed(tmp_path / "mirror", BYTES + b"evil")) is None
    assert f"the lock says {pinned.sha256}" in capsys.readouterr().err
    assert list((tmp_path / "cache/llmkeep/sha256").iterdir()) == []


def test_a_damaged_cached_program_is_unpacked_again(tmp_path: Path, pinned: Artifact) -> None:
    cache.blob(pinned.sha256).write_bytes(BYTES.replace(b"it", b"no"))
    path = programs.find("tool", packed(tmp_path / "mirror"))
    assert path
    assert path.read_bytes() == BYTES


def test_a_torn_packed_file_is_told_in_zstds_own_words(
    tmp_path: Path, pinned: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    file = packed(tmp_path / "mirror") / "tool/tool.zst"
    file.write_bytes(file.read_bytes()[:-3])
    assert programs.find("tool", tmp_path / "mirror") is None
    assert "mirror: `zstd -d` exited 1: " in capsys.readouterr().err
    assert not cache.blob(pinned.sha256).exists()


def test_without_a_mirror_folder_the_recipe_is_run_by_the_named_toolchain_without_cgo(
    tmp_path: Path, pinned: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "called"
    stand_in_for_go(
        tmp_path / "go", monkeypatch,
        f'echo "$@" $GOTOOLCHAIN $CGO_ENABLED $GOOS/$GOARCH > {record}; cat go.mod >> {record}\n'
        f'cp {tmp_path}/tool "$GOBIN/tool"',
    )  # fmt: skip
    assert programs.find("tool") == cache.blob(pinned.sha256)
    assert record.read_text() == (
        "install -trimpath example.org/tool@v1.2.3 go1.26.8 0 linux/amd64\n"
        "module build\n\ngo 1.26.8\n\nrequire example.org/tool v1.2.3\n"
    )


@pytest.mark.usefixtures("pinned")
def test_a_build_that_fails_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in_for_go(tmp_path / "go", monkeypatch, "echo downloading >&2; echo 403 Forbidden >&2; exit 1")
    assert programs.find("tool") is None
    assert "source: `go install` exited 1: 403 Forbidden" in capsys.readouterr().err


def test_the_lock_pins_the_unpacked_program(
    tmp_path: Path, pinned: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKEEP_MIRROR", str(packed(tmp_path / "mirror")))
    assert programs.resolve("tool", ENTRY, None) == pinned


def test_a_program_that_cannot_be_had_keeps_its_pin_while_its_version_stays(pinned: Artifact) -> None:
    assert programs.resolve("tool", ENTRY, pinned) == pinned
    with pytest.raises(LlmkeepError, match=r"tool v2\.0\.0 is not available: .*LLMKEEP_MIRROR"):
        programs.resolve("tool", ENTRY | {"version": "v2.0.0"}, pinned)


def test_the_command_prints_the_path_or_exits_one(
    tmp_path: Path, pinned: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["program", "tool"]) == 1
    assert cli.main(["program", "tool", "--mirror", str(packed(tmp_path / "mirror"))]) == 0
    assert capsys.readouterr().out == f"{cache.blob(pinned.sha256)}\n"
    assert cli.main(["program", "moon"]) == 1
    assert "no program 'moon', only ['tool']" in capsys.readouterr().err
