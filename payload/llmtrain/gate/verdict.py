"""Is NEW better than OLD? Paired statistics of their scores on the same rows, and the rule of the gate.

The terms: an interval by the paired bootstrap (Efron 1979: rows are drawn again, both models' scores together);
non-inferior: the whole interval lies above -margin; superior: it lies above 0, and a sign-flip test (Fisher 1935) agrees.
The test is exact for equivalent models, however few rows differ; the bootstrap alone is not. All judged metrics share
`alpha` (Bonferroni), so two equal models are found different with at most half that probability.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from llmcore.config import Section

Scores = NDArray[numpy.float64]
Verdict = Literal["promote", "hold", "reject"]
Finding = Literal["better", "not worse", "unclear", "worse"]
Margin = Annotated[float, Field(gt=0, lt=1)] | None
BLOCK = 1 << 22  # random numbers drawn at a time
FEWEST = 30  # texts or rows; with fewer, the bootstrap is not reliable


class Margins(Section):
    """By how much NEW may be worse, as a share; null: the metric is reported, but not judged."""

    exact: Margin = 0.02
    f1: Margin = 0.02
    choice: Margin = None
    choice_normalised: Margin = 0.02
    bits_per_byte: Margin = 0.01  # relative to OLD


class Speed(Section):
    """How latency is measured: with the same prompts for both in turn, and answers of the same length."""

    slower: Annotated[float, Field(ge=1)] | None = (
        1.25  # the highest ratio of NEW's latency to OLD's; null: reported, but not judged
    )
    rounds: Annotated[int, Field(ge=4)] = 9  # the first is warm-up and dropped
    prompts: PositiveInt = 4
    tokens: PositiveInt = 32  # of each answer


class Rule(Section):
    """The schema of gate.yaml: when NEW is promoted."""

    margins: Margins = Margins()
    speed: Speed = Speed()
    alpha: Annotated[float, Field(gt=0, le=0.2)] = 0.05
    resamples: Annotated[int, Field(ge=1000)] = 10_000
    seed: Annotated[int, Field(ge=0)] = 42
    max_tokens: PositiveInt = 64  # per answer
    context: PositiveInt = 1024  # tokens of a text in one forward pass
    batch: PositiveInt = 8  # questions in one forward pass


@dataclass(frozen=True)
class Paired:
    """One metric: the scores of both models, row by row.

    Its value is sum(scores) / sum(weights): a mean if the weights are 1, bits per byte if they are bytes.
    """

    name: str
    old: Scores
    new: Scores
    margin: float | None
    weights: Scores | None = None
    lower_is_better: bool = False

    @property
    def each(self) -> Scores:
        """The weight of each row."""
        return numpy.ones(len(self.old)) if self.weights is None else self.weights


@dataclass(frozen=True)
class Measured:
    """The result of a metric. `gain` is by how much NEW is better, in the metric's unit, with its interval."""

    old: float
    new: float
    rows: int
    gain: float
    interval: tuple[float, float]
    margin: float | None  # in the metric's unit
    p: float | None  # of the sign-flip test, if the interval lies above 0
    finding: Finding
    rows_to_tell: int | None  # if it is unclear: about how many rows would suffice


def needed(margin: float, tail: float) -> int:
    """The fewest rows with which perfect agreement shows that the share of worse answers is under `margin`.

    (1 - margin)^n <= tail; with a tail of 5 % this is the "rule of three", 3 / margin (Hanley and Lippman-Hand 1983).
    """
    return max(FEWEST, math.ceil(math.log(tail) / math.log1p(-margin)))


def tail_of(rule: Rule, names: Sequence[str]) -> float:
    """The probability outside of an interval on each side, if these metrics are judged."""
    margins = rule.margins.model_dump()
    return rule.alpha / 2 / max(1, sum(margins[name] is not None for name in names))


def too_small(rule: Rule, rows: dict[str, int]) -> str:
    """Why these numbers of rows, by metric, are too small for a verdict; "" if they are not."""
    tail = tail_of(rule, list(rows))
    for name, count in rows.items():
        margin = getattr(rule.margins, name)
        minimum = FEWEST if margin is None or name == "bits_per_byte" else needed(margin, tail)
        if count < minimum:
            say = "" if margin is None else f" with a margin of {margin:g}"
            return f"{count} rows for {name} are too few for a verdict{say}: at least {minimum} are needed"
    return ""


