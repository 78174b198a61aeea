"""What a Prometheus may answer that is broken, slow or hostile: it is never a value, and no page waits for it long."""

import asyncio
import json
import math
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from pydantic import ValidationError

from llmcore.config import describe
from llmweb import monitors
from llmweb.monitors import Kept, Monitors, Reading, Series, open_monitors
from llmweb.pages import alerts, first_tokens_of_day, gpus, gpus_of_day, hosts_up
from llmweb.sections import MOST_ROWS, STEP_SECONDS, Look, Section, Table, Words
from llmweb.settings import Monitor, WebConfig


def vector(*values: Any) -> bytes:
    found = [{"metric": {"model": f"m{number}"}, "value": [0, value]} for number, value in enumerate(values)]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": found}}).encode()


class Prometheus:
    """Answers every request with `body`; `hang`: never."""

    def __init__(self, body: bytes = b"", status: int = 200, hang: bool = False) -> None:
        self.body, self.status, self.hang, self.asked = body, status, hang, 0

    async def __aenter__(self) -> "Prometheus":
        self.server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        if self.hang:
            await asyncio.sleep(60)
        head = f"HTTP/1.1 {self.status} X\r\ncontent-length: {len(self.body)}\r\n\r\n"
        writer.write(head.encode() + self.body)
        writer.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"


def of(*servers: Prometheus) -> Monitors:
    return open_monitors(tuple(Monitor(prometheus=each.url, alertmanager=each.url) for each in servers), None)


def asked(what: Callable[[Monitors], Awaitable[Any]], *servers: Prometheus) -> Any:
    """The result of `what` before these servers."""

    async def run() -> Any:
        async with AsyncExitStack() as stack:
            for each in servers:
                await stack.enter_async_context(each)
            return await what(of(*servers))

    return asyncio.run(run())


BROKEN = {
    "nothing": b"",
    "no JSON": b"<html>",
    "a list": b"[]",
    "a word": b'"success"',
    "a hundred thousand lists": b"[" * 100_000,
    "an error": b'{"status": "error", "error": "x"}',
    "a matrix": b'{"status": "success", "data": {"resultType": "matrix", "result": []}}',
    "a series without a value": b'{"status": "success", "data": {"resultType": "vector", "result": [{"metric": {}}]}}',
    "labels that are a list": vector("1").replace(b'{"model": "m0"}', b"[]"),
    "a value that is no number": vector("one"),
    "megabytes": vector(1) + b" " * monitors.ANSWER_BYTES,
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_no_data(body: bytes) -> None:
    reading = asked(lambda to: to.now("up"), Prometheus(body))
    assert reading == Reading(0.0, None)


def test_an_error_is_no_data_even_if_its_body_is_an_answer() -> None:
    assert asked(lambda to: to.now("up"), Prometheus(vector("1"), status=500)).found is None


def test_what_is_no_number_is_left_out() -> None:
    reading = asked(lambda to: to.now("up"), Prometheus(vector("NaN", "+Inf", "2")))
    assert [(each.labels, each.value) for each in reading.found] == [({"model": "m2"}, 2.0)]


def test_more_series_than_a_page_shows_are_counted() -> None:
    reading = asked(lambda to: to.now("up"), Prometheus(vector(*["1"] * (monitors.MOST_SERIES + 3))))
    assert (len(reading.found), reading.left_out) == (monitors.MOST_SERIES, 3)


def test_long_labels_are_cut() -> None:
    labels = monitors.texts({"model": "x" * 10**6})
    assert len(labels["model"]) == monitors.LABEL_CHARACTERS


def test_a_hanging_prometheus_delays_a_page_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "ASK_SECONDS", 0.5)

    async def many(to: Monitors) -> tuple[list[Reading[Series]], float]:
        begun = time.monotonic()
        found = await asyncio.gather(*(to.now(f"metric_{number}") for number in range(600)))
        return list(found), time.monotonic() - begun

    server = Prometheus(hang=True)
    found, took = asked(many, server)
    assert all(reading.found is None for reading in found)
    assert server.asked <= monitors.AT_ONCE
    assert took < 25, "600 questions, each waiting, would take 50 s"


def test_the_next_one_is_asked_where_one_is_away() -> None:
    first, second = Prometheus(hang=True), Prometheus(vector("7"))

    async def without_the_first(to: Monitors) -> Reading[Series]:
        await first.__aexit__()
        return await to.now("up")

    assert asked(without_the_first, first, second).found[0].value == 7


def test_the_same_question_is_asked_once_and_again_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Prometheus(vector("1"))

    async def often(to: Monitors) -> list[int]:
        await asyncio.gather(*(to.now("up") for _ in range(50)))
        counts = [server.asked]
        monkeypatch.setattr(monitors, "KEPT_SECONDS", -1.0)
        to.kept.clear()
        for _ in range(3):
            await to.now("up")
        return [*counts, server.asked]

    assert asked(often, server) == [1, 4]


