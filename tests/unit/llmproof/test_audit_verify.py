"""Whatever is done to a record is found, and where."""

import hashlib
import json
import random
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from audit_records import NAME, SEED, UNTIMED, checked, event, put, record, verifier, whole

from llmproof import cli, heads
from llmproof.chain import FIRST_PREVIOUS, Chain, files, named_previous, problem
from llmproof.heads import Head, Signer, Tree
from llmproof.verify import CLOCK_SECONDS, Finding, verify

LINES = 1000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of 1,000 lines in several files, with a head after each 100 and 50 lines behind the last."""
    folder = record(tmp_path_factory.mktemp("good") / "record", LINES - 50, head_each=100, rotate=200_000)
    with Chain(folder, SEED, rotate=200_000) as chain:
        for number in range(50):
            chain.append([event(1000 + number)])
    assert len(files(folder)) > 2
    return folder


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return shutil.copytree(good, tmp_path / "record")


def kinds(folder: Path, kept: Path | None = None) -> list[str]:
    """The findings' places and first words."""
    return [f"{found.sequence} {found.what.split(':')[0]}" for found in checked(folder, kept).findings]


def test_a_good_record_is_good(good: Path) -> None:
    report = checked(good, good / "heads")
    assert report.ok
    assert (report.records, report.heads, report.kept_heads, report.open_tail) == (LINES, 9, 9, 100)
    assert report.findings == []
    assert report.first < report.last


def test_every_single_byte_change_of_every_line_is_found_by_the_line_alone(good: Path) -> None:
    previous, tried, values = FIRST_PREVIOUS, 0, random.Random(1)  # noqa: S311 - test data
    for sequence, line in enumerate(whole(good), start=1):
        assert problem(line, sequence, previous) is None
        changed = bytearray(line)
        for position, byte in enumerate(line):
            changed[position] = byte ^ values.randrange(1, 256)
            assert problem(bytes(changed), sequence, previous) is not None, (sequence, position)
            changed[position] = byte
            tried += 1
        previous = hashlib.sha256(line).hexdigest()
    assert tried > LINES * 400


def test_every_value_at_every_position_of_one_line_is_found(good: Path) -> None:
    lines = whole(good)
    previous = hashlib.sha256(lines[6]).hexdigest()
    for position, byte in enumerate(lines[7]):
        for value in set(range(256)) - {byte}:
            changed = lines[7][:position] + bytes([value]) + lines[7][position + 1 :]
            assert problem(changed, 8, previous) is not None


def test_a_changed_byte_is_found_in_the_whole_record_at_its_line(copy: Path) -> None:
    values = random.Random(2)  # noqa: S311 - test data
    for _ in range(60):
        path = values.choice(files(copy))
        data = bytearray(path.read_bytes())
        position = values.randrange(len(data))
        before, data[position] = data[position], data[position] ^ values.randrange(1, 256)
        if before == 10:
            continue  # newlines: below
        path.write_bytes(data)
        first = checked(copy).findings[0]
        assert first.file == str(path)
        assert first.line == data[:position].count(b"\n") + 1
        assert first.sequence == int(path.stem.split("-")[1]) + first.line - 1
        data[position] = before
        path.write_bytes(data)
    assert checked(copy).ok


def test_a_change_is_one_finding_and_one_head_that_does_not_fit(copy: Path) -> None:
    path = files(copy)[0]
    path.write_bytes(path.read_bytes().replace(b"request-100", b"request-101", 1))
    assert kinds(copy) == ["199 changed", "200 rewritten"]
    assert "something in records 101 to 200" in checked(copy).findings[1].what


def test_a_newline_that_is_changed_or_put_in_is_found(copy: Path) -> None:
    path = files(copy)[0]
    data = path.read_bytes()
    ends = [match.start() for match in re.finditer(b"\n", data)]
    for position in [*ends[::40], ends[-1]]:
        path.write_bytes(data[:position] + b" " + data[position + 1 :])
        assert not checked(copy).ok
        path.write_bytes(data[:position] + data[position + 1 :])
        assert not checked(copy).ok
        path.write_bytes(data[:position] + b"\n" + data[position:])
        assert not checked(copy).ok


