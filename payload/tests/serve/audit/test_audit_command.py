"""`llm-serve audit` is `llm-audit`."""

from pathlib import Path

import pytest

from llmproof.chain import Chain, files
from llmserve import cli


def test_verify_and_show_have_llm_audits_output_and_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", "verify", str(tmp_path / "none")]) == 4
    with Chain(tmp_path, bytes(32), "llm-audit/test") as chain:
        chain.append([{"user.id": "alice@corp", "event.action": "GET /generate"}])
        chain.sign()
    assert cli.main(["audit", "verify", str(tmp_path)]) == 0
    assert "1 records" in capsys.readouterr().out
    assert cli.main(["audit", "show", str(tmp_path), "--subject", "alice@corp"]) == 0
    assert "GET /generate" in capsys.readouterr().out
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes().replace(b"alice", b"bobby"))
    assert cli.main(["audit", "verify", str(tmp_path)]) == 3
    assert cli.main(["audit", "verify", str(tmp_path), "--verifier", "nonsense"]) == 1
