"""`llm-train check` and `run --prepare`, as the role uses them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmtrain import exits
from llmtrain.cli import main

JOB = {
    "name": "small",
    "model": "/srv/model",
    "method": {"kind": "lora"},
    "data": {"train": "/srv/rows"},
    "output": "/srv/out",
}
DATA = {"inputs": [{"path": "/nowhere"}], "tokenizer": "/srv/model", "work": "work", "output": "rows"}


def written(folder: Path, content: object) -> str:
    path = folder / "asked.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize(("kind", "content"), [("job", JOB), ("data", DATA)])
def test_a_file_that_is_right_is_checked_without_a_word(
    kind: str, content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", kind, written(tmp_path, content)]) == exits.DONE
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("kind", "content"), [("job", JOB), ("data", DATA)])
def test_a_typo_is_named(
    kind: str, content: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", kind, written(tmp_path, {**content, "epochz": 1})]) == exits.USAGE
    assert "unknown key 'epochz'" in capsys.readouterr().err


def test_a_job_whose_rows_cannot_be_made_does_not_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump(DATA))
    assert main(["run", written(tmp_path, JOB), "--prepare", str(data)]) == exits.USAGE
    assert "/nowhere" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    seen = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llmtrain", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in seen.stderr.splitlines()}
    assert "llmtrain.cli" in imported
    assert not imported & {"torch", "transformers", "pyarrow", "deepspeed", "peft"}
