"""Old files of the record go only where a signed record declares it; what is left verifies."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from audit_records import NAME, SEED, checked, event, record, whole

from llmproof import cli, heads
from llmproof.chain import Chain, ChainError, EventError, files, first_of, utc
from llmproof.heads import Head, Tree
from llmproof.service import Retention

LATER = datetime.now(UTC) + timedelta(days=181)
ROTATE = 4000  # bytes: nine or ten records a file


def statement(folder: Path, count: int, now: datetime = LATER) -> Path:
    """What a witness says at NOW that saw the first COUNT records."""
    tree = Tree()
    for line in whole(folder)[:count]:
        tree.add(line)
    path = folder.parent / "seen"
    path.write_bytes(Head(tree.size, tree.root(), utc(now)).text(NAME))
    return path


def opened(folder: Path, seen: Path | None = None) -> Chain:
    return Chain(folder, SEED, rotate=ROTATE, unsigned_seconds=1e12, seen=seen)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 records in several files, the last head over all of them."""
    return record(tmp_path / "record", 60, rotate=ROTATE)


@pytest.fixture
def shortened(folder: Path) -> Path:
    """The same without its first two files, and with what came later."""
    with opened(folder, statement(folder, 60)) as chain:
        assert chain.remove_oldest(LATER, 180)
        assert chain.remove_oldest(LATER, 180)
        for number in range(30):
            chain.append([event(100 + number)])
        chain.sign()
    return folder


