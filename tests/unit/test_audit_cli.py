"""llm-audit's output, word by word: people read it, and scripts take it apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from audit_records import event, record

from llmproof import cli
from llmproof.chain import file_name, files
from llmproof.verify import FINDINGS


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """llm-audit's exit code, what it printed, and what it complained of."""
    code = cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def written(folder: Path, *records: dict[str, object] | bytes) -> Path:
    """A file with these lines; `show` does not ask whether they are chained."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in records]
    (folder / file_name(1)).write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


def at(time: str, number: int = 1, /, **more: object) -> dict[str, object]:
    return {"event.sequence": number, "@timestamp": time, **more}


def test_show_prints_number_time_caller_phase_outcome_action_status_and_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, at("2027-01-31T08:00:00Z", 7, **event(3), **{"http.response.status_code": 200}))
    assert said(capsys, "show", tmp_path) == (
        0,
        "7  2027-01-31T08:00:00Z  alice@corp@corp  intent  unknown  POST /v1/chat/completions  200  request-3\n",
        "",
    )


@pytest.mark.parametrize(
    ("fields", "caller"),
    [({}, "-@-"), ({"user.name": "alice"}, "alice@-"), ({"organization.id": "corp"}, "-@corp"),
     ({"user.name": "alice", "user.id": "a1"}, "a1@-")],
)  # fmt: skip
def test_show_names_the_caller_by_what_the_record_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, object], caller: str
) -> None:
    written(tmp_path, at("2027", **fields))
    assert said(capsys, "show", tmp_path)[1] == f"1  2027  {caller}\n"


def test_show_prints_a_record_that_has_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, {"event.sequence": 1})
    assert said(capsys, "show", tmp_path)[1] == "1    -@-\n"


def test_show_finds_a_subject_by_its_name_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, at("2027", 1, **{"user.name": "bob"}), at("2027", 2, **{"user.name": "alice"}))
    assert said(capsys, "show", tmp_path, "--subject", "alice")[1] == "2  2027  alice@-\n"


@pytest.mark.parametrize(
    ("options", "numbers"),
    [(["--since", "2027-01-02T00"], ["2", "1"]), (["--since", "2027-01-02"], ["2", "1"]),
     (["--until", "2027-01-02"], ["3", "2"]), (["--until", "2027-01-02T00:00"], ["3", "2"]),
     (["--since", "2027-01-02", "--until", "2027-01-02"], ["2"])],
)  # fmt: skip
def test_show_takes_both_ends_of_a_span_for_a_part_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], numbers: list[str]
) -> None:
    # The clock was put back: what is out of the span comes before what is in it.
    written(tmp_path, at("2027-01-03T00", 1), at("2027-01-01T00", 3), at("2027-01-02T00", 2))
    expected = [number for number in ("1", "3", "2") if number in numbers]
    lines = said(capsys, "show", tmp_path, *options)[1].splitlines()
    assert [line.split()[0] for line in lines] == expected


def test_show_goes_on_after_a_line_that_is_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, b'{"torn', b"[1]", at("2027", 2))
    assert said(capsys, "show", tmp_path) == (0, "2  2027  -@-\n", "")


def test_show_json_prints_each_line_as_it_stands_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, b'{"a": "\xc3\xbc\\u001b"} ', b'{"b":1}')
    assert said(capsys, "show", tmp_path, "--json")[1] == '{"a": "ü\\u001b"} \n{"b":1}\n'


def test_show_json_prints_a_line_that_is_not_quite_utf_8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, b'{"a":"\xed\xa0\x80"}')  # half of a pair: JSON in Python takes it
    assert said(capsys, "show", tmp_path, "--json")[1] == '{"a":"\ufffd\ufffd\ufffd"}\n'


def test_without_a_command_it_prints_its_usage_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: llm-audit [-h] COMMAND ...\n")


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    assert "Exit codes: 0 good;" in capsys.readouterr().out


def test_show_prints_letters_of_any_language_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, at("2027", **{"user.id": "müller 管理员"}))
    assert said(capsys, "show", tmp_path)[1] == "1  2027  müller 管理员@-\n"


def test_show_whose_reader_has_gone_ends_with_1_and_without_a_word(tmp_path: Path) -> None:
    written(tmp_path, *(at("2027", number) for number in range(10_000)))
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "llmproof", "show", tmp_path],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_verify_json_of_no_record_is_a_report_of_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = said(capsys, "verify", tmp_path / "none", "--json")
    report = json.loads(out)
    assert (code, report["ok"], report["verifier"], report["records"]) == (4, False, "", 0)


def test_verify_takes_the_verifier_key_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(tmp_path / "record", 3)
    key = (folder / "verifier").rename(tmp_path / "noted")
    assert said(capsys, "verify", folder, "--verifier", key)[0] == 0


def test_verify_tells_how_many_findings_it_does_not_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(tmp_path / "record", FINDINGS + 5, head_each=1000)
    path, data = files(folder)[0], files(folder)[0].read_bytes()
    path.write_bytes(data.replace(b"alice", b"bobby", 1))
    assert "more\n" not in said(capsys, "verify", folder)[1]
    path.write_bytes(data.replace(b"alice", b"bobby"))
    assert said(capsys, "verify", folder)[1].splitlines()[FINDINGS] == "… and 5 more"
