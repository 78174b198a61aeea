"""`llm-serve run` on a developer's machine."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
from service import eventually


def test_run_prints_a_working_address_and_key_without_redis_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
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
        url, headers = f"{address[1]}/generate", {"authorization": f"Bearer {shown[1]}"}

        def answer() -> str | None:
            try:
                response = httpx.get(
                    url,
                    params={"prompt": "hello you"},
                    headers=headers,
                )
            except httpx.TransportError:
                return None
            text: str | None = response.json().get("response")
            return text

        assert eventually("it answers", answer) == "hello you"
        assert "no Redis: answers are not cached" in (tmp_path / "err").read_text()
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(10)
    assert code == 0
    assert list((tmp_path / "tmp").iterdir()) == []
