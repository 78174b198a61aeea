"""A power cut leaves each file of a data set as it was, or whole: all of them are written by one function."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from lost_power import Disk
from training_job import SEQ_LEN, make_row

from llmcore.files import replacing, write_aside
from llmtrain.data.output import gather_rejects, place
from llmtrain.data.rows import write_shard


def shard(directory: Path, turn: int) -> Path:
    row = make_row(numpy.random.default_rng(turn))
    return directory / str(write_shard(directory, 0, [row])["file"])


def rejects(directory: Path, turn: int) -> Path:
    source = directory.parent / f"step-{turn}"
    source.mkdir(exist_ok=True)
    (source / "a-00000.jsonl").write_text(json.dumps({"rule": "short", "turn": turn}) + "\n")
    gather_rejects(directory / "rejects.jsonl", {"clean": [(source, {})]})
    return directory / "rejects.jsonl"


def placed(directory: Path, turn: int) -> Path:
    """From another disk, as far as links can tell."""
    source = directory.parent / f"source-{turn}"
    source.write_text(f"lineage of turn {turn}" * SEQ_LEN)
    place(source, directory / "documents.gz")
    return directory / "documents.gz"


def text(directory: Path, turn: int) -> Path:
    write_aside(directory / "report.json", f"report of turn {turn}" * SEQ_LEN)
    return directory / "report.json"


@pytest.mark.parametrize("write", [shard, rejects, placed, text])
def test_a_power_cut_leaves_the_old_file_or_the_new_one(
    write: Callable[[Path, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    directory = tmp_path / "out"
    directory.mkdir()
    old = write(directory, 1).read_bytes()
    disk = Disk(directory, monkeypatch)
    disk.durable = disk.look()
    path = write(directory, 2)
    disk.saved()
    new = path.read_bytes()
    for number, cut in enumerate(disk.cuts):
        for chance in (None, random.Random(number)):  # noqa: S311 - which of two states a cut leaves
            cut.restore(tmp_path / "after", chance)
            found = (tmp_path / "after" / path.name).read_bytes()
            assert found == new if cut.returned else found in (old, new)
    disk.close()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_aside(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as aside:
        aside.write_text(f"half {1 / 0}")
    assert (tmp_path / "file").read_text() == "old"
