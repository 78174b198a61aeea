"""Checkpoints that are truncated, altered, forged or rolled back: the last complete save, or the reason, is reported."""

import errno
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saver
from saver import KEY, Ranks, fill, is_whole, resume, resume_and_save, save_two

from llmtrain import exits
from llmtrain.run import sealed
from llmtrain.run.checkpoint import Checkpoint, Checkpoints, read_key

SIZE = 3000
FOREIGN = bytes(32)


def save(checkpoints: Checkpoints, step: int, size: int = SIZE) -> Path:
    return saver.save(checkpoints, step, size)


def never(folder: Path) -> None:
    pytest.fail(f"{folder} is written to")


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


def opened(directory: Path, key: bytes = KEY) -> Checkpoint | None:
    return Checkpoints(directory, key, last=2).latest_good()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Checkpoints of steps 10 and 20."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", KEY, last=2)
    for step in (10, 20):
        save(checkpoints, step)
    return checkpoints.directory


# -- What can happen to a saved checkpoint: each is told, and the one before it is taken.


def cut(folder: Path) -> None:
    os.truncate(folder / "rank0.pt", 2999)


def alter(folder: Path) -> None:
    with (folder / "rank0.pt").open("r+b") as file:
        file.seek(1500)
        byte = file.read(1)
        file.seek(1500)
        file.write(bytes([byte[0] ^ 1]))


def alter_state(folder: Path) -> None:
    manifest = folder / sealed.MANIFEST
    manifest.write_text(manifest.read_text().replace('"cursor": 140', '"cursor": 141'))


def other_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000010"), folder)


