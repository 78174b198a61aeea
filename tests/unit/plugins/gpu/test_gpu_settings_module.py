"""The module in front of `llm-gpu settings`: a diff, a refusal in its words, nothing before the release has it."""

from pathlib import Path

import pytest
from called_module import called
from plugin_modules import load

gpu_settings = load("modules.gpu_settings")
DUE = '{"gpu": 3, "setting": "MIG", "before": "off", "after": "on (7g.80gb)", "pending": false}'
WAITING = '{"gpu": 5, "setting": "ECC", "before": "off", "after": "on", "pending": true}'


def program(folder: Path, code: int, out: str = "", err: str = "") -> str:
    """A stand-in for llm-gpu, which keeps its arguments and its configuration."""
    path = folder / "llm-gpu"
    path.write_text(
        f'#!/bin/sh\necho "$*" > {folder}/arguments\ncat > {folder}/config\necho \'{out}\'\necho "{err}" >&2\nexit {code}\n'
    )
    path.chmod(0o755)
    return str(path)


def test_what_differs_is_a_diff_and_what_waits_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f'{{"due": [{DUE}], "waiting": [{WAITING}]}}'
    given = {"program": program(tmp_path, 0, out), "config": "expect: {count: 8}\n", "take_last": True}
    result = called(gpu_settings, given, capsys)
    assert (result["changed"], result["diff"]["before"]) == (True, "GPU 3: MIG: off\n")
    assert result["diff"]["after"] == "GPU 3: MIG: on (7g.80gb)\n"
    assert result["waiting"] == ["GPU 5: ECC is on after a reset of the GPU or a reboot"]
    assert (tmp_path / "arguments").read_text() == "settings --config /dev/stdin --json --take-last\n"
    assert (tmp_path / "config").read_text().strip() == "expect: {count: 8}"
    out = f'{{"due": [], "waiting": [{WAITING}]}}'
    assert not called(gpu_settings, {**given, "program": program(tmp_path, 0, out)}, capsys)["changed"]


def test_a_refusal_keeps_its_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = "llm-gpu: the power limit of GPU 0 cannot be 500 W: declare 100 to 400 W"
    result = called(gpu_settings, {"program": program(tmp_path, 3, err=refused), "config": ""}, capsys)
    assert result["msg"] == f"The GPUs are not set as declared. {refused.removeprefix('llm-gpu: ')}"


def test_check_mode_has_nothing_to_show_before_the_release_has_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = "llm-gpu: error: argument command: invalid choice: 'settings' (choose from watch, check)"
    given = {"program": program(tmp_path, 2, err=err), "config": "", "_ansible_check_mode": True}
    assert called(gpu_settings, given, capsys)["changed"] is False
    assert "--check" in (tmp_path / "arguments").read_text()
    assert called(gpu_settings, {**given, "_ansible_check_mode": False}, capsys)["failed"]
