"""What of a host's record its program ships, and what the control node can tell from the copy."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from audit_records import NAME, SEED, event, record
from plugin_modules import ROOT

from llmkeep.record.shipped import Line, check, kept_heads, line, removed_up_to, verify
from llmproof import retention
from llmproof.chain import Chain
from llmproof.heads import Head, Tree

PROGRAM = ROOT / "roles/filebeat/files/audit_ship.py"
NOW = datetime.now(UTC)
PROMPT = "canary-in-a-record"


def ship(folder: Path, state: Path) -> list[str]:
    """The lines of one run of the program."""
    done = subprocess.run(
        [sys.executable, PROGRAM, folder, state],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    return done.stdout.splitlines()


def copy(said: list[str]) -> list[Line]:
    """Lines as the control node gets them, from documents as Filebeat makes them."""
    documents = []
    for each in map(json.loads, said):
        audit = {
            name: each[f"llmkeep.audit.{name}"]
            for name in ("leaf", "record")
            if f"llmkeep.audit.{name}" in each
        }
        documents.append({"event": {"sequence": each["event.sequence"]}, "llmkeep": {"audit": audit}})
    return [line(document) for document in documents]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of 60 lines in several files, one of them with a prompt, and a head after each ten."""
    folder = record(tmp_path_factory.mktemp("record") / "record", 50, head_each=10, rotate=5000)
    with Chain(folder, SEED, rotate=5000) as chain:
        chain.append([event(50) | {"llmkeep.prompt.text": PROMPT}])
        chain.append([event(51 + number) for number in range(9)])
        chain.sign()
    return folder


@pytest.fixture(scope="module")
def heads(folder: Path) -> list[Head]:
    return kept_heads((folder / "heads").read_bytes(), (folder / "verifier").read_text())