def link(folder: Path) -> None:
    (folder / "rank0.pt").rename(folder.parent / "elsewhere")
    (folder / "rank0.pt").symlink_to(folder.parent / "elsewhere")


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda folder: (folder / "rank0.pt").unlink(), "rank0.pt is missing (1 in all)"),
    "a file is cut": (cut, "rank0.pt has 2999 bytes, but its manifest says 3000"),
    "a bit of a file is altered": (alter, "rank0.pt was altered: its piece 0 of 1 has sha256 "),
    "there is one more file": (
        lambda folder: (folder / "tag" / "more.pt").write_bytes(b"x"),
        "tag/more.pt is not in its manifest (1 in all)",
    ),
    "the manifest is missing": (
        lambda folder: (folder / sealed.MANIFEST).unlink(),
        "it has no manifest.json",
    ),
    "the manifest is cut": (
        lambda folder: os.truncate(folder / sealed.MANIFEST, 200),
        "its manifest was altered, or authenticated with another key",
    ),
    "the manifest's state is altered": (
        alter_state,
        "its manifest was altered, or authenticated with another key",
    ),
    "the HMAC is missing": (lambda folder: (folder / sealed.MAC).unlink(), "it has no manifest.hmac"),
    "the HMAC is empty": (
        lambda folder: os.truncate(folder / sealed.MAC, 0),
        "its manifest was altered, or authenticated with another key",
    ),
    "it is another step's": (other_step, "its manifest is of step 10"),
    "a file is a link": (link, "rank0.pt is neither a regular file nor a folder"),
    "others may write to a folder in it": (
        lambda folder: (folder / "tag").chmod(0o770),
        "tag is writable by others (owner ",
    ),
    "others may write to a file": (
        lambda folder: (folder / "rng0").chmod(0o606),
        "rng0 is writable by others (owner ",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_newest_checkpoint_that_is_not_good_is_told_and_the_one_before_is_taken(
    directory: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    do, told = HARMS[harm]
    do(directory / "step-00000020")
    found = opened(directory)
    assert found
    assert found.step == 10
    assert is_whole(found, size=SIZE)
    assert any("20" in line and told in line for line in caplog.messages), caplog.messages


def test_with_no_good_one_left_it_does_not_silently_begin_anew(directory: Path) -> None:
    for step in (10, 20):
        alter(directory / f"step-{step:08d}")
    with pytest.raises(exits.Refusal, match="no checkpoint is good on all nodes") as refusal:
        opened(directory)
    assert refusal.value.code == exits.ALTERED
    assert steps(directory) == [10, 20], "nothing is taken away"


def test_a_key_that_is_not_theirs_refuses_all_of_them(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(exits.Refusal, match="Restore the files or the key"):
        opened(directory, FOREIGN)
    assert len([line for line in caplog.messages if "another key" in line]) == 2


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


def test_a_hostile_pickle_with_hashes_that_fit_is_refused_unopened_without_the_key(
    directory: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    folder = directory / "step-00000020"
    for name in (sealed.MANIFEST, sealed.MAC, "rank0.pt"):
        (folder / name).unlink()
    (folder / "rank0.pt").write_bytes(pickle.dumps(Hostile(victim)))
    facts = {"save": "f" * 32, "step": 20, "node": 0, "nodes": 1, "world_size": 1, "state": {"cursor": 140}}
    sealed.seal(folder, FOREIGN, facts)  # all that can be computed without the estate's key
    found = opened(directory)
    assert found
    assert found.step == 10
    assert not victim.exists(), "it was loaded"
    pickle.loads((folder / "rank0.pt").read_bytes())  # noqa: S301 - to see that it would have worked
    assert victim.exists()


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert opened(tmp_path / "a" / "b") is None
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_a_checkpoint_says_what_was_saved(directory: Path) -> None:
    found = opened(directory)
    assert found
    assert (found.step, found.state, found.world_size, found.nodes) == (20, {"cursor": 140}, 1, 1)
    assert found.folder == directory / "step-00000020"


# -- Saves.


def test_the_last_so_many_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", KEY, last=2)
    seen = []
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
        seen.append(steps(checkpoints.directory))
    assert seen == [[10], [10, 20], [20, 30], [30, 40]]


def test_a_bad_one_does_not_count_among_those_that_are_kept(directory: Path) -> None:
    cut(directory / "step-00000020")
    save(Checkpoints(directory, KEY, last=2), 30)
    assert steps(directory) == [10, 20, 30]


def test_what_is_newer_than_the_save_is_left_alone(directory: Path) -> None:
    save(Checkpoints(directory, KEY, last=1), 15)
    assert steps(directory) == [15, 20]


def test_a_step_that_was_saved_before_is_replaced(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    alter(directory / "step-00000020")
    checkpoints = Checkpoints(directory, KEY, last=2)
    found = checkpoints.latest_good()
    assert found
    assert found.step == 10
    save(checkpoints, 20)
    found = checkpoints.latest_good()
    assert found
    assert found.step == 20
    assert [path.name for path in directory.iterdir() if path.name.startswith(".partial")] == []


def test_a_write_that_raises_leaves_what_there_was(directory: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_bytes(b"x" * 1000)
        raise ValueError("no tensor")

    with pytest.raises(ValueError, match="no tensor"):
        Checkpoints(directory, KEY, last=2).save(30, fails, {})
    assert sorted(path.name for path in directory.iterdir()) == [".lock", "step-00000010", "step-00000020"]


def test_a_state_that_is_no_json_is_refused_before_anything_is_written(directory: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        Checkpoints(directory, KEY, last=2).save(30, never, {"x": object()})


def test_a_disk_that_fails_to_flush_fails_the_save(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "rng0":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        save(Checkpoints(directory, KEY, last=2), 30)
    assert steps(directory) == [10, 20]


def test_a_file_is_hashed_in_pieces_and_each_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sealed, "PIECE", 1 << 20)
    checkpoints = Checkpoints(tmp_path / "checkpoints", KEY, last=2)
    big = save(checkpoints, 10, size=(2 << 20) + 5) / "rank0.pt"
    manifest = sealed.authentic(big.parent, checkpoints.key)
    whole = big.read_bytes()
    wanted = [hashlib.sha256(whole[at : at + (1 << 20)]).hexdigest() for at in (0, 1 << 20, 2 << 20)]
    assert manifest["files"]["rank0.pt"]["sha256"] == wanted
    assert len(manifest["files"]["tag/rank0.safetensors"]["sha256"]) == 1
    big.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(exits.Refusal):
        opened(checkpoints.directory)
    assert "its piece 2 of 3 has sha256" in caplog.text


def test_files_and_folders_are_this_users_alone(directory: Path) -> None:
    modes = {status.st_mode & 0o777 for _, status in sealed.walk(directory / "step-00000020")}
    assert modes == {0o700, 0o600}


# -- An older save of this very job, put back: it is authentic.


def remembering(directory: Path) -> Checkpoints:
    """Checkpoints whose newest step is recorded in a file elsewhere."""
    return Checkpoints(directory, KEY, last=2, newest=directory.with_name("newest-save"))


@pytest.fixture
def put_back(tmp_path: Path) -> Path:
    """Restore the directory as of step 10 after step 20 was saved."""
    directory = tmp_path / "checkpoints"
    checkpoints = remembering(directory)
    save(checkpoints, 10)
    shutil.copytree(directory, tmp_path / "before")
    save(checkpoints, 20)
    shutil.rmtree(directory)
    (tmp_path / "before").rename(directory)
    return directory


def test_an_older_save_that_was_put_back_is_told_with_the_step_that_was_expected(
    put_back: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = remembering(put_back).latest_good()
    assert found
    assert found.step == 10
    assert "the last save of node 0 was of step 20, the newest good one is of step 10" in caplog.text


def test_a_directory_that_was_emptied_is_told_with_the_step_that_was_expected(
    put_back: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(put_back)
    assert remembering(put_back).latest_good() is None
    assert "the last save of node 0 was of step 20, the newest good one is of step none" in caplog.text


def test_an_altered_record_of_the_newest_save_is_told(
    put_back: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = put_back.with_name("newest-save")
    record.write_bytes(record.read_bytes().replace(b'"step": 20', b'"step": \xff\xff'))
    assert remembering(put_back).latest_good()
    assert "newest-save was altered, or authenticated with another key" in caplog.text


def test_nothing_is_told_of_the_newest_save_or_of_one_whose_record_a_kill_forestalled(
    put_back: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = remembering(put_back)
    save(checkpoints, 20)
    assert checkpoints.latest_good()
    checkpoints.newest = None
    save(checkpoints, 30)
    checkpoints.newest = put_back.with_name("newest-save")
    assert checkpoints.latest_good()
    assert not caplog.messages


# -- The directory.


def test_a_second_trainer_is_refused(directory: Path) -> None:
    Checkpoints(directory, KEY, last=2)
    [[said]] = Ranks(directory, 1, 1, resume_and_save).said()
    assert "another process uses the checkpoints in" in str(said)
    assert steps(directory) == [10, 20]


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_directory_that_others_may_write_to_is_refused(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    with pytest.raises(exits.Refusal, match="is writable by others"):
        Checkpoints(directory, KEY, last=2)


def test_a_directory_in_one_that_others_may_write_to_is_refused(directory: Path) -> None:
    directory.parent.chmod(0o777)
    with pytest.raises(exits.Refusal, match="others could replace"):
        Checkpoints(directory, KEY, last=2)


# -- The key.


def test_the_key_is_read_from_a_file_or_the_units_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm-train.key").write_bytes(KEY)
    (tmp_path / "llm-train.key").chmod(0o600)
    assert read_key(tmp_path / "llm-train.key") == KEY
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "llm-train.key").chmod(0o440)  # as systemd shows a file that an ACL lets one user read
    assert read_key(None) == KEY


@pytest.mark.parametrize(
    ("size", "mode", "told"),
    [(31, 0o600, "has 31 bytes: it needs at least 32"), (32, 0o640, "mode 640"), (32, 0o604, "mode 604")],
)
def test_a_key_that_is_short_or_known_to_others_is_refused(
    tmp_path: Path, size: int, mode: int, told: str
) -> None:
    file = tmp_path / "key"
    file.write_bytes(bytes(size))
    file.chmod(mode)
    with pytest.raises(exits.Refusal, match=told):
        read_key(file)


def test_no_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(exits.Refusal, match="there is no checkpoint key"):
        read_key(None)
    with pytest.raises(exits.Refusal, match="No such file"):
        read_key(tmp_path / "none")


# -- Two nodes, which share no disk.


@pytest.fixture(scope="module")
def two_nodes_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch.distributed", reason="Debian's python3-torch is not installed")
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    assert Ranks(directory, 2, 2, save_two).said() == [[], []]
    return directory


@pytest.fixture
def two_nodes(two_nodes_once: Path, tmp_path: Path) -> Path:
    """Steps 10 and 20 on each node."""
    shutil.copytree(two_nodes_once, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def resumed(directory: Path) -> list[Any]:
    """The reports of both nodes."""
    [first], [second] = Ranks(directory, 2, 2, resume).said()
    return [first, second]


def test_two_nodes_resume_from_the_newest_that_both_have(two_nodes: Path) -> None:
    assert resumed(two_nodes) == [(20, True, 2, 2)] * 2


@pytest.mark.parametrize("harm", ["a file is cut", "a bit of a file is altered"])
def test_what_is_not_good_on_one_node_counts_on_none(two_nodes: Path, harm: str) -> None:
    folder = two_nodes / "1" / "step-00000020"
    (folder / "rank1.pt").rename(folder / "rank0.pt")  # where the harm is done
    HARMS[harm][0](folder)
    (folder / "rank0.pt").rename(folder / "rank1.pt")
    assert resumed(two_nodes) == [(10, True, 2, 2)] * 2


def test_a_save_that_has_its_name_on_one_node_only_is_taken(two_nodes: Path) -> None:
    folder = two_nodes / "1" / "step-00000020"
    folder.rename(folder.with_name(".partial-00000020"))
    assert resumed(two_nodes) == [(20, True, 2, 2)] * 2
    assert folder.is_dir()


def test_parts_of_two_saves_of_one_step_are_not_one_checkpoint(two_nodes: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "checkpoints"
    again.parent.mkdir()
    assert Ranks(again, 2, 2, save_two).said() == [[], []]
    shutil.rmtree(two_nodes / "1" / "step-00000020")
    shutil.copytree(again / "1" / "step-00000020", two_nodes / "1" / "step-00000020")
    assert resumed(two_nodes) == [(10, True, 2, 2)] * 2


def test_a_node_with_an_empty_disk_does_not_make_all_begin_anew(two_nodes: Path) -> None:
    shutil.rmtree(two_nodes / "1")
    for said in resumed(two_nodes):
        assert "node 0 has step-00000010, step-00000020; node 1 has none" in str(said)
    assert steps(two_nodes / "0") == [10, 20]


def test_nodes_in_another_order_are_told(two_nodes: Path, caplog: pytest.LogCaptureFixture) -> None:
    for old, new in (("0", "x"), ("1", "0"), ("x", "1")):
        (two_nodes / old).rename(two_nodes / new)
    for said in resumed(two_nodes):
        assert isinstance(said, exits.Refusal)
        assert said.code == exits.ALTERED


def test_a_disk_that_is_full_on_one_node_stops_the_save_on_all(two_nodes: Path) -> None:
    assert Ranks(two_nodes, 2, 2, fill).said() == [[exits.NO_SPACE, (20, True, 2, 2)]] * 2
