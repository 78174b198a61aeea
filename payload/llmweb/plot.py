"""Lines over time, and intervals, as SVG. Colours and dashes come from the style sheet, by the classes s0 to s5."""

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from markupsafe import Markup, escape

from llmweb.monitors import Series

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 24
ROW = 34  # of an interval
MOST_LINES = 6
DAY = 24 * 3600


def ceiling(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten: the top of the axis; 1 if the value is too small."""
    if value < 1e-9:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999)


def clock(at: float, span: float) -> str:
    """A time (UTC) on an axis of `span` seconds: with the day if the same time occurs twice."""
    return f"{datetime.fromtimestamp(at, UTC):{'%H:%M' if span < DAY else '%m-%d %H:%M'}}"


def interval_plot(
    name: str, title: str, description: str, intervals: Sequence[tuple[str, float, float]]
) -> Markup:
    """Intervals around 0 as bars below their names. `name`: unique on the page."""
    bound = ceiling(max(abs(end) for _, *ends in intervals for end in ends))
    high = TOP + ROW * len(intervals)

    def x(value: float) -> float:
        return LEFT + (value + bound) / (2 * bound) * (WIDTH - 2 * LEFT)

    parts = [opened(name, title, description, high + BOTTOM)]
    for value in (-bound, 0.0, bound):
        parts.append(f'<path class="grid" d="M{x(value):.1f} {TOP}V{high}"/>')
        parts.append(
            f'<text class="middle" x="{x(value):.1f}" y="{high + 14}">{f"{value:+.2g}" if value else "0"}</text>'
        )
    for number, (of, low, top) in enumerate(intervals):
        y = TOP + ROW * number
        parts.append(f'<text x="{RIGHT}" y="{y + 12}">{escape(of)}</text>')
        parts.append(f'<path class="line s0" d="M{x(low):.1f} {y + 22}H{x(top):.1f}"/>')
        parts.append(f'<path class="line s0" d="M{x((low + top) / 2):.1f} {y + 18}v8"/>')
    return Markup("".join([*parts, "</svg>"]))  # noqa: S704 - texts are escaped above


def opened(name: str, title: str, description: str, height: int) -> str:
    """The beginning of a plot, with its description for screen readers."""
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
    )


def line_plot(
    name: str,
    title: str,
    description: str,
    series: list[Series],
    span: tuple[float, float, int],
    shown: Callable[[float], str],
) -> Markup:
    """`name`: unique on the page. `span`: start and end in seconds since the epoch, and the step; a longer distance between two
    points is a gap. `shown`: a value as text.
    """
    start, end, step = span
    top = ceiling(max((value for each in series for _, value in each.points), default=0.0))

    def x(at: float) -> float:
        return LEFT + (at - start) / (end - start) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - max(0.0, value) / top * (HEIGHT - TOP - BOTTOM)

    parts = [opened(name, title, description, HEIGHT)]
    for share in (0.0, 0.5, 1.0):
        height = y(top * share)
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="left" x="{LEFT - 6}" y="{height + 4:.1f}">{escape(shown(top * share))}</text>'
        )
    for share, side, zone in ((0.0, "start", ""), (0.5, "middle", ""), (1.0, "left", " UTC")):
        at = start + (end - start) * share
        time = clock(at, end - start) + zone
        parts.append(f'<text class="{side}" x="{x(at):.1f}" y="{HEIGHT - 6}">{time}</text>')
    for number, each in enumerate(series[:MOST_LINES]):
        path, before = [], -math.inf
        for at, value in each.points:
            place = f"{x(at):.1f} {y(value):.1f}"
            # A point between two gaps is seen by the line of no length that begins there.
            path.append(f"L{place}" if at - before < 1.5 * step else f"M{place}h0")
            before = at
        parts.append(f'<path class="line s{number}" d="{"".join(path)}"/>')
    return Markup("".join([*parts, "</svg>"]))  # noqa: S704 - texts are escaped above
