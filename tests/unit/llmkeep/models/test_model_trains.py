"""A sharded DeepSeek that was taken in is what a training host needs: `llm-train run` prepares data with it and trains it."""

import json
import secrets
import subprocess
from pathlib import Path

import model_add
import pytest
import sharded_deepseek
from plugin_modules import ROOT


def test_a_model_from_outside_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sharded_deepseek.write(tmp_path / "deepseek-tiny")
    assert model_add.run(capsys, source, tmp_path / "candidate")[0] == 0
    model = tmp_path / "candidate/models/deepseek-tiny"
    (tmp_path / "key").write_bytes(secrets.token_bytes(32))
    (tmp_path / "key").chmod(0o600)
    prepare = {
        "inputs": [{"path": str(ROOT / "LICENSE"), "format": "text"}],
        "tokenizer": str(model),
        "pack": {"seq_len": 128},
        "work": str(tmp_path / "work"),
        "output": str(tmp_path / "rows"),
    }
    job = {
        "name": "trained",
        "model": str(model),
        "method": {"kind": "full"},
        "data": {"train": str(tmp_path / "rows")},
        "output": str(tmp_path / "trained"),
        "optim": {"steps": 4, "lr": 1e-2, "precision": "fp32"},
        "scale": {"tokens_per_step": 256, "micro_batch": 2},
        "watch": {"log_every": 1},
    }
    for name, content in {"data": prepare, "job": job}.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    command = [str(ROOT / "payload/.venv/bin/llm-train"), "run", str(tmp_path / "job.yaml")]
    options = ["--prepare", str(tmp_path / "data.yaml"), "--key-file", str(tmp_path / "key")]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if "python3-torch is not installed" in run.stderr:
        pytest.skip("Debian's python3-torch is not installed")
    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads((tmp_path / "trained/model/training.json").read_text())
    assert told["step"] == 4
    assert told["losses"]["4"] < told["losses"]["1"]
    config = json.loads((tmp_path / "trained/model/config.json").read_text())
    assert config["architectures"] == ["DeepseekV2ForCausalLM"]
