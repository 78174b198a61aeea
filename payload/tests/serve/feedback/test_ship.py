"""Ratings on their way from the journal to Elasticsearch, by its official client: none lost, none twice, and out again.

The server is a stand-in that takes bulk requests, since Elasticsearch itself cannot be told to refuse the third document. The
estate's own is asked in tests/lab/containers/test_logs.py.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from bulk_index import Document, Index, indexing
from elasticsearch import Elasticsearch
from lost_power import Disk

from llmcore.ratings import ANSWERED, RATED, files, read
from llmserve.cli import main
from llmserve.feedback import journal, ship
from llmserve.feedback.documents import HISTORY, LATEST

KILLED = """
import os, signal, sys
from pathlib import Path
from threading import Thread
from elasticsearch import Elasticsearch
from llmserve.feedback import ship
ship.connected = lambda url, _: Elasticsearch(url)
ship.put_positions = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
ship.ship(Path(sys.argv[1]), sys.argv[2], Path())
"""


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with indexing() as server:
        monkeypatch.setattr(ship, "connected", lambda url, _: Elasticsearch(url, max_retries=0))
        monkeypatch.setattr(ship, "BACKOFF_SECONDS", 0.001)
        yield server


def rating(number: int, second: int = 0, subject: str = "ada", **fields: object) -> Document:
    given = {f"llmkeep.feedback.{name}": value for name, value in ({"thumb": "up"} | fields).items()}
    return {
        "@timestamp": f"2026-11-28T10:00:{second:02}.000+00:00",
        "transaction.id": f"{number:016x}",
        "event.created": "2026-11-28T09:59:00+00:00",
        "user.id": subject,
        "organization.id": "research",
        **given,
    }


def rate(folder: Path, *records: Document) -> None:
    journal.append(folder, [(RATED, record) for record in records])


def shipped(folder: Path, index: Index) -> tuple[int, int, int]:
    done = ship.ship(folder, index.url, Path())
    return done.sent, done.removed, done.refused


def thumbs(index: Index) -> dict[str, str]:
    """The thumb of each exchange, as the index has it."""
    return {name: source["llmkeep.feedback.thumb"] for name, source in index.of(LATEST).items()}


def forget(folder: Path, wait: str = "0") -> int:
    given = ["--subject", "ada", "--tenant", "research", "--folder", str(folder), "--wait", wait]
    return main(["feedback", "forget", *given])


def test_a_rating_is_sent_with_its_model_and_without_text_and_subject(tmp_path: Path, index: Index) -> None:
    rate(tmp_path, rating(1, reason="wrong", comment="a canary", correction="a canary"))
    answer = {"transaction.id": f"{1:016x}", "llm.model": "echo", "llmkeep.feedback.answer": "a canary"}
    (tmp_path / f"{ANSWERED}-20261128T10.jsonl").write_text(json.dumps(answer) + "\n")
    assert shipped(tmp_path, index) == (1, 0, 0)
    [document] = index.of(LATEST).values()
    assert document == {
        "@timestamp": "2026-11-28T10:00:00.000+00:00",
        "transaction.id": f"{1:016x}",
        "event.created": "2026-11-28T09:59:00+00:00",
        "organization.id": "research",
        "llmkeep.feedback.thumb": "up",
        "llmkeep.feedback.reason": "wrong",
        "llmkeep.feedback.corrected": True,
        "llm.model": "echo",
    }
    assert list(index.of(HISTORY).values()) == [document]


def test_a_correction_whose_text_was_not_kept_is_told_as_one(tmp_path: Path, index: Index) -> None:
    rate(tmp_path, rating(1, corrected=True), rating(2))
    assert shipped(tmp_path, index) == (2, 0, 0)
    told = [source["llmkeep.feedback.corrected"] for _, source in sorted(index.of(LATEST).items())]
    assert told == [True, False]


def test_the_last_rating_counts_and_the_others_are_history(tmp_path: Path, index: Index) -> None:
    rate(tmp_path, rating(1, 0), rating(1, 1, thumb="down"))
    shipped(tmp_path, index)
    rate(tmp_path, rating(1, 2, thumb="up"), rating(2, 2))
    assert shipped(tmp_path, index) == (2, 0, 0)
    assert thumbs(index) == {f"{1:016x}": "up", f"{2:016x}": "up"}
    assert len(index.of(HISTORY)) == 4


def test_an_older_rating_that_comes_later_from_another_host_does_not_count(
    tmp_path: Path, index: Index
) -> None:
    for host, record in ("llm1", rating(1, 9, thumb="down")), ("llm2", rating(1, 3)):
        (tmp_path / host).mkdir()
        rate(tmp_path / host, record)
        assert shipped(tmp_path / host, index) == (1, 0, 0)
    assert thumbs(index) == {f"{1:016x}": "down"}
    assert len(index.of(HISTORY)) == 2


def test_what_was_sent_is_not_sent_again_and_without_the_note_changes_nothing(
    tmp_path: Path, index: Index
) -> None:
    rate(tmp_path, *(rating(number) for number in range(20)))
    assert shipped(tmp_path, index) == (20, 0, 0)
    before, requests = dict(index.documents), index.requests
    assert shipped(tmp_path, index) == (0, 0, 0)
    assert index.requests == requests, "Elasticsearch is not even asked"
    (tmp_path / "shipping/positions.json").write_text("{torn")
    assert shipped(tmp_path, index) == (20, 0, 0)
    assert index.documents == before


def test_with_another_key_all_is_sent_again_since_elasticsearch_may_have_lost_it(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, key = tmp_path / "journal", tmp_path / ship.KEY
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    key.write_text("first:a secret")
    rate(folder, rating(1), rating(2))
    assert shipped(folder, index) == (2, 0, 0)
    assert shipped(folder, index) == (0, 0, 0)
    before = dict(index.documents)
    index.documents.clear()
    key.write_text("second:a secret")
    assert shipped(folder, index) == (2, 0, 0)
    assert index.documents == before
    assert shipped(folder, index) == (0, 0, 0)
    assert not [path for path in folder.rglob("*") if path.is_file() and "secret" in path.read_text()]


def test_a_file_that_is_removed_after_it_was_listed_holds_nothing_up(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / f"{RATED}-20260101T00.jsonl"
    rate(tmp_path, rating(1))
    listed = [gone, *files(tmp_path)]
    monkeypatch.setattr(ship, "files", lambda *_: listed)
    assert shipped(tmp_path, index) == (1, 0, 0)
    assert not ship.news(tmp_path)
    assert list(read(gone)) == []


def test_one_that_is_killed_after_it_was_acknowledged_sends_again_and_nothing_is_there_twice(
    tmp_path: Path, index: Index
) -> None:
    rate(tmp_path, *(rating(number) for number in range(5)))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), index.url], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(index.of(LATEST)) == 5
    assert shipped(tmp_path, index) == (5, 0, 0)
    assert (len(index.of(LATEST)), len(index.of(HISTORY))) == (5, 5)


@pytest.mark.parametrize("status", [401, 403, 503])
def test_while_elasticsearch_does_not_take_ratings_they_stay_in_the_journal(
    tmp_path: Path, index: Index, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rate(tmp_path, rating(1))
    index.away = [status] * 8
    given = ["--folder", str(tmp_path), "--url", index.url]
    assert main(["feedback", "ship", *given]) == 1
    assert "they stay in the journal and will be sent again" in capsys.readouterr().err
    index.away = []
    assert main(["feedback", "ship", *given]) == 0
    assert capsys.readouterr().out == "sent 1 ratings, deleted 0\n"
    assert len(index.of(LATEST)) == 1


def test_a_server_that_is_not_there_is_named_with_what_to_do(tmp_path: Path, index: Index) -> None:
    rate(tmp_path, rating(1))
    with pytest.raises(ship.AwayError, match=r"See\s+elasticsearch.service on the search host"):
        ship.ship(tmp_path, "http://127.0.0.1:1", Path())
    assert shipped(tmp_path, index) == (1, 0, 0)


def test_without_a_key_it_says_what_makes_one(tmp_path: Path) -> None:
    rate(tmp_path, rating(1))
    with pytest.raises(ship.AwayError, match=r"run site\.yml for this host with the tag filebeat"):
        ship.ship(tmp_path, "https://search.internal:9200", tmp_path)


def test_documents_that_have_no_room_are_sent_again_at_once(tmp_path: Path, index: Index) -> None:
    rate(tmp_path, rating(1), rating(2))
    index.away = [429]
    index.refused = {f"{2:016x}": [429, 429]}
    assert shipped(tmp_path, index) == (2, 0, 0)
    assert len(index.of(LATEST)) == 2


def test_documents_that_have_no_room_for_long_wait_for_the_next_run(tmp_path: Path, index: Index) -> None:
    rate(tmp_path, rating(1), rating(2))
    index.refused = {f"{1:016x}": [429] * 4}
    with pytest.raises(ship.AwayError, match="429"):
        shipped(tmp_path, index)
    assert shipped(tmp_path, index) == (2, 0, 0)
    assert (len(index.of(LATEST)), len(index.of(HISTORY))) == (2, 2)


def test_a_document_that_is_refused_for_good_is_told_once_and_holds_no_other_up(
    tmp_path: Path, index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    rate(tmp_path, *(rating(number) for number in range(3)))
    index.refused = {f"{1:016x}": [400]}
    assert shipped(tmp_path, index) == (3, 0, 1)
    assert len(index.of(LATEST)) == 2
    [told] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert told.__dict__["fields"] == {
        "documents": 1,
        "first": f"index of {1:016x} in llmkeep-ratings: 400 strange_exception",
    }
    assert shipped(tmp_path, index) == (0, 0, 0)


def test_a_torn_line_and_one_that_is_no_rating_hide_no_other(tmp_path: Path, index: Index) -> None:
    rate(tmp_path, rating(1))
    [path] = files(tmp_path, RATED)
    with path.open("ab") as file:
        file.write(b'[1]\n{"transaction.id": "x"}\n{"transaction.id": "to')
    assert shipped(tmp_path, index) == (1, 0, 0)
    rate(tmp_path, rating(2))
    assert shipped(tmp_path, index) == (1, 0, 0)
    assert len(index.of(LATEST)) == 2


def test_what_is_forgotten_is_deleted_from_the_index_and_the_rest_stays(
    tmp_path: Path, index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    rate(tmp_path, rating(1), rating(1, 1, thumb="down"), rating(2, subject="bob"))
    shipped(tmp_path, index)
    assert forget(tmp_path) == 1
    assert "2 ratings are waiting to be deleted from Elasticsearch" in capsys.readouterr().out
    assert b"ada" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*.json*"))
    assert shipped(tmp_path, index) == (1, 2, 0), "the file that was rewritten is sent anew"
    assert list(index.of(LATEST)) == [f"{2:016x}"]
    assert len(index.of(HISTORY)) == 1
    assert forget(tmp_path) == 0
    assert "0 are left\n0 of these ratings of this host are left in Elasticsearch" in capsys.readouterr().out


def test_forgetting_waits_for_the_unit_that_ships(
    tmp_path: Path, index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    rate(tmp_path, rating(1))
    shipped(tmp_path, index)

    def deleting() -> None:
        while not (tmp_path / "shipping/unindexed.jsonl").exists():
            time.sleep(0.01)
        shipped(tmp_path, index)

    thread = Thread(target=deleting)
    thread.start()
    assert forget(tmp_path, wait="30") == 0
    thread.join()
    assert index.documents == {}
    assert "0 of these ratings of this host are left in Elasticsearch" in capsys.readouterr().out


def test_what_is_forgotten_while_it_is_being_sent_is_deleted_by_the_same_run(
    tmp_path: Path, index: Index
) -> None:
    (tmp_path / "shipping").mkdir()
    rate(tmp_path, rating(1), rating(2, subject="bob"))
    index.meanwhile = lambda: journal.forget(tmp_path, lambda record: record["user.id"] == "ada")
    assert shipped(tmp_path, index) == (3, 1, 0)
    assert list(index.of(LATEST)) == [f"{2:016x}"]


def test_a_deletion_is_kept_until_elasticsearch_has_acknowledged_it(tmp_path: Path, index: Index) -> None:
    rate(tmp_path, rating(1))
    shipped(tmp_path, index)
    forget(tmp_path)
    for refusing in ({f"{1:016x}": [400]}, {f"{1:016x}": [503] * 4}):
        index.refused = refusing
        with pytest.raises(ship.AwayError):
            shipped(tmp_path, index)
        assert index.of(LATEST)
    assert shipped(tmp_path, index) == (0, 1, 0)
    assert index.documents == {}


def test_a_newer_rating_of_another_host_stays_when_an_older_one_is_too_old(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host, record in ("llm1", rating(1, 3)), ("llm2", rating(1, 9, thumb="down")):
        (tmp_path / host).mkdir()
        rate(tmp_path / host, record)
        shipped(tmp_path / host, index)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 181 * journal.DAY)
    assert main(["feedback", "expire", "--days", "180", "--folder", str(tmp_path / "llm1")]) == 0
    assert files(tmp_path / "llm1") == []
    assert shipped(tmp_path / "llm1", index) == (0, 1, 0)
    assert thumbs(index) == {f"{1:016x}": "down"}
    assert len(index.of(HISTORY)) == 1


def test_a_record_that_is_no_rating_holds_no_removal_up(tmp_path: Path, index: Index) -> None:
    lines = [
        json.dumps(each) + "\n" for each in (rating(1), {"user.id": "ada"}, rating(2) | {"@timestamp": 1})
    ]
    (tmp_path / f"{RATED}-20200101T00.jsonl").write_text("".join(lines))
    assert shipped(tmp_path, index) == (1, 0, 0)
    assert journal.expire(tmp_path, 180) == 3
    assert shipped(tmp_path, index) == (0, 1, 0)
    assert index.documents == {}


def test_what_is_younger_stays(tmp_path: Path) -> None:
    rate(tmp_path, rating(1))
    for kind in RATED, ANSWERED:
        (tmp_path / f"{kind}-20200101T00.jsonl").write_text(json.dumps(rating(2)) + "\n")
    assert journal.expire(tmp_path, 180) == 2
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize(
    "verb", [["expire", "--days", "180"], ["forget", "--subject", "ada", "--tenant", "x"]]
)
def test_what_a_killed_removal_left_goes_with_the_next_one(tmp_path: Path, verb: list[str]) -> None:
    (tmp_path / "rated-20261128T10.jsonl.partial").write_text("the texts of many")
    assert main(["feedback", *verb, "--folder", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []


def test_days_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["feedback", "expire", "--days", "0", "--folder", str(tmp_path)]) == 2
    assert "--days is 0: specify 1 or more" in capsys.readouterr().err


def test_ids_of_what_is_forgotten_are_written_for_the_exports_or_nothing_is_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ids = tmp_path / "journal", tmp_path / "ids"
    folder.mkdir()
    rate(folder, rating(1), rating(1, 1), rating(2, subject="bob"), rating(3))
    given = ["feedback", "forget", "--subject", "ada", "--tenant", "research", "--folder", str(folder)]
    assert main([*given, "--ids", str(tmp_path / "none/ids")]) == 2
    assert "Nothing was removed" in capsys.readouterr().err
    assert main([*given, "--ids", str(ids)]) == 0
    assert ids.read_text() == f"{1:016x}\n{3:016x}\n"
    told = capsys.readouterr()
    assert "removed 3 records of ada" in told.out
    assert "warning" not in told.err
    assert main([*given, "--ids", str(tmp_path / "again")]) == 0
    assert "exports may contain exchanges that the journal removed by age" in capsys.readouterr().err


def test_after_a_power_cut_what_is_forgotten_is_in_the_journal_or_its_ids_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, after = tmp_path / "host" / "journal", tmp_path / "after"
    folder.mkdir(parents=True)
    rate(folder, rating(1))
    disk = Disk(tmp_path / "host", monkeypatch)
    given = ["feedback", "forget", "--subject", "ada", "--tenant", "research", "--folder", str(folder)]
    assert main([*given, "--ids", str(tmp_path / "host" / "ids")]) == 0
    disk.saved()
    for cut in disk.cuts:
        cut.restore(after, None)
        left = [record for path in files(after / "journal") for record in read(path)]
        assert left or (after / "ids").read_text() == f"{1:016x}\n"
    assert not left
    disk.close()
