"""The record's writer: what is on disk, after whatever happened, goes on where it ended."""

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from audit_records import NAME, SEED, checked, event, record, sizes, whole

from llmproof import heads
from llmproof.chain import MAX_LINE, READ, Chain, ChainError, EventError, fields, files, lines
from llmproof.heads import Head, Tree


def test_a_line_has_its_keys_in_order_and_its_hashes_are_over_its_bytes(tmp_path: Path) -> None:
    with Chain(tmp_path, SEED, NAME) as chain:
        assert chain.append([{"b": 1, "a": ["x", "ü\n"]}]) == range(1, 2)
        assert list(chain.append([{"c": None}, {"d": {"e": 2}}])) == [2, 3]
    first, second, third = whole(tmp_path)
    assert list(json.loads(first)) == [
        "event.sequence", "@timestamp", "b", "a", "llmkeep.audit.previous", "llmkeep.audit.hash"
    ]  # fmt: skip
    assert json.loads(first)["a"] == ["x", "ü\n"]
    assert json.loads(first)["llmkeep.audit.previous"] == "0" * 64
    body, _, end = first.partition(b',"llmkeep.audit.hash":')
    assert end == f'"{hashlib.sha256(body).hexdigest()}"}}'.encode()
    assert json.loads(second)["llmkeep.audit.previous"] == hashlib.sha256(first).hexdigest()
    assert json.loads(third)["llmkeep.audit.previous"] == hashlib.sha256(second).hexdigest()


@pytest.mark.parametrize(
    ("bad", "why"),
    [({}, "at least one"), ([1], "JSON object"), ({"a": float("nan")}, "not JSON"), ({"a": object()}, "not JSON"),
     ({"@timestamp": "1970"}, "record itself writes @timestamp"), ({"llmkeep.audit.hash": ""}, "remove it"),
     ({"a": "x" * (1 << 20)}, "at most")],
)  # fmt: skip
def test_what_is_no_event_is_refused_and_nothing_of_its_group_is_written(
    tmp_path: Path, bad: dict[str, object], why: str
) -> None:
    with Chain(tmp_path, SEED, NAME) as chain:
        with pytest.raises(EventError, match=why):
            chain.append([event(1), bad])
        assert chain.append([event(2)]) == range(1, 2)
    assert len(whole(tmp_path)) == 1


def test_sequence_chain_and_tree_go_on_across_rotation_and_restarts(tmp_path: Path) -> None:
    for start in range(1, 60, 5):
        with Chain(tmp_path, SEED, NAME, rotate=4000) as chain:
            assert chain.append([event(start + n) for n in range(5)]) == range(start, start + 5)
            if start % 2:
                chain.sign()
    assert [path.name for path in files(tmp_path)][:2] == [
        "records-000000000001.jsonl",
        "records-000000000011.jsonl",
    ]
    tree = Tree()
    for line in whole(tmp_path):
        tree.add(line)
    with Chain(tmp_path, SEED) as chain:
        assert (chain.tree.size, chain.tree.root()) == (60, tree.root())
        assert chain.verifier.name == NAME
    report = checked(tmp_path)
    assert report.ok
    assert report.records == 60
    assert report.recovered == 0


def test_the_kept_tree_saves_reading_and_a_wrong_one_is_not_believed(tmp_path: Path) -> None:
    record(tmp_path, 50)
    right = (tmp_path / "tree").read_text()
    size, *peaks = right.split("\n")
    for wrong in (
        "",
        "x",
        "49\n" + "\n".join(peaks),
        "\n".join([size, *reversed(peaks)]),
        f"{size}\n" + "00" * 32,
    ):
        (tmp_path / "tree").write_text(wrong)
        with Chain(tmp_path, SEED) as chain:
            chain.append([event(99)])
            chain.sign()
        assert checked(tmp_path).ok
        size, *peaks = (tmp_path / "tree").read_text().split("\n")
    # With it only what comes after its size is read: a change before it is for `verify` to find.
    data = files(tmp_path)[0].read_bytes()
    files(tmp_path)[0].write_bytes(data.replace(b"alice", b"alicf", 1))
    with Chain(tmp_path, SEED) as chain:
        assert chain.tree.size == 55


def test_a_tree_that_lags_behind_the_last_head_is_used_and_leads_to_the_same_root(tmp_path: Path) -> None:
    record(tmp_path, 30)
    kept = (tmp_path / "tree").read_text()
    record(tmp_path, 30)
    (tmp_path / "tree").write_text(kept)  # as after a power cut
    files(tmp_path)[0].write_bytes(files(tmp_path)[0].read_bytes().replace(b"alice", b"alicf", 1))
    with Chain(tmp_path, SEED) as chain:
        assert chain.tree.size == 60
        assert chain.sign() is None


