"""Which records of a journal are a subject's own; without a gateway."""

import asyncio
import json
import tracemalloc
from pathlib import Path

import pytest

from llmcore import ratings
from llmserve.access.identity import Identity
from llmserve.asgi import Exchange
from llmserve.cli import main
from llmserve.feedback import own
from llmserve.feedback.journal import append, forget

ADA = Identity("api_key", "0", 'ada"s', "research", ())


def record(subject: str, tenant: str, comment: str) -> ratings.Record:
    return {ratings.SUBJECT: subject, ratings.TENANT: tenant, f"{ratings.FIELD}comment": comment}


def test_a_name_in_the_text_of_others_is_not_a_subject(tmp_path: Path) -> None:
    append(
        tmp_path,
        [
            (ratings.RATED, record(ADA.subject, "research", "mine")),
            (ratings.RATED, record(ADA.subject, "sales", "of a namesake")),
            (ratings.RATED, record("bob", "research", f"of {ADA.subject}")),
        ],
    )
    assert [each[f"{ratings.FIELD}comment"] for _, each in own.records(tmp_path, ADA)] == ["mine"]


def test_torn_lines_are_passed_over(tmp_path: Path) -> None:
    append(tmp_path, [(ratings.RATED, record(ADA.subject, "research", "mine"))])
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + path.read_bytes()[:-9])
    assert len(list(own.records(tmp_path, ADA))) == 1


def test_a_file_that_another_gateway_removes_meanwhile_has_no_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "files", lambda _: [tmp_path / "rated-20260101T00.jsonl"])
    assert list(own.records(tmp_path, ADA)) == []


def test_a_name_beyond_ascii_is_found(tmp_path: Path) -> None:
    append(tmp_path, [(ratings.RATED, record("Zoë", "research", "mine"))])
    assert len(list(own.records(tmp_path, Identity("oidc", "0", "Zoë", "research", ())))) == 1


def test_records_that_are_not_shown_are_counted(tmp_path: Path) -> None:
    kinds = ratings.RATED, ratings.ASSIGNED, ratings.ENDED, ratings.REVIEWED
    append(tmp_path, [(kind, record(ADA.subject, "research", kind)) for kind in kinds])
    [(kind, _)], older, others = own.listed(tmp_path, ADA)
    assert (kind, older, others) == (ratings.RATED, 0, 3)


def test_a_journal_larger_than_the_memory_is_listed_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "MOST", 3)
    lines = [
        json.dumps(record(subject, "research", f"{number} {'x' * 20_000}")) + "\n"
        for number in range(500)
        for subject in (ADA.subject, "bob")
    ]
    path = tmp_path / f"{ratings.ANSWERED}-20260101T00.jsonl"
    path.write_text("".join(lines))
    assert path.stat().st_size > 20_000_000
    del lines
    tracemalloc.start()
    try:
        newest, older, _ = own.listed(tmp_path, ADA)
        first = [each[f"{ratings.FIELD}comment"].split()[0] for _, each in newest]
        assert (first, older) == (["499", "498", "497"], 497)
        assert forget(tmp_path, lambda each: own.is_of(each, ADA), own.name_of(ADA)) == 500
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert (len(list(ratings.read(path))), list(own.records(tmp_path, ADA))) == (500, [])


def test_exports_can_be_cleaned_of_what_a_subject_has_deleted(tmp_path: Path) -> None:
    folder, ids = tmp_path / "journal", tmp_path / "ids"
    folder.mkdir()
    exchange = Exchange(b"id", b"trace", False, 0.0, identity=ADA)
    of_others = [record("bob", "research", "x"), record(ADA.subject, "sales", "x")]
    for number, each in enumerate([record(ADA.subject, "research", "secret"), *of_others]):
        append(folder, [(ratings.RATED, each | {ratings.TRANSACTION: f"{number:016x}"})])
    records = own.OwnRecords(folder, None)
    for removed in 1, 0:  # the second time, the first one's note stays
        told = asyncio.run(records.forget(exchange))
        assert (told.removed, told.left) == (removed, 0)
    [note] = [path.read_text() for path in ratings.files(folder, ratings.FORGOTTEN)]
    assert "secret" not in note
    command = ["feedback", "forget", "--subject", ADA.subject, "--tenant", "research"]
    assert main([*command, "--folder", str(folder), "--ids", str(ids)]) == 0
    assert ids.read_text() == f"{0:016x}\n"
    assert ratings.files(folder, ratings.FORGOTTEN) == [], "the ids go with the rest"
