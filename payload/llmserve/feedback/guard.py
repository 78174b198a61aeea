"""`llm-serve experiment guard`: automatically halts experiments on this host whose candidate does harm.

It reads the assigned requests and ratings that gateways of this host write, and the experiments of the signed policy. At each
check it tests each of the candidate's guardrails and both metrics with anytime-valid intervals (llmcore.sequential); the
probability of a false halt is ALPHA per step. A halt is written to disk before it takes effect (llmserve.feedback.halts), and
then recorded in the audit record. The guard can never give requests to the candidate.
"""

import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmcore import sequential
from llmcore.experiments import LARGEST_SHARE, RATINGS_EACH, identifier
from llmcore.files import Stamp, stamp, write_aside
from llmcore.ratings import ARM_FIELD, ASSIGNED, ENDED, RATED, TRANSACTION, Record, files, parsed
from llmcore.sequential import FEWEST, Mean, Sums
from llmgpu.record import RecordError, record
from llmproof.policy_bundle import PolicyRefused, judged
from llmserve.feedback.halts import GUARD, WATCHED, halted
from llmserve.feedback.journal import ANSWER_BYTES, REWRITTEN, kept_bytes
from llmserve.feedback.outcomes import values

log = logging.getLogger("llmserve.guard")
ALPHA = 0.01  # of a step: that a candidate which is no worse is halted
TESTS = 7  # slow, failed, refused, longer, shorter, and two metrics
MOST_RATABLE = 200_000  # assigned exchanges that may be rated; of older ones `llmkeep experiment show` knows
# What is seen best: harm that is so large. Less takes longer, by what intervals that are tuned to it would save.
EARLY, EARLY_RATED = 0.05, 0.15
SHARES = ("slow", "failed", "refused")


@dataclass(frozen=True)
class Guarded:
    """An experiment of the policy: the part by which its candidate is judged."""

    name: str
    id: str
    unit: str
    minimum: int  # units of each arm that rate; of answers sequential.FEWEST
    metrics: dict[str, str]  # which is better: higher or lower
    rails: dict[str, float]
    percent: int = field(default=0, compare=False)  # at which nothing that was read is judged otherwise


@dataclass(frozen=True)
class Halt:
    """Why an experiment is halted on this host."""

    experiment: Guarded
    percent: int
    test: str
    control: Mean
    candidate: Mean
    allowed: str

    @property
    def reason(self) -> str:
        """The reason as text."""
        means = (
            f"{arm} {estimate.mean:.4g} of {estimate.values} values of {estimate.clusters} units"
            for arm, estimate in (("candidate", self.candidate), ("control", self.control))
        )
        return f"{self.test} at {self.percent} %: {', '.join(means)}; allowed: {self.allowed}"


@dataclass
class Track:
    """One test's values of one arm, by unit."""

    sums: Sums = field(default_factory=Sums)
    units: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add(self, unit: str, number: int, total: float) -> None:
        """Add values to those of a unit; negative, to take some back."""
        before = self.units.get(unit)
        if before:
            self.sums.add(before, -1)
        after = ((before or (0, 0.0))[0] + number, (before or (0, 0.0))[1] + total)
        if after[0]:
            self.sums.add(after)
            self.units[unit] = after
        else:
            del self.units[unit]

    @property
    def largest_share(self) -> float:
        """The largest share of all values that belongs to one unit."""
        return max((number for number, _ in self.units.values()), default=0) / max(1.0, self.sums.values)


type Arms = dict[tuple[str, str], Track]  # by test and arm


def guarded(bundle: bytes, key: bytes, revision: int = 0) -> tuple[dict[str, Guarded], int]:
    """Experiments of a signed policy by id, and its revision; raises PolicyRefused. One without guardrails is not guarded."""
    policy = judged(bundle, key, revision)
    experiments = {}
    for name, experiment in policy.data["llm"].get("experiments", {}).items():
        if "guardrails" not in experiment:
            continue
        rails = {rail: value for rail, value in experiment["guardrails"].items() if rail != "refusals"}
        each = Guarded(
            name,
            identifier(name, experiment["salt"]),
            experiment["unit"],
            experiment["minimum"],
            experiment["metrics"],
            rails,
            experiment["percent"],
        )
        experiments[each.id] = each
    return experiments, policy.revision


