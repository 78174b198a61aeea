"""What the guard reads from the journal on its host, what it halts by it, and what gateways learn of that."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from authority import PUBLIC_KEY, signed_bundle
from guarded_experiment import ENTRY, SUPPORT, lines, rating

from llmcore.experiments import RATINGS_EACH, identifier
from llmcore.ratings import ENDED, RATED
from llmserve.cli import main
from llmserve.feedback import journal, outcomes
from llmserve.feedback.guard import Guard
from llmserve.feedback.halts import GUARD, WATCHED, Halts
from llmserve.metrics import Metrics


def failing() -> list[tuple[str, dict[str, Any]]]:
    """100 units of each arm, of which 75 of the candidate meet a failure."""
    arms = [("control", "candidate")[number % 2] for number in range(200)]
    return [
        record
        for number, arm in enumerate(arms)
        for record in lines(number, arm, f"{arm}-{number}", failed=arm == "candidate" and number < 150)
    ]


def on_files(folder: Path, unit: str = "subject") -> Guard:
    """A guard of a journal, with a signed policy and without an audit writer."""
    (folder / "policy.pem").write_bytes(PUBLIC_KEY)
    entry = ENTRY | {"unit": unit}
    (folder / "bundle.tar.gz").write_bytes(signed_bundle(experiments={"support-12": entry}))
    return Guard(folder, folder / "bundle.tar.gz", folder / "policy.pem", folder / "audit.sock")


@pytest.mark.parametrize("unit", ["subject", "request"])
def test_a_candidate_whose_answers_are_rated_worse_is_ended_by_the_last_rating_of_each(
    unit: str, tmp_path: Path
) -> None:
    guard = on_files(tmp_path, unit)
    records = []
    for number in range(400):
        arm = ("control", "candidate")[number % 2]
        records += lines(number, arm, f"{arm}-{number}", thumb="up")
    journal.append(tmp_path, records)
    assert guard.look() == []
    worse = [(RATED, rating(number, "down")) for number in range(1, 120, 2)]
    journal.append(tmp_path, worse)
    [halt] = guard.look()
    assert (halt.test, halt.candidate.clusters, halt.candidate.mean) == ("thumb", 200, 0.7)
    again = on_files(tmp_path, unit)
    (tmp_path / GUARD / f"halted-{halt.experiment.id}.json").unlink()
    assert [each.reason for each in again.look()] == [halt.reason], "read anew, the same comes out"


def test_one_client_of_an_experiment_by_requests_ends_no_candidate(tmp_path: Path) -> None:
    """120 ratings of one subject, which sees which arm answered, beside 200 honest ones."""
    guard = on_files(tmp_path, "request")
    records = []
    for number in range(200):
        arm = ("control", "candidate")[number % 2]
        records += lines(number, arm, f"r{number}", rater=f"s{number}", thumb=("up", "down")[number // 2 % 2])
    for number in range(200, 320):
        arm, thumb = (("control", "up"), ("candidate", "down"))[number % 2]
        records += lines(number, arm, f"r{number}", rater="one client", thumb=thumb)
    journal.append(tmp_path, records)
    assert guard.look() == []
    [step] = guard.steps.values()
    assert step["thumb", "candidate"].units["one client"] == (RATINGS_EACH, 0.0)


def test_read_anew_ratings_of_exchanges_that_can_no_longer_be_rated_still_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = on_files(tmp_path)
    guard.most_ratable = 50
    for hour in range(8):
        monkeypatch.setattr(journal, "HOUR", f"20260101T{hour:02}")
        records = []
        for number in range(hour * 50, hour * 50 + 50):
            arm, thumb = (("control", "up"), ("candidate", "down"))[number % 2]
            records += lines(number, arm, f"{arm}-{number}", thumb=thumb)
        journal.append(tmp_path, records)
    [halt] = guard.look()
    assert (halt.test, halt.candidate.clusters) == ("thumb", 200)
    assert len(guard.ratable) == 50


def test_a_file_that_is_rewritten_while_the_guard_reads_is_read_anew_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = on_files(tmp_path)
    records = failing()
    journal.append(tmp_path, records[:80])
    guard.look()
    monkeypatch.setattr(guard.tail, "rewritten", lambda: False)  # as the look before the file was
    journal.forget(tmp_path, lambda record: record["user.id"] == "candidate-1")
    journal.append(tmp_path, records[80:])
    assert guard.look() == []
    monkeypatch.undo()
    [halt] = guard.look()
    assert halt.candidate.clusters == 99


def test_two_subjects_who_delete_their_records_between_two_looks_are_both_noticed(tmp_path: Path) -> None:
    guard = on_files(tmp_path)
    # Of one file alone: then the second rewritten one gets the inode that was read, where the file system uses it again.
    records = [each for each in failing() if each[0] == ENDED]
    journal.append(tmp_path, records[:40])
    journal.forget(tmp_path, lambda record: record["user.id"] == "control-0")
    guard.look()
    journal.forget(tmp_path, lambda record: record["user.id"] == "candidate-1")
    journal.forget(tmp_path, lambda record: record["user.id"] == "candidate-3")
    journal.append(tmp_path, records[40:])
    [halt] = guard.look()
    assert (halt.control.clusters, halt.candidate.clusters) == (99, 98)


def test_outcomes_are_of_the_newest_salt_alone(tmp_path: Path) -> None:
    before = lines(1, "control", "a", thumb="up")
    journal.append(tmp_path, [(kind, each | {"llmkeep.experiment.id": "f" * 16}) for kind, each in before])
    copy = {"shadow": "3"}
    journal.append(tmp_path, lines(2, "candidate", "b", thumb="up") + lines(3, "control", "c"))
    journal.append(tmp_path, lines(4, "candidate", "c", **copy)[1:])
    assert [each["unit"] for each in outcomes.outcomes(tmp_path, "support-12", ["thumb"])] == ["b", "b", "c"]
    assert [each["answers"] for each in outcomes.shadowed(tmp_path, "support-12")] == [1, 1]
    journal.append(tmp_path, [(kind, each | {"llmkeep.experiment.id": "f" * 16}) for kind, each in before])
    assert [each["answers"] for each in outcomes.shadowed(tmp_path, "support-12")] == [0, 0]


def test_what_was_forgotten_does_not_count(tmp_path: Path) -> None:
    guard = on_files(tmp_path)
    records = failing()
    journal.append(tmp_path, records[:80])
    guard.look()
    assert (
        main(
            [
                "feedback",
                "forget",
                "--subject",
                "candidate-1",
                "--tenant",
                "research",
                "--folder",
                str(tmp_path),
            ]
        )
        == 0
    )
    journal.append(tmp_path, records[80:])
    [halt] = guard.look()
    assert halt.candidate.clusters == 99


def test_a_halt_waits_for_the_audit_writer_and_counts_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = on_files(tmp_path)
    for number in range(200):
        arm = ("control", "candidate")[number % 2]
        journal.append(
            tmp_path,
            lines(number, arm, f"{arm}-{number}", tokens=number if arm == "control" else number // 8),
        )
    [halt] = guard.look()
    assert halt.test == "shorter"
    folder = tmp_path / GUARD
    assert [path.name for path in folder.glob("halted-*")] == [f"halted-{halt.experiment.id}.json"], (
        "not on record"
    )
    capsys.readouterr()
    assert main(["experiment", "halted", "--folder", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == halt.reason


def test_with_a_journal_that_is_full_nothing_is_watched(tmp_path: Path) -> None:
    guard = on_files(tmp_path)
    journal.append(tmp_path, lines(1, "control", "a"))
    guard.look()
    watched = tmp_path / GUARD / WATCHED
    assert json.loads(watched.read_bytes()) == {identifier("support-12", ENTRY["salt"]): "support-12"}
    guard.most_bytes = 100
    guard.look()
    assert json.loads(watched.read_bytes()) == {}


def series(halts: Halts, name: str) -> float | None:
    halts.look()
    return halts.metrics.registry.get_sample_value(f"llm_experiment_{name}", {"experiment": "support-12"})


def test_a_halt_and_a_guard_that_is_away_are_told_as_long_as_they_hold(tmp_path: Path) -> None:
    halts = Halts(tmp_path, Metrics())
    assert (series(halts, "halted"), series(halts, "unwatched")) == (None, None)
    assert halts.reason(SUPPORT) == "unwatched"
    assert (series(halts, "halted"), series(halts, "unwatched")) == (None, 1)
    on_files(tmp_path).look()
    assert (series(halts, "halted"), series(halts, "unwatched")) == (0, 0)
    (tmp_path / GUARD / f"halted-{SUPPORT.id}.json").touch()
    assert series(halts, "halted") == 1
    watched = tmp_path / GUARD / WATCHED
    os.utime(watched, (1, 1))
    halts.request_times.clear()
    assert (series(halts, "halted"), series(halts, "unwatched")) == (1, None)
    again = Halts(tmp_path, Metrics())
    again.look()
    assert again.reason(SUPPORT) == "halted"
    assert series(again, "halted") == 1, "after a restart, by the first request"
    watched.write_text("{}")
    assert series(halts, "halted") is None, "policy has it no longer"


@pytest.mark.parametrize("garbage", ["[" * 100_000, "null", "[1]", "\x00", "{"])
def test_garbage_in_the_list_of_what_is_watched_leaves_the_control(garbage: str, tmp_path: Path) -> None:
    (tmp_path / GUARD).mkdir()
    (tmp_path / GUARD / WATCHED).write_text(garbage)
    halts = Halts(tmp_path, Metrics())
    halts.look()
    assert halts.reason(SUPPORT) == "unwatched"


def test_a_policy_that_is_not_signed_is_not_watched(tmp_path: Path) -> None:
    guard = on_files(tmp_path)
    (tmp_path / "bundle.tar.gz").write_bytes(b"no bundle")
    guard.look()
    assert not (tmp_path / GUARD / WATCHED).exists()
