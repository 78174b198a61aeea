"""Is NEW better than OLD? Paired statistics of what both said to the same questions, and the rule of the gate.

Three terms of the field: an interval by the paired bootstrap (Efron 1979: rows are drawn again, both models' scores together);
non-inferior: the whole interval lies above -margin; superior: it lies above 0, and a sign-flip test (Fisher 1935) says so
too. That test is exact where the two models are alike, however few rows differ; the bootstrap alone is not. All that is
judged shares `alpha` (Bonferroni), so two equal models are told apart with at most half that probability.
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
BLOCK = 1 << 22  # numbers drawn at a time
FEWEST = 30  # texts or rows: below, no bootstrap is to be trusted


class Margins(Section):
    """By how much NEW may be worse, as a share; null: the metric is told, not judged."""

    exact: Margin = 0.02
    f1: Margin = 0.02
    choice: Margin = None
    choice_normalised: Margin = 0.02
    bits_per_byte: Margin = 0.01  # of OLD's


class Speed(Section):
    """How latency is measured: the same prompts to both in turn, each answer of the same length."""

    slower: Annotated[float, Field(ge=1)] | None = (
        1.25  # NEW may take so many times as long; null: told, not judged
    )
    rounds: Annotated[int, Field(ge=4)] = 9  # the first is warm-up and dropped
    prompts: PositiveInt = 4
    tokens: PositiveInt = 32  # of each answer


class Rule(Section):
    """gate.yaml: what makes NEW worth its promotion."""

    margins: Margins = Margins()
    speed: Speed = Speed()
    alpha: Annotated[float, Field(gt=0, le=0.2)] = 0.05
    resamples: Annotated[int, Field(ge=1000)] = 10_000
    seed: Annotated[int, Field(ge=0)] = 42
    max_tokens: PositiveInt = 64  # of an answer
    context: PositiveInt = 1024  # tokens of a text that are seen at once
    batch: PositiveInt = 8  # questions at once


@dataclass(frozen=True)
class Paired:
    """One metric: the scores of both models, row by row.

    Its value is sum(scores) / sum(weights): a mean where the weights are 1, bits per byte where they are bytes.
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
    """What a metric came to. `gain` is how much better NEW is, in the metric's unit, with its interval."""

    old: float
    new: float
    rows: int
    gain: float
    interval: tuple[float, float]
    margin: float | None  # in the metric's unit
    p: float | None  # of the sign-flip test, where the interval lies above 0
    finding: Finding
    rows_to_tell: int | None  # where it is unclear: about so many rows would do


def needed(margin: float, tail: float) -> int:
    """Rows below which not even perfect agreement shows that the share of worse answers is under `margin`.

    (1 - margin)^n <= tail; with a tail of 5 % this is the "rule of three", 3 / margin (Hanley and Lippman-Hand 1983).
    """
    return max(FEWEST, math.ceil(math.log(tail) / math.log1p(-margin)))


def tail_of(rule: Rule, names: Sequence[str]) -> float:
    """The probability left on each side of an interval, where these metrics are there."""
    margins = rule.margins.model_dump()
    return rule.alpha / 2 / max(1, sum(margins[name] is not None for name in names))


def too_small(rule: Rule, rows: dict[str, int]) -> str:
    """Why these numbers of rows, by metric, cannot tell anything, or ""."""
    tail = tail_of(rule, list(rows))
    for name, seen in rows.items():
        margin = getattr(rule.margins, name)
        wanted = FEWEST if margin is None or name == "bits_per_byte" else needed(margin, tail)
        if seen < wanted:
            say = "" if margin is None else f" with a margin of {margin:g}"
            return f"{seen} rows for {name} are too few to tell anything{say}: {wanted} are needed at least"
    return ""


