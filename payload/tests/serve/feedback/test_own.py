"""Which records of a journal are a subject's own; without a gateway."""

from pathlib import Path

import pytest

from llmcore import ratings
from llmserve.access.identity import Identity
from llmserve.feedback import own
from llmserve.feedback.journal import append

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
    assert len(own.records(tmp_path, ADA)) == 1


def test_a_file_that_another_gateway_removes_meanwhile_has_no_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "files", lambda _: [tmp_path / "rated-20260101T00.jsonl"])
    assert own.records(tmp_path, ADA) == []
