"""Sessions end, and show nothing of their credential; words exist in both languages."""

import base64
import re
import time

import pytest

from llmweb.monitors import Series
from llmweb.plot import ceiling, line_plot
from llmweb.sections import safe_link, span_of
from llmweb.sessions import IDLE_SECONDS, LIFETIME_SECONDS, RENEWAL_SECONDS, Sessions
from llmweb.wording import REFUSALS, WORDS, preferred

KEYS = (b"k" * 32,)
KEY = "llmk_0123456789ab_" + "5e" * 24


class Clock:
    """Stands in for time.time()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_800_000_000.0
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_session_ends_after_its_lifetime_however_much_it_is_used(clock: Clock) -> None:
    sessions = Sessions(KEYS)
    cookie, opened = sessions.open(KEY), clock.now
    while clock.now - opened + IDLE_SECONDS / 2 <= LIFETIME_SECONDS:
        clock.now += IDLE_SECONDS / 2
        cookie = sessions.renewed(cookie) or ""
        assert sessions.find(cookie)
    clock.now = opened + LIFETIME_SECONDS + 1
    assert sessions.find(cookie) is None
    assert sessions.renewed(cookie) is None


def test_a_session_ends_when_it_is_not_used(clock: Clock) -> None:
    sessions = Sessions(KEYS)
    cookie = sessions.open(KEY)
    clock.now += IDLE_SECONDS + 1
    assert sessions.find(cookie) is None


def test_use_is_noted_once_a_minute_and_the_session_stays_the_same(clock: Clock) -> None:
    sessions = Sessions(KEYS)
    cookie = sessions.open(KEY)
    clock.now += RENEWAL_SECONDS - 1
    assert sessions.renewed(cookie) is None
    clock.now += 1
    renewed = sessions.renewed(cookie)
    assert renewed
    assert sessions.find(renewed) == sessions.find(cookie)


@pytest.mark.parametrize(("ahead", "valid"), [(60, True), (61, False)])
def test_a_host_whose_clock_is_a_minute_ahead_disturbs_no_session(
    clock: Clock, ahead: int, valid: bool
) -> None:
    sessions = Sessions(KEYS)
    clock.now += ahead
    cookie = sessions.open(KEY)
    clock.now -= ahead
    assert bool(sessions.find(cookie)) is valid


def test_a_session_that_was_closed_is_over_in_each_of_its_cookies(clock: Clock) -> None:
    sessions = Sessions(KEYS)
    cookie = sessions.open(KEY)
    clock.now += RENEWAL_SECONDS
    renewed = sessions.renewed(cookie) or ""
    sessions.close(cookie)
    assert sessions.find(renewed) is None
    assert sessions.renewed(renewed) is None
    assert sessions.find(sessions.open(KEY)), "another one of the same key goes on"


def test_closed_sessions_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmweb.sessions.MOST_ENDED", 2)
    sessions = Sessions(KEYS)
    cookies = [sessions.open(KEY) for _ in range(3)]
    for each in cookies:
        sessions.close(each)
    assert [sessions.find(each) is None for each in cookies] == [False, True, True]
    assert len(sessions.ended) == 2


def test_a_session_shows_its_credential_neither_in_its_cookie_nor_when_it_is_printed() -> None:
    sessions = Sessions(KEYS)
    cookie = sessions.open(KEY)
    session = sessions.find(cookie)
    assert session
    assert session.credential == KEY
    assert KEY not in repr(session)
    assert KEY.encode() not in base64.urlsafe_b64decode(cookie)


def test_two_sessions_of_a_key_have_nothing_in_common() -> None:
    sessions = Sessions(KEYS)
    opened = [sessions.find(sessions.open(KEY)) for _ in range(100)]
    assert len({each.id for each in opened if each}) == 100


@pytest.mark.parametrize("cookie", ["", "x", "gAAAAA", "\xe9", "==", "A" * 4000])
def test_what_is_no_cookie_is_no_session(cookie: str) -> None:
    assert Sessions(KEYS).find(cookie) is None


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
