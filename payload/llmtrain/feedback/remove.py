"""`llm-train feedback remove`: removes the examples of forgotten exchanges from exports."""

import argparse
import hashlib
import json
from io import StringIO
from pathlib import Path
from typing import Any

from llmcore.files import replacing
from llmcore.privileges import become_owner
from llmtrain import exits
from llmtrain.feedback.export import KINDS

REPORT, REJECTS = "export.json", "rejects.jsonl"


def written(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def without(path: Path, ids: set[str]) -> tuple[str, int]:
    """The lines of a file without those of these exchanges, and the number of removed lines."""
    lines = list(StringIO(path.read_text(encoding="utf-8")))  # splitlines would split at U+2028 in a text
    remaining = [line for line in lines if json.loads(line)["id"] not in ids]
    return "".join(remaining), len(lines) - len(remaining)


def report_of(folder: Path) -> dict[str, Any]:
    """The report of an export; raises Refusal if the folder has none."""
    try:
        report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if report["kind"] not in KINDS:
            raise ValueError(f"its kind is {report['kind']!r}")
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise exits.Refusal(
            f"{folder} has no {REPORT} of an export ({error}): specify folders written by `llm-train feedback export`, and pack "
            f"rows again from them"
        ) from error
    return report


def from_export(folder: Path, ids: set[str]) -> int:
    """Remove the lines of these exchanges from an export, or an import of annotations, and return their number.

    The lists are replaced before the report. If this is killed in between, the report's digest is wrong until it runs again.
    """
    report = report_of(folder)
    lists = {path.name: without(path, ids) for path in folder.glob("*.jsonl")}
    for name, (text, _) in lists.items():
        written(folder / name, text)
    data = lists[f"{report['kind']}.jsonl"][0]
    report["examples"] = data.count("\n")
    report["rejected"] = dict(sorted(counted(lists[REJECTS][0]).items()))
    report["sha256"] = hashlib.sha256(data.encode()).hexdigest()
    written(folder / REPORT, json.dumps(report, indent=1) + "\n")
    return sum(removed for _, removed in lists.values())


def counted(rejects: str) -> dict[str, int]:
    """Rejects by rule."""
    rules = [json.loads(line)["rule"] for line in StringIO(rejects)]
    return {rule: rules.count(rule) for rule in rules}


def remove(arguments: argparse.Namespace) -> int:
    """Remove the exchanges from each export, and print the number of lines left."""
    try:
        ids = set(arguments.ids.read_text("ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise exits.Refusal(
            f"--ids: {arguments.ids} cannot be read ({error}): specify the file written by `llm-serve feedback forget --ids`"
        ) from error
    become_owner(*arguments.exports)
    for folder in arguments.exports:
        report_of(folder)
    for folder in arguments.exports:
        removed = from_export(folder, ids)
        remaining = sum(without(path, ids)[1] for path in folder.glob("*.jsonl"))
        print(f"removed {removed} lines from {folder}; {remaining} are left")
    return exits.DONE