def test_what_is_left_verifies_and_the_report_says_what_went_and_by_which_record(
    shortened: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = first_of(files(shortened)[0])
    assert first == 15
    report = checked(shortened, shortened / "heads")
    assert (report.findings, report.removed, report.records) == ([], first - 1, 92)
    declared = json.loads(whole(shortened)[62 - first])
    assert report.removed_by == declared["event.sequence"] == 62
    assert declared["event.reason"] == "its records are older than 180 days"
    assert cli.main(["verify", str(shortened)]) == 0
    said = capsys.readouterr().out
    assert f"records 1 to {first - 1} were removed by declared retention, according to record 62 of " in said
    assert f"verified from record {first} on" in said


@pytest.mark.parametrize("tree", ["kept", "lost"])
def test_a_record_without_its_first_files_is_gone_on_with_and_shortened_again(
    shortened: Path, tree: str
) -> None:
    if tree == "lost":
        (shortened / "tree").unlink()
    before = len(files(shortened))
    with opened(shortened, statement_of_all(shortened)) as chain:
        assert chain.append([event(200)]) == range(93, 94)
        chain.sign()
        assert chain.remove_oldest(LATER, 180)
    assert len(files(shortened)) == before - 1
    report = checked(shortened)
    assert (report.findings, report.removed_by) == ([], 94)


def statement_of_all(folder: Path) -> Path:
    """What a witness says that saw the last head."""
    notes, _ = heads.read(folder / "heads")
    head = heads.stated(notes[-1].partition(b"\n\n")[0] + b"\n")[1]
    path = folder.parent / "seen"
    path.write_bytes(Head(head.size, head.root, utc(LATER)).text(NAME))
    return path


def test_a_file_that_is_gone_without_a_declaration_is_a_finding(shortened: Path, folder: Path) -> None:
    files(shortened)[0].unlink()
    assert "is expected here" in checked(shortened).findings[0].what
    whole_one = record(folder.parent / "whole", 60, rotate=ROTATE)
    files(whole_one)[0].unlink()
    assert not checked(whole_one).ok


def test_a_change_in_what_is_left_and_in_the_declaration_is_a_finding(shortened: Path) -> None:
    for old, new in ((b"request-105", b"request-106"), (b"older than 180 days", b"older than 181 days")):
        copy = shutil.copytree(shortened, shortened.parent / new.decode().replace(" ", "-"))
        path = next(path for path in files(copy) if old in path.read_bytes())
        path.write_bytes(path.read_bytes().replace(old, new))
        assert not checked(copy).ok


def test_a_declaration_that_no_head_covers_proves_nothing(folder: Path) -> None:
    notes = (folder / "heads").read_bytes()
    with opened(folder, statement(folder, 60)) as chain:
        chain.remove_oldest(LATER, 180)
    (folder / "heads").write_bytes(notes)
    assert "is expected here" in checked(folder).findings[0].what


@pytest.mark.parametrize(
    "event_", [{"llmkeep.audit.removed.last": 5}, {"a": 1, "llmkeep.audit.removed.peaks": []}]
)
def test_a_client_declares_nothing_removed(folder: Path, event_: dict[str, object]) -> None:
    with opened(folder) as chain, pytest.raises(EventError, match="the record itself writes"):
        chain.append([event_])


def test_nothing_goes_that_is_young_open_unsigned_unwitnessed_or_of_the_future(folder: Path) -> None:
    before = files(folder)
    first = first_of(before[1]) - 1
    now = datetime.now(UTC)
    for why, seen, moment in (
        ("young", statement(folder, 60, now + timedelta(days=179)), now + timedelta(days=179)),
        ("the host's clock is wrong", statement(folder, 60, now), LATER),
        ("the witness's clock is wrong", statement(folder, 60), now),
        ("not witnessed", statement(folder, first - 1), LATER),
        ("no witness", folder / "none", LATER),
    ):
        with opened(folder, seen) as chain:
            assert chain.remove_oldest(moment, 180) is None, why
    assert files(folder) == before
    with opened(folder, statement(folder, 60)) as chain:
        while chain.remove_oldest(LATER, 180):
            pass
    assert files(folder)[0] == before[-1], "it is not witnessed to its end"
    unsigned = record(folder.parent / "unsigned", 60, head_each=1000, rotate=ROTATE)
    with opened(unsigned, statement(unsigned, 60)) as chain:
        assert chain.remove_oldest(LATER, 180) is None


def test_a_file_that_is_not_as_it_was_written_stays(folder: Path) -> None:
    seen = statement(folder, 60)
    path = files(folder)[0]
    path.write_bytes(path.read_bytes().replace(b"alice", b"mally", 1))
    with (
        opened(folder, seen) as chain,
        pytest.raises(ChainError, match="is old enough to be removed, but was kept"),
    ):
        chain.remove_oldest(LATER, 180)
    assert path.exists()


def test_a_file_stays_where_its_removal_cannot_be_signed(folder: Path) -> None:
    with opened(folder, statement(folder, 60)) as chain:
        (folder / "heads").rename(folder.parent / "aside")
        (folder / "heads").mkdir()
        with pytest.raises(OSError, match="directory"):
            chain.remove_oldest(LATER, 180)
    assert first_of(files(folder)[0]) == 1


def test_a_power_cut_between_declaration_and_removal_is_made_good(shortened: Path) -> None:
    leftover = shortened / "records-000000000009.jsonl"
    first = first_of(files(shortened)[0])
    leftover.write_bytes(b"what is left of it\n")
    assert checked(shortened).ok
    with opened(shortened, statement_of_all(shortened)) as chain:
        assert chain.remove_oldest(LATER, 180) == leftover
    assert first_of(files(shortened)[0]) == first


def test_a_hold_keeps_everything_and_is_on_record_when_it_begins_and_ends(folder: Path) -> None:
    hold, before = folder.parent / "hold", files(folder)
    retention = Retention(-1, hold)  # everything is old
    with opened(folder, statement(folder, 60)) as chain:
        hold.write_text("case 2027-14\n")
        for _ in range(2):
            retention.apply(chain)
        assert files(folder)[: len(before)] == before
        hold.unlink()
        hold.mkdir()
        retention.apply(chain)
        assert files(folder)[: len(before)] == before, "what cannot be read holds"
        hold.rmdir()
        retention.apply(chain)
        assert files(folder)[0] == before[1]
    said = [
        (each["event.action"], each.get("event.reason"))
        for each in map(json.loads, whole(folder))
        if "hold" in each["event.action"]
    ]
    assert said[0] == ("hold", "case 2027-14")
    assert [action for action, _ in said] == ["hold", "hold", "hold ended"]


@pytest.mark.parametrize("days", ["179", "0", "-1", "x"])
def test_the_writer_keeps_for_180_days_or_more(days: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--keep-days", days])
    assert ended.value.code == 2
    assert "180 days or more" in capsys.readouterr().err


def test_what_the_unit_sets_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"UNSIGNED_SECONDS": "240", "SEEN": "/a", "KEEP_DAYS": "400", "HOLD": "/b"}
    for name, value in given.items():
        monkeypatch.setenv(f"LLM_AUDIT_{name}", value)
    options = cli.parser().parse_args(["serve"])
    assert (options.unsigned_seconds, options.seen, options.keep_days, options.hold) == (
        240,
        Path("/a"),
        400,
        Path("/b"),
    )
    monkeypatch.setenv("LLM_AUDIT_KEEP_DAYS", "179")
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["serve"])