def test_a_line_removed_anywhere_is_found_at_its_place(copy: Path) -> None:
    path = files(copy)[0]
    lines = path.read_bytes().split(b"\n")[:-1]
    for number in range(0, len(lines), 20):
        put(path, lines[:number] + lines[number + 1 :])
        first = checked(copy).findings[0]
        if number < len(lines) - 1:
            assert (first.file, first.line, first.sequence) == (str(path), number + 1, number + 1)
            assert first.what == f"removed: record {number + 2} is here, 1 before it are missing"
    put(path, lines[:-1])
    assert f"a file records-{len(lines):012d}.jsonl is expected here" in checked(copy).findings[0].what


def test_lines_that_changed_places_are_found(copy: Path) -> None:
    path = files(copy)[1]
    lines = path.read_bytes().split(b"\n")[:-1]
    first = int(path.stem.split("-")[1])
    lines[4], lines[5] = lines[5], lines[4]
    put(path, lines)
    assert kinds(copy)[:3] == [f"{first + 4} removed", f"{first + 6} moved or added", f"{first + 5} removed"]


def test_a_line_put_in_is_found_whether_copied_or_made_for_its_place(copy: Path) -> None:
    path = files(copy)[0]
    lines = path.read_bytes().split(b"\n")[:-1]
    put(path, [*lines[:10], lines[3], *lines[10:]])
    assert kinds(copy)[0] == "11 moved or added"
    put(path, [*lines[:10], forged(lines[10], 11, lines[9], "mallory"), *lines[10:]])
    assert kinds(copy)[0] == "12 moved or added"


def test_a_record_cut_at_any_line_under_a_head_is_found(copy: Path) -> None:
    last = files(copy)[-1]
    data, first = last.read_bytes(), int(last.stem.split("-")[1])
    lines = data.split(b"\n")[:-1]
    for left in range(len(lines)):
        put(last, lines[:left])
        report = checked(copy)
        records = first + left - 1
        assert report.ok == (records >= 900), "behind the last head an end is no sign: the tail stays open"
        assert report.records == records
        if records < 900:
            assert (
                report.findings[-1].what
                == f"{900 - records} records are missing at the end: a head was signed over 900"
            )
    last.unlink()
    assert not checked(copy).ok


def test_a_record_cut_within_a_line_is_found_also_in_the_open_tail(copy: Path) -> None:
    path = files(copy)[-1]
    path.write_bytes(path.read_bytes()[:-20])
    assert kinds(copy) == ["1000 cut"]


def test_swapped_renamed_missing_and_foreign_files_are_found(copy: Path) -> None:
    one, two, *_ = files(copy)
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])
    assert not checked(copy).ok
    one.write_bytes(data[0])
    two.unlink()
    assert "is expected here: a file was removed" in checked(copy).findings[0].what
    two.write_bytes(data[1])
    assert checked(copy).ok
    two.rename(copy / "records-000000000002.jsonl")
    assert not checked(copy).ok
    (copy / "records-000000000002.jsonl").rename(two)
    shutil.copy(one, copy / "records-000000009999.jsonl")
    assert not checked(copy).ok


def forged(line: bytes, sequence: int, before: bytes, subject: str) -> bytes:
    """LINE with another subject, all its hashes right: what who can write the folder is able to make."""
    text = re.sub(rb'"event.sequence":\d+', b'"event.sequence":%d' % sequence, line)
    text = text.replace(b"alice", subject.encode())
    text = text.replace(named_previous(line).encode(), hashlib.sha256(before).hexdigest().encode())
    body = text.split(b',"llmkeep.audit.hash"')[0]
    return body + b',"llmkeep.audit.hash":"' + hashlib.sha256(body).hexdigest().encode() + b'"}'


