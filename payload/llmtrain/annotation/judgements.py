"""`llm-train annotate import`: annotations become examples in the format of `llm-train feedback export`.

Reads Label Studio's JSON export. The only id that is used is the annotator's, and only to tell annotators apart.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmcore.privileges import become_owner
from llmcore.ratings import liked
from llmtrain import exits
from llmtrain.annotation.agreement import alpha
from llmtrain.annotation.controls import CORRECTED, UNCHANGED, Control, Labels, control
from llmtrain.annotation.tasks import ID, ITEMS, KEY, REPORT, Item, answers_of, data_of, mac, written_out
from llmtrain.feedback.export import (
    FIELD,
    KINDS,
    Example,
    Rated,
    Rejected,
    held_out,
    write_export,
)

GIVES = {"better": ("dpo",), "rating": ("kto", "sft"), "correction": ("dpo", "sft"), "labels": ("kto", "sft")}


@dataclass(frozen=True)
class Exported:
    """An export of `llm-train annotate export`; `items` by our id."""

    kind: str
    labels: Labels | None
    key: bytes
    items: dict[str, Item]
    digest: str

    @property
    def control(self) -> Control:
        return control(self.kind, self.labels)


def read_exported(folder: Path) -> Exported:
    """Load an export of tasks; raises Refusal if it is altered or incomplete."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        data = (folder / ITEMS).read_bytes()
        key = bytes.fromhex((folder / KEY).read_text("ascii"))
        labels = Labels.model_validate(report["labels"]) if report["labels"] else None
        kind, expected = report["annotation"], report["sha256"]
        if kind not in GIVES:
            raise ValueError(f"its kind is {kind!r}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected:
            raise exits.Refusal(
                f"{folder}/{ITEMS} has sha256 {digest}, but {REPORT} says {expected}: use the unchanged export",
                exits.ALTERED,
            )
        items = [Item(**json.loads(line)) for line in data.splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise exits.Refusal(
            f"--tasks is {folder}, which does not contain a complete export ({error}): write it with `llm-train annotate export`"
        ) from error
    return Exported(kind, labels, key, {each.task: each for each in items}, digest)


@dataclass(frozen=True)
class Annotation:
    """An annotation and its location. `annotator` is a pseudonym."""

    item: Item
    annotator: str
    time: datetime
    place: dict[str, Any]
    raw: dict[str, Any]


def read_file(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The tasks of a JSON export of Label Studio, and the file's digest; raises Refusal."""
    try:
        data = path.read_bytes()
        tasks = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise exits.Refusal(
            f"--annotations: {path} cannot be read as JSON ({error}): export the project as JSON"
        ) from error
    if not isinstance(tasks, list) or not all(isinstance(each, dict) for each in tasks):
        raise exits.Refusal(f"--annotations: {path} is not a list of tasks: export the project as JSON")
    if any(not isinstance(each.get("annotations"), list) for each in tasks):
        raise exits.Refusal(
            f"--annotations: a task of {path} has no list of annotations: export the project as JSON, not as JSON-MIN"
        )
    return tasks, hashlib.sha256(data).hexdigest()


def annotation_of(raw: Any, item: Item, key: bytes, place: dict[str, Any]) -> Annotation:
    """An annotation with its annotator and its time; raises Rejected."""
    try:
        who = raw["completed_by"]
        who = who["id"] if isinstance(who, dict) else who
        time = datetime.fromisoformat(raw.get("updated_at") or raw["created_at"])
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Rejected("malformed", f"its annotator or time is missing ({error!r})") from error
    if type(who) is not int:
        raise Rejected(
            "malformed", f"completed_by is {type(who).__name__}, but must be an annotator's number"
        )
    return Annotation(item, mac(key, "annotator", str(who)).hex()[:12], time, place, raw)


def own(task: dict[str, Any], name: str, task_ids: set[str], exported: Exported) -> Item:
    """The item of a task that belongs to this export; raises Rejected. `task_ids` are those of earlier tasks in the file."""
    if (item := exported.items.get(name)) is None:
        raise Rejected("foreign_task", f"its {ID} is {name[:60]!r}, which is not in this export")
    if item.task in task_ids:
        raise Rejected("duplicate_id", f"{item.task} occurs twice in this file: the first one counts")
    if task["data"] != data_of(exported.key, exported.kind, item):
        raise Rejected("altered_task", "its texts differ from the exported ones")
    task_ids.add(item.task)
    return item


def found_in(
    path: Path, tasks: list[dict[str, Any]], exported: Exported
) -> Iterator[Annotation | dict[str, Any]]:
    """Each annotation of a file, or why it is rejected; also rejected tasks without annotations, and drafts."""
    task_ids: set[str] = set()
    for number, task in enumerate(tasks):
        data, drafts, annotations = task.get("data"), task.get("drafts"), task["annotations"]
        name = str(data.get(ID)) if isinstance(data, dict) else ""
        example = exported.items[name].id if name in exported.items else ""
        head: dict[str, Any] = {"id": example, "file": str(path), "task": number}
        for position in range(len(drafts) if isinstance(drafts, list) else 0):
            yield {**head, "draft": position, "rule": "draft", "reason": "it was not submitted"}
        try:
            item = own(task, name, task_ids, exported)
        except Rejected as rejected:
            for position in range(len(annotations) or 1):
                yield {**head, "annotation": position, **asdict(rejected)}
            continue
        for position, raw in enumerate(annotations):
            here = {**head, "annotation": position}
            try:
                yield annotation_of(raw, item, exported.key, here)
            except Rejected as rejected:
                yield {**here, **asdict(rejected)}


def rated(exported: Exported, item: Item, value: str | int) -> Rated:
    """The annotation as a rating of the exchange; raises Rejected."""
    prompt, answer, good, best, correction = item.prompt, "", None, False, None
    if exported.kind == "better":
        if value == "equal":
            raise Rejected("tie", "neither answer is better")
        first, second = answers_of(exported.key, item)
        correction, answer = (first, second) if value == "A" else (second, first)
    elif exported.kind == "rating":
        answer, good, best = item.answers[0], liked({FIELD + "stars": value}), value == 5
    elif exported.kind == "correction":
        answer, correction = item.answers[0], str(value)
    elif exported.labels and item.answers:
        good = {each.name: each.good for each in exported.labels.labels}[str(value)]
        answer, best = item.answers[0], good is True
    elif exported.labels:  # of a text: to give the label is what is learned
        question = f"{exported.labels.question}\n\n{written_out(item.prompt)}"
        prompt, answer, best = [{"role": "user", "content": question}], str(value), True
    return Rated(item.id, ("", ""), "", prompt, answer, good, best, correction)


def scaled(kind: str, item: Item, value: str | int) -> str | int:
    """The part of a value that is compared with other annotators': for a correction, whether there is one."""
    if kind != "correction":
        return value
    return UNCHANGED if str(value).strip() == item.answers[0].strip() else CORRECTED


class Judged:
    """The result of all annotations: examples, rejects and disagreements. Each annotation is in an example or a reject."""

    def __init__(self, exported: Exported, kind: str, shares: Callable[[Example], bool]) -> None:
        self.exported, self.kind, self.shares = exported, kind, shares
        self.examples: list[Example] = []
        self.rejects: list[dict[str, Any]] = []
        self.disagreements: list[dict[str, Any]] = []
        self.units: list[list[str | int]] = []  # of what two or more annotated
        self.values: Counter[str] = Counter()
        self.used = 0  # annotations
        self.annotated: set[str] = set()
        self.annotators: set[str] = set()
        self.originals: dict[str, str] = {}

    def reject(self, each: Annotation, rule: str, reason: str) -> None:
        self.rejects.append({**each.place, "annotator": each.annotator, "rule": rule, "reason": reason})

    def last(self, annotations: list[Annotation]) -> dict[str, list[Annotation]]:
        """The last annotation of each annotator by task, except skipped ones; others are rejected."""
        lasting: dict[tuple[str, str], Annotation] = {}
        for each in sorted(annotations, key=lambda each: each.time):
            pair = each.item.task, each.annotator
            if pair in lasting:
                self.reject(
                    lasting[pair], "superseded", "the annotator's later annotation of this task counts"
                )
            lasting[pair] = each
        tasks: dict[str, list[Annotation]] = {}
        for (task, _), each in sorted(lasting.items()):
            if each.raw.get("was_cancelled"):
                self.reject(each, "skipped", "the annotator skipped it")
            else:
                tasks.setdefault(task, []).append(each)
        return tasks

    def judge(self, entries: Iterable[Annotation | dict[str, Any]]) -> None:
        """Sort the annotations of all files."""
        annotations: list[Annotation] = []
        for each in entries:
            if isinstance(each, Annotation):
                annotations.append(each)
            else:
                self.rejects.append(each)
        self.annotated = {each.item.task for each in annotations}
        self.annotators = {each.annotator for each in annotations}
        for task, task_annotations in self.last(annotations).items():
            valid: list[tuple[Annotation, str | int]] = []
            for each in task_annotations:
                try:
                    valid.append((each, self.exported.control.value(each.raw.get("result"))))
                except Rejected as rejected:
                    self.reject(each, rejected.rule, rejected.reason)
            self.task(task, valid)

    def task(self, task: str, valid: list[tuple[Annotation, str | int]]) -> None:
        """Sort the annotations of one task."""
        item = self.exported.items[task]
        scale = {each.annotator: scaled(self.exported.kind, item, value) for each, value in valid}
        self.values.update(map(str, scale.values()))
        if len(scale) > 1:
            self.units.append(list(scale.values()))
        outcomes = [(each, self.outcome(item, value)) for each, value in valid]
        differ = len(set(scale.values())) > 1
        if differ:
            self.disagreements.append({"id": item.id, "task": task, "values": scale})
        contents = {outcome if isinstance(outcome, str) else outcome.rule for _, outcome in outcomes}
        if differ and len(contents) > 1:
            for each, _ in outcomes:
                self.reject(each, "disagreement", f"annotators differ: {', '.join(map(str, scale.values()))}")
            return
        by_content: dict[str, list[Annotation]] = {}
        for each, outcome in outcomes:
            if isinstance(outcome, Rejected):
                self.reject(each, outcome.rule, outcome.reason)
            elif self.originals.setdefault(outcome, item.id) != item.id:
                self.reject(each, "duplicate", f"the same as {self.originals[outcome]}")
            else:
                by_content.setdefault(outcome, []).append(each)
        for content, agreeing in by_content.items():
            self.used += len(agreeing)
            annotation = {
                "task": task,
                "kind": self.exported.kind,
                "annotators": [each.annotator for each in agreeing],
                "time": max(each.time for each in agreeing).isoformat(),
            }
            self.examples.append({"id": item.id, "annotation": annotation, **json.loads(content)})

    def outcome(self, item: Item, value: str | int) -> str | Rejected:
        """The example of a value, as JSON, or why there is none."""
        try:
            example = KINDS[self.kind](rated(self.exported, item, value))
        except Rejected as rejected:
            return rejected
        if self.shares(example):
            return Rejected("held_out", "it is in the held-out set, or contains a part of it")
        return json.dumps(example, sort_keys=True)


def import_(arguments: argparse.Namespace) -> int:
    """Write examples, rejects, disagreements and a report into a new folder, and print the report."""
    become_owner(*filter(None, [arguments.held_out]))
    shares = held_out(arguments.held_out)
    become_owner(arguments.tasks, *arguments.annotations, arguments.out)
    exported = read_exported(arguments.tasks)
    if arguments.kind not in GIVES[exported.kind]:
        raise exits.Refusal(
            f"--kind is {arguments.kind}, but annotations by {exported.kind} only yield {' or '.join(GIVES[exported.kind])}"
        )
    if arguments.out.exists():
        raise exits.Refusal(f"--out is {arguments.out}, which exists: specify a new folder")
    read = {path: read_file(path) for path in arguments.annotations}
    judged = Judged(exported, arguments.kind, shares)
    judged.judge(each for path, (tasks, _) in read.items() for each in found_in(path, tasks, exported))
    own = exported.control
    reached = alpha(judged.units, own.scale, own.level)
    agreement = {
        "alpha": reached,
        "level": own.level,
        "tasks": len(judged.units),
        "least": arguments.least_alpha,
    }
    refuse_disagreement(judged, agreement)
    if not judged.examples:
        rules = dict(Counter(each["rule"] for each in judged.rejects))
        raise exits.Refusal(
            f"no annotation yields an example for {arguments.kind}: {rules or 'there are none'}"
        )
    report = {
        "annotation": exported.kind,
        "tasks": {"export": exported.digest, "number": len(exported.items)},
        "annotations": {str(path): digest for path, (_, digest) in read.items()},
        "annotated": len(judged.annotated),
        "used": judged.used,
        "annotators": len(judged.annotators),
        "values": dict(sorted(judged.values.items())),
        "agreement": agreement,
        "disagreements": len(judged.disagreements),
    }
    write_export(
        arguments.out,
        arguments.kind,
        judged.examples,
        judged.rejects,
        report,
        disagreements=judged.disagreements,
    )
    return exits.DONE


def refuse_disagreement(judged: Judged, agreement: dict[str, Any]) -> None:
    """Raise Refusal, with the disagreements on stdout, unless annotators agree enough, or no agreement is required."""
    reached, least, double = agreement["alpha"], agreement["least"], agreement["tasks"]
    if least is None or (reached is not None and reached >= least):
        return
    for each in judged.disagreements:
        print(json.dumps(each))
    message = f"nothing was written: Krippendorff's alpha of {double} tasks that two or more annotated is "
    if reached is None:
        why = "all have the same value" if judged.units else "there are none"
        raise exits.Refusal(
            f"{message}undefined, because {why}. Have a second person annotate overlap.json, or accept the annotations as they "
            f"are with --least-alpha none"
        )
    raise exits.Refusal(
        f"{message}{reached:.3f}, below --least-alpha {least}. Stdout lists the {len(judged.disagreements)} tasks on which they "
        "differ: settle those and improve the instructions, or lower --least-alpha"
    )