@pytest.mark.parametrize("lost", [1, 2, 300, 600])
def test_a_torn_end_is_cut_kept_aside_and_the_record_says_so(tmp_path: Path, lost: int) -> None:
    record(tmp_path, 25)  # heads over 10 and 20
    path = files(tmp_path)[0]
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    left = data[:-lost]
    good = left[: left.rfind(b"\n") + 1]
    count = good.count(b"\n")
    with Chain(tmp_path, SEED) as chain:
        assert chain.append([event(100)]) == range(count + 2, count + 3)
    assert (tmp_path / f"cut-{count + 1:012d}").read_bytes() == left[len(good) :]
    said = json.loads(whole(tmp_path)[count])
    assert said["event.action"] == "recovered"
    assert said["llmkeep.audit.dropped_bytes"] == len(left) - len(good)
    report = checked(tmp_path)
    assert report.ok
    assert report.recovered == 1
    with Chain(tmp_path, SEED) as chain:
        assert chain.tree.size == count + 2


def test_zeros_and_garbage_that_a_power_cut_leaves_are_cut_too(tmp_path: Path) -> None:
    record(tmp_path, 25)
    with files(tmp_path)[0].open("ab") as file:
        file.write(b"\0" * 5000 + b"\n" + whole(tmp_path)[3] + b"\n")
    with Chain(tmp_path, SEED) as chain:
        assert chain.tree.size == 26
    assert checked(tmp_path).ok


def test_a_power_cut_between_the_cut_and_its_record_is_told_at_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, 5)
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-7])

    def power_cut(*_: object) -> range:
        raise OSError(errno.EIO, "the power failed")

    with monkeypatch.context() as patch:
        patch.setattr(Chain, "_write", power_cut)
        with pytest.raises(OSError, match="the power failed"):
            Chain(tmp_path, SEED)
    assert len(whole(tmp_path)) == 4
    Chain(tmp_path, SEED).close()
    assert json.loads(whole(tmp_path)[-1])["event.action"] == "recovered"


def test_a_torn_head_is_cut_off_and_signed_anew(tmp_path: Path) -> None:
    record(tmp_path, 20)
    path = tmp_path / "heads"
    path.write_bytes(path.read_bytes()[:-30])
    with Chain(tmp_path, SEED) as chain:
        assert chain.sign() is not None
    assert sizes(tmp_path) == [10, 20]


def test_the_writer_refuses_to_go_on_where_records_under_a_head_are_gone_or_changed(tmp_path: Path) -> None:
    record(tmp_path / "good", 25)
    lines = whole(tmp_path / "good")
    for name, wrong in {
        "removed": lines[:15],
        "changed": [*lines[:15], lines[15].replace(b"alice", b"mally"), *lines[16:]],
        "none": [],
    }.items():
        record(tmp_path / name, 25)
        (tmp_path / name / "tree").unlink()
        files(tmp_path / name)[0].write_bytes(b"".join(line + b"\n" for line in wrong))
        before = files(tmp_path / name)[0].read_bytes()
        with pytest.raises(ChainError, match=r"[Mm]ove the folder away"):
            Chain(tmp_path / name, SEED)
        assert files(tmp_path / name)[0].read_bytes() == before


def test_the_writer_refuses_a_removed_file_a_foreign_seed_and_a_lost_verifier(tmp_path: Path) -> None:
    record(tmp_path, 60, head_each=1000, rotate=4000)
    with pytest.raises(ChainError, match="give the correct seed"):
        Chain(tmp_path, bytes(32))
    for lost in (files(tmp_path)[0], files(tmp_path)[2]):
        data = lost.read_bytes()
        lost.unlink()
        with pytest.raises(ChainError, match="should begin with record"):
            Chain(tmp_path, SEED)
        lost.write_bytes(data)
    text = (tmp_path / "verifier").read_text()
    (tmp_path / "verifier").unlink()
    with pytest.raises(ChainError, match="verifier is missing"):
        Chain(tmp_path, SEED)
    (tmp_path / "verifier").write_text(text)
    Chain(tmp_path, SEED).close()


