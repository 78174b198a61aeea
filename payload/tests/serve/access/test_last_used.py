"""The file of last uses: one write a minute, the later time wins, and a damaged file costs nothing else."""

import json
import stat
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from llmserve.access.last_used import LastUsed, last_used_file, read_last_used

MINUTE = 30_000_000  # since the epoch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since the epoch and of the monotonic clock, to be moved by the test."""
    now = [MINUTE * 60.0, 1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[1])
    return now


def at(minute: int) -> datetime:
    return datetime.fromtimestamp(minute * 60, UTC)


def test_the_file_is_beside_the_keys_file() -> None:
    assert last_used_file(Path("/x/keys.json")) == Path("/x/last-used.json")


@pytest.mark.parametrize("content", ["", "[]", "5", '{"a": 5}', '{"a": "soon"}', "\\xff"])
def test_a_damaged_file_counts_as_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "last-used.json"
    assert read_last_used(path) == {}
    path.write_text(content)
    assert read_last_used(path) == {}


def test_a_use_is_written_to_the_minute_and_read_again_after_a_restart(
    tmp_path: Path, clock: list[float]
) -> None:
    path = tmp_path / "last-used.json"
    used = LastUsed(path)
    assert not used.unwritten
    clock[0] += 59
    used.touch("b")
    used.touch("a")
    used.touch("unknown")
    used.flush({"a", "b"})
    assert path.read_text() == '{"a": "2027-01-15T08:00Z", "b": "2027-01-15T08:00Z"}'
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_last_used(path) == {"a": at(MINUTE), "b": at(MINUTE)}
    assert LastUsed(path).minutes == {"a": MINUTE, "b": MINUTE}
    assert used.minutes == {"a": MINUTE, "b": MINUTE}
    assert [each.name for each in tmp_path.iterdir()] == ["last-used.json"]


def test_a_second_use_in_the_same_minute_is_nothing_new(tmp_path: Path, clock: list[float]) -> None:
    used = LastUsed(tmp_path / "last-used.json")
    used.touch("a")
    used.flush({"a"})
    used.touch("a")
    assert not used.unwritten
    clock[0] += 60
    used.touch("a")
    assert used.unwritten


def test_it_is_written_at_once_and_then_at_most_once_a_minute(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "last-used.json"
    used = LastUsed(path)
    used.flush_if_due({"a"})
    assert not path.exists(), "nothing is new"
    used.touch("a")
    used.flush_if_due({"a"})
    clock[0] += 60
    used.touch("a")
    clock[1] += 59.9
    used.flush_if_due({"a"})
    assert read_last_used(path) == {"a": at(MINUTE)}
    clock[1] += 0.1
    used.flush_if_due({"a"})
    assert read_last_used(path) == {"a": at(MINUTE + 1)}


def test_the_later_of_two_gateways_wins_in_both_orders(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "last-used.json"
    used = LastUsed(path)
    used.touch("later")
    used.touch("earlier")
    path.write_text(
        json.dumps({"later": "2027-01-15T09:00Z", "earlier": "2027-01-15T07:00Z", "old": "1970-01-01T00:00Z"})
    )
    used.flush({"later", "earlier", "old"})
    assert read_last_used(path) == {"later": at(MINUTE + 60), "earlier": at(MINUTE), "old": at(0)}


def test_a_file_that_cannot_be_written_is_a_warning_and_is_tried_again(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    used = LastUsed(folder / "last-used.json")
    used.touch("a")
    used.flush({"a"})
    assert "No such file or directory" in caplog.text
    assert used.unwritten
    folder.mkdir()
    (folder / "last-used.json").mkdir()
    used.flush({"a"})
    assert [each.name for each in folder.iterdir()] == ["last-used.json"], "no temporary file stays"
    (folder / "last-used.json").rmdir()
    used.flush({"a"})
    assert not used.unwritten
    assert read_last_used(used.path) == {"a": at(MINUTE)}
