"""Queries to Prometheus and Alertmanager. An answer is shared by all readers for some seconds; a missing answer never becomes a
value."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlencode, urlsplit

from llmcore.config import ConfigError
from llmserve.http_client import BadAnswer, HttpClient, Lost
from llmserve.settings import ClientTls
from llmweb.settings import Monitor

log = logging.getLogger("llmweb.monitors")
KEPT_SECONDS = 10.0
ASK_SECONDS = 4.0
ANSWER_BYTES = 4 * 1024 * 1024
AT_ONCE = 6  # questions, of all pages together
MOST_SERIES = 1000  # of an answer; a page says how many it leaves out
MOST_OVER_TIME = 200  # of a range query, the highest
LABEL_CHARACTERS = 200
MOST_VALUE = 1e18  # of a plot


@dataclass(frozen=True, slots=True)
class Series:
    """Labels, and values by their time in seconds since the epoch; an instant query has one."""

    labels: dict[str, str]
    points: list[tuple[float, float]]

    @property
    def value(self) -> float:
        return self.points[-1][1]


@dataclass(frozen=True, slots=True)
class Reading[T]:
    """An answer and its time; `found` None: there is none, and `at` is the time of the last one, 0 if there was none yet."""

    at: float
    found: list[T] | None
    left_out: int = 0
    monitor: int = 0  # which one answered


@dataclass(slots=True)
class Kept:
    """An answer, or a query in progress. `good`: the time of the last answer."""

    until: float
    answer: asyncio.Task[Reading[Any]]
    seconds: float
    good: float = 0.0

    def answered(self, task: asyncio.Task[Reading[Any]]) -> None:
        self.until = time.monotonic() + self.seconds
        if not task.cancelled() and task.exception() is None:
            self.good = task.result().at or self.good


@dataclass(slots=True)
class Server:
    """One API. While it is away, pages do not wait for it repeatedly."""

    client: HttpClient
    base: str
    away_until: float = 0.0
    trouble: str = ""


@dataclass(slots=True)
class Monitors:
    """The APIs, in the order in which they are queried."""

    prometheus: list[Server]
    alertmanager: list[Server]
    kept: dict[str, Kept] = field(default_factory=dict)
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    async def now(self, expression: str) -> Reading[Series]:
        """An instant query."""
        return await self.shared(
            expression,
            lambda: self.ask(self.prometheus, "/api/v1/query?" + urlencode({"query": expression}), vector),
        )

    async def over(self, expression: str, seconds: int, step: int) -> Reading[Series]:
        """A range query of the last `seconds`."""

        def question() -> Any:
            end = int(time.time()) // step * step
            words = {"query": expression, "start": end - seconds, "end": end, "step": step}
            path = "/api/v1/query_range?" + urlencode(words)
            read = partial(matrix, times=range(end - seconds, end + 1, step))
            return self.ask(self.prometheus, path, read, most=MOST_OVER_TIME)

        return await self.shared(f"{seconds} {step} {expression}", question)

    async def rules_firing(self) -> Reading[dict[str, Any]]:
        """Firing alerts from Prometheus' rules, most urgent first."""
        return await self.shared(
            "rules", lambda: self.ask(self.prometheus, "/api/v1/alerts", firing_of_prometheus)
        )

    async def delivered(self, monitor: int) -> Reading[dict[str, Any]]:
        """Alerts in this monitor's Alertmanager, to which the Prometheus on the same host sends them."""
        servers = self.alertmanager[monitor : monitor + 1]
        return await self.shared(
            f"delivered {monitor}", lambda: self.ask(servers, "/api/v2/alerts?active=true", of_alertmanager)
        )

    async def shared(
        self, name: str, question: Callable[[], Any], seconds: float | None = None
    ) -> Reading[Any]:
        """Send the query, unless there is an answer from the last `seconds` or the query is in progress. `name` never comes from
        a client."""
        kept = self.kept.get(name)
        if kept is None or time.monotonic() > kept.until:
            before = kept.good if kept else 0.0
            lasts = KEPT_SECONDS if seconds is None else seconds
            kept = self.kept[name] = Kept(math.inf, asyncio.create_task(question()), lasts, before)
            kept.answer.add_done_callback(
                kept.answered
            )  # also where the request that asked has been cancelled
        reading: Reading[Any] = await asyncio.shield(kept.answer)
        return reading if reading.found is not None else Reading(kept.good, None)

    async def ask(
        self,
        servers: list[Server],
        path: str,
        read: Callable[[Any], list[Any]],
        most: int = MOST_SERIES,
    ) -> Reading[Any]:
        """The first valid answer of the servers."""
        async with self.turn:
            for number, server in enumerate(servers):
                if time.monotonic() < server.away_until:
                    continue
                try:
                    async with asyncio.timeout(ASK_SECONDS):
                        found = read(await get(server, path))
                except (
                    BadAnswer,
                    ValueError,
                    LookupError,
                    TypeError,
                    AttributeError,
                    RecursionError,
                ) as error:
                    complain(server, f"{type(error).__name__}: {error}"[:300])
                except (OSError, TimeoutError, Lost, ConfigError) as error:
                    server.away_until = time.monotonic() + KEPT_SECONDS
                    complain(server, f"{type(error).__name__}: {error}"[:300])
                else:
                    server.trouble = ""
                    return Reading(time.time(), found[:most], max(0, len(found) - most), number)
        return Reading(0.0, None)


