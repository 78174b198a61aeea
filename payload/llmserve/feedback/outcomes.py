"""Outcomes of an experiment on this host, for `llmkeep experiment show --outcomes`: lines without subject and text."""

from collections.abc import Collection, Iterator
from pathlib import Path
from statistics import fmean

from llmcore.ratings import (
    ARM_FIELD,
    ASSIGNED,
    ENDED,
    FIELD,
    RATED,
    TRANSACTION,
    Record,
    files,
    read,
)
from llmserve.feedback.documents import corrected

METRICS = ("thumb", "stars", "corrected")


def values(rating: Record) -> Iterator[tuple[str, float]]:
    """Metrics of a rating, each from 0 to 1: thumb up is 1, five stars are 1 and one is 0; whether there was a correction."""
    if (thumb := rating.get(FIELD + "thumb")) is not None:
        yield "thumb", float(thumb == "up")
    if (stars := rating.get(FIELD + "stars")) is not None:
        yield "stars", (stars - 1) / 4
    yield "corrected", float(corrected(rating))


def newest(folder: Path, experiment: str) -> object:
    """The id of the last assignment of an experiment of this name, or None; another salt changes the id."""
    for path in reversed(files(folder, ASSIGNED)):
        ids = [
            each.get(ARM_FIELD + "id") for each in read(path) if each.get(ARM_FIELD + "name") == experiment
        ]
        if ids:
            return ids[-1]
    return None


def outcomes(folder: Path, experiment: str, metrics: Collection[str], run: str = "") -> Iterator[Record]:
    """One line when a unit meets an arm, once for each percentage, and one for each of its ratings; the last rating of an
    exchange counts.

    If there were runs with several salts, only the one with the given id, or the newest, counts, since each reassigned its units.

    Outcomes that cannot be compared are left out: requests that the control answered because the candidate was away, and steps of
    0 and 100 percent.
    """
    rated = {
        record[TRANSACTION]: tuple(values(record)) for path in files(folder, RATED) for record in read(path)
    }
    met = set()
    identity = run or newest(folder, experiment)
    for record in (record for path in files(folder, ASSIGNED) for record in read(path)):
        if record.get(ARM_FIELD + "name") != experiment or record.get(ARM_FIELD + "id") != identity:
            continue
        if record.get(ARM_FIELD + "away"):
            continue
        unit, arm, percent = (record[ARM_FIELD + name] for name in ("unit", "arm", "percent"))
        if not 0 < percent < 100:
            continue
        outcome: Record = {"unit": unit, "arm": arm, "percent": percent}
        rater = record.get(ARM_FIELD + "rater", unit)
        if (unit, arm, percent) not in met:
            met.add((unit, arm, percent))
            yield outcome
        for metric, value in rated.get(record[TRANSACTION], ()):
            if metric in metrics:
                yield outcome | {"rater": rater, "metric": metric, "value": value}


def shadowed(folder: Path, experiment: str) -> Iterator[Record]:
    """How the candidate answered the copies, and the control the originals: numbers, failed, refused, tokens and seconds.

    Seconds are those to the first byte, which for a copy is the whole answer, so they can be compared if answers are not
    streamed.
    """
    identity = newest(folder, experiment)
    ended = {
        record[TRANSACTION]: record
        for path in files(folder, ENDED)
        for record in read(path)
        if record.get(ARM_FIELD + "name") == experiment and record.get(ARM_FIELD + "id") == identity
    }
    copies = [each for each in ended.values() if each.get(ARM_FIELD + "shadow") in ended]
    for arm, answers in (
        ("control", [ended[each[ARM_FIELD + "shadow"]] for each in copies]),
        ("candidate", copies),
    ):
        seconds = sorted(each[ARM_FIELD + "seconds"] for each in answers)
        tokens = [each[ARM_FIELD + "tokens"] for each in answers if ARM_FIELD + "tokens" in each]
        yield {
            "arm": arm,
            "answers": len(answers),
            "failed": sum(each[ARM_FIELD + "failed"] for each in answers),
            "refused": sum(each.get(ARM_FIELD + "refused", False) for each in answers),
            "tokens": round(fmean(tokens), 1) if tokens else None,
            "seconds_p50": seconds[len(seconds) // 2] if seconds else None,
            "seconds_p99": seconds[len(seconds) * 99 // 100] if seconds else None,
        }