def test_there_is_one_writer(tmp_path: Path) -> None:
    with Chain(tmp_path, SEED, NAME), pytest.raises(ChainError, match="since there can be only one writer"):
        Chain(tmp_path, SEED)
    # A second one that is told to wait gets its turn when the first has gone.
    program = ("import sys; from pathlib import Path; from llmproof.chain import Chain\n"
               "with Chain(Path(sys.argv[1]), bytes(range(32)), wait=True) as chain: chain.append([{'a': 1}])")  # fmt: skip
    with Chain(tmp_path, SEED) as chain:
        second = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1)
        chain.append([event(1)])
    assert second.wait(10) == 0
    assert checked(tmp_path).records == 2


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return filler


def append_until_it_fails(chain: Chain, group: int) -> int:
    """The last acknowledged record before the disk was full."""
    acknowledged = chain.tree.size
    with suppress(OSError):
        for _ in range(1000):
            acknowledged = chain.append([event(number) for number in range(group)])[-1]
        raise AssertionError("the disk never was full")
    return acknowledged


def test_after_a_full_disk_nothing_half_written_is_there_and_it_goes_on_when_there_is_room(
    small_disk: Path,
) -> None:
    folder = small_disk / "record"
    with Chain(folder, SEED, NAME) as chain:
        chain.append([event(1)])
        filler = fill(small_disk)
        for group in (1, 200, 1):
            acknowledged = append_until_it_fails(chain, group)
            assert len(whole(folder)) == acknowledged == chain.tree.size
            assert files(folder)[0].read_bytes().endswith(b"}\n")
        with pytest.raises(OSError, match="No space left"):
            chain.sign()
        filler.unlink()
        assert chain.append([event(5)])[-1] == acknowledged + 1
        chain.sign()
    assert checked(folder).ok
    assert checked(folder).open_tail == 0
    assert checked(folder).recovered == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here: run it as root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_write_that_cannot_be_undone_closes_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with Chain(tmp_path, SEED, NAME) as chain:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fails)
            patch.setattr(os, "ftruncate", fails)
            with pytest.raises(OSError, match="the disk is broken"):
                chain.append([event(1)])
        with pytest.raises(ChainError, match="open it again"):
            chain.append([event(2)])


def test_fields_are_ascii_whatever_comes_in() -> None:
    assert fields({"a": "\ud800\u2028\x00"}) == b'"a":"\\ud800\\u2028\\u0000"'


