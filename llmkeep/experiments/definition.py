"""The definition of an experiment: two models behind one name, the participants, and metrics fixed in advance."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from llmcore import sequential
from llmkeep.errors import LlmkeepError
from llmkeep.policy.source import UniqueKeys

ARMS = ("control", "candidate")
UNITS = {"subject": "subjects", "conversation": "conversations", "request": "requests"}
BETTER = ("higher", "lower")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ALPHA = 0.01  # of the whole experiment, for a difference where there is none
POWER = 0.95
REFUSAL_LETTERS = 40  # gateways look at no more of an answer
LONGEST_SECONDS = 300.0  # no answer takes longer
# How a model that was asked in English declines; an answer that begins so counts as a refusal.
REFUSALS = ("I can't", "I can’t", "I cannot", "I'm sorry", "I’m sorry", "I am sorry", "Sorry, ", "As an AI")
KNOWN = (
    "experiment", "model", *ARMS, "unit", "tenants", "ladder", "days", "minimum", "metrics", "expects",
)  # fmt: skip
OPTIONAL = ("guardrails",)


@dataclass(frozen=True)
class Metric:
    """One of the two metrics of an experiment; DIFFERENCE is the smallest that matters, in the metric's own unit."""

    name: str
    better: str
    difference: float


@dataclass(frozen=True)
class Guardrails:
    """How much worse than the control the candidate may be before it is halted, without a person.

    SLOW: more of the answers whose first byte takes longer than SLOW_SECONDS; FAILED: more that end in an error; REFUSED: more
    that are refusals, by the engine's finish reason or by beginning with one of REFUSALS. Each is a share of answers. LENGTH:
    how many times longer, or shorter, the mean answer may be, less 1: at 0.5 it may have half as many tokens again, or two
    thirds of them.
    """

    slow_seconds: float = 5.0
    slow: float = 0.01
    failed: float = 0.01
    refused: float = 0.02
    length: float = 0.5
    refusals: tuple[str, ...] = REFUSALS


@dataclass(frozen=True)
class Expects:
    """Expected participation: SUBJECTS in total; CONVERSATIONS, REQUESTS and RATINGS a day; how ALIKE one subject's ratings
    are (their intraclass correlation).
    """

    subjects: int
    conversations: float
    requests: float
    ratings: float
    alike: float


@dataclass(frozen=True)
class Rung:
    """Expected figures of a rung of the ladder: rating units of each arm, and the smallest detectable difference."""

    percent: int
    candidate: int
    control: int
    variance: float  # of the difference at its end, at most
    finds: float


@dataclass(frozen=True)
class Experiment:
    """An experiment as defined in its file. LADDER: percent of units with the candidate, one step every DAYS."""

    name: str
    model: str
    control: str
    candidate: str
    unit: str
    tenants: tuple[str, ...]
    ladder: tuple[int, ...]
    days: int
    minimum: int
    metrics: tuple[Metric, ...]
    expects: Expects
    guardrails: Guardrails = Guardrails()

    @property
    def compared(self) -> tuple[int, ...]:
        """Rungs with a control group to compare with."""
        return tuple(percent for percent in self.ladder if percent < 100)

    @property
    def alpha(self) -> float:
        """The significance level of one metric on one rung, which are judged separately."""
        return ALPHA / (len(self.compared) * len(self.metrics))

    def rung(self, percent: int) -> Rung:
        """Expected figures of a rung: each subject takes part once, and others join each day."""
        each = getattr(self.expects, UNITS[self.unit])
        units = each if self.unit == "subject" else each * self.days
        ratings = self.expects.ratings * self.days
        rating = min(units, ratings)
        # Ratings of one subject are alike in part, so that they count as fewer (Kish's design effect).
        of_one = max(1.0, ratings / self.expects.subjects)
        counted = ratings / (1 + (of_one - 1) * self.expects.alike)
        share = percent / 100
        # A share has the variance 1/4 at most.
        variance = 0.25 / (counted * share) + 0.25 / (counted * (1 - share))
        return Rung(
            percent,
            int(rating * share),
            int(rating * (1 - share)),
            variance,
            sequential.effect_found(variance, POWER, self.alpha),
        )


def _fields(mapping: Any, known: tuple[str, ...], what: str, optional: tuple[str, ...] = ()) -> list[str]:
    """Faults of the keys in a mapping."""
    every = (*known, *optional)
    if not isinstance(mapping, dict):
        return [f"{what} is {mapping!r}: write {', '.join(every)}"]
    return [
        f"{what} has {name!r}, which is unknown: use one of {', '.join(every)}"
        for name in mapping
        if name not in every
    ] + [f"{what} lacks {name}" for name in known if name not in mapping]


def _number(value: Any, *, above: float = 0, most: float = 1e9) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value <= most


def faults(document: Any) -> list[str]:
    """All faults of a definition, one sentence each, apart from the calculation of its rungs."""
    problems = _fields(document, KNOWN, "the file", OPTIONAL)
    if problems:
        return problems
    problems += [
        f"{name} is {document[name]!r}: write a name of lowercase letters, digits and hyphens"
        for name in ("experiment", "model", *ARMS)
        if not isinstance(document[name], str) or not NAME.fullmatch(document[name])
    ]
    if document["control"] == document["candidate"]:
        problems.append(f"both arms are {document['control']!r}: name two models or adapters")
    if document["unit"] not in list(UNITS):
        problems.append(f"unit is {document['unit']!r}: take {', '.join(UNITS)}")
    tenants = document["tenants"]
    if not isinstance(tenants, list) or not tenants or not all(isinstance(name, str) for name in tenants):
        problems.append(f"tenants is {tenants!r}: write a list of those who take part")
    ladder = document["ladder"]
    if (
        not isinstance(ladder, list)
        or not all(type(step) is int and 1 <= step <= 100 for step in ladder)
        or ladder != sorted(set(ladder))
        or ladder in ([], [100])
    ):
        problems.append(
            f"ladder is {ladder!r}: write whole percentages of 1 to 100, in increasing order, the first below 100"
        )
    problems += [
        f"{name} is {document[name]!r}: write a whole number of {least} or more"
        for name, least in (("days", 1), ("minimum", sequential.FEWEST))
        if type(document[name]) is not int or document[name] < least
    ]
    return (
        problems
        + _metrics(document["metrics"])
        + _expected(document["expects"])
        + _guarded(document.get("guardrails", {}))
    )


