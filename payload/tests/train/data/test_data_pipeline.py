"""`llm-train data run` end to end: its results, what is recomputed, what a kill costs."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_set import bytes_of, done_in, made, rejects_of, rules_of, sentence, settings_of, write_lines

from llmtrain.cli import main
from llmtrain.data.pipeline import run
from llmtrain.data.rows import SOURCES, Rows
from llmtrain.data.where import where
from llmtrain.exits import FAILED, NO_SPACE, STOPPED, USAGE, Refusal


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three files of forty texts."""
    for file in range(3):
        texts = [{"text": sentence(file * 100 + number)} for number in range(40)]
        write_lines(tmp_path / f"raw/{file}.jsonl", texts)
    return tmp_path


def written(root: Path, **changed: Any) -> Path:
    """The configuration as a file."""
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump(settings_of(root, **changed).model_dump(mode="json", exclude_none=True)))
    return path


def command(root: Path, *more: str, modules: Path | None = None, **changed: Any) -> subprocess.Popen[str]:
    """Start the command as a process, with the folder `modules` on Python's path."""
    path = written(root, **changed)
    words = [sys.executable, "-m", "llmtrain", "data", "run", "--config", str(path), *more]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[3]}:{modules or ''}"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


# Once a result exists, the next flush waits.
HOLDS = """
import os, time
from pathlib import Path
flush = os.fsync

def held(descriptor):
    flush(descriptor)
    while any(path.parent.suffix != ".partial" for path in Path({work!r}).glob("*/*/done.json")):
        time.sleep(0.01)

os.fsync = held
"""


def held(root: Path, *more: str, **changed: Any) -> subprocess.Popen[str]:
    """A run that has finished some work and is held, so that a test on a busy machine is in time to disturb it."""
    modules = root / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(HOLDS.format(work=str(root / "work")))
    process = command(root, *more, modules=modules, **changed)
    while process.poll() is None and not done_in(root / "work"):
        time.sleep(0.002)
    return process


def test_every_document_is_in_the_rows_or_in_the_reject_file(root: Path) -> None:
    write_lines(root / "raw/3.jsonl", [{"text": sentence(1)}, {"text": "   "}, {"nothing": 1}])
    report = made(root)
    assert report["rows"]["documents"] + len(rejects_of(root)) == 123
    assert sorted(rules_of(root)) == ["empty", "exact_duplicate", "no_text"]


def test_the_rows_are_whole_and_name_their_tokenizer(root: Path) -> None:
    report = made(root)
    rows = Rows(root / "out")
    rows.verify()
    learned = sum(int(row.learned.sum()) for row in rows)
    assert (len(rows), learned) == (report["rows"]["rows"], report["rows"]["learned"])


def test_the_files_that_it_is_made_of_are_named_so_that_the_gate_knows_them(root: Path) -> None:
    for _ in range(2):  # the second time nothing is read
        made(root)
        files = [
            hashlib.sha256((root / f"raw/{number}.jsonl").read_bytes()).hexdigest() for number in range(3)
        ]
        assert (root / "out" / SOURCES).read_text().split() == sorted(files)


def test_another_number_of_workers_changes_no_byte(root: Path) -> None:
    made(root)
    alone = bytes_of(root / "out")
    settings = settings_of(root, output=str(root / "out2"), work=str(root / "work2"))
    run(settings, workers=3, prune=False)
    many = bytes_of(root / "out2")
    assert many.pop("report.html").replace(b"out2", b"out") == alone.pop("report.html")
    assert many == alone


def test_a_second_run_makes_nothing_again(root: Path) -> None:
    made(root)
    before = done_in(root / "work")
    made(root)
    assert done_in(root / "work") == before


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"pack": {"seq_len": 256}}, {"pack"}),
        ({"duplicates": {"near": {"bands": 7}}}, {"near-keys", "near-same", "near-drops"}),
        ({"quality": {"min_letters": 21}}, {"quality"}),
        # A rule that is named and changes no text here: only the step itself runs.
        ({"clean": {"rules": ["newlines", "whitespace"]}}, {"clean"}),
    ],
    ids=["pack", "near", "quality", "clean"],
)
def test_a_changed_rule_runs_again_only_what_it_must(root: Path, changed: Any, again: set[str]) -> None:
    made(root)
    before = done_in(root / "work")
    made(root, **changed)
    assert {name.split("/")[0] for name in done_in(root / "work").keys() - before.keys()} == again


def test_a_changed_file_reads_again_only_its_shard(root: Path) -> None:
    made(root, reading={"shard_mb": 1})
    other = write_lines(root / "raw2/more.jsonl", [{"text": sentence(900)}])
    inputs = [{"path": str(root / "raw")}, {"path": str(other)}]
    made(root, inputs=inputs)
    before = done_in(root / "work")
    write_lines(other, [{"text": sentence(901)}])
    made(root, inputs=inputs)
    anew = [name for name in done_in(root / "work").keys() - before.keys() if name.startswith("clean/")]
    assert len(anew) == 1


def test_pruning_leaves_what_the_last_run_used(root: Path) -> None:
    made(root)
    earlier = set((root / "work").glob("quality/*"))  # two where a path's hash ends a shard
    run(settings_of(root, quality={"min_letters": 22}), 1, prune=True)
    later = set((root / "work").glob("quality/*"))
    assert len(later) == len(earlier)
    assert not later & earlier
    before = done_in(root / "work")
    run(settings_of(root, quality={"min_letters": 22}), 1, prune=False)
    assert done_in(root / "work") == before