def plain(sums: Sums, proportion: bool) -> Mean:
    """The mean; for proportions with one additional 0 and one additional 1, as in sequential.difference."""
    if not proportion:
        return sums.mean()
    more = Sums(**vars(sums))
    more.add((1, 0.0))
    more.add((1, 1.0))
    return more.mean()


def harmful(of: Guarded, percent: int, arms: Arms) -> Halt | None:
    """The first test that shows with certainty that the candidate exceeds its limit."""
    alpha = 2 * ALPHA / TESTS  # of both directions, of which each test has one

    def pair(test: str, fewest: int, proportion: bool = True) -> tuple[Mean, Mean] | None:
        control, candidate = (arms[test, arm].sums for arm in ("control", "candidate"))
        if min(control.clusters, candidate.clusters) < fewest:
            return None
        return plain(control, proportion), plain(candidate, proportion)

    def halt(test: str, allowed: str, source: str = "") -> Halt:
        control, candidate = (arms[source or test, arm].sums.mean() for arm in ("control", "candidate"))
        return Halt(of, percent, test, control, candidate, allowed)

    for test in SHARES:
        more = of.rails[test]
        planned = sequential.planned_for(EARLY, alpha)
        if (both := pair(test, FEWEST)) and sequential.surely_above(
            both[1], both[0], 1, more, planned, alpha
        ):
            return halt(test, f"{more:g} more than the control")
    if both := pair("length", FEWEST, proportion=False):
        control, candidate = both
        times = 1 + of.rails["length"]
        for test, high, low in (("longer", candidate, control), ("shorter", control, candidate)):
            planned = sequential.planned_for(of.rails["length"] * max(low.mean, 1.0), alpha)
            if sequential.surely_above(high, low, times, 0, planned, alpha):
                return halt(test, f"{times:g} times as many tokens", "length")
    for test, better in of.metrics.items():
        if both := pair(test, of.minimum):
            high, low = both if better == "higher" else both[::-1]
            planned = sequential.planned_for(EARLY_RATED, alpha)
            alone = max(arms[test, arm].largest_share for arm in ("control", "candidate")) > LARGEST_SHARE
            if not alone and sequential.surely_above(high, low, 1, 0, planned, alpha):
                less = "less" if better == "higher" else "more"
                return halt(test, f"no {less} than the control")
    return None


