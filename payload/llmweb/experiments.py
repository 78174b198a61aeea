"""The product owner's page: the policy's experiments, their outcomes, and the state of both arms."""

import asyncio
import json
import logging
import re
import socket
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from llmcore.ratings import ARM_FIELD, ASSIGNED, RATED, TRANSACTION, files, read
from llmserve.access.experiments import Experiment
from llmserve.feedback import outcomes
from llmweb.monitors import Reading
from llmweb.plot import interval_plot
from llmweb.sections import Cell, Look, Plot, Section, State, Table, Words, percent, seconds, whole
from llmweb.settings import WebConfig

log = logging.getLogger("llmweb.experiments")
BEGINS = "llm_time_to_first_token_seconds"
COUNTED_SECONDS = 300.0  # for which a count of the journal is used again: it reads all of it
WAITED_SECONDS = 8.0  # for one that is on its way
MOST = 200_000  # subjects of an arm, and ratings, that are held in memory to count them
VERDICT_BYTES = 1 << 20
MOST_SHOWN = 1e6  # of means and ends of intervals, which are shares and their differences
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
STATES: dict[str, State] = {"better": "good", "worse": "bad", "undecided": ""}


@dataclass(slots=True)
class Arm:
    """The number of units that met an arm, and the number and sum of each metric's values. `cut`: there were more subjects."""

    units: int = 0
    values: dict[str, tuple[int, float]] = field(default_factory=dict)
    cut: bool = False

    def add(self, metric: str, value: float) -> None:
        count, total = self.values.get(metric, (0, 0.0))
        self.values[metric] = count + 1, total + value


@dataclass(slots=True)
class Count:
    """The counts of a journal. `cut`: only the newest ratings were kept."""

    arms: dict[str, Arm] = field(default_factory=lambda: defaultdict(Arm))
    cut: bool = False


async def in_force(look: Look, _: WebConfig) -> Section:
    title = look.say("in_force")
    if not look.experiments:
        return Words(title, look.say("no_experiments"))
    names = ("experiment", "model", "control", "candidate", "unit", "has_candidate")
    rows = [
        [
            *map(Cell, (each.name, each.model, each.control, each.candidate, look.say(f"unit_{each.unit}"))),
            Cell(f"{each.percent} %"),
        ]
        for each in look.experiments
    ]
    return Table(title, [look.say(name) for name in names], rows)


async def verdicts(look: Look, config: WebConfig) -> Section:
    """The results of `llmkeep experiment show`, whose files an operator copies here."""
    title = look.say("found")
    rows: list[list[Cell]] = []
    bars: list[tuple[str, float, float]] = []
    notes = []
    for each in look.experiments:
        told, at = await asyncio.to_thread(shown, config.verdicts, each.name)
        if told is None:
            rows.append(
                [
                    Cell(each.name),
                    *[Cell("–")] * 3,
                    Cell(look.say("not_shown" if at is None else "unreadable"), "unknown"),
                ]
            )
            continue
        times = [rung["time"] for rung in told if rung["time"] is not None]
        notes.append(
            look.say("shown_at", experiment=each.name, at=look.at(max(times)))
            if times
            else look.say("brought_at", experiment=each.name, at=look.at(at or 0.0))
        )
        for rung in told:
            rows += rung_rows(look, each.name, rung)
            bars += [
                (named(look, each.name, rung, metric), *metric["interval"])
                for metric in rung["metrics"]
                if metric["interval"][0] is not None
            ]
    if not rows:
        return Words(title, look.say("no_verdict_yet"), "unknown", " ".join(notes))
    names = ("experiment", "control", "candidate", "interval", "verdict")
    table = look.table(title, [look.say(name) for name in names], rows, notes=notes)
    if not bars:
        return table
    description = "; ".join(f"{name} {interval_text(*ends)}" for name, *ends in bars)
    svg = interval_plot("intervals", look.say("interval"), description, bars)
    return replace(table, svg=svg)


