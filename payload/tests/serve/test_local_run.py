"""`llm-serve run` on a developer's machine."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
from service import eventually


def test_run_prints_a_key_once_it_is_answered_and_no_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with (tmp_path / "err").open("w") as err, (tmp_path / "out").open("w") as out:
        command = [sys.executable, "-m", "llmserve", "run", "--engine", "echo", "--port", "0"]
        environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
        (tmp_path / "tmp").mkdir()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
    try:
        shown = eventually(
            "the key is printed",
            lambda: re.search(r"key\s+(\S+)\s", (tmp_path / "out").read_text()),
        )
        address = re.search(r"url\s+(\S+)", (tmp_path / "out").read_text())
        assert address
        response = httpx.get(
            f"{address[1]}/generate",
            params={"prompt": "hello you"},
            headers={"authorization": f"Bearer {shown[1]}"},
        )
        assert response.json()["response"] == "hello you"
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(10)
    assert code == 0
    assert [line.partition(":")[0] for line in (tmp_path / "err").read_text().splitlines()] == [
        "no Redis",
        "no policy",
        "starting echo",
    ]
    assert list((tmp_path / "tmp").iterdir()) == []
