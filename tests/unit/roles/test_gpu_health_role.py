"""What role gpu_health makes of an inventory: the watch's configuration, as the watch reads it, and its unit, as systemd does."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_modules import ROOT
from rendered_role import content, hardened, rendered

HOSTS = {"llm1.estate.internal": "10.0.0.1", "gpu1.estate.internal": "10.0.0.2"}
GROUPS = {"serve": ["llm1"], "vllm": ["llm1"], "train": ["gpu1"], "gpu": ["llm1", "gpu1"]}
GIVEN: dict[str, Any] = {
    "gpu_health_expect": {
        "count": 8,
        "name": "NVIDIA A100-SXM4-80GB",
        "ecc": True,
        "power_limit_watts": 400,
        "mig_layout": {0: ["3g.40gb", "3g.40gb"]},
    },
    "gpu_health_engines": [{"name": "small", "socket": "/run/llm-engine/small.sock", "gpus": [7]}],
    "vllm_models": [{"name": "1.5", "gpus": [0, 1, 2, 3]}],
    "__gpu_health_current": {"stat": {"exists": True, "lnk_target": "releases/0123456789ab"}},
}
LLM_GPU = ROOT / "payload/.venv/bin/llm-gpu"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the role makes of GIVEN on a host that serves, and on one that only trains."""
    wanted = {
        "unit": "lookup('ansible.builtin.template', 'llm-gpu.service.j2')",
        "served": "__gpu_health_served",
        "by_cuda": "__gpu_health_by_cuda",
    }
    return {
        host: rendered(
            tmp_path_factory.mktemp(host), "gpu_health", wanted, host, HOSTS, GIVEN, GROUPS, configured=True
        )
        for host in ("llm1", "gpu1")
    }


def test_a_host_that_serves_has_vllm_s_models_and_other_engines_watched_and_on_record(made: Any) -> None:
    serving = made["llm1"]
    assert yaml.safe_load(content(serving, "/gpu.yaml")) == {
        "expect": {**GIVEN["gpu_health_expect"], "mig_layout": {"0": ["3g.40gb", "3g.40gb"]}},
        "engines": {
            "1.5": {"socket": "/run/vllm/1.5/api.sock", "unit": "vllm@1.5.service", "gpus": [0, 1, 2, 3]},
            "small": {"socket": "/run/llm-engine/small.sock", "gpus": [7]},
        },
        "gateways": [9464, 9465],
        "state": "/var/lib/llm-gpu/state.json",
        "metrics_port": 9410,
        "seconds": 10,
        "stale_seconds": 30,
        "return_seconds": 60,
    }
    assert serving["served"] == ["1.5", "small"]
    assert serving["by_cuda"] is False, "a GPU is divided"
    assert "\nExecStart=/opt/llmkeep/current/bin/llm-gpu watch\n" in serving["unit"]
    assert "\nX-Release=0123456789ab\n" in serving["unit"], (
        "another release is another unit, and starts it anew"
    )
    assert "\nSupplementaryGroups=llm-audit\n" in serving["unit"]


def test_a_host_that_only_trains_waits_for_no_audit_writer(made: Any) -> None:
    training = made["gpu1"]
    assert yaml.safe_load(content(training, "/gpu.yaml"))["audit"] is None
    assert training["served"] == ["small"]
    assert "\nExecStart=/opt/llmtrain/current/bin/llm-gpu watch\n" in training["unit"]
    assert "llm-audit" not in training["unit"]


@pytest.mark.parametrize("host", ["llm1", "gpu1"])
def test_the_watch_reads_its_configuration_and_its_unit_is_hardened(
    made: Any, host: str, tmp_path: Path
) -> None:
    text = content(made[host], "/gpu.yaml").replace("/var/lib/llm-gpu/", f"{tmp_path}/")
    (tmp_path / "gpu.yaml").write_text(text)
    read = subprocess.run(
        [LLM_GPU, "status", "--config", tmp_path / "gpu.yaml"], capture_output=True, text=True, check=False
    )
    wanted = [f"{name}: in service" for name in made[host]["served"]]
    assert (read.returncode, read.stdout.splitlines()) == (0, wanted), read.stderr
    hardened(tmp_path, "llm-gpu.service", made[host]["unit"])