def rewrite(folder: Path, start: int) -> None:
    """From record START on another subject did it, and the chain says so throughout."""
    sequence, before = 0, b""
    for path in files(folder):
        lines = path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines):
            sequence += 1
            if sequence >= start:
                lines[number] = forged(line, sequence, before, "bobby")
            before = lines[number]
        put(path, lines)


def test_one_line_replaced_by_another_that_is_whole_is_found_at_the_next_one(copy: Path) -> None:
    path = files(copy)[-1]
    lines, first = path.read_bytes().split(b"\n")[:-1], int(path.stem.split("-")[1])
    at = 950 - first
    lines[at] = forged(lines[at], 950, lines[at - 1], "mallory")
    put(path, lines)  # behind the last head: only the chain can tell
    assert kinds(copy) == ["951 rewritten"]
    assert (checked(copy).findings[0].file, checked(copy).findings[0].line) == (str(path), at + 2)


def test_a_chain_rewritten_from_the_middle_is_whole_and_found_by_the_heads(copy: Path) -> None:
    rewrite(copy, 450)
    report = checked(copy)
    assert [(found.sequence, found.what.split(":")[0]) for found in report.findings] == [(500, "rewritten")]
    assert report.findings[0].what.endswith("; something in records 401 to 500 differs from what was signed")
    (copy / "heads").unlink()
    assert checked(copy).ok, "the chain alone cannot tell"


def test_a_record_rewritten_and_signed_anew_is_found_by_heads_kept_elsewhere(
    copy: Path, tmp_path: Path
) -> None:
    kept = Path(shutil.copy(copy / "heads", tmp_path / "kept"))
    notes, _ = heads.read(kept)
    kept.write_bytes(b"".join(note + b"\n" for note in notes[:7]))  # the witness was last there at 700
    rewrite(copy, 650)
    tree, signer = Tree(), Signer(NAME, SEED)
    (copy / "heads").unlink()
    with (copy / "heads").open("ab") as file:
        for line in whole(copy):
            tree.add(line)
            if tree.size % 100 == 0:
                file.write(signer.sign(heads.Head(tree.size, tree.root())) + b"\n")
    assert checked(copy).ok, "who has the key and the folder can make a good record"
    found = checked(copy, kept).findings
    assert found[0].what == (
        f"7 of the 7 heads kept in {kept} are not in it: heads were removed, or the record was signed again"
    )
    assert (found[1].sequence, found[1].what.split(":")[0]) == (700, "rewritten")
    assert str(kept) in found[1].what
    assert "records 601 to 700" in found[1].what


def test_an_end_cut_off_together_with_its_heads_is_found_by_heads_kept_elsewhere(
    copy: Path, tmp_path: Path
) -> None:
    kept = Path(shutil.copy(copy / "heads", tmp_path / "kept"))
    notes, _ = heads.read(kept)
    (copy / "heads").write_bytes(b"".join(note + b"\n" for note in notes[:8]))
    last = files(copy)[-1]
    first = int(last.stem.split("-")[1])
    assert first < 800
    put(last, last.read_bytes().split(b"\n")[: 801 - first])  # 800 records, as the last head left says
    assert checked(copy).ok
    what = [found.what for found in checked(copy, kept).findings]
    assert what[0].startswith("1 of the 9 heads kept")
    assert what[1] == "100 records are missing at the end: a head was signed over 900"
    shutil.rmtree(copy)
    with pytest.raises(FileNotFoundError):
        checked(copy, kept)