def draws(rule: Rule, rows: int) -> Iterator[int]:
    """How many resamples at a time, so that memory stays bounded."""
    left = rule.resamples
    while left:
        now = min(left, max(1, BLOCK // rows))
        left -= now
        yield now


def interval(gains: Scores, weights: Scores, rule: Rule, tail: float) -> tuple[float, float]:
    """Paired bootstrap interval of sum(gains) / sum(weights), by percentiles."""
    random, rows = numpy.random.default_rng(rule.seed), len(gains)
    seen = []
    for times in draws(rule, rows):
        chosen = random.integers(0, rows, (times, rows))
        seen.append(gains[chosen].sum(1) / weights[chosen].sum(1))
    low, high = numpy.quantile(numpy.concatenate(seen), [tail, 1 - tail])
    return float(low), float(high)


def sign_flip(gains: Scores, rule: Rule) -> float:
    """The probability of so large a gain where OLD and NEW are exchangeable, one-sided."""
    random, rows = numpy.random.default_rng(rule.seed + 1), len(gains)
    reached = gains.sum() - 1e-9 * abs(gains).sum()
    hits = 0
    for times in draws(rule, rows):
        signs = random.integers(0, 2, (times, rows), dtype=numpy.int8) * 2.0 - 1.0
        hits += int((signs @ gains >= reached).sum())
    return (hits + 1) / (rule.resamples + 1)


def measure(paired: Paired, rule: Rule, tail: float) -> Measured:
    """Judge one metric. A score that is no number counts as worse, if it is NEW's; of OLD it raises ValueError."""
    if not numpy.isfinite(paired.old).all():
        raise ValueError(f"OLD's scores of {paired.name} are no numbers")
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
    """Seconds of the answers of both models in each round, warm-up dropped: shape (rounds, prompts)."""

    old: Scores
    new: Scores
    tokens: int  # of an answer

    def told(self, rule: Rule) -> dict[str, Any]:
        """Latency p50 and p95 in seconds, tokens a second, and how many times as long NEW takes, with its interval."""
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


def sentence(name: str, found: Measured) -> str:
    """One metric for a person."""
    if math.isnan(found.new):
        return f"{name}: NEW gives no numbers"
    low, high = found.interval
    text = f"{name}: {found.old:.4g} → {found.new:.4g} on {found.rows} rows"
    text += f", gain {found.gain:+.4g} ({low:+.4g} to {high:+.4g})"
    if found.margin is None:
        return f"{text}: not judged"
    if found.finding == "unclear":
        return (
            f"{text}: unclear with a margin of {found.margin:.4g}, about {found.rows_to_tell} rows would tell"
        )
    if found.finding == "not worse":
        return f"{text}: not worse than the margin of {found.margin:.4g}"
    return f"{text}: {found.finding}"


def judge(
    metrics: Sequence[Paired], pace: dict[str, Any], rule: Rule, same: bool
) -> tuple[Verdict, list[str], dict[str, Any]]:
    """The verdict, its reasons, and each metric as JSON has it. `same`: OLD and NEW are the same bytes.

    reject: something is worse by more than its margin. promote: something is better, and nothing worse or unclear.
    hold: all else.
    """
    tail = tail_of(rule, [each.name for each in metrics])
    found = {each.name: measure(each, rule, tail) for each in metrics}
    judged = {name: each for name, each in found.items() if each.margin is not None}
    findings: dict[str, Finding] = {name: each.finding for name, each in judged.items()}
    if pace and rule.speed.slower is not None:
        findings["latency"] = pace["finding"]
    worse, unclear, better = (
        [name for name, each in findings.items() if each == kind] for kind in ("worse", "unclear", "better")
    )
    verdict: Verdict = "hold"
    if same:
        first = "OLD and NEW are the same model, byte by byte"
    elif worse:
        verdict, first = "reject", f"NEW is worse by {', '.join(worse)}"
    elif not judged:
        first = "the rule judges nothing that this set measures: give a margin"
    elif unclear:
        first = f"this set does not tell whether NEW is worse by {', '.join(unclear)}"
    elif better:
        verdict, first = "promote", f"NEW is better by {', '.join(better)}, and worse by nothing"
    else:
        first = "no difference that this set can show"
    reasons = [first, *(sentence(name, each) for name, each in found.items())]
    if pace:
        low, high = pace["interval"]
        most = (
            "not judged"
            if rule.speed.slower is None
            else f"{pace['finding']}, allowed are {rule.speed.slower:g}"
        )
        reasons.append(
            f"latency: NEW takes {pace['ratio']:.3g} times as long ({low:.3g} to {high:.3g}): {most}"
        )
    return verdict, reasons, {name: plain(each) for name, each in found.items()}


def plain(found: Measured) -> dict[str, Any]:
    """As JSON can say it: what is no number is null."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in asdict(found).items()
        if key != "interval"
    } | {"interval": None if math.isnan(found.interval[0]) else list(found.interval)}
