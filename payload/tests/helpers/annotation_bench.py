"""Exports for annotators, results as Label Studio gives them back, and their import."""

import json
from pathlib import Path
from typing import Any

from llmtrain import exits
from llmtrain.cli import main

ROOT = Path(__file__).parents[3]
MEDICINES = ROOT / "docs/use/medicines"
KEY = b"the key of tests, of 32 letters."
QUESTION = "Where is the station?\n<b>Please</b> & $thanks"
LINES: dict[str, list[dict[str, Any]]] = {
    "better": [
        {"id": f"t{n}", "prompt": f"{QUESTION} {n}", "chosen": f"Left {n}", "rejected": f"Right {n}"}
        for n in range(6)
    ],
    "rating": [
        {"id": f"t{n}", "prompt": f"{QUESTION} {n}", "completion": [{"role": "assistant", "content": f"Left {n}\n"}]}
        for n in range(6)
    ],
    "correction": [
        {"id": f"t{n}", "prompt": f"车站在哪里？{n}", "completion": f"左边 {n}"}
        for n in range(6)
    ],
}  # fmt: skip
# The control's name, its object, the type of its results, and the key of a result's value.
RESULTS = {
    "better": ("better", "prompt", "choices", "choices"),
    "rating": ("rating", "answer", "rating", "rating"),
    "correction": ("correction", "answer", "textarea", "text"),
    "labels": ("label", "text", "choices", "choices"),
}


def result(kind: str, value: object) -> dict[str, Any]:
    """A result as Label Studio makes it."""
    name, of, type_, key = RESULTS[kind]
    content = value if kind == "rating" else [value]
    return {
        "from_name": name,
        "to_name": of,
        "type": type_,
        "value": {key: content},
        "id": "x7",
        "origin": "manual",
    }


def annotation(kind: str, value: object, by: int = 1, at: int = 0, **more: Any) -> dict[str, Any]:
    """An annotation as Label Studio exports it; `at` is a second."""
    time = f"2026-11-28T08:00:{at:02d}.000000Z"
    return {
        "id": 7, "completed_by": by, "result": [result(kind, value)], "was_cancelled": False, "created_at": time,
        "updated_at": time, "task": 9, "project": 3, **more,
    }  # fmt: skip


class Bench:
    """Exports and imports in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kind = ""

    def export(
        self, kind: str, lines: list[dict[str, Any]] | None = None, *more: str
    ) -> list[dict[str, Any]]:
        """The tasks of an export."""
        self.kind = kind
        source = MEDICINES / "answers.jsonl"
        if kind == "labels":
            more = ("--labels", str(MEDICINES / "labels.yaml"), *more)
        if lines or kind != "labels":
            source = self.folder / "lines.jsonl"
            source.write_text("".join(json.dumps(each) + "\n" for each in lines or LINES[kind]))
        command = ["--examples", str(source), "--kind", kind, "--out", str(self.folder / "tasks"), *more]
        assert main(["annotate", "export", *command]) == exits.DONE
        found: list[dict[str, Any]] = self.read("label-studio/tasks.json")
        return found

    def read(self, name: str) -> Any:
        return json.loads((self.folder / "tasks" / name).read_text())

    def ids(self) -> dict[str, str]:
        """Our id of each example."""
        lines = (self.folder / "tasks/items.jsonl").read_text().splitlines()
        return {each["id"]: each["task"] for each in map(json.loads, lines)}

    def take(
        self, *files: list[dict[str, Any]], gives: str, more: tuple[str, ...] = ("--least-alpha", "none")
    ) -> int:
        """Import Label Studio's exports, and return the exit code."""
        names = []
        for number, content in enumerate(files):
            path = self.folder / f"exported-{number}.json"
            path.write_text(json.dumps(content))
            names.append(str(path))
        command = ["--tasks", str(self.folder / "tasks"), "--annotations", *names, "--kind", gives, *more]
        return main(["annotate", "import", *command, "--out", str(self.folder / gives)])

    def taken(self, gives: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
        """Examples, rejects and report of an import."""
        out = self.folder / gives
        examples, rejects = (
            [json.loads(line) for line in (out / name).read_text().splitlines()]
            for name in (f"{gives}.jsonl", "rejects.jsonl")
        )
        return examples, rejects, json.loads((out / "export.json").read_text())

    def answered(self, kind: str, values: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """An export of Label Studio in which each example has these values, of annotators 1, 2 and so on."""
        found = self.export(kind)
        ids = self.ids()
        by_task = {ids[name]: given for name, given in values.items()}
        for task in found:
            own = by_task.get(task["data"]["llmkeep_id"], [])
            task["annotations"] = [annotation(kind, value, by=who) for who, value in enumerate(own, 1)]
        return found