def test_heads_removed_changed_moved_and_torn_are_found(copy: Path, tmp_path: Path) -> None:
    path = copy / "heads"
    notes, _ = heads.read(path)
    data = path.read_bytes()

    def found(notes: list[bytes]) -> list[str]:
        path.write_bytes(b"".join(note + b"\n" for note in notes))
        return [f"{each.line}: {each.what}" for each in checked(copy).findings]

    kept = Path(shutil.copy(path, tmp_path / "kept"))
    assert found([notes[0], notes[2]]) == []
    assert checked(copy, kept).findings[0].what.startswith("7 of the 9 heads kept")
    assert found([notes[1], notes[0]])[0].startswith("8: head 2 covers 100 records, the one before it 200")
    assert found([notes[0], notes[0]])[0].startswith("8: head 2 covers 100")
    assert found([notes[0], notes[1].replace(b"200", b"201")])[0].startswith(
        "8: head 2: the signature does not match"
    )
    path.write_bytes(data[:-30])
    assert "the last head is torn" in checked(copy).findings[0].what


def test_a_record_signed_by_another_key_is_found_when_the_auditor_brings_the_key(copy: Path) -> None:
    brought = verifier(copy)
    notes, _ = heads.read(copy / "heads")
    thief = Signer(NAME, bytes(32))
    (copy / "heads").write_bytes(b"".join(thief.sign(brought.open(note)) + b"\n" for note in notes))
    (copy / "verifier").write_text(thief.verifier.text)
    assert checked(copy).ok
    assert verify(copy, brought).altered == 9


def test_intents_without_an_outcome_are_told_and_are_no_alteration(tmp_path: Path) -> None:
    with Chain(tmp_path, SEED, NAME) as chain:
        chain.append([event(1), event(2), event(1, "outcome"), event(3), event(3)])
        chain.append([event(3, "outcome"), event(4, "refused")])
        chain.append([{"llmkeep.audit.phase": "intent", "llmkeep.run.id": "r1"}])
    report = checked(tmp_path)
    assert report.ok
    assert report.pending == 3
    assert report.pending_ids == ["transaction-2", "transaction-3", "r1"]


