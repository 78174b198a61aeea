"""The parts of a page: tables, plots, and places without data, which are never shown as zero or as good."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from markupsafe import Markup

from llmserve.access.experiments import Experiment
from llmweb.monitors import Monitors, Reading, Series
from llmweb.plot import MOST_LINES, clock, line_plot
from llmweb.wording import Language, said

State = Literal["", "good", "warn", "bad", "unknown"]
STEP_SECONDS = 300  # of a plot; a rate over fewer would leave out what happened between two points
TABLE_TIMES = 12  # rows of a plot's table
MOST_ROWS = 200


@dataclass(frozen=True, slots=True)
class Cell:
    """Text with its meaning."""

    text: str
    state: State = ""
    link: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table. The first cell of a row names it. `notes`: sentences below. `svg`: the same values above."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    kind: str = "table"
    svg: Markup | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """`lines`, `latest`: names and last values. `table`: the same values."""

    title: str
    svg: Markup
    lines: Sequence[str]
    latest: Sequence[str]
    table: Table
    notes: Sequence[str] = ()
    kind: str = "plot"


@dataclass(frozen=True, slots=True)
class Words:
    """A sentence in place of a table. `state` is `unknown` if data is missing."""

    title: str
    text: str
    state: State = ""
    more: str = ""
    kind: str = "words"


Section = Table | Plot | Words


@dataclass(slots=True)
class Look:
    """One view of the estate, in a language."""

    monitors: Monitors
    language: Language
    experiments: tuple[Experiment, ...] = ()  # of the policy, for the page about them
    oldest: float = field(default_factory=time.time)  # of the answers on the page

    def say(self, name: str, **values: object) -> str:
        return said(self.language, name, **values)

    def at(self, seconds: float) -> str:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"

    async def now(self, expression: str) -> Reading[Series]:
        reading = await self.monitors.now(expression)
        self.seen(reading)
        return reading

    def seen[T](self, reading: Reading[T]) -> None:
        if reading.found is not None:
            self.oldest = min(self.oldest, reading.at)

    async def missing(self, title: str, reading: Reading[Series], metric: str) -> Words:
        """A note in place of missing data: since when it has been missing, if known. `metric`: a selector for it."""
        if reading.found is None:
            since = (
                self.say("no_data_since", at=self.at(reading.at)) if reading.at else self.say("no_data_yet")
            )
            return Words(title, since, "unknown", self.say("unreachable"))
        last = await self.now(f"max(max_over_time(timestamp({metric})[6h:5m]))")
        since = (
            self.say("no_data_since", at=self.at(last.found[0].value))
            if last.found
            else self.say("no_data_long")
        )
        return Words(title, since, "unknown", self.say("absent"))

    def cell(
        self,
        series: Series | None,
        shown: Callable[[float], str],
        state: Callable[[float], State] = lambda _: "",
    ) -> Cell:
        """A value, or that there is none."""
        if series is None:
            return Cell(self.say("no_data"), "unknown")
        return Cell(shown(series.value), state(series.value))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *readings: Reading[Any],
        notes: Sequence[str] = (),
    ) -> Table:
        """A table that says what it leaves out, which is rows without problems first. `readings`: the source of the rows."""
        shown = sorted(rows, key=urgency)[:MOST_ROWS] if len(rows) > MOST_ROWS else rows
        more = len(rows) - len(shown) + max((each.left_out for each in readings), default=0)
        return Table(
            title, columns, shown, [*notes, self.say("left_out", count=more)] if more else list(notes)
        )

    async def plot(
        self,
        name: str,
        expression: str,
        metric: str,
        label: Sequence[str],
        shown: Callable[[float], str],
        hours: int = 6,
    ) -> Section:
        """Lines of the last `hours`, named by their labels."""
        title, step = self.say(name), STEP_SECONDS
        reading = await self.monitors.over(expression, hours * 3600, step)
        self.seen(reading)
        if not reading.found:
            return await self.missing(title, reading, metric)
        # By name, so that a line keeps its colour when the page is loaded again.
        series = sorted(reading.found[:MOST_LINES], key=lambda each: named(each, label))
        names = [named(each, label) for each in series]
        end = max(each.points[-1][0] for each in series)
        end = max(end, reading.at // step * step)
        latest = [
            shown(each.value) if end - each.points[-1][0] < 1.5 * step else self.say("no_data")
            for each in series
        ]
        span = (end - hours * 3600, end, step)
        values = ", ".join(map(" ".join, zip(names, latest, strict=True)))
        description = self.say("plot_of", hours=hours, values=values)
        svg = line_plot(name, title, description, series, span, shown)
        more = len(reading.found) - MOST_LINES + reading.left_out
        notes = [self.say("left_out", count=more)] if more > 0 else []
        table = self.as_table(title, series, names, span, shown)
        return Plot(title, svg, names, latest, table, notes)

    def as_table(
        self,
        title: str,
        series: list[Series],
        names: list[str],
        span: tuple[float, float, int],
        shown: Callable[[float], str],
    ) -> Table:
        """A dozen times of a plot, with the last value before each."""
        start, end, step = span
        wide = (end - start) / TABLE_TIMES
        rows = []
        for number in range(TABLE_TIMES + 1):
            at = start + number * wide
            cells = [Cell(clock(at, end - start))]
            for each in series:
                value = next((v for t, v in reversed(each.points) if at - step < t <= at + 1), None)
                cells.append(
                    Cell(self.say("no_data"), "unknown") if value is None else Cell(shown(value), "")
                )
            rows.append(cells)
        return Table(self.say("as_table", title=title), [f"{self.say('time')} (UTC)", *names], rows)


def urgency(row: Sequence[Cell]) -> int:
    """The severity of a row by its worst cell; 0 is the worst."""
    order: tuple[State, ...] = ("bad", "warn", "unknown")
    return min(order.index(each.state) if each.state in order else len(order) for each in row)


def named(series: Series, labels: Iterable[str]) -> str:
    return " ".join(filter(None, (series.labels.get(label, "") for label in labels))) or "–"


def by(reading: Reading[Series], *labels: str) -> dict[tuple[str, ...], Series]:
    """Series by their labels."""
    return {tuple(each.labels.get(label, "") for label in labels): each for each in reading.found or ()}


def safe_link(address: str) -> str:
    """An address that may become a link: alert annotations are untrusted data, and could contain `javascript:`."""
    parts = urlsplit(address)
    return address if parts.scheme in {"http", "https"} and parts.netloc else ""


def percent(value: float) -> str:
    return f"{100 * value:.3g} %" if value < 0.9995 else f"{100 * value:.5g} %"


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def per_second(value: float) -> str:
    return f"{number(value)} /s"


def per_minute(value: float) -> str:
    return f"{number(value)} /min"


def whole(value: float) -> str:
    return f"{value:.0f}"


def seconds(value: float) -> str:
    return f"{value:.3g} s"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.3g} GiB"


def celsius(value: float) -> str:
    return f"{value:.0f} °C"


def watts(value: float) -> str:
    return f"{value:.0f} W"


def span_of(value: float) -> str:
    """A duration, in its two largest units."""
    left = int(max(0, value))
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2])
