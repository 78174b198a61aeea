"""An estate as an SVG: a row per host, a column per port, a dot for a source and an arrow for a target.

Columns stay readable where arrows between boxes would cross. The SVG has no script, font or link, and the same estate
gives the same bytes.
"""

import textwrap
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from llmkeep.inventory.flows import Box, Estate, Flow

MARGIN, BOX, LANE, LINE = 24, 300, 46, 16  # pixels
TITLE = 40
TEXT_WIDTH = 44  # characters in a box
COLOURS = ("#0b5cad", "#b3261e", "#1b7f3b", "#7a3fb0", "#9a5b00", "#00727a", "#b0246e", "#4a5560")
WITHIN = "UNIX socket"  # in the reasons of meta/features.yml: a connection that no firewall has


def svg(estate: Estate, features: Iterable[dict[str, object]], title: str) -> str:
    """The drawing. FEATURES: rows of meta/features.yml, whose reasons describe connections within a host."""
    rows = _ordered(estate)
    lines = {box: _words(box) for box in rows}
    longest = max((len(_label(flow)) for flow in estate.flows), default=0)
    header = TITLE + 6 * longest  # pixels that a slanted label is high, at most
    tops, height = {}, MARGIN + header
    for box in rows:
        tops[box] = height
        height += LINE * len(lines[box]) + 26
    notes = [*_within(estate, features), *(f"Not drawn: {reason}" for reason in estate.unread)]
    first_lane = MARGIN + BOX + LANE
    width = max(first_lane + LANE * len(estate.flows) + 4 * longest, 720)
    notes = [line for note in notes for line in textwrap.wrap(note, width // 7)]
    end = height
    height += LINE * (len(notes) + 2) + MARGIN
    drawing = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            "width": str(width),
            "height": str(height),
            "font-family": "sans-serif",
            "font-size": "12",
            "role": "img",
        },
    )
    ElementTree.SubElement(drawing, "title").text = title
    _add(drawing, "rect", x=0, y=0, width=width, height=height, fill="#ffffff")
    _text(drawing, MARGIN, MARGIN + 8, title, size=16, weight="bold")
    for box in rows:
        _draw_box(drawing, box, lines[box], tops[box], width)
    for number, flow in enumerate(estate.flows):
        middle = {box: tops[box] + (LINE * len(lines[box]) + 14) // 2 for box in rows}
        x, colour = first_lane + LANE * number, COLOURS[number % len(COLOURS)]
        _draw_lane(drawing, flow, middle, x, MARGIN + header - 14, colour)
    legend = "A dot connects, an arrow is connected to; rows with both connect to each other."
    for number, note in enumerate([legend, *notes]):
        _text(drawing, MARGIN, end + LINE * (number + 1), note, fill="#333333")
    ElementTree.indent(drawing)
    return ElementTree.tostring(drawing, encoding="unicode") + "\n"


def _ordered(estate: Estate) -> Sequence[Box]:
    """Outside machines that only connect come first, those that are connected to come last."""
    reached = {box for flow in estate.flows for box in flow.targets}
    outside = [box for box in estate.boxes if not box.address and not box.groups]
    outside += [box for box in estate.boxes if box.address and not box.groups]
    inside = [box for box in estate.boxes if box.groups]
    return [
        *(box for box in outside if box not in reached),
        *inside,
        *(box for box in outside if box in reached),
    ]


def _words(box: Box) -> list[str]:
    """Lines of a box, the title first."""
    groups = textwrap.wrap(", ".join(box.groups), TEXT_WIDTH)
    title = f"{box.title} {box.address}".strip()
    return [*textwrap.wrap(title, TEXT_WIDTH), *groups]


def _within(estate: Estate, features: Iterable[dict[str, object]]) -> Iterable[str]:
    """Connections within a host, in the words of the features table."""
    for row in features:
        needs = row.get("needs")
        group = row.get("group", row["hosts"])
        for needed, reason in needs.items() if isinstance(needs, dict) else ():
            both = [
                box for box in estate.boxes if group in box.groups and {*needed.split(":")} & {*box.groups}
            ]
            if WITHIN in reason and both:
                yield f"Within a host in {group} and {needed.replace(':', ' or ')}: {reason}."


def _draw_box(drawing: ElementTree.Element, box: Box, lines: list[str], top: int, width: int) -> None:
    height = LINE * len(lines) + 14
    middle = top + height // 2
    _add(drawing, "line", x1=MARGIN + BOX, y1=middle, x2=width - MARGIN, y2=middle, stroke="#dddddd")
    fill = "#eef4fb" if box.groups else "#f7f7f7"
    dashes = {} if box.groups else {"stroke-dasharray": "5 4"}
    _add(
        drawing,
        "rect",
        x=MARGIN,
        y=top,
        width=BOX,
        height=height,
        rx=6,
        fill=fill,
        stroke="#4a5560",
        **dashes,
    )
    for number, line in enumerate(lines):
        weight = "normal" if number else "bold"
        _text(drawing, MARGIN + 10, top + LINE * (number + 1) + 3, line, weight=weight)


def _label(flow: Flow) -> str:
    return textwrap.shorten(f"{flow.port} {flow.label}", 44, placeholder="…")


def _draw_lane(
    drawing: ElementTree.Element, flow: Flow, middle: dict[Box, int], x: int, head: int, colour: str
) -> None:
    ends = [middle[box] for box in (*flow.sources, *flow.targets)]
    _text(drawing, x + 4, head, _label(flow), fill=colour, slanted=True)
    _add(drawing, "line", x1=x, y1=head + 4, x2=x, y2=min(ends), stroke=colour, **{"stroke-dasharray": "1 4"})
    _add(drawing, "line", x1=x, y1=min(ends), x2=x, y2=max(ends), stroke=colour, **{"stroke-width": "2"})
    for box in dict.fromkeys((*flow.sources, *flow.targets)):
        y = middle[box]
        if box in flow.targets:
            _add(drawing, "path", d=f"M {x} {y - 6} L {x - 13} {y} L {x} {y + 6} Z", fill=colour)
        if box in flow.sources:
            _add(drawing, "circle", cx=x, cy=y, r=5, fill=colour)


def _add(drawing: ElementTree.Element, name: str, **attributes: object) -> ElementTree.Element:
    return ElementTree.SubElement(drawing, name, {key: str(value) for key, value in attributes.items()})


def _text(
    drawing: ElementTree.Element,
    x: int,
    y: int,
    words: str,
    size: int = 12,
    weight: str = "normal",
    fill: str = "#111111",
    slanted: bool = False,
) -> None:
    """Characters that XML does not have become `?`."""
    turned = {"transform": f"rotate(-55 {x} {y})"} if slanted else {}
    text = _add(drawing, "text", x=x, y=y, fill=fill, **{"font-size": size, "font-weight": weight}, **turned)
    text.text = "".join(char if char.isprintable() else "?" for char in words)