def draws(rule: Rule, rows: int) -> Iterator[int]:
    """The numbers of resamples to draw at a time, so that memory stays bounded."""
    remaining = rule.resamples
    while remaining:
        now = min(remaining, max(1, BLOCK // rows))
        remaining -= now
        yield now


def interval(gains: Scores, weights: Scores, rule: Rule, tail: float) -> tuple[float, float]:
    """The paired bootstrap interval of sum(gains) / sum(weights), by percentiles."""
    random, rows = numpy.random.default_rng(rule.seed), len(gains)
    ratios = []
    for times in draws(rule, rows):
        chosen = random.integers(0, rows, (times, rows))
        ratios.append(gains[chosen].sum(1) / weights[chosen].sum(1))
    low, high = numpy.quantile(numpy.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


def sign_flip(gains: Scores, rule: Rule) -> float:
    """The one-sided probability of at least this gain if OLD and NEW are exchangeable."""
    random, rows = numpy.random.default_rng(rule.seed + 1), len(gains)
    reached = gains.sum() - 1e-9 * abs(gains).sum()
    hits = 0
    for times in draws(rule, rows):
        signs = random.integers(0, 2, (times, rows), dtype=numpy.int8) * 2.0 - 1.0
        hits += int((signs @ gains >= reached).sum())
    return (hits + 1) / (rule.resamples + 1)


def measure(paired: Paired, rule: Rule, tail: float) -> Measured:
    """Judge one metric. NaN in NEW's scores counts as worse; in OLD's it raises ValueError."""
    if not numpy.isfinite(paired.old).all():
        raise ValueError(f"OLD's scores for {paired.name} are NaN")
    weights, rows = paired.each, len(paired.old)
    old, new = float(paired.old.sum() / weights.sum()), float(paired.new.sum() / weights.sum())
    margin = paired.margin
    if margin is not None and paired.lower_is_better:
        margin *= old
    if not numpy.isfinite(paired.new).all():
        return Measured(old, math.nan, rows, math.nan, (math.nan, math.nan), margin, None, "worse", None)
    gains = (paired.old - paired.new) if paired.lower_is_better else (paired.new - paired.old)
    gain = float(gains.sum() / weights.sum())
    low, high = interval(gains, weights, rule, tail)
    p = sign_flip(gains, rule) if low > 0 else None
    finding: Finding
    rows_to_tell = None
    if p is not None and p <= tail:
        finding = "better"
    elif margin is None or low >= -margin:
        finding = "not worse"
    elif high < -margin:
        finding = "worse"
    else:
        finding = "unclear"
        short = (gain - low) if gain > -margin else (high - gain)
        rows_to_tell = math.ceil(rows * (short / max(abs(gain + margin), margin / 1000)) ** 2)
    return Measured(old, new, rows, gain, (low, high), margin, p, finding, rows_to_tell)


@dataclass(frozen=True)
class Pace:
    """Seconds per answer of both models without warm-up, each of shape (rounds, prompts)."""

    old: Scores
    new: Scores
    tokens: int  # per answer

    def as_json(self, rule: Rule) -> dict[str, Any]:
        """As JSON: latency p50 and p95 in seconds, tokens per second, and the ratio of NEW to OLD with its interval."""
        logs = numpy.log(self.new.sum(1) / self.old.sum(1))
        low, high = interval(logs, numpy.ones(len(logs)), rule, rule.alpha / 2)
        most = rule.speed.slower
        finding: Finding = "not worse"
        if most is not None and math.exp(low) > most:
            finding = "worse"
        elif most is not None and math.exp(high) > most:
            finding = "unclear"
        sides = {
            name: {
                "p50_seconds": float(numpy.quantile(side, 0.5)),
                "p95_seconds": float(numpy.quantile(side, 0.95)),
                "tokens_per_second": float(side.size * self.tokens / side.sum()),
            }
            for name, side in (("old", self.old), ("new", self.new))
        }
        return {
            **sides,
            "ratio": float(numpy.exp(logs.mean())),
            "interval": [math.exp(low), math.exp(high)],
            "rounds": len(logs),
            "finding": finding,
        }


def sentence(name: str, measurement: Measured) -> str:
    """The result of one metric as text."""
    if math.isnan(measurement.new):
        return f"{name}: NEW's scores are NaN"
    low, high = measurement.interval
    text = f"{name}: {measurement.old:.4g} → {measurement.new:.4g} on {measurement.rows} rows"
    text += f", gain {measurement.gain:+.4g} ({low:+.4g} to {high:+.4g})"
    if measurement.margin is None:
        return f"{text}: not judged"
    if measurement.finding == "unclear":
        return f"{text}: unclear with a margin of {measurement.margin:.4g}, about {measurement.rows_to_tell} rows would suffice"
    if measurement.finding == "not worse":
        return f"{text}: not worse than the margin of {measurement.margin:.4g}"
    return f"{text}: {measurement.finding}"


def judge(
    metrics: Sequence[Paired], pace: dict[str, Any], rule: Rule, same: bool
) -> tuple[Verdict, list[str], dict[str, Any]]:
    """The verdict, its reasons, and each metric as JSON has it. `same`: OLD and NEW are the same bytes.

    reject: a metric is worse by more than its margin. promote: a metric is better, and none is worse or unclear.
    hold: otherwise.
    """
    tail = tail_of(rule, [each.name for each in metrics])
    measurements = {each.name: measure(each, rule, tail) for each in metrics}
    judged = {name: each for name, each in measurements.items() if each.margin is not None}
    findings: dict[str, Finding] = {name: each.finding for name, each in judged.items()}
    if pace and rule.speed.slower is not None:
        findings["latency"] = pace["finding"]
    worse, unclear, better = (
        [name for name, each in findings.items() if each == kind] for kind in ("worse", "unclear", "better")
    )
    verdict: Verdict = "hold"
    if same:
        first = "OLD and NEW are the same model, byte for byte"
    elif worse:
        verdict, first = "reject", f"NEW is worse by {', '.join(worse)}"
    elif not judged:
        first = "the rule judges no metric that this set measures: set a margin"
    elif unclear:
        first = f"this set does not show whether NEW is worse by {', '.join(unclear)}"
    elif better:
        verdict, first = "promote", f"NEW is better by {', '.join(better)}, and not worse by any metric"
    else:
        first = "this set shows no difference"
    reasons = [first, *(sentence(name, each) for name, each in measurements.items())]
    if pace:
        low, high = pace["interval"]
        most = (
            "not judged"
            if rule.speed.slower is None
            else f"{pace['finding']}, at most {rule.speed.slower:g} is allowed"
        )
        reasons.append(
            f"latency: NEW takes {pace['ratio']:.3g} times as long ({low:.3g} to {high:.3g}): {most}"
        )
    return verdict, reasons, {name: plain(each) for name, each in measurements.items()}


def plain(measurement: Measured) -> dict[str, Any]:
    """The value for JSON, with null for NaN and infinity."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in asdict(measurement).items()
        if key != "interval"
    } | {"interval": None if math.isnan(measurement.interval[0]) else list(measurement.interval)}