def rung_rows(look: Look, name: str, rung: dict[str, Any]) -> list[list[Cell]]:
    """A step of an experiment: a row for each metric, or why there is no verdict."""
    if rung["stopped"]:
        step = f"{name} · {rung['percent']} %"
        units = [Cell(look.say("units", count=count)) for count in rung["units"]]
        return [[Cell(step), *units, Cell("–"), Cell(f"{look.say('no_verdict')}: {rung['stopped']}", "bad")]]
    rows = []
    for each in rung["metrics"]:
        low, high = each["interval"]
        width = look.say("no_interval") if low is None else interval_text(low, high)
        arms = (each[arm] for arm in ("control", "candidate"))
        means = [Cell(f"{arm['mean']:.3f} ({arm['values']})" if arm["values"] else "–") for arm in arms]
        verdict = Cell(look.say(f"verdict_{each['verdict']}"), STATES[each["verdict"]])
        rows.append([Cell(named(look, name, rung, each)), *means, Cell(width), verdict])
    return rows


def named(look: Look, name: str, rung: dict[str, Any], metric: dict[str, Any]) -> str:
    return f"{name} · {rung['percent']} % · {look.say('metric_' + metric['metric'])}"


def interval_text(low: float, high: float) -> str:
    return f"{low:+.3f} … {high:+.3f}"


def shown(folder: Path | None, name: str) -> tuple[list[dict[str, Any]] | None, float | None]:
    """The file of an experiment and its time: None and None where there is none, None and 0 where `show` prints no such."""
    if folder is None or not NAME.fullmatch(name):
        return None, None
    path = folder / f"{name}.json"
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(VERDICT_BYTES))
        at = path.stat().st_mtime
        return [checked(rung) for rung in told], at
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        log.warning(
            "the results of an experiment cannot be read",
            extra={"fields": {"file": str(path), "reason": reason}},
        )
        return None, 0.0


def checked(rung: dict[str, Any]) -> dict[str, Any]:
    """A rung as `show --json` prints it; raises KeyError, TypeError, ValueError or OverflowError for anything else."""

    def number(value: Any) -> float:
        """A number for a plot: neither infinite nor NaN, which the JSON reader accepts, nor of arbitrary size."""
        found = round(float(value), 6)
        if not abs(found) <= MOST_SHOWN:
            raise ValueError(f"a number is {found}")
        return found

    def arm(mean: dict[str, Any]) -> dict[str, Any]:
        return {"mean": number(mean["mean"]), "values": int(mean["values"])}

    def metric(each: dict[str, Any]) -> dict[str, Any]:
        low, high = (None if end is None else number(end) for end in each["interval"])
        if each["verdict"] not in STATES or each["metric"] not in outcomes.METRICS:
            raise ValueError(f"metric {each['metric']!r} is {each['verdict']!r}")
        ends = [low, high] if low is not None and high is not None else [None, None]
        return {
            "metric": each["metric"],
            "verdict": each["verdict"],
            "interval": ends,
            **{name: arm(each[name]) for name in ("control", "candidate")},
        }

    control, candidate = map(int, rung["units"])
    at = rung.get("time")  # an earlier llmkeep prints none
    return {
        "time": None if at is None else datetime.fromisoformat(at).astimezone(UTC).timestamp(),
        "percent": int(rung["percent"]),
        "units": [control, candidate],
        "stopped": str(rung["stopped"])[:500],
        "metrics": [metric(each) for each in rung["metrics"]],
    }


async def quality(look: Look, config: WebConfig) -> Section:
    """Ratings of both arms at the present step, from this host's journal."""
    title = look.say("quality")
    if config.feedback is None:
        return Words(title, look.say("no_journal"), "unknown")
    rows, cut = [], False
    for each in look.experiments:
        question = partial(counted, config.feedback, each)
        name = f"outcomes of {each.id} at {each.percent}"
        asked = asyncio.ensure_future(look.monitors.shared(name, question, COUNTED_SECONDS))
        await asyncio.wait([asked], timeout=WAITED_SECONDS)
        if not asked.done():
            return Words(title, look.say("counting"), "unknown")
        reading: Reading[Count] = asked.result()
        look.seen(reading)
        if reading.found is None:
            return Words(title, look.say("journal_away"), "unknown")
        [told] = reading.found
        cut |= told.cut or any(arm.cut for arm in told.arms.values())
        rows += [
            arm_row(look, each, model, told.arms[arm])
            for arm, model in (("control", each.control), ("candidate", each.candidate))
        ]
    if not rows:
        return Words(title, look.say("no_experiments"))
    names = ("arm", "units_met", "thumbs_up", "stars_mean", "corrected_share")
    notes = [look.say("quality_note", host=socket.gethostname())]
    if cut:
        notes.append(look.say("quality_cut", most=MOST))
    return look.table(title, [look.say(name) for name in names], rows, notes=notes)


