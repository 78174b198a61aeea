"""Charts of benchmarks: bars in groups, one SVG, drawn by matplotlib in an environment of its own (`make peers PEER=plot`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / "bench/.venv-plot/bin/python"


def draw(file: Path, title: str, unit: str, groups: dict[str, dict[str, float]], budget: float = 0) -> None:
    """Bars by group and series; a dashed line at `budget`. Numbers that differ by a lot get a logarithmic axis."""
    if not PYTHON.exists():
        print(
            "SKIPPED: the plot: there is no matplotlib. `make peers PEER=plot` installs it", file=sys.stderr
        )
        return
    chart = {"file": str(file.resolve()), "title": title, "unit": unit, "groups": groups, "budget": budget}
    subprocess.run([PYTHON, __file__], input=json.dumps(chart), text=True, check=True)


def render(chart: dict[str, Any]) -> None:
    """What `draw` has sent, in matplotlib's own interpreter."""
    import matplotlib

    matplotlib.use("svg")
    # Letters stay letters, which is small, and the same numbers make the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench"})
    from matplotlib import pyplot

    groups = chart["groups"]
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(groups))]
        heights = [values.get(name, float("nan")) for values in groups.values()]
        bars = axes.bar(places, heights, width, label=name)
        axes.bar_label(bars, fmt="{:.3g}", fontsize=8)
    if chart["budget"]:
        axes.axhline(chart["budget"], color="black", linestyle="--", linewidth=1, label="budget")
    drawn = [value for values in groups.values() for value in values.values() if value > 0]
    if max(drawn) > 30 * min(drawn):
        axes.set_yscale("log")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set(title=chart["title"], ylabel=chart["unit"])
    axes.margins(y=0.1)
    axes.legend(fontsize=8)
    figure.savefig(chart["file"], metadata={"Date": None})


if __name__ == "__main__":
    render(json.load(sys.stdin))