class Tail:
    """Whole lines that were appended to the journal's files since the last check."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.at: dict[Path, tuple[int, int]] = {}  # inode, and bytes that were read
        self.marked = stamp(folder / REWRITTEN)

    def rewritten(self) -> bool:
        """Whether a file that was read is gone, shorter, or replaced, as after `forget`.

        The second of two rewritten files may have the first one's inode, so there is a mark, too.
        """
        if stamp(self.folder / REWRITTEN) != self.marked:
            return True
        for path, (inode, read) in self.at.items():
            now = stamp(path)
            if now is None or now[0] != inode or now[2] < read:
                return True
        return False

    def hours(self) -> list[str]:
        """The hours for which there are files, oldest first."""
        return sorted({path.stem.partition("-")[2] for path in files(self.folder)})

    def new(self, kind: str, hour: str) -> Iterator[Record]:
        """Records of an hour since the last check. A line that is being written is left for the next one; a torn one is
        skipped."""
        path = self.folder / f"{kind}-{hour}.jsonl"
        try:
            file = path.open("rb")
        except FileNotFoundError:  # there is none, or it was removed meanwhile
            return
        with file:
            status = os.fstat(file.fileno())
            inode, read = self.at.get(path, (status.st_ino, 0))
            # Of a file that was rewritten meanwhile nothing is read on: `rewritten` says so at the next look.
            if status.st_size == read or status.st_ino != inode:
                return
            file.seek(read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                read += len(line)
                if event := parsed(line):
                    yield event
            self.at[path] = status.st_ino, read


class Guard:
    """The state of this host's experiments. A new instance reads the whole journal."""

    def __init__(self, folder: Path, bundle: Path, key: Path, audit: Path) -> None:
        """`folder`: the journal's; `bundle`, `key`: the signed policy; `audit`: the writer's socket."""
        self.folder, self.bundle, self.key, self.audit = folder, bundle, key, audit
        self.experiments: dict[str, Guarded] | None = None
        self.file_stamp: Stamp | None = None
        self.most_bytes = ANSWER_BYTES
        self.most_ratable = MOST_RATABLE
        self.revision = 0
        self.begin()

    def begin(self) -> None:
        """Forget all that was read."""
        self.tail = Tail(self.folder)
        self.steps: dict[tuple[str, int], Arms] = defaultdict(lambda: defaultdict(Track))
        self.ratable: dict[str, tuple[tuple[str, int], str, str]] = {}  # by exchange: step, arm and rater
        self.rated: dict[str, dict[str, float]] = {}  # by exchange: the metrics of its last rating

    def look(self) -> list[Halt]:
        """Read new records, halt harmful experiments, and record the check. Returns the new halts."""
        self.read_policy()
        if self.experiments is None:
            return []
        if self.tail.rewritten():
            self.begin()
        self.read_journal()
        halted_ids = halted(self.folder)
        halts = []
        for (identity, percent), arms in self.steps.items():
            experiment = self.experiments.get(identity)
            if experiment and identity not in halted_ids and (halt := harmful(experiment, percent, arms)):
                self.halt(halt)
                halted_ids.add(identity)
                halts.append(halt)
        self.put_on_record()
        (self.folder / GUARD).mkdir(mode=0o700, exist_ok=True)
        # Where gateways keep no more lines there is nothing to judge by. At 100 % there is none anyway.
        full = any(kept_bytes(self.folder, kind) > self.most_bytes for kind in (ASSIGNED, ENDED))
        experiments = self.experiments.values()
        watched = {each.id: each.name for each in experiments if not full or each.percent == 100}
        aside = self.folder / GUARD / (WATCHED + ".partial")
        aside.write_text(json.dumps(watched))
        aside.replace(self.folder / GUARD / WATCHED)
        return halts

    def read_policy(self) -> None:
        """Load the policy's experiments if it has changed. If the policy is refused, the known experiments remain."""
        now = stamp(self.bundle)
        if now is None or now == self.file_stamp:
            return
        try:
            experiments, self.revision = guarded(
                self.bundle.read_bytes(), self.key.read_bytes(), self.revision
            )
        except (PolicyRefused, OSError) as error:
            log.error("the policy cannot be read", extra={"fields": {"error.message": str(error)}})
            return
        self.file_stamp = now
        # Their lines were passed over, or judged otherwise: read all anew.
        if experiments != self.experiments:
            self.begin()
        self.experiments = experiments

    def read_journal(self) -> None:
        """Count new records hour by hour, so that old exchanges can still be rated when everything is read again."""
        for hour in self.tail.hours():
            self.read_hour(hour)

    def read_hour(self, hour: str) -> None:
        """Ratings are read first, so that the assignment of each one, which precedes it, is known; their text is not kept."""
        ratings = [(each.get(TRANSACTION, ""), dict(values(each))) for each in self.tail.new(RATED, hour)]
        for each in self.tail.new(ASSIGNED, hour):
            if step := self.step(each):
                self.ratable[each[TRANSACTION]] = (
                    step,
                    each[ARM_FIELD + "arm"],
                    sys.intern(str(each.get(ARM_FIELD + "rater") or each[ARM_FIELD + "unit"])),
                )
                self.evict(2 * self.most_ratable)  # those of the hour before are rated in this one
        for each in self.tail.new(ENDED, hour):
            if step := self.step(each):
                self.count_answer(step, each)
        for transaction, metrics in ratings:
            self.count_rating(transaction, metrics)
        self.evict(self.most_ratable)

    def evict(self, most: int) -> None:
        """Keep only the most recent exchanges that may be rated."""
        while len(self.ratable) > most:
            oldest = next(iter(self.ratable))
            del self.ratable[oldest]
            self.rated.pop(oldest, None)

    def step(self, line: Record) -> tuple[str, int] | None:
        """The experiment step to which a line belongs, if it is judged."""
        identity, percent = line.get(ARM_FIELD + "id"), line.get(ARM_FIELD + "percent")
        of = (self.experiments or {}).get(identity) if isinstance(identity, str) else None
        aside = line.get(ARM_FIELD + "away") or line.get(ARM_FIELD + "shadow")
        if of is None or aside or type(percent) is not int or not 0 < percent < 100:
            return None
        return of.id, percent

    def count_answer(self, step: tuple[str, int], line: Record) -> None:
        """One answer, or an error in its place."""
        of = (self.experiments or {})[step[0]]
        arm, unit = line[ARM_FIELD + "arm"], sys.intern(line[ARM_FIELD + "unit"])
        tracks = self.steps[step]
        slow = line[ARM_FIELD + "seconds"] > of.rails["slow_seconds"]
        for test, value in (
            ("slow", slow),
            ("failed", line[ARM_FIELD + "failed"]),
            ("refused", line.get(ARM_FIELD + "refused")),
            ("length", line.get(ARM_FIELD + "tokens")),
        ):
            if value is None:
                continue
            if of.unit == "request":  # which comes once
                tracks[test, arm].sums.add((1, float(value)))
            else:
                tracks[test, arm].add(unit, 1, float(value))

    def count_rating(self, transaction: str, metrics: dict[str, float]) -> None:
        """Count a rating; it replaces an earlier one of the same exchange. For each subject and arm only the first ones count."""
        if transaction not in self.ratable:
            return
        step, arm, rater = self.ratable[transaction]
        tracks = self.steps[step]
        for test, value in self.rated.pop(transaction, {}).items():
            tracks[test, arm].add(rater, -1, -value)
        counted = {
            test: value
            for test, value in metrics.items()
            if tracks[test, arm].units.get(rater, (0, 0.0))[0] < RATINGS_EACH
        }
        for test, value in counted.items():
            tracks[test, arm].add(rater, 1, value)
        if counted:
            self.rated[transaction] = counted

    def halt(self, halt: Halt) -> None:
        """Write a halt to disk; gateways see it within a second."""
        folder = self.folder / GUARD
        folder.mkdir(mode=0o700, exist_ok=True)
        report = {
            "experiment": halt.experiment.name,
            "percent": halt.percent,
            "test": halt.test,
            "reason": halt.reason,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "revision": self.revision,
        }
        write_aside(folder / f"halted-{halt.experiment.id}.json", json.dumps(report))
        log.error("an experiment was halted", extra={"fields": report})

    def put_on_record(self) -> None:
        """Record halts that are missing in the audit record; if the writer is away, at the next check."""
        for path in sorted((self.folder / GUARD).glob("halted-*.json")):
            noted = path.with_suffix(".recorded")
            if noted.exists():
                continue
            report = halt_in(path)
            fields = {
                "llmkeep.experiment.name": report["experiment"],
                "llmkeep.experiment.percent": report.get("percent"),
                "event.reason": report["reason"],
                "llmkeep.decision.revision": report.get("revision"),
            }
            try:
                record(self.audit, "experiment.halted", fields)
            except RecordError as error:
                log.error("a halt is not recorded yet", extra={"fields": {"error.message": str(error)}})
                return
            noted.touch(mode=0o600)


def halt_in(path: Path) -> dict[str, Any]:
    """The content of a halt's file. Its presence alone counts: one that no guard wrote is `unreadable`."""
    unreadable = {"experiment": path.stem.removeprefix("halted-"), "reason": "unreadable"}
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return unreadable
    whole = isinstance(report, dict) and all(
        isinstance(report.get(name), kind)
        for name, kind in (("experiment", str), ("percent", int), ("reason", str), ("revision", int))
    )
    return report if whole else unreadable


def watch(guard: Guard, interval: float, once: bool) -> None:
    """Check every `interval` seconds until this process is stopped."""
    guard.look()
    while not once:
        time.sleep(interval)
        guard.look()