def arm_row(look: Look, experiment: Experiment, model: str, arm: Arm) -> list[Cell]:
    def mean(metric: str, text: Callable[[float], str]) -> Cell:
        count, total = arm.values.get(metric, (0, 0.0))
        return Cell(f"{text(total / count)} ({count})") if count else Cell(look.say("no_ratings"), "unknown")

    return [
        Cell(f"{experiment.name} · {model}"),
        Cell(("> " if arm.cut else "") + whole(arm.units)),
        mean("thumb", percent),
        mean("stars", lambda share: f"{1 + 4 * share:.2f}"),
        mean("corrected", percent),
    ]


def count(folder: Path, experiment: Experiment) -> Count:
    """Both arms of this salt at the present percentage, in bounded memory; raises OSError."""
    found = Count()
    subjects: dict[str, set[str]] = defaultdict(set)  # of each arm; a request meets but one, once
    told: dict[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]] = {}  # few, each held once
    rated: dict[str, tuple[tuple[str, float], ...]] = {}
    for rating in (record for path in files(folder, RATED) for record in read(path)):
        values = tuple(outcomes.values(rating))
        rated.pop(rating[TRANSACTION], None)
        rated[rating[TRANSACTION]] = told.setdefault(values, values)
        if len(rated) > MOST:
            del rated[next(iter(rated))]
            found.cut = True
    for record in (record for path in files(folder, ASSIGNED) for record in read(path)):
        step = record.get(ARM_FIELD + "id"), record.get(ARM_FIELD + "percent")
        if step != (experiment.id, experiment.percent) or record.get(ARM_FIELD + "away"):
            continue
        arm, unit = found.arms[record[ARM_FIELD + "arm"]], record[ARM_FIELD + "unit"]
        met = subjects[record[ARM_FIELD + "arm"]]
        if experiment.unit == "request":
            arm.units += 1
        elif unit in met or len(met) < MOST:
            met.add(unit)
            arm.units = len(met)
        else:
            arm.cut = True
        for metric, value in rated.get(record[TRANSACTION], ()):
            arm.add(metric, value)
    return found


async def counted(folder: Path, experiment: Experiment) -> Reading[Count]:
    """Found None where the journal cannot be read."""
    try:
        return Reading(time.time(), [await asyncio.to_thread(count, folder, experiment)])
    except OSError as error:
        log.error("the journal cannot be read", extra={"fields": {"error.message": str(error)}})
        return Reading(0.0, None)


def models(look: Look) -> list[str]:
    """Of all arms."""
    return sorted({name for each in look.experiments for name in (each.control, each.candidate)})


def chosen(look: Look) -> str:
    """A selector of the arms' models: PromQL's strings are quoted as JSON's are."""
    return "model=~" + json.dumps("|".join(map(re.escape, models(look))), ensure_ascii=False)


async def first_tokens(look: Look, _: WebConfig) -> Section:
    if not look.experiments:
        return Words(look.say("arms_first_token"), look.say("no_experiments"))
    arms = chosen(look)
    expression = f"histogram_quantile(0.99, sum by (model, le) (rate({BEGINS}_bucket{{{arms}}}[15m])))"
    section = await look.plot(
        "arms_first_token", expression, f"{BEGINS}_count{{{arms}}}", ("model",), seconds
    )
    return with_absent(look, section)


async def failures(look: Look, _: WebConfig) -> Section:
    """The share of answers that failed: the other counter has those that did not."""
    if not look.experiments:
        return Words(look.say("arms_failed"), look.say("no_experiments"))
    arms = chosen(look)
    failed, done = (
        f"sum by (model) (rate({name}{{{arms}}}[15m]))"
        for name in ("llm_failed_total", "llm_e2e_seconds_count")
    )
    expression = f"{failed} / ({failed} + {done})"
    section = await look.plot("arms_failed", expression, f"llm_failed_total{{{arms}}}", ("model",), percent)
    return with_absent(look, section)


def with_absent(look: Look, section: Section) -> Section:
    """A plot that names the arms without a line, unless its notes say that it leaves out lines, which may be theirs."""
    if not isinstance(section, Plot) or section.notes:
        return section
    absent = [name for name in models(look) if name not in section.lines]
    notes = [look.say("no_line_of", models=", ".join(absent))] if absent else []
    return replace(section, notes=notes)


PARTS: tuple[Callable[[Look, WebConfig], Awaitable[Section]], ...] = (
    in_force,
    verdicts,
    quality,
    first_tokens,
    failures,
)