def test_verify_beside_a_writer_at_work_never_cries_wolf(tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        with Chain(tmp_path, SEED, NAME, rotate=300_000) as chain:
            number = 0
            while not stop.is_set():
                number += 1
                chain.append([event(number), event(number, "outcome")] * 50)
                chain.sign()

    Chain(tmp_path, SEED, NAME).close()
    writer = threading.Thread(target=write)
    writer.start()
    reports = [checked(tmp_path)]
    try:
        while reports[-1].records < 5000 or len(reports) <= 5:
            reports.append(checked(tmp_path))
    finally:
        stop.set()
        writer.join()
    assert [found for report in reports for found in report.findings] == []
    assert len(reports) > 5


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """llm-audit's exit code and output."""
    code = cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out + told.err


def test_the_command_verify_has_its_exit_codes(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = (copy / "verifier").read_text().strip()
    code, said = run(capsys, "verify", copy, "--verifier", key, "--heads", copy / "heads")
    assert (code, "nothing was altered" in said) == (0, True)
    assert "the last 100 records come after the last head" in said
    code, said = run(capsys, "verify", copy, "--json")
    assert json.loads(said) == {
        **json.loads(said),
        "ok": True,
        "records": LINES,
        "open_tail": 100,
        "altered": 0,
    }
    files(copy)[0].write_bytes(files(copy)[0].read_bytes().replace(b"alice", b"bobby", 1))
    code, said = run(capsys, "verify", copy)
    assert (code, f"{files(copy)[0]}:1: record 1: changed" in said) == (3, True)
    assert run(capsys, "verify", tmp_path / "empty")[0] == 4
    assert run(capsys, "verify", copy, "--verifier", "nonsense")[0] == 1
    assert run(capsys, "verify", copy, "--heads", tmp_path / "none") == (
        1, f"llm-audit: there are no kept heads {tmp_path / 'none'}: give the file that the witness wrote\n"
    )  # fmt: skip
    (copy / "verifier").unlink()
    assert run(capsys, "verify", copy)[0] == 1


def test_a_record_whose_files_are_all_gone_is_altered_and_not_nothing(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in files(copy):
        path.unlink()
    assert run(capsys, "verify", copy)[0] == 3


def test_show_filters_and_never_obeys_what_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Chain(tmp_path, SEED, NAME) as chain:
        chain.append([event(1), {**event(2), "user.id": "bob@corp"}, {**event(3), "organization.id": "lab"}])
        chain.append([{**event(4), "event.action": "\x1b[2Jgone\nline"}])
    assert len(run(capsys, "show", tmp_path)[1].splitlines()) == 4
    for option, value, expected in [
        ("--subject", "bob@corp", ["2"]), ("--tenant", "lab", ["3"]), ("--request", "request-1", ["1"]),
        ("--since", "2020", ["1", "2", "3", "4"]), ("--until", "2020", []), ("--until", "2999", ["1", "2", "3", "4"]),
    ]:  # fmt: skip
        code, said = run(capsys, "show", tmp_path, option, value)
        assert [line.split()[0] for line in said.splitlines()] == expected
        assert code == (0 if expected else 4)
    said = run(capsys, "show", tmp_path, "--request", "request-4")[1]
    assert "\x1b" not in said
    assert "\\x1b[2Jgone\\nline" in said
    assert (
        json.loads(run(capsys, "show", tmp_path, "--request", "request-4", "--json")[1])["event.sequence"]
        == 4
    )


@pytest.mark.parametrize(
    ("line", "sequence", "said"),
    [(0, 0, "file: wrong"), (3, 0, "file:3: wrong"), (0, 7, "file: record 7: wrong"), (3, 7, "file:3: record 7: wrong")],
)  # fmt: skip
def test_a_finding_names_its_line_and_its_record_where_it_has_them(
    line: int, sequence: int, said: str
) -> None:
    assert str(Finding("file", line, sequence, "wrong")) == said


def places(folder: Path, kept: Path | None = None) -> list[tuple[str, int, int]]:
    """Where the findings are: file, line, record."""
    return [(Path(found.file).name, found.line, found.sequence) for found in checked(folder, kept).findings]


def test_what_no_line_shows_is_found_in_the_file_or_folder_itself(copy: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copy(copy / "heads", tmp_path / "kept"))
    (copy / "heads").unlink()
    assert places(copy, kept) == [("heads", 0, 0)]
    shutil.copy(kept, copy / "heads")
    for path in files(copy):
        path.unlink()
    assert places(copy) == [("record", 0, 1)]


def test_a_file_that_is_missing_is_found_where_it_is_due(copy: Path) -> None:
    _, second, third, *_ = files(copy)
    due = int(second.stem.split("-")[1])
    second.unlink()
    assert places(copy)[0] == (third.name, 0, due)


def test_a_torn_head_is_found_at_the_line_where_it_begins(copy: Path) -> None:
    path = copy / "heads"
    path.write_bytes(path.read_bytes()[:-30])
    assert places(copy) == [("heads", 8 * 7 + 1, 0)]


def test_heads_that_are_no_heads_are_found_at_their_lines_and_the_others_are_read(copy: Path) -> None:
    path = copy / "heads"
    notes, _ = heads.read(path)
    notes[1], notes[3] = (
        note.replace(b"llm-audit/test", b"llm-audit/mine", 1) for note in (notes[1], notes[3])
    )
    path.write_bytes(b"".join(note + b"\n" for note in notes))
    assert places(copy) == [("heads", 8, 0), ("heads", 22, 0)]
    assert checked(copy).heads == 7


@pytest.mark.parametrize("name", ["heads", "records-000000000001.jsonl"])
def test_what_a_writer_is_just_writing_is_not_taken_for_torn(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmproof.verify.WRITER_SECONDS", 30)  # on a busy machine it may be away for long
    path = record(tmp_path / "record", 3, head_each=1) / name
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    if name != "heads":
        (tmp_path / "record/heads").unlink()

    def finish() -> None:
        time.sleep(0.3)
        with path.open("ab") as file:
            file.write(data[-40:])

    writer = threading.Thread(target=finish)
    writer.start()
    report = checked(tmp_path / "record")
    writer.join()
    assert report.findings == []


def test_a_torn_end_is_waited_for_a_second(tmp_path: Path) -> None:
    folder = record(tmp_path / "record", 3)
    files(folder)[0].write_bytes(files(folder)[0].read_bytes()[:-1])
    start = time.monotonic()
    assert places(folder) == [("records-000000000001.jsonl", 3, 3)]
    assert time.monotonic() - start > 0.9


def test_only_the_end_of_the_last_file_is_waited_for(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmproof.verify.WRITER_SECONDS", 60)
    first, second, *_ = files(copy)
    first.write_bytes(first.read_bytes()[:-1])
    due = int(second.stem.split("-")[1])
    start = time.monotonic()
    assert places(copy)[0] == (first.name, due - 1, due - 1)
    assert time.monotonic() - start < 30


def test_a_whole_line_that_is_no_json_is_found_although_its_hashes_fit(tmp_path: Path) -> None:
    folder = record(tmp_path / "record", 1)
    body = b'{"event.sequence":2,"@timestamp":"x",nonsense,"llmkeep.audit.previous":"%s"' % (
        hashlib.sha256(whole(folder)[0]).hexdigest().encode()
    )
    line = body + b',"llmkeep.audit.hash":"' + hashlib.sha256(body).hexdigest().encode() + b'"}'
    put(files(folder)[0], [*whole(folder), line])
    assert [str(found).split(": ", 1)[1] for found in checked(folder).findings] == [
        "record 2: not JSON, although its hashes match: not written by this writer"
    ]


def test_no_more_than_twenty_pending_intents_are_named_and_all_are_counted(tmp_path: Path) -> None:
    with Chain(tmp_path, SEED, NAME) as chain:
        chain.append([event(number) for number in range(25)])
        chain.append([event(number, "outcome") for number in (30, 31)])  # of intents that are elsewhere
    report = checked(tmp_path)
    assert report.pending == 25
    assert report.pending_ids == [f"transaction-{number}" for number in range(20)]


def test_an_intent_that_names_nothing_is_told_by_its_number(tmp_path: Path) -> None:
    with Chain(tmp_path, SEED, NAME) as chain:
        chain.append([{"a": 1}, {"llmkeep.audit.phase": "intent"}])
    assert checked(tmp_path).pending_ids == ["2"]


def test_a_report_has_the_times_of_the_first_and_the_last_record(good: Path) -> None:
    report, lines = checked(good), whole(good)
    assert report.first == json.loads(lines[0])["@timestamp"]
    assert report.last == json.loads(lines[-1])["@timestamp"]


def test_after_a_damage_the_next_one_is_found_too(copy: Path) -> None:
    path = files(copy)[0]
    lines = path.read_bytes().split(b"\n")[:-1]
    lines[4], lines[8] = lines[4].replace(b"alice", b"mally"), lines[8].replace(b"alice", b"mally")
    put(path, lines)
    assert kinds(copy) == ["5 changed", "9 changed", "100 rewritten"]
    assert "something in records 1 to 100" in checked(copy).findings[2].what


def test_a_head_that_does_not_fit_is_found_once_with_each_place_that_has_it(
    copy: Path, tmp_path: Path
) -> None:
    kept = Path(shutil.copy(copy / "heads", tmp_path / "kept"))
    rewrite(copy, 450)
    report = checked(copy, kept)
    path = max(each for each in files(copy) if int(each.stem.split("-")[1]) <= 500)
    line = 500 - int(path.stem.split("-")[1]) + 1
    assert [(found.file, found.line, found.sequence) for found in report.findings] == [(str(path), line, 500)]
    assert f"in {kept} and {copy / 'heads'} does not match" in report.findings[0].what


def test_a_hash_that_is_no_text_after_a_damage_is_a_finding(copy: Path) -> None:
    path = files(copy)[0]
    lines = path.read_bytes().split(b"\n")[:-1]
    lines[4] = lines[4].replace(b"alice", b"mally")
    lines[5] = lines[5].replace(named_previous(lines[5]).encode(), b"\xff" * 64)
    put(path, lines)
    assert kinds(copy) == ["5 changed", "6 changed", "100 rewritten"]


def test_a_line_with_the_right_number_in_another_form_is_not_told_as_a_gap(tmp_path: Path) -> None:
    folder = record(tmp_path / "record", 2)
    lines = whole(folder)
    body = lines[1].split(b',"llmkeep.audit.hash"')[0].replace(b'"@timestamp"', b'"a":1,"@timestamp"')
    lines[1] = body + b',"llmkeep.audit.hash":"' + hashlib.sha256(body).hexdigest().encode() + b'"}'
    put(files(folder)[0], lines)
    assert kinds(folder) == ["2 moved or added"]


def test_a_report_names_the_key_that_it_was_made_with(good: Path) -> None:
    assert checked(good).verifier == verifier(good).text


def test_a_kept_head_that_does_not_open_is_found_in_the_kept_file(copy: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copy(copy / "heads", tmp_path / "kept"))
    notes, _ = heads.read(kept)
    kept.write_bytes(b"".join(note + b"\n" for note in [notes[0].replace(b"100", b"101", 1), *notes[1:]]))
    assert places(copy, kept) == [("kept", 1, 0)]
    assert checked(copy, kept).kept_heads == 8


def test_a_record_that_has_only_begun_is_nothing_and_not_altered(tmp_path: Path) -> None:
    Chain(tmp_path, SEED, NAME).close()
    report = checked(tmp_path)
    assert (report.findings, report.nothing, report.open_tail) == ([], True, 0)


AT_ONCE = -CLOCK_SECONDS  # a promise that nothing keeps


def test_a_record_whose_heads_have_no_times_verifies_and_is_gone_on_with(tmp_path: Path) -> None:
    folder = shutil.copytree(UNTIMED, tmp_path / "record")
    assert checked(folder, UNTIMED / "heads").ok
    with Chain(folder, SEED, unsigned_seconds=1e12) as chain:
        chain.append([event(9)])
        chain.sign()
    report = checked(folder, UNTIMED / "heads")
    assert (report.findings, report.records, report.heads, report.open_tail) == ([], 8, 4, 0)


def test_a_tail_that_grew_without_a_head_for_longer_than_promised_is_a_finding(good: Path) -> None:
    report = verify(good, verifier(good), unsigned_seconds=AT_ONCE)
    found = [(each.sequence, each.what.partition(":")[0]) for each in report.findings]
    assert found == [(LINES - 99, "unsigned for too long")]
    assert report.open_tail == 100


def test_the_tail_of_a_copy_does_not_age_and_that_of_a_writer_at_work_does(tmp_path: Path) -> None:
    folder = record(tmp_path / "record", 1)
    assert verify(folder, verifier(folder), unsigned_seconds=AT_ONCE).ok
    assert not verify(folder, verifier(folder), unsigned_seconds=AT_ONCE, live=True).ok


def test_heads_that_came_late_are_counted_and_no_alteration(tmp_path: Path) -> None:
    folder = record(tmp_path / "record", 30)
    report = verify(folder, verifier(folder), unsigned_seconds=AT_ONCE)
    assert (report.ok, report.heads, report.late) == (True, 3, 3)
    assert checked(folder).late == 0


def test_a_tail_that_was_forged_and_then_signed_is_found_by_the_witnesss_tips(
    copy: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(copy / "heads", kept / "heads")
    tree = Tree()
    for line in whole(copy)[: LINES - 40]:
        tree.add(line)
    tip = Head(tree.size, tree.root()).text(NAME)
    (kept / "tips").write_bytes(tip + b"\n")
    assert checked(copy, kept / "heads").ok
    rewrite(copy, LINES - 60)
    with Chain(copy, SEED) as chain:  # which knows of no witness
        chain.sign()
    assert checked(copy).ok
    assert kinds(copy, kept / "heads") == [f"{LINES - 40} rewritten"]
