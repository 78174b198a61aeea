"""What the journal says of a download."""

from pathlib import Path

import pytest
from plugin_modules import load

progress = load("module_utils.bundle.progress")
mirror = load("module_utils.bundle.mirror")
GB = 10**9


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def half(clock: Clock, lines: list[str]) -> object:
    """472 GB, of which an earlier run fetched 236."""
    return progress.Progress("m", 472 * GB, 236 * GB, lines.append, clock)


def test_says_how_much_is_here_how_fast_it_comes_and_how_long_it_takes(
    half: object, clock: Clock, lines: list[str]
) -> None:
    clock.now += 60
    half.add(6 * GB)  # type: ignore[attr-defined]
    assert lines == [
        "m: 236.0 of 472.0 GB, fetching the rest",
        "m: 242.0 of 472.0 GB, 100.0 MB/s, about 38 min left",
    ]


def test_a_line_comes_twice_a_minute_whatever_comes(half: object, clock: Clock, lines: list[str]) -> None:
    for _ in range(120):
        clock.now += 1
        half.add(1 << 20)  # type: ignore[attr-defined]
    assert len(lines) == 1 + 120 / progress.EVERY


def test_waiting_for_the_mirror_is_told_and_does_not_count_as_slow(
    half: object, clock: Clock, lines: list[str]
) -> None:
    for _ in range(4):
        clock.now += 15
        half.wait(15)  # type: ignore[attr-defined]
    clock.now += 60
    half.add(6 * GB)  # type: ignore[attr-defined]
    assert lines[1:] == [
        "m: 236.0 of 472.0 GB, waiting for the mirror, which serves other hosts",
        "m: 236.0 of 472.0 GB, waiting for the mirror, which serves other hosts",
        "m: 242.0 of 472.0 GB, 100.0 MB/s, about 38 min left",
    ]


def test_the_end_says_how_long_it_took(half: object, clock: Clock, lines: list[str]) -> None:
    clock.now += 7500
    half.end()  # type: ignore[attr-defined]
    assert lines[-1] == "m: all 472.0 GB are here, after 2 h 05 min"


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (60, "1 min"), (3600, "1 h 00 min")])
def test_a_duration_is_as_long_as_needed(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_what_an_earlier_run_left_counts_as_here(tmp_path: Path, journal: list[str]) -> None:
    (tmp_path / "whole").write_bytes(bytes(10))
    (tmp_path / "half.partial").write_bytes(bytes(4))
    files = [(mirror.Entry(name, 10, "0" * 64), tmp_path / name) for name in ("whole", "half", "absent")]
    found = mirror.progress_of("m", tmp_path, files)
    assert (found.here, found.total) == (14, 30)
    assert journal == ["m: 0.0 of 0.0 GB, fetching the rest"]