@pytest.fixture(scope="module")
def lines(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    return copy(ship(folder, tmp_path_factory.mktemp("state") / "last"))


def test_the_copy_of_a_good_record_is_proved_up_to_its_last_head(
    lines: list[Line], heads: list[Head]
) -> None:
    found = verify(lines, heads, NOW)
    assert found.findings == []
    assert (found.first, found.last, found.records, found.heads) == (1, 60, 60, len(heads))


def test_a_line_with_a_field_that_is_not_named_is_shipped_by_its_leaf_alone(
    folder: Path, tmp_path: Path, lines: list[Line], heads: list[Head]
) -> None:
    said = ship(folder, tmp_path / "last")
    assert PROMPT not in "\n".join(said)
    assert [each.sequence for each in lines if each.whole is None] == [51]
    assert verify(lines, heads, NOW).withheld == 1


def test_each_line_is_shipped_once_and_a_lost_state_ships_them_again(
    folder: Path, tmp_path: Path, heads: list[Head]
) -> None:
    state = tmp_path / "last"
    first = ship(folder, state)
    assert len(first) == 60
    assert ship(folder, state) == []
    state.unlink()
    twice = sorted(copy(first + ship(folder, state)), key=lambda each: each.sequence)
    found = verify(twice, heads, NOW)
    assert (found.records, found.duplicates, found.findings) == (60, 60, [])


def test_missing_lines_are_named(lines: list[Line], heads: list[Head]) -> None:
    found = verify([each for each in lines if not 20 < each.sequence < 24], heads, NOW)
    assert found.findings == ["records 21 to 23 are missing"]
    assert found.heads == 2


def test_a_line_that_was_changed_is_named_also_where_its_leaf_was_changed_with_it(
    lines: list[Line], heads: list[Head]
) -> None:
    whole = lines[4].whole
    assert whole
    changed = whole.replace(b"event", b"evenT", 1)
    alone = [*lines[:4], dataclasses.replace(lines[4], whole=changed), *lines[5:]]
    assert "record 5 does not match its leaf: it was changed" in verify(alone, heads, NOW).findings
    leaf = hashlib.sha256(b"\0" + changed).digest()
    both = [*lines[:4], Line(5, leaf, changed), *lines[5:]]
    found = verify(both, heads, NOW).findings
    assert "record 5: changed: its own hash does not match" in found
    assert any("the witness's head over the first 10 records does not match" in each for each in found)
    withheld = [*lines[:4], Line(5, leaf, None), *lines[5:]]
    assert any(
        "head over the first 10 records does not match" in each
        for each in verify(withheld, heads, NOW).findings
    )


def test_an_end_that_does_not_come_is_named_once_its_head_is_old(
    lines: list[Line], heads: list[Head]
) -> None:
    assert verify(lines[:55], heads, NOW).findings == []
    [finding] = verify(lines[:55], heads, NOW + timedelta(hours=1)).findings
    assert finding.startswith("records 56 to 60 are missing")


def test_two_different_lines_of_one_number_are_a_forgery(lines: list[Line], heads: list[Head]) -> None:
    twice = [*lines[:7], dataclasses.replace(lines[6], leaf=bytes(32)), *lines[7:]]
    assert verify(twice, heads, NOW).findings == [
        "record 7 exists twice with different content: one was forged"
    ]


def test_without_its_first_lines_a_copy_is_proved_by_links_alone_and_wants_a_declaration(
    lines: list[Line], heads: list[Head], tmp_path: Path
) -> None:
    found = verify(lines[10:], heads, NOW)
    assert (found.first, found.heads) == (11, 0)
    assert found.findings == ["records 1 to 10 are missing, and no record declares them removed by retention"]
    with Chain(tmp_path / "record", SEED, NAME) as chain:
        for _ in range(12):
            chain.append([event(1)])
        peaks = Tree(10, [bytes(32), bytes(32)])
        chain.write(
            [json.dumps(retention.declaration(peaks, "0" * 64, "old"), separators=(",", ":"))[1:-1].encode()]
        )
    kept = copy(ship(tmp_path / "record", tmp_path / "last"))[10:]
    assert all(each.whole for each in kept)
    assert verify(kept, [], NOW).findings == []


def test_first_lines_that_elasticsearch_removed_by_age_are_said_and_no_finding(
    lines: list[Line], heads: list[Head]
) -> None:
    old = [dataclasses.replace(head, time="2020-01-01T00:00:00Z") for head in heads if head.size <= 20]
    young = [head for head in heads if head.size > 20]
    found = verify(lines[15:], old + young, NOW)
    assert found.findings == []
    [note] = found.notes
    assert note.startswith("records 1 to 15 are absent: they were signed more than 180 days ago")
    # Records 21 to 25 are too young for that.
    found = verify(lines[25:], old + young, NOW)
    assert found.findings == [
        "records 21 to 25 are missing, and no record declares them removed by retention"
    ]
    # A quiet host, of whose record nothing is left.
    assert verify([], old, NOW).findings == []
    assert verify(lines[:15], old, NOW).findings[0].startswith("records 16 to 20 are missing")


def test_a_line_that_is_none_is_a_finding_of_its_host_and_the_others_are_checked(
    folder: Path, lines: list[Line]
) -> None:
    documents = [
        {
            "event": {"sequence": each.sequence},
            "llmkeep": {"audit": {"leaf": each.leaf.hex()} | ({"record": each.whole.decode()} if each.whole else {})},
        }
        for each in lines
    ]  # fmt: skip
    bad: dict[str, Any] = {"event": {"sequence": "x"}, "llmkeep": {"audit": {"leaf": "zz"}}}

    class Server:
        """A stand-in for the client: llm1's stream has a line that is none."""

        def search(self, index: str, **_: Any) -> dict[str, Any]:
            said = documents + ([bad] if index.endswith("-llm1") else [])
            return {"hits": {"hits": [{"_source": each} for each in said]}}

    kept = ((folder / "heads").read_bytes(), (folder / "verifier").read_text())
    found = check(Server(), {"llm1": kept, "llm2": kept, "llm3": (b"x" + kept[0][1:], kept[1])})
    [finding] = found["llm1"].findings
    assert finding.startswith("a line of the record is invalid (")
    assert [each.records for each in found.values()] == [60, 60, 0]
    assert found["llm2"].findings == []
    assert "the witness's copy is invalid" in found["llm3"].findings[0]


def test_a_declaration_that_is_no_number_declares_nothing() -> None:
    assert removed_up_to(b'{"llmkeep.audit.removed.last":"many"}') == 0
    assert removed_up_to(b"none") == 0
    assert removed_up_to(b'{"llmkeep.audit.removed.last":10}') == 10