def test_an_answer_that_no_request_waited_for_is_not_used_when_it_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(monitors, "KEPT_SECONDS", 0.2)
    server = Prometheus(vector("1"))

    async def left(to: Monitors) -> int:
        first = asyncio.create_task(to.now("up"))
        await asyncio.sleep(0)
        first.cancel()
        while not to.kept["up"].answer.done():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        await to.now("up")
        return server.asked

    assert asked(left, server) == 2


def test_the_time_of_the_last_answer_is_told_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "KEPT_SECONDS", -1.0)
    server = Prometheus(vector("1"))

    async def then_broken(to: Monitors) -> tuple[Reading[Series], Reading[Series], Reading[Series]]:
        before = await to.now("up")
        server.body = b"broken"
        return before, await to.now("up"), await to.now("up")

    before, after, later = asked(then_broken, server)
    assert before.found and before.at > 0  # noqa: PT018 - both are what an answer has
    assert after == later == Reading(before.at, None)


# Over time.

NO_CONFIG: Any = None  # these parts read none


def over(*points: tuple[int, str]) -> bytes:
    """A series of the last hours, each point its distance from now in steps, and its value."""
    now = int(time.time()) // STEP_SECONDS * STEP_SECONDS
    values = [[now - distance * STEP_SECONDS, value] for distance, value in points]
    result = [{"metric": {"line": "P99"}, "values": values}]
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()


NO_LINE = {
    **BROKEN,
    "a vector": vector("1"),
    "no series": b'{"status": "success", "data": {"resultType": "matrix", "result": []}}',
    "nothing but NaN": over((2, "NaN"), (1, "+Inf"), (0, "-Inf")),
    "a million points": over(*[(1, "1")] * 10**6),
    "more points than were asked for": over(*[(1, "1")] * 300),
    "points of the last year": over((10**5, "1")),
    "points that go back": over((1, "1"), (2, "1")),
    "a value that no axis has room for": over((1, "1.7e308")),
    "a time that is no number": over((1, "1")).replace(b"values", b"value"),
}


@pytest.mark.parametrize("body", NO_LINE.values(), ids=NO_LINE)
def test_what_has_no_line_is_no_data(body: bytes) -> None:
    section = asked(lambda to: first_tokens_of_day(Look(to, "en"), NO_CONFIG), Prometheus(body))
    assert (section.kind, section.state) == ("words", "unknown")
    assert section.text.startswith("No data")


def test_a_line_has_gaps_where_there_is_no_value_and_says_its_last_one() -> None:
    body = over((9, "1"), (8, "NaN"), (7, "0.5"), (6, "1e-320"), (0, "0.25"))
    plot = asked(lambda to: first_tokens_of_day(Look(to, "en"), NO_CONFIG), Prometheus(body))
    assert [(each[0], each.count("L")) for each in re.findall(r'class="line s0" d="([^"]*)"', plot.svg)] == [
        ("M", 1)
    ]
    assert (plot.lines, plot.latest) == (["P99"], ["0.25 s"])
    assert re.findall(r'<text class="left"[^>]*>([^<]*)', plot.svg)[:3] == ["0 s", "0.5 s", "1 s"]
    old = asked(lambda to: first_tokens_of_day(Look(to, "en"), NO_CONFIG), Prometheus(over((9, "1"))))
    assert old.latest == ["no data"]
    assert "Last values: P99 no data." in old.svg


def test_without_gpus_their_plot_says_so() -> None:
    async def gpus_of(to: Monitors) -> Section:
        to.kept["last_over_time(llm_gpu_present[7d])"] = Kept(math.inf, asyncio.create_task(nothing()), 10)
        return await gpus_of_day(Look(to, "en"), NO_CONFIG)

    async def nothing() -> Reading[Series]:
        return Reading(1.0, [])

    assert (
        asked(gpus_of, Prometheus(NO_LINE["no series"])).text
        == "No GPU has exported metrics in the last 7 days."
    )


# What pages make of it.


def firing(*severities: str, name: str = "Drifted") -> list[dict[str, Any]]:
    return [
        {
            "labels": {"alertname": name, "severity": severity, "number": str(number)},
            "annotations": {},
            "activeAt": f"2026-01-01T00:00:{number % 60:02}",
            "state": "firing",
        }
        for number, severity in enumerate(severities)
    ]


BEAT = firing("none", name="Watchdog")


def rules(alerts: list[dict[str, Any]]) -> bytes:
    return json.dumps({"data": {"alerts": alerts}}).encode()


def held(alerts: list[dict[str, Any]]) -> bytes:
    """The same, at Alertmanager."""
    return json.dumps([{"labels": each["labels"], "status": {"state": "active"}} for each in alerts]).encode()


def alerts_of(*monitors: tuple[Prometheus, Prometheus]) -> Section:
    """The page's alerts; each monitor is a Prometheus and an Alertmanager."""

    async def seen(_: Monitors) -> Section:
        asked = [Monitor(prometheus=one.url, alertmanager=other.url) for one, other in monitors]
        return await alerts(Look(open_monitors(tuple(asked), None), "en"), NO_CONFIG)

    found: Section = asked(seen, *(each for pair in monitors for each in pair))
    return found


