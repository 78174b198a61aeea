"""Which records of a journal are a subject's own; without a gateway."""

import asyncio
import json
import tracemalloc
from pathlib import Path

import pytest

from llmcore import ratings
from llmserve.access.identity import Identity
from llmserve.api.errors import ApiError
from llmserve.asgi import Exchange
from llmserve.cli import main
from llmserve.feedback import index, own
from llmserve.feedback.journal import append, forget

ADA = Identity("api_key", "0", 'ada"s', "research", ())
BOB = Identity("api_key", "0", "bob", "research", ())


def record(subject: str, tenant: str, comment: str) -> ratings.Record:
    return {ratings.SUBJECT: subject, ratings.TENANT: tenant, f"{ratings.FIELD}comment": comment}


def listed(folder: Path, identity: Identity = ADA, before: str = "") -> list[str]:
    """The comments that a subject sees."""
    return [str(each[f"{ratings.FIELD}comment"]) for _, each in own.listed(folder, identity, before)[0]]


def test_a_name_in_the_text_of_others_is_not_a_subject(tmp_path: Path) -> None:
    append(
        tmp_path,
        [
            (ratings.RATED, record(ADA.subject, "research", "mine")),
            (ratings.RATED, record(ADA.subject, "sales", "of a namesake")),
            (ratings.RATED, record("bob", "research", f"of {ADA.subject}")),
        ],
    )
    assert listed(tmp_path) == ["mine"]


def test_a_torn_line_is_passed_over_and_goes_when_anyone_deletes(tmp_path: Path) -> None:
    append(tmp_path, [(ratings.RATED, record(ADA.subject, "research", "mine"))])
    [path] = ratings.files(tmp_path)
    path.write_bytes(path.read_bytes() + path.read_bytes()[:-9])
    assert listed(tmp_path) == ["mine"]
    assert own.forget(tmp_path, BOB).removed == 0
    assert path.read_bytes().count(b"mine") == 1
    append(tmp_path, [(ratings.RATED, record(ADA.subject, "research", "later"))])
    assert listed(tmp_path) == ["later", "mine"]


def test_a_file_that_another_gateway_removes_has_no_records(tmp_path: Path) -> None:
    append(tmp_path, [(ratings.RATED, record(ADA.subject, "research", "mine"))])
    assert listed(tmp_path) == ["mine"]
    ratings.files(tmp_path)[0].unlink()
    assert listed(tmp_path) == []


def test_a_line_that_moved_in_its_file_is_found_at_its_new_place(tmp_path: Path) -> None:
    append(tmp_path, [(ratings.RATED, record(who, "research", who)) for who in ("bob", ADA.subject)])
    assert listed(tmp_path) == [ADA.subject]
    forget(tmp_path, lambda each: each[ratings.SUBJECT] == "bob")
    assert listed(tmp_path) == [ADA.subject]


def test_a_broken_index_is_made_anew(tmp_path: Path) -> None:
    append(tmp_path, [(ratings.RATED, record(ADA.subject, "research", "mine"))])
    (tmp_path / index.NAME).write_bytes(b"no database at all" * 500)
    with pytest.raises(OSError, match="is being rebuilt"):
        listed(tmp_path)
    assert listed(tmp_path) == ["mine"]


def test_the_index_has_no_name_and_no_text(tmp_path: Path) -> None:
    append(tmp_path, [(ratings.RATED, record("ada@corp", "research", "a comment"))])
    listed(tmp_path)
    content = b"".join(path.read_bytes() for path in tmp_path.glob(f"{index.NAME}*"))
    assert content
    assert not [each for each in (b"ada@corp", b"research", b"a comment") if each in content]


def test_pages_go_back_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "MOST", 2)
    at = "2026-12-01T00:00:0{}.000+00:00"
    for number in range(5):
        append(
            tmp_path,
            [
                (
                    ratings.RATED,
                    record(ADA.subject, "research", str(number)) | {ratings.TIME: at.format(number)},
                )
            ],
        )
    assert listed(tmp_path) == ["4", "3"]
    assert listed(tmp_path, before=at.format(3)) == ["2", "1"]
    assert own.listed(tmp_path, ADA, at.format(3))[1:] == (1, 0)


def test_a_name_beyond_ascii_is_found(tmp_path: Path) -> None:
    append(tmp_path, [(ratings.RATED, record("Zoë", "research", "mine"))])
    assert listed(tmp_path, Identity("oidc", "0", "Zoë", "research", ())) == ["mine"]


def test_records_that_are_not_shown_are_counted(tmp_path: Path) -> None:
    kinds = ratings.RATED, ratings.ASSIGNED, ratings.ENDED, ratings.REVIEWED
    append(tmp_path, [(kind, record(ADA.subject, "research", kind)) for kind in kinds])
    [(kind, _)], older, others = own.listed(tmp_path, ADA)
    assert (kind, older, others) == (ratings.RATED, 0, 3)


def test_a_second_request_of_a_subject_that_waits_is_refused_and_another_subjects_is_answered(
    tmp_path: Path,
) -> None:
    """As long as the first one is not answered."""

    async def scenario() -> None:
        kept = own.OwnRecords(tmp_path, None)
        async with kept.turn(ADA):
            with pytest.raises(ApiError, match="feedback_busy") as refused:
                async with kept.turn(ADA):
                    pass
            assert refused.value.status == 429
            waiting = asyncio.create_task(kept.forget(Exchange(b"i", b"t", False, 0.0, identity=BOB)))
            await asyncio.sleep(0)
        assert (await waiting).removed == 0

    asyncio.run(scenario())


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
        assert own.forget(tmp_path, ADA).removed == 500
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert (len(list(ratings.read(path))), listed(tmp_path)) == (500, [])


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