def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_bytes(root: Path) -> None:
    inputs = [{"path": str(root / f"raw/{file}.jsonl")} for file in range(3)]
    made(root, inputs=inputs)
    whole = bytes_of(root / "out")
    killed: dict[str, Any] = {
        "inputs": inputs,
        "work": str(root / "work2"),
        "output": str(root / "killed/out"),
    }
    for wanted in (2, 9, 27):
        process = command(root, "--workers", "2", **killed)
        while process.poll() is None and len(done_in(root / "work2")) < wanted:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        if wanted == 9:
            kept = done_in(root / "work2")
    process = command(root, "--workers", "2", **killed)
    _, said = process.communicate()
    assert process.returncode == 0, said
    after = done_in(root / "work2")
    assert {name: after[name] for name in kept} == kept, "what was done is made again"
    assert bytes_of(root / "killed/out") == whole


def test_workers_end_when_the_run_is_killed(root: Path) -> None:
    process = held(root, "--workers", "2", inputs=[{"path": str(root / f"raw/{n}.jsonl")} for n in range(3)])
    children = descendants(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children
    assert not [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists()]


def descendants(pid: int) -> list[int]:
    """Peak resident memory of a process, in bytes."""
    children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [deeper for child in children for deeper in descendants(child)]


def test_a_killed_worker_ends_the_run_with_what_to_do(root: Path) -> None:
    process = held(root, "--workers", "2", inputs=[{"path": str(root / f"raw/{n}.jsonl")} for n in range(3)])
    # The pool's own helper processes come first; its workers are the last.
    for pid in descendants(process.pid)[-2:]:
        with suppress(ProcessLookupError):  # the pool has ended the other one itself
            os.kill(pid, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == FAILED, said
    assert "a worker was killed" in said


def test_a_full_disk_is_said_and_has_its_code(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        """A fake that fails like a full disk."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("llmtrain.data.work_directory.flush", full)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest keeps its own
    assert main(["data", "run", "--config", str(written(root)), "--workers", "1"]) == NO_SPACE
    assert "is full (No space left on device): free some space" in capsys.readouterr().err


def test_sigterm_ends_with_the_code_for_stopped(root: Path) -> None:
    process = held(root, "--workers", "1")
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == STOPPED, said


def test_two_runs_in_one_working_directory_are_refused(root: Path) -> None:
    first = held(root, "--workers", "1")
    try:
        with pytest.raises(Refusal, match="in use by another"):
            made(root)
    finally:
        first.kill()
        first.communicate()


def test_a_data_set_of_which_nothing_is_left_is_refused_with_the_reasons(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", [{"text": "short"}])
    with pytest.raises(Refusal, match=r"no document is left.*'short': 1") as refusal:
        made(tmp_path)
    assert refusal.value.code == USAGE
    assert rules_of(tmp_path) == ["short"]


def test_the_reject_file_has_a_text_only_where_it_is_asked_for(root: Path) -> None:
    write_lines(root / "raw/3.jsonl", [{"text": "too short"}])
    made(root)
    assert "text" not in rejects_of(root)[0]
    made(root, reject_text=True)
    assert rejects_of(root)[0]["text"] == "too short"


def test_a_rule_with_a_typo_is_refused_by_its_name(root: Path) -> None:
    path = written(root)
    path.write_text(path.read_text().replace("- urls", "- url"))
    words = [sys.executable, "-m", "llmtrain", "data", "run", "--config", str(path)]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == USAGE
    assert "there are no rules url: choose from newlines, control" in answer.stderr


def test_where_finds_a_document_by_a_part_of_its_text_and_the_model_that_saw_it(root: Path) -> None:
    said = "Zhang San, born in Xian, \n wrote " + sentence(500)
    write_lines(root / "raw/3.jsonl", [{"text": said}, {"text": said}])
    made(root)
    digest = Rows(root / "out").digest
    for name, data in (("mine", digest), ("other", "0" * 64)):
        (root / "models" / name).mkdir(parents=True)
        (root / "models" / name / "training.json").write_text(json.dumps({"data": data}))
    answer = where("Zhang San, born in Xian, wrote", [root / "out"], settings_of(root), root / "models")
    [line] = answer["rows"]
    [copy] = answer["dropped"]
    assert line["id"] == f"{root}/raw/3.jsonl#0"
    assert copy["reason"] == f"the same as {line['id']}"
    assert [each["model"] for each in answer["models"]] == [str(root / "models/mine")]
    rows = Rows(root / "out")
    in_file = [name for name, count, _ in rows.shards for _ in range(count)]
    first = in_file.index(line["file"])
    assert b"Zhang" in spoken(root, rows, first + line["rows"][0])


def spoken(root: Path, rows: Rows, number: int) -> bytes:
    """The decoded text of a row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    text: str = tokenizer.decode(rows[number].input_ids.tolist())
    return text.encode()


def test_where_says_that_nothing_holds_it(root: Path) -> None:
    made(root)
    answer = where("no text of ours", [root / "out"], settings_of(root), None)
    assert answer == {"rows": [], "dropped": [], "models": []}


def test_the_page_needs_nothing_from_elsewhere_and_has_the_drops(root: Path) -> None:
    write_lines(root / "raw/3.jsonl", [{"text": "too short"}])
    made(root)
    page = (root / "out/report.html").read_text()
    assert "http" not in page
    assert ">short</text>" in page