def told(section: Section) -> list[list[tuple[str, str]]]:
    """The rows of a table: texts and states."""
    assert isinstance(section, Table)
    return [[(cell.text, cell.state) for cell in row] for row in section.rows]


def test_no_alert_fires_though_the_heartbeat_does() -> None:
    section = alerts_of((Prometheus(rules(BEAT)), Prometheus(held(BEAT))))
    assert section == Words("Firing alerts", "No alert is firing.", "good")


def test_without_the_heartbeat_nothing_is_good() -> None:
    section = alerts_of((Prometheus(rules([])), Prometheus(held([]))))
    assert isinstance(section, Words)
    assert section.state == "unknown"
    assert section.more.startswith("No heartbeat")
    others = alerts_of((Prometheus(rules(firing("page"))), Prometheus(held([]))))
    assert [note for note in others.notes if note.startswith("No heartbeat")]  # type: ignore[union-attr]


@pytest.mark.parametrize("others", [MOST_ROWS + 3, monitors.MOST_SERIES + 3])
def test_what_is_left_out_is_the_least_urgent_alert(others: int) -> None:
    all_of_them = [*firing(*["ticket"] * others), *firing("page", name="Engine"), *BEAT]
    section = alerts_of((Prometheus(rules(all_of_them)), Prometheus(held(all_of_them))))
    rows = told(section)
    assert (rows[0][0][0], len(rows)) == ("Engine", MOST_ROWS)
    assert section.notes == [f"{others + 1 - MOST_ROWS} more are not shown."]  # type: ignore[union-attr]


def test_delivery_is_unknown_where_alertmanager_has_more_than_is_read() -> None:
    many = held(firing(*["ticket"] * (monitors.MOST_SERIES + 1)))
    [row] = told(alerts_of((Prometheus(rules([*firing("page"), *BEAT])), Prometheus(many))))
    assert row[4] == ("unknown", "unknown")
    [row] = told(alerts_of((Prometheus(rules([*firing("page"), *BEAT])), Prometheus(held([])))))
    assert row[4] == ("not at Alertmanager", "bad")


def test_the_alertmanager_beside_the_prometheus_that_answers_is_asked() -> None:
    own = [*firing("page"), *BEAT]
    broken = Prometheus(b"", status=500)
    [row] = told(alerts_of((broken, Prometheus(held([]))), (Prometheus(rules(own)), Prometheus(held(own)))))
    assert row[4] == ("at Alertmanager", "")
    [row] = told(
        alerts_of(
            (Prometheus(rules(own)), Prometheus(b"broken")), (Prometheus(rules(own)), Prometheus(held([])))
        )
    )
    assert row[4] == ("unknown", "unknown")


def series(count: int, bad: int, **labels: str) -> bytes:
    """0 for the series `bad`, 1 for the others, each of a host of its own."""
    found = [
        {"metric": labels | {"instance": f"host{number:04}"}, "value": [0, str(int(number != bad))]}
        for number in range(count)
    ]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": found}}).encode()


@pytest.mark.parametrize("part", [hosts_up, gpus])
def test_a_long_table_says_what_it_leaves_out_and_keeps_what_is_wrong(part: Any) -> None:
    body = series(MOST_ROWS + 50, MOST_ROWS + 40, gpu="0", job="node")

    async def seen(to: Monitors) -> Section:
        found: Section = await part(Look(to, "en"), NO_CONFIG)
        return found

    section = asked(seen, Prometheus(body))
    rows = told(section)
    assert len(rows) == MOST_ROWS
    if part is hosts_up:
        assert rows[0][1] == ("down", "bad")
    assert section.notes == ["50 more are not shown."]


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (
            {"monitors": [{"prometheus": "http://10.0.0.1:9090", "alertmanager": "http://127.0.0.1:9093"}]},
            "clear text",
        ),
        (
            {"monitors": [{"prometheus": "https://10.0.0.1", "alertmanager": "https://10.0.0.1"}]},
            "need 'tls'",
        ),
        ({"monitors": []}, "there is no page to serve"),
        ({"listen": {"port": 1}, "certificate_header": "X-Client-Certificate"}, "UNIX socket"),
        (
            {"monitors": [{"prometheus": "http://127.0.0.1/a?b", "alertmanager": "http://127.0.0.1"}]},
            "pattern",
        ),
    ],
)
def test_settings_that_would_leak_are_refused(changes: dict[str, Any], wrong: str) -> None:
    content: dict[str, Any] = {
        "listen": {"socket": "/run/llm-web/web.sock"},
        "keys_file": "/keys",
        "policy": {"engine": "server", "socket": "/opa", "key": "/key"},
        "audit": {"socket": "/audit"},
        "monitors": [{"prometheus": "http://127.0.0.1:9090", "alertmanager": "http://127.0.0.1:9093"}],
    }
    WebConfig.model_validate(content)
    with pytest.raises(ValidationError) as refused:
        WebConfig.model_validate(content | changes)
    assert wrong in "\n".join(describe(refused.value))