def _metrics(metrics: Any) -> list[str]:
    if not isinstance(metrics, list) or len(metrics) != 2:
        return [
            f"metrics is {metrics!r}: define exactly two, since each further metric is another chance of a false positive"
        ]
    problems = []
    for metric in metrics:
        wrong = _fields(metric, ("name", "better", "difference"), "a metric")
        if not wrong and (not isinstance(metric["name"], str) or not NAME.fullmatch(metric["name"])):
            wrong = [f"a metric's name is {metric['name']!r}: write lowercase letters, digits and hyphens"]
        if not wrong and metric["better"] not in BETTER:
            wrong = [f"better of {metric['name']} is {metric['better']!r}: take {' or '.join(BETTER)}"]
        if not wrong and not _number(metric["difference"], most=1):
            wrong = [
                (
                    f"difference of {metric['name']} is {metric['difference']!r}: write the smallest difference that matters, "
                    "above 0 and up to 1"
                )
            ]
        problems += wrong
    names = [metric["name"] for metric in metrics if isinstance(metric, dict) and "name" in metric]
    return problems + [f"both metrics are {names[0]!r}"] * (len(names) == 2 and names[0] == names[1])


def _expected(expectations: Any) -> list[str]:
    names = ("subjects", "conversations", "requests", "ratings", "alike")
    problems = _fields(expectations, names, "expects")
    if problems:
        return problems
    problems = [
        f"expects: {name} is {expectations[name]!r}: write a number above 0"
        for name in names[:-1]
        if not _number(expectations[name])
    ]
    if expectations["alike"] != 0 and not _number(expectations["alike"], most=1):
        problems.append(
            f"expects: alike is {expectations['alike']!r}: write a correlation from 0 to 1; 0.2 if it is unknown"
        )
    return problems


def _guarded(limits: Any) -> list[str]:
    names = tuple(field.name for field in fields(Guardrails))
    problems = _fields(limits, (), "guardrails", names)
    if problems:
        return problems
    for name, most, what in (
        ("slow_seconds", LONGEST_SECONDS, "seconds to the first byte, within an answer's deadline"),
        ("slow", 0.5, "a share of answers that the candidate may have more"),
        ("failed", 0.5, "a share of answers that the candidate may have more"),
        ("refused", 0.5, "a share of answers that the candidate may have more"),
        ("length", 10, "how many times longer the mean answer may be, less 1"),
    ):
        value = limits.get(name, getattr(Guardrails, name))
        if not _number(value, most=most):
            problems.append(f"guardrails: {name} is {value!r}: write {what}, above 0 and up to {most:g}")
    refusals = limits.get("refusals", [])
    if not isinstance(refusals, list) or not all(
        isinstance(each, str) and 3 <= len(each.strip()) <= REFUSAL_LETTERS for each in refusals
    ):
        problems.append(
            f"guardrails: refusals is {refusals!r}: write a list of beginnings of refusals, 3 to {REFUSAL_LETTERS} letters "
            "each; with an empty list, only the engine's own refusals count"
        )
    return problems


def out_of_reach(experiment: Experiment) -> list[str]:
    """Rungs that cannot reach their minimum, with the calculation and what to do."""
    problems = []
    expects, unit = experiment.expects, UNITS[experiment.unit]
    for percent in experiment.compared:
        rung = experiment.rung(percent)
        arm, rated = (
            ("candidate", rung.candidate) if rung.candidate < rung.control else ("control", rung.control)
        )
        if rated < experiment.minimum:
            part = percent if arm == "candidate" else 100 - percent
            units = getattr(expects, unit)
            days = f"a day × {experiment.days} days"
            come = f"{units:g} {unit}" + f" {days}" * (experiment.unit != "subject")
            problems.append(
                f"at {percent} % the {arm} has {rated} {unit} that rate (the fewer of {come} and "
                f"{expects.ratings:g} ratings {days}, × {part} %), but minimum is {experiment.minimum}: change the step, or "
                "give it more days"
            )
    return problems


def _guardrails(limits: dict[str, Any]) -> Guardrails:
    refusals = {"refusals": tuple(limits["refusals"])} if "refusals" in limits else {}
    return Guardrails(**limits | refusals)


def read(path: Path) -> Experiment:
    """The experiment in a file; raises LlmkeepError with all its faults."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)  # noqa: S506 -- a SafeLoader, made stricter
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise LlmkeepError(f"{path} cannot be read: {error}") from error
    wrong = faults(document)
    if not wrong:
        experiment = Experiment(
            name=document["experiment"],
            **{name: document[name] for name in ("model", *ARMS, "unit", "days", "minimum")},
            tenants=tuple(document["tenants"]),
            ladder=tuple(document["ladder"]),
            metrics=tuple(Metric(**metric) for metric in document["metrics"]),
            expects=Expects(**document["expects"]),
            guardrails=_guardrails(document.get("guardrails", {})),
        )
        wrong = out_of_reach(experiment)
        if not wrong:
            return experiment
    raise LlmkeepError(f"{path} is not a valid experiment:\n" + "\n".join(f"- {each}" for each in wrong))
