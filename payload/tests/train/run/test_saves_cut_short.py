"""Saves interrupted by a full disk, kills and power cuts: the last save that returned is found complete.

20 kills of a save by one rank, 10 of one by two ranks of a node, and of two nodes; or as many as STORM says (and a half
of it), from the seed SEED.
"""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lost_power import Disk
from saver import KEY, Ranks, is_whole, resume_and_save, save, write

from llmtrain import exits
from llmtrain.run.checkpoint import Checkpoints

KILLS = int(os.environ.get("STORM", "20"))
SEED = int(os.environ.get("SEED", "5"))
SIZE = 3000


def never(folder: Path) -> None:
    pytest.fail(f"{folder} is written to")


# -- A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB, of which 16 must stay free."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40M,mode=700", "none", str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mount.returncode:
        pytest.skip(f"this user cannot mount a small disk: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_save_for_which_there_is_no_space_is_refused_before_it_begins(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk / "checkpoints", KEY, last=2)
    save(checkpoints, 10, size=13_000_000)  # with a third of it again: 17 MB, 23 are left

    with pytest.raises(exits.Refusal, match=r"takes about 0.03 GB, .* has 0.02 GB free") as refusal:
        checkpoints.save(20, never, {})
    assert refusal.value.code == exits.NO_SPACE


def test_a_first_save_is_measured_by_what_is_expected(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk, KEY, last=2, expected=30_000_000)
    with pytest.raises(exits.Refusal, match="keep fewer"):
        checkpoints.save(10, never, {})


def torch_saves(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(12_000_000)}, folder / "x.pt")


def safetensors_saves(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(12_000_000)}, folder / "x.safetensors")


@pytest.mark.parametrize(
    "writes", [lambda folder: write(folder, 20, size=40_000_000), torch_saves, safetensors_saves],
    ids=["plain files", "torch.save", "safetensors"],
)  # fmt: skip
def test_a_disk_that_fills_during_a_save_leaves_what_there_was(
    small_disk: Path, writes: Callable[[Path], None]
) -> None:
    checkpoints = Checkpoints(small_disk / "checkpoints", KEY, last=2)
    save(checkpoints, 10, SIZE)
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(exits.Refusal, match="became full during a save") as refusal:
        checkpoints.save(20, writes, {})
    assert refusal.value.code == exits.NO_SPACE
    assert shutil.disk_usage(small_disk).free == free, "what was written aside is gone"
    found = checkpoints.latest_good()
    assert found
    assert found.step == 10
    save(checkpoints, 20, SIZE)
    assert sorted(path.name for path in checkpoints.directory.glob("step-*")) == [
        "step-00000010",
        "step-00000020",
    ]


# -- Kills and power cuts.


@pytest.mark.parametrize(
    ("ranks", "nodes"), [(1, 1), (2, 1), (2, 2)], ids=["a rank", "two ranks of a node", "two nodes"]
)
def test_after_a_kill_at_any_moment_of_a_save_the_last_one_that_returned_is_there_whole(
    tmp_path: Path, ranks: int, nodes: int
) -> None:
    if ranks > 1:
        pytest.importorskip("torch.distributed", reason="Debian's python3-torch is not installed")
    chance = random.Random(f"{SEED} {ranks} {nodes}")  # noqa: S311 - moments, no secret
    directory = tmp_path / "checkpoints"
    directory.mkdir(mode=0o700)
    reached = in_a_save = 0
    kills = KILLS // ranks
    # As many as are asked for, and more where most of them met the moments between two saves.
    for number in range(10 * kills):
        if number >= kills and in_a_save > kills // 4:
            break
        processes = Ranks(directory, ranks, nodes, resume_and_save)
        begun = [end.recv() for end in processes.ends]
        assert len({str(each) for each in begun}) == 1, f"kill {number}: the nodes resume from {begun}"
        assert isinstance(begun[0], int), f"kill {number}: {begun}"
        assert begun[0] >= reached, f"kill {number}: step {reached} had been saved, it resumes from {begun}"
        began, saves = time.monotonic(), chance.randrange(1, 4)
        reached = [processes.ends[0].recv() for _ in range(saves)][-1]
        time.sleep(chance.random() * (time.monotonic() - began) / saves)  # anywhere in the next one
        reached = max([reached, *(step for told in processes.killed() for step in told)])
        in_a_save += any(directory.rglob(".partial-*"))
    assert in_a_save > kills // 4, f"only {in_a_save} of {number + 1} kills were in a save"


def test_after_a_power_cut_at_each_flush_of_a_save_the_last_one_that_returned_is_there_whole(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", KEY, last=2)
    done = (10, 20, 30, 40)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(checkpoints.directory, patch)
        for step in done:
            save(checkpoints, step, SIZE)
            disk.saved()
    disk.close()
    chance = random.Random(SEED)  # noqa: S311 - moments, no secret
    found_new = 0
    for number, cut in enumerate(disk.cuts):
        returned = done[cut.returned - 1] if cut.returned else 0
        for luck in (None, *[chance] * 4):
            place = tmp_path / "found"
            cut.restore(place, luck)
            found = Checkpoints(place, KEY, last=2).latest_good()
            step = found.step if found else 0
            told = f"cut {number} of {len(disk.cuts)}, {returned} had returned, found {step}"
            assert step in (returned, returned + 10), told
            assert found is None or is_whole(found, size=SIZE), told
            found_new += step > returned
    assert len(disk.cuts) > 4 * 2 * 9, "a save has nine flushes"
    assert found_new
