"""Results of an experiment so far: a verdict for each rung, valid however often it is computed."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from llmcore import sequential
from llmcore.experiments import LARGEST_SHARE, RATINGS_EACH
from llmcore.sequential import Mean
from llmkeep.errors import LlmkeepError
from llmkeep.experiments.definition import ARMS, Experiment, Metric

ODDS = 1000  # of a mismatch of shares: at most one of 1,000 experiments without one comes to it


@dataclass
class Seen:
    """Data of a rung: the arms that each unit met, and the number and sum of each subject's values by metric and arm."""

    arms: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    values: dict[tuple[str, str], dict[str, tuple[int, float]]] = field(
        default_factory=lambda: defaultdict(dict)
    )


@dataclass(frozen=True)
class Judged:
    """A metric on a rung: both arms, the interval of candidate less control, and `better`, `worse` or `undecided`. `largest`: the
    share of an arm's values by one subject, above LARGEST_SHARE there is no conclusion.
    """

    metric: str
    control: Mean
    candidate: Mean
    interval: tuple[float, float]
    verdict: str
    largest: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Verdict on a rung: units of each arm, the reason for having none (else ''), and the metrics."""

    percent: int
    units: tuple[int, int]
    stopped: str
    metrics: tuple[Judged, ...]


def read(path: Path, experiment: Experiment) -> dict[int, Seen]:
    """Outcomes by rung from a file; raises LlmkeepError like `add`."""
    by_rung: dict[int, Seen] = defaultdict(Seen)
    add(by_rung, path.read_bytes().splitlines(), str(path), experiment)
    return by_rung


def add(by_rung: dict[int, Seen], lines: Iterable[bytes], source: str, experiment: Experiment) -> None:
    """Add outcomes to those by rung: JSON lines of a file or a host.

    `{"unit": "…", "arm": "control", "percent": 5}` says that a unit met an arm; with `"metric"` and `"value"` (0 to
    1) it was rated, by the subject `"rater"`, or by the unit. The first RATINGS_EACH values of each subject and arm
    count. Raises LlmkeepError at the first malformed line.
    """
    names = [metric.name for metric in experiment.metrics]
    for number, line in enumerate(lines, 1):
        try:
            outcome = json.loads(line)
            unit, arm, percent = outcome["unit"], outcome["arm"], outcome["percent"]
            metric, value = outcome.get("metric"), outcome.get("value")
            rater = outcome.get("rater", unit)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LlmkeepError(
                f"{source}, line {number}: {error!r}; a line needs unit, arm and percent, and for a rating also "
                "metric and value"
            ) from error
        if (
            arm not in ARMS
            or percent not in experiment.compared
            or not all(isinstance(each, str) for each in (unit, rater))
        ):
            raise LlmkeepError(
                f"{source}, line {number}: unit {unit!r}, arm {arm!r}, percent {percent!r}; arms are {', '.join(ARMS)}, and the "
                f"ladder of {experiment.name} compares at {experiment.compared}"
            )
        by_rung[percent].arms[unit].add(arm)
        if metric is None:
            continue
        if metric not in names or type(value) not in (int, float) or not 0 <= value <= 1:
            raise LlmkeepError(
                f"{source}, line {number}: metric {metric!r} is {value!r}; {experiment.name} defines {', '.join(names)}, "
                "each from 0 to 1"
            )
        count, total = by_rung[percent].values[metric, arm].get(rater, (0, 0.0))
        if count < RATINGS_EACH:
            by_rung[percent].values[metric, arm][rater] = (count + 1, total + value)


def judged(experiment: Experiment, metric: Metric, percent: int, rung: Seen) -> Judged:
    """The interval of a metric, and its verdict."""
    control, candidate = (list(rung.values[metric.name, arm].values()) for arm in ARMS)
    low, high = sequential.difference(
        control, candidate, experiment.rung(percent).variance, experiment.alpha, experiment.minimum
    )
    up, down = (low > 0, high < 0) if metric.better == "higher" else (high < 0, low > 0)
    largest = max(map(largest_share, (control, candidate)))
    outcome = "undecided" if largest > LARGEST_SHARE else "better" if up else "worse" if down else "undecided"
    return Judged(
        metric.name, sequential.mean(control), sequential.mean(candidate), (low, high), outcome, largest
    )


def largest_share(clusters: list[sequential.Cluster]) -> float:
    """The largest share of one subject in an arm's values."""
    numbers = [number for number, _ in clusters]
    return max(numbers, default=0) / max(1, sum(numbers))


def verdict(experiment: Experiment, percent: int, rung: Seen) -> Verdict:
    """The verdict on a rung."""
    crossed = sum(len(arms) > 1 for arms in rung.arms.values())
    counts = Counter(arm for arms in rung.arms.values() if len(arms) == 1 for arm in arms)
    control, candidate = counts["control"], counts["candidate"]
    share = percent / 100
    odds = sequential.mismatch((control, candidate), (1 - share, share))
    stopped = ""
    if crossed:
        stopped = f"{crossed} units met both arms, so the arms are not comparable: find out which units were assigned twice"
    elif odds >= ODDS:
        stopped = (
            f"the candidate has {candidate} of {control + candidate} units instead of {percent} %, odds of {odds:.0f} to 1 "
            "against chance: find out which units are missing"
        )
    metrics = [] if stopped else [judged(experiment, metric, percent, rung) for metric in experiment.metrics]
    return Verdict(percent, (control, candidate), stopped, tuple(metrics))


def lines(verdicts: Iterable[Verdict]) -> list[str]:
    """The verdict as lines for a person."""
    lines = []
    for rung in verdicts:
        lines.append(f"at {rung.percent} %: control {rung.units[0]}, candidate {rung.units[1]} units")
        if rung.stopped:
            lines.append(f"  no verdict: {rung.stopped}")
            continue
        for each in rung.metrics:
            low, high = each.interval
            width = "no interval yet" if math.isinf(low) else f"{low:+.3f} to {high:+.3f}"
            lines.append(
                f"  {each.metric:12} {each.control.mean:.3f} ({each.control.values}), {each.candidate.mean:.3f} "
                f"({each.candidate.values}); {width}: {each.verdict}; one subject has {each.largest:.0%} of an arm's at most"
            )
    return lines
