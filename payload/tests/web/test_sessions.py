"""Sessions end, are bounded, and are not what the cookie says; words exist in both languages."""

import re
import time

import pytest

from llmserve.access.identity import Identity
from llmweb import sessions
from llmweb.monitors import Series
from llmweb.plot import ceiling, line_plot
from llmweb.sections import safe_link, span_of
from llmweb.sessions import IDLE_SECONDS, LIFETIME_SECONDS, MOST, MOST_OF_A_HOLDER, Sessions
from llmweb.wording import REFUSALS, WORDS, preferred


class Clock:
    """Stands in for time.monotonic()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def of(key: str, subject: str = "ada") -> Identity:
    return Identity("oidc", key, subject, "research", ())


def test_a_session_ends_after_its_lifetime_however_much_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, kept = Clock(monkeypatch), Sessions()
    identifier = kept.open(of("key"))
    begun = clock.now
    while clock.now - begun + IDLE_SECONDS / 2 <= LIFETIME_SECONDS:
        clock.now += IDLE_SECONDS / 2
        assert kept.key_of(identifier) == "key"
    clock.now = begun + LIFETIME_SECONDS + 1
    assert kept.key_of(identifier) is None
    assert not kept.open_ones


def test_a_session_ends_when_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, kept = Clock(monkeypatch), Sessions()
    identifier = kept.open(of("key"))
    clock.now += IDLE_SECONDS + 1
    assert kept.key_of(identifier) is None


def test_sessions_are_bounded_by_holder_and_in_all() -> None:
    kept = Sessions()
    mine = [kept.open(of("mine")) for _ in range(MOST_OF_A_HOLDER + 1)]
    assert [kept.key_of(each) for each in mine] == [None, *["mine"] * MOST_OF_A_HOLDER]
    for number in range(MOST + 5):
        kept.open(of("key", f"ada-{number}"))
    assert len(kept.open_ones) == MOST


def test_each_sign_in_at_the_provider_counts_though_its_token_is_a_new_one() -> None:
    kept = Sessions()
    first, *_ = [kept.open(of(f"token-{number}")) for number in range(MOST_OF_A_HOLDER + 1)]
    assert kept.key_of(first) is None
    assert len(kept.open_ones) == MOST_OF_A_HOLDER


def test_one_who_reads_the_memory_of_sessions_has_no_session() -> None:
    kept = Sessions()
    identifier = kept.open(of("key"))
    assert identifier.encode() not in b"".join(kept.open_ones)
    assert kept.key_of(sessions.hashed(identifier).hex()) is None
    assert len({kept.open(of("key", f"{number}")) for number in range(100)}) == 100


def test_all_words_are_there_in_both_languages_with_the_same_values() -> None:
    for name, (english, chinese) in (WORDS | REFUSALS).items():
        assert english, name
        assert chinese, name
        assert set(re.findall(r"{\w+}", english)) == set(re.findall(r"{\w+}", chinese)), name


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"), ("zh", "zh"), ("zh-TW,en;q=0.5", "zh"), ("en-US,zh;q=0.9", "en"), ("fr,de", "en"), ("fr, zh;q=0.1", "zh"),
        ("zh;q=0,en", "en"), ("zh;q=x", "en"), (";;;,,,", "en"), ("zh" * 10000, "en"), ("*", "en"),
    ],
)  # fmt: skip
def test_the_language_that_the_browser_prefers(header: str, language: str) -> None:
    assert preferred(header) == language


@pytest.mark.parametrize(
    ("address", "link"),
    [
        ("https://docs.example/metrics.md#x", True), ("javascript:alert(1)", False), ("/docs/metrics.md#x", False),
        ("data:text/html,x", False), (" javascript:alert(1)", False), ("https:", False), ("//elsewhere.example", False),
    ],
)  # fmt: skip
def test_only_an_address_of_a_page_is_a_link(address: str, link: bool) -> None:
    assert bool(safe_link(address)) is link


def test_the_axis_ends_above_the_highest_value() -> None:
    assert [ceiling(value) for value in (0, 0.0007, 1, 1.1, 49, 51, 999)] == [1, 0.001, 1, 2, 50, 100, 1000]


def test_a_gap_in_the_data_is_a_gap_in_the_line() -> None:
    series = Series({}, [(0, 1), (60, 1), (600, 1), (660, 1)])
    [path] = re.findall(
        r'class="line s0" d="([^"]*)"', line_plot("p", "<t>", "d & e", [series], (0, 660, 60), str)
    )
    assert [step[0] for step in re.findall(r"[ML]", path)] == ["M", "L", "M", "L"]


def test_a_duration_in_its_two_largest_units() -> None:
    assert [span_of(each) for each in (0, 59, 61, 3600, 90000, -5)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h",
        "1 d 1 h",
        "0 s",
    ]