def test_folder_and_files_are_made_with_their_modes(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = record(tmp_path / "not/there/yet", 1, head_each=1)
    finally:
        os.umask(before)
    modes = {
        path.name: oct(path.stat().st_mode & 0o7777) for path in (folder, *files(folder), folder / "heads")
    }
    assert modes == {"yet": "0o750", "records-000000000001.jsonl": "0o640", "heads": "0o640"}
    assert oct((folder / "verifier").stat().st_mode & 0o7777) == "0o644"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files and folders that were synced, in their order."""
    names: list[str] = []

    def noting(sync: Callable[[int], None]) -> Callable[[int], None]:
        def noted(descriptor: int) -> None:
            sync(descriptor)
            names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

        return noted

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    return names


def since(synced: list[str]) -> list[str]:
    """What was synced since the last time."""
    new = synced[:]
    synced.clear()
    return new


def test_whatever_is_written_or_made_is_synced_and_its_folder_when_it_is_new(
    tmp_path: Path, synced: list[str]
) -> None:
    folder, first, second = tmp_path / "folder", "records-000000000001.jsonl", "records-000000000002.jsonl"
    with Chain(folder, SEED, NAME, rotate=1) as chain:
        assert since(synced) == [".verifier.new", "folder", first, "folder"]
        chain.append([event(1)])
        assert since(synced) == [first]
        chain.sign()
        assert since(synced) == ["heads", "folder"]
        chain.append([event(2)])
        assert since(synced) == [second, "folder", second]
        chain.sign()
        assert since(synced) == ["heads"]


def test_what_is_cut_off_is_on_disk_elsewhere_before_it_is_cut(tmp_path: Path, synced: list[str]) -> None:
    folder, name = record(tmp_path / "folder", 3), "records-000000000001.jsonl"
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    since(synced)
    Chain(folder, SEED).close()
    assert since(synced) == ["cut-000000000003", "folder", name, name]


def test_a_head_is_signed_once(tmp_path: Path) -> None:
    with Chain(tmp_path, SEED, NAME) as chain:
        assert chain.sign() is None
        chain.append([event(1)])
        assert chain.sign() is not None
        assert chain.sign() is None
    assert sizes(tmp_path) == [1]


def test_a_head_is_signed_where_the_tree_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir(parents=True)
    record(tmp_path, 2, head_each=1)
    assert sizes(tmp_path) == [1, 2]
    with Chain(tmp_path, SEED) as chain:
        assert chain.tree.size == 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_short_record_goes_on_from_its_tree(tmp_path: Path, count: int) -> None:
    record(tmp_path, count, head_each=1)
    with Chain(tmp_path, SEED) as chain:
        assert chain.append([event(9)]) == range(count + 1, count + 2)
    assert checked(tmp_path).ok


def test_a_line_without_an_end_under_a_head_is_named_and_not_cut(tmp_path: Path) -> None:
    record(tmp_path, 20)
    (tmp_path / "tree").unlink()
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ChainError,
        match=r"000001\.jsonl, record 20: torn: its end is missing\. This is not the result of a power cut",
    ):
        Chain(tmp_path, SEED)
    assert not list(tmp_path.glob("cut-*"))


def test_a_record_has_the_time_in_utc_to_the_microsecond(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    record(tmp_path, 1)
    written = json.loads(whole(tmp_path)[0])["@timestamp"]
    assert written.endswith("Z")
    assert (
        before <= datetime.strptime(written, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC) <= datetime.now(UTC)
    )


def test_a_file_that_has_the_size_to_rotate_at_is_not_written_to_again(tmp_path: Path) -> None:
    size = files(record(tmp_path / "one", 1))[0].stat().st_size
    assert len(files(record(tmp_path / "full", 2, rotate=size))) == 2
    assert len(files(record(tmp_path / "not yet", 2, rotate=size + 1))) == 1


def test_a_closed_chain_refuses_and_may_be_closed_again(tmp_path: Path) -> None:
    chain = Chain(tmp_path, SEED, NAME)
    chain.close()
    chain.close()
    for refused in (lambda: chain.append([event(1)]), chain.sign):
        with pytest.raises(ChainError, match="open it again"):
            refused()
    assert whole(tmp_path) == []


def test_a_record_whose_newest_file_has_one_line_goes_on(tmp_path: Path) -> None:
    record(tmp_path, 3, head_each=1, rotate=1)
    assert len(files(tmp_path)) == 3
    with Chain(tmp_path, SEED, rotate=1) as chain:
        assert chain.append([event(4)]) == range(4, 5)
    assert checked(tmp_path).ok


def test_a_changed_last_line_under_a_head_is_not_taken_for_a_torn_end(tmp_path: Path) -> None:
    record(tmp_path, 20)
    (tmp_path / "tree").unlink()
    path = files(tmp_path)[0]
    before, _, last = path.read_bytes()[:-1].rpartition(b"\n")
    path.write_bytes(before + b"\n" + last.replace(b"alice", b"mally") + b"\n")
    with pytest.raises(ChainError, match="record 20: changed: its own hash does not match"):
        Chain(tmp_path, SEED)
    assert len(whole(tmp_path)) == 20


def test_what_a_start_left_of_a_verifier_key_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".verifier.new").write_text("x" * 500)
    with Chain(tmp_path, SEED, NAME) as chain:
        assert (tmp_path / "verifier").read_text() == chain.verifier.text + "\n"


def test_a_recovery_is_a_record_with_the_fields_of_an_event(tmp_path: Path) -> None:
    record(tmp_path, 3)
    files(tmp_path)[0].write_bytes(files(tmp_path)[0].read_bytes()[:-1])
    Chain(tmp_path, SEED).close()
    said = json.loads(whole(tmp_path)[-1])
    assert {name: value for name, value in said.items() if name.startswith("event.")} == {
        "event.sequence": 3, "event.kind": "event", "event.category": ["process"], "event.action": "recovered",
        "event.outcome": "success",
    }  # fmt: skip


def test_a_new_file_that_cannot_be_synced_is_closed_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with Chain(tmp_path, SEED, NAME, rotate=1) as chain:
        chain.append([event(1)])
        opened = len(list(Path("/proc/self/fd").iterdir()))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            with pytest.raises(OSError, match="the disk is broken"):
                chain.append([event(2)])
        assert len(list(Path("/proc/self/fd").iterdir())) == opened
        assert chain.append([event(2)]) == range(2, 3)
    assert checked(tmp_path).ok


def test_an_event_may_be_exactly_as_long_as_the_limit() -> None:
    longest = {"a": "x" * (MAX_LINE - len('{"a":""}'))}
    assert len(fields(longest)) == MAX_LINE - 2
    with pytest.raises(EventError, match=f"it has {MAX_LINE + 1} bytes"):
        fields({"a": longest["a"] + "x"})


def test_who_signs_is_the_host_where_no_name_is_given(tmp_path: Path) -> None:
    with Chain(tmp_path, SEED) as chain:
        assert chain.verifier.name == f"llm-audit/{socket.gethostname()}"


def test_a_line_of_any_length_is_never_read_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (2 * READ + 1) + b"\n")
    assert [len(line) for line in lines(tmp_path / "file")] == [READ, READ, 2]


def test_a_record_is_refused_while_one_has_waited_for_its_head_for_longer_than_promised(
    tmp_path: Path,
) -> None:
    with Chain(tmp_path, SEED, NAME, unsigned_seconds=0) as chain:
        chain.append([event(1)])
        with pytest.raises(OSError, match="been without a signed head for more than 0 s"):
            chain.append([event(2)])
        chain.sign()
        chain.append([event(3)])
    assert len(whole(tmp_path)) == 2
    with (
        Chain(tmp_path, SEED, unsigned_seconds=0) as chain,
        pytest.raises(OSError, match="been without a signed head"),
    ):
        chain.append([event(4)])  # a restart is no head


def test_the_end_of_a_power_cut_is_recorded_however_old_the_tail_is(tmp_path: Path) -> None:
    record(tmp_path, 5)
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-7])
    with Chain(tmp_path, SEED, unsigned_seconds=0) as chain:
        chain.sign()
    assert json.loads(whole(tmp_path)[-1])["event.action"] == "recovered"


def statement(folder: Path, count: int, path: Path) -> Path:
    """What a witness says that saw the first COUNT records."""
    tree = Tree()
    for line in whole(folder)[:count]:
        tree.add(line)
    path.write_bytes(Head(tree.size, tree.root()).text(NAME))
    return path


@pytest.mark.parametrize("seen", [10, 20, 23, 25])
def test_a_record_that_the_witness_has_seen_is_gone_on_with(tmp_path: Path, seen: int) -> None:
    record(tmp_path / "record", 25)
    with Chain(
        tmp_path / "record", SEED, seen=statement(tmp_path / "record", seen, tmp_path / "seen")
    ) as chain:
        chain.append([event(1)])
        chain.sign()
    assert sizes(tmp_path / "record") == [10, 20, 26]


def test_a_tail_that_was_forged_torn_or_cut_after_the_witness_saw_it_is_not_signed(tmp_path: Path) -> None:
    record(tmp_path / "good", 25)
    seen = statement(tmp_path / "good", 24, tmp_path / "seen")
    lines = whole(tmp_path / "good")
    other = whole(record(tmp_path / "other", 25))  # whole and chained in itself
    for name, tail, heads_left in (("torn", [*lines[:23], lines[23][:-9]], None), ("cut", lines[:22], None),
                                   ("rolled back", lines[:15], 1), ("forged", other, 0)):  # fmt: skip
        folder = record(tmp_path / name, 25)
        (folder / "tree").unlink()
        files(folder)[0].write_bytes(b"\n".join(tail) + b"\n" * (name != "torn"))
        notes = (tmp_path / "good/heads").read_bytes().split(b"\n\n")
        (folder / "heads").write_bytes(
            b"".join(part + b"\n\n" for part in notes[: 4 if heads_left is None else 2 * heads_left])
        )
        before = (folder / "heads").read_bytes()
        with pytest.raises(ChainError, match=r"the witness has seen|torn: its end is missing"):
            Chain(folder, SEED, seen=seen)
        assert (folder / "heads").read_bytes() == before
        assert not list(folder.glob("cut-*"))


def test_a_statement_that_is_none_stops_the_writer_and_a_missing_one_does_not(tmp_path: Path) -> None:
    Chain(tmp_path / "record", SEED, NAME, seen=tmp_path / "none").close()
    (tmp_path / "seen").write_bytes(b"")
    with pytest.raises(ChainError, match="cannot be read as the witness's statement"):
        Chain(tmp_path / "record", SEED, seen=tmp_path / "seen")


def test_where_no_head_can_be_written_the_tip_says_what_it_would_be_over(tmp_path: Path) -> None:
    with Chain(tmp_path, SEED, NAME) as chain:
        chain.append([event(1)])
        chain.sign()
        (tmp_path / "heads").rename(tmp_path / "aside")
        (tmp_path / "heads").mkdir()
        chain.append([event(2)])
        with pytest.raises(OSError, match="directory"):
            chain.sign()
        name, tip = heads.stated((tmp_path / "tip").read_bytes())
        assert (name, tip.size, tip.root) == (NAME, 2, chain.tree.root())
