"""Transcripts of NVML's answers to the health reader: one recorded on a real GPU defines the behaviour of the stand-in.

    nvml_transcript.py record FILE     one reading, one wait for events; each call, its arguments and its answer, as JSON
    nvml_transcript.py compare FILE    the same on the library at hand (the stand-in): what it answers otherwise

The comparison covers which calls have an answer, which error, and its type and fields; values are the GPU's own. Serial numbers
and UUIDs are not recorded. `compare` prints one difference per line. Exit code 0, 1 if there are differences, or 2 without a
library.
"""

import json
import sys
from collections.abc import Callable
from inspect import getmembers, isfunction
from pathlib import Path
from typing import Any

import pynvml
from llmgpu import nvml

Call = dict[str, Any]


def plain(value: Any) -> Any:
    """An argument or an answer as JSON: structures by field, handles by the name of their type."""
    if value is None or isinstance(value, int | float | str):
        return "GPU-recorded" if str(value).startswith("GPU-") else value
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    fields = getattr(value, "_fields_", None)
    if fields and not hasattr(value, "contents"):
        return {name: plain(getattr(value, name)) for name, *_ in fields}
    return f"<{type(value).__name__}>"


def noting(name: str, function: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    """`function`, with each call noted."""

    def call(*arguments: Any) -> Any:
        noted: Call = {"call": name, "arguments": plain(arguments)}
        calls.append(noted)
        try:
            answer = function(*arguments)
        except pynvml.NVMLError as error:
            noted["error"] = type(error).__name__
            raise
        noted["answer"] = plain(answer)
        return answer

    return call


def record() -> list[Call]:
    """All calls of one reading; raises NvmlError without a library or a driver."""
    calls: list[Call] = []
    for name, function in getmembers(pynvml, isfunction):
        if name.startswith("nvml"):
            setattr(pynvml, name, noting(name, function, calls))
    reader = nvml.Nvml()
    reader.open()
    reader.read()
    reader.wait(0.1)
    reader.close()
    return calls


def shape(value: Any) -> Any:
    """Of an answer: types, and fields of structures."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return value if str(value).startswith("<") else type(value).__name__


def answers(calls: list[Call]) -> dict[str, set[str]]:
    """By call and its arguments that are no handles: how it was answered, whichever GPU was asked."""
    found: dict[str, set[str]] = {}
    for each in calls:
        arguments = [one for one in each["arguments"] if not str(one).startswith("<")]
        if each["call"] == "nvmlDeviceGetHandleByIndex":
            arguments = []
        told = each.get("error") or json.dumps(shape(each["answer"]))
        found.setdefault(f"{each['call']}({', '.join(map(str, arguments))})", set()).add(told)
    return found


def differences(recorded: list[Call], here: list[Call]) -> list[str]:
    """What is answered otherwise, a line each."""
    card, library = answers(recorded), answers(here)
    return [
        f"{call}: recorded {sorted(card.get(call, ['no such call']))}, here {sorted(library.get(call, ['no such call']))}"
        for call in sorted(card.keys() | library.keys())
        if card.get(call) != library.get(call)
    ]


def main(verb: str, file: Path) -> int:
    """Record or compare."""
    try:
        calls = record()
    except nvml.NvmlError as error:
        print(f"nvml_transcript: {error}", file=sys.stderr)
        return 2
    if verb == "record":
        file.write_text(json.dumps(calls, indent=1) + "\n")
        return 0
    found = differences(json.loads(file.read_text()), calls)
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