def open_monitors(monitors: tuple[Monitor, ...], tls: ClientTls | None) -> Monitors:
    """Raises ConfigError if the certificates are unusable."""

    def server(url: str) -> Server:
        parts = urlsplit(url)
        client = HttpClient(
            f"{parts.scheme}://{parts.netloc}", tls if parts.scheme == "https" else None, None
        )
        return Server(client, parts.path)

    return Monitors(
        [server(each.prometheus) for each in monitors], [server(each.alertmanager) for each in monitors]
    )


async def get(server: Server, path: str) -> Any:
    """The JSON of a GET; raises what HttpClient does, or BadAnswer."""
    server.client.refresh()
    async with server.client.request("GET", server.base + path) as response:
        if response.status != 200:
            raise BadAnswer(f"it answered {response.status}")
        return json.loads(await response.whole(ANSWER_BYTES))


def complain(server: Server, reason: str) -> None:
    if reason != server.trouble:
        server.trouble = reason
        fields = {"server": str(server.client.address) + server.base, "reason": reason}
        log.warning("a monitor does not answer", extra={"fields": fields})


def data(answer: Any, kind: str) -> list[Any]:
    if answer["status"] != "success" or answer["data"]["resultType"] != kind:
        raise BadAnswer(f"it did not answer with a {kind}")
    return list(answer["data"]["result"])


def texts(labels: Any) -> dict[str, str]:
    """Labels, whose lengths others determine."""
    return {str(name): str(value)[:LABEL_CHARACTERS] for name, value in labels.items()}


def vector(answer: Any) -> list[Series]:
    found = [
        Series(texts(each["metric"]), [(float(each["value"][0]), float(each["value"][1]))])
        for each in data(answer, "vector")
    ]
    return [each for each in found if math.isfinite(each.value)]


def matrix(answer: Any, times: range) -> list[Series]:
    """The series, highest first. Raises BadAnswer for points at other times than the requested ones."""
    found = []
    for each in data(answer, "matrix"):
        if len(each["values"]) > len(times):
            raise BadAnswer(f"a series has {len(each['values'])} points, but {len(times)} were requested")
        points = [(float(at), float(value)) for at, value in each["values"]]
        if any(at not in times for at, _ in points) or points != sorted(points):
            raise BadAnswer("points are not at the requested times, or out of order")
        # NaN is no value, and what no axis has room for is none that was measured.
        if points := [(at, value) for at, value in points if abs(value) < MOST_VALUE]:
            found.append(Series(texts(each["metric"]), points))
    return sorted(found, key=lambda each: -max(value for _, value in each.points))


def firing_of_prometheus(answer: Any) -> list[dict[str, Any]]:
    """Sorts the heartbeat first, then by severity and age, so that the least urgent alerts are left out."""
    found = [
        {"labels": texts(each["labels"]), "notes": texts(each["annotations"]), "since": str(each["activeAt"])}
        for each in answer["data"]["alerts"]
        if each["state"] == "firing"
    ]
    order = {"none": 0, "page": 1}
    return sorted(found, key=lambda each: (order.get(each["labels"].get("severity", ""), 2), each["since"]))


def of_alertmanager(answer: Any) -> list[dict[str, Any]]:
    return [{"labels": texts(each["labels"]), "state": str(each["status"]["state"])} for each in answer]
