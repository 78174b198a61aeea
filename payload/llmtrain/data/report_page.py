"""The report as a self-contained HTML page with plots."""

from html import escape
from typing import Any

BAR, ROW, LABEL = 420, 22, 190  # pixels
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}svg text{font:13px system-ui,sans-serif}"""


def bars(title: str, counts: dict[str, int]) -> str:
    """A bar chart of counts, as HTML."""
    if not counts:
        return f"<h2>{escape(title)}</h2><p>none</p>"
    most = max(max(counts.values()), 1)
    drawn = []
    for place, (name, count) in enumerate(counts.items()):
        y = place * ROW
        width = max(1, round(BAR * count / most)) if count else 0
        drawn.append(
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{LABEL}" y="{y + 3}" width="{width}" height="{ROW - 6}" fill="#3b6ea5"/>'
            f'<text x="{LABEL + width + 6}" y="{y + 15}">{count:,}</text>'
        )
    size = f'width="{LABEL + BAR + 110}" height="{len(counts) * ROW}"'
    return (
        f'<h2>{escape(title)}</h2><svg {size} role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    )


def most_first(counts: dict[str, int]) -> dict[str, int]:
    """The twenty largest counts, in descending order."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:20])


def page(name: str, report: dict[str, Any]) -> str:
    """The HTML page of a report."""
    rows = report["rows"]
    steps = "".join(
        f"<tr><td>{escape(each['step'])}</td><td>{each['documents']:,}</td><td>{each['bytes'] / 1e6:,.1f}</td></tr>"
        for each in report["steps"]
    )
    lengths = {
        f"{2 ** (int(each) - 1) + 1 if int(each) else 1:,} to {2 ** int(each):,}": count
        for each, count in sorted(report["lengths"].items(), key=lambda pair: int(pair[0]))
    }
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>
<h1>Data set {escape(name)}</h1>
<p>{rows["documents"]:,} documents, {rows["tokens"]:,} tokens, of which {rows["learned"]:,} are learned, in
{rows["rows"]:,} rows of {rows["seq_len"]:,}; {100 * rows["padding_share"]:.2f} % is padding;
{rows["split"]:,} documents were longer than a row and split.</p>
<h2>What each step left</h2><table><tr><th>step</th><th>documents</th><th>MB</th></tr>{steps}</table>
{bars("Dropped, by rule", most_first(report["dropped"]))}
{bars("Tokens of a document", lengths)}
{bars("Languages", most_first(report["languages"]))}
{bars("Domains", most_first(report["domains"]))}
{bars("Personal data replaced", most_first(report["personal"]))}
</html>
"""
