"""Logstash's pipeline file, run as far as the estate's pipeline goes. What is not known here is refused, never passed over."""

import copy
import json
import re
import uuid
from pathlib import Path
from typing import Any

from logstash_pipeline_parser import Pipeline

Event = dict[str, Any]
Plugin = tuple[str, dict[str, Any]]

TLS = {"ssl_enabled", "ssl_supported_protocols", "ssl_certificate", "ssl_key", "ssl_certificate_authorities"}
KNOWN = {
    "beats": TLS | {"host", "port", "ssl_client_authentication", "enrich", "ecs_compatibility"},
    "mutate": {"remove_field", "add_field"},
    "translate": {"source", "target", "dictionary_path", "refresh_interval"},
    "uuid": {"target"},
    "drop": {"id"},
    "elasticsearch": TLS
    | {"id", "hosts", "api_key", "data_stream", "action", "index", "document_id", "manage_template", "ilm_enabled"}
    | {"ecs_compatibility", "silence_errors_in_log", "ssl_verification_mode"},
}  # fmt: skip


class Unknown(Exception):
    """A plugin, option or condition that this stand-in does not have."""


def reference(name: str) -> list[str]:
    """[a][b] or name, as its parts."""
    return re.findall(r"\[([^\[\]]+)\]", name) or [name]


def value(event: Event, name: str) -> Any:
    found: Any = event
    for part in reference(name):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def put(event: Event, name: str, new: Any) -> None:
    *folders, last = reference(name)
    for part in folders:
        if not isinstance(event.get(part), dict):
            event[part] = {}
        event = event[part]
    event[last] = new


def remove(event: Event, name: str) -> None:
    *folders, last = reference(name)
    for part in folders:
        event = event.get(part) if isinstance(event, dict) else None  # type: ignore[assignment]
    if isinstance(event, dict):
        event.pop(last, None)


def text(event: Event, template: str) -> str:
    """With the event's values in place of %{references}; one that has none stays."""

    def shown(match: re.Match[str]) -> str:
        found = value(event, match[1])
        if found is None:
            return match[0]
        if isinstance(found, list):
            return ",".join(map(str, found))
        return found if isinstance(found, str) else json.dumps(found)

    return re.sub(r"%\{([^{}]+)\}", shown, template)


def operand(event: Event, word: Any) -> Any:
    return value(event, word) if isinstance(word, str) and word.startswith("[") else word


def holds(event: Event, condition: list[Any]) -> bool:
    """One comparison, or several that are all joined by the same word."""
    if len(condition) == 1 and isinstance(condition[0], list):
        return holds(event, condition[0])
    joined = [word for word in condition if word in ("and", "or")]
    if joined:
        if len(set(joined)) > 1:
            raise Unknown(f"and with or: {condition}")
        results = [holds(event, part) for part in condition if part not in joined]
        return all(results) if joined[0] == "and" else any(results)
    match condition:
        case ["!", name]:
            return operand(event, name) in (None, False)
        case [left, "==", right]:
            return bool(operand(event, left) == operand(event, right))
        case [left, "!=", right]:
            return bool(operand(event, left) != operand(event, right))
        case [left, "in", list(right)]:
            return operand(event, left) in right
        case [left, "not", "in", list(right)]:
            return operand(event, left) not in right
    raise Unknown(f"the condition {condition}")


def options(node: list[Any]) -> Plugin:
    name, given = node
    found = {key: values[0] for key, values in given}
    if name not in KNOWN or found.keys() - KNOWN[name]:
        raise Unknown(f"{name} with {sorted(found.keys() - KNOWN.get(name, set()))}")
    return name, found


def known(steps: list[Any]) -> None:
    """Raises Unknown before anything comes."""
    for step in steps:
        if step[0] == "if":
            *condition, [body] = step[1]
            holds({}, condition)
            known(body)
        else:
            options(step)


class Running:
    """A pipeline with its counters."""

    def __init__(self, source: str, folder: Path) -> None:
        """FOLDER: where /etc/logstash is."""
        sections = dict(Pipeline(source).parse())
        if sorted(sections) != ["filter", "input", "output"]:
            raise Unknown(f"sections {sorted(sections)}")
        (name, self.beats), *more = [options(node) for node in sections["input"]]
        if name != "beats" or more or self.beats["enrich"] != ["ssl_peer_metadata"]:
            raise Unknown(f"inputs {sections['input']}")
        (name, self.elasticsearch), *more = [options(node) for node in sections["output"]]
        if name != "elasticsearch" or more or self.elasticsearch["action"] != "create":
            raise Unknown(f"outputs {sections['output']}")
        self.folder = folder
        self.filters: list[Any] = sections["filter"]
        self.dropped: dict[str, int] = {}
        known(self.filters)

    def filtered(self, event: Event, subject: str) -> Event | None:
        """What is left of an event of the holder of a certificate; None where it is dropped."""
        event = copy.deepcopy(event) | {"@version": "1"}
        event.setdefault("@metadata", {})["tls_peer"] = {"status": "verified", "subject": subject}
        return event if self.passed(event, self.filters) else None

    def passed(self, event: Event, steps: list[Any]) -> bool:
        for step in steps:
            if step[0] == "if":
                *condition, [body] = step[1]
                if holds(event, condition) and not self.passed(event, body):
                    return False
            elif not self.applied(event, *options(step)):
                return False
        return True

    def applied(self, event: Event, name: str, given: dict[str, Any]) -> bool:
        """Apply one filter; False where the event is dropped."""
        if name == "drop":
            self.dropped[given["id"]] = self.dropped.get(given["id"], 0) + 1
            return False
        if name == "uuid" and value(event, given["target"]) is None:
            put(event, given["target"], str(uuid.uuid4()))
        if name == "translate" and value(event, given["target"]) is None:
            table = json.loads((self.folder / Path(given["dictionary_path"]).name).read_text())
            if value(event, given["source"]) in table:
                put(event, given["target"], table[value(event, given["source"])])
        if name == "mutate":
            for field, (template,) in given.get("add_field", []):
                # A field that is there becomes a list of both.
                there = value(event, field)
                put(event, field, text(event, template) if there is None else [there, text(event, template)])
            for field in given.get("remove_field", []):
                remove(event, field)
        return True

    def action(self, event: Event) -> tuple[dict[str, Any], Event]:
        """What the output asks Elasticsearch for: the action with the stream and the id, and the document."""
        given = self.elasticsearch
        where = {"_index": text(event, given["index"]), "_id": text(event, given["document_id"])}
        return {"create": where}, {key: part for key, part in event.items() if key != "@metadata"}
