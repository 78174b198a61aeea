"""A host's GPUs before they serve: compared with what is expected, on the stand-in for NVIDIA's library."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvml_standin import Gpus

from llmcore.config import ConfigError, load
from llmgpu.settings import SKUS, GpuConfig

A100 = {"count": 8, "name": "NVIDIA A100-SXM4-80GB", "mig": False, "persistence": True}


@dataclass
class Host:
    folder: Path
    gpus: Gpus

    def check(
        self, *options: str, expect: dict[str, Any] = A100, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`llm-gpu check` as an operator runs it."""
        config = self.folder / "gpu.yaml"
        config.write_text(yaml.safe_dump({"expect": expect, "state": str(self.folder / "state.json")}))
        return subprocess.run(
            [sys.executable, "-m", "llmgpu", "check", "--config", str(config), *options],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **self.gpus.environment, **(environment or {})},
        )

    def findings(self, expect: dict[str, Any] = A100) -> list[tuple[str, int | None, bool]]:
        """Check, GPU, and whether it drains, of each finding."""
        report = json.loads(self.check("--json", expect=expect).stdout)
        return [(each["check"], each["gpu"], each["drains"]) for each in report["findings"]]


@pytest.fixture
def host(tmp_path: Path, gpus: Gpus) -> Host:
    return Host(tmp_path, gpus)


def test_eight_healthy_a100_are_accepted_and_cuda_works_on_each(host: Host) -> None:
    result = host.check("--cuda")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "8 GPUs are as expected"


def test_the_report_is_evidence_by_gpu(host: Host) -> None:
    result = host.check("--json", "--cuda")
    report = json.loads(result.stdout)
    assert (result.returncode, report["accepted"], report["driver"]) == (0, True, "535.261.03")
    assert {gpu["nvlinks"] for gpu in report["gpus"]} == {12}
    assert report["expected"]["nvlinks"] == 12, "thresholds of the SKU are part of it"


FAULTS: list[tuple[str, list[str], list[tuple[str, int | None, bool]]]] = [
    (
        "each on a GPU of its own",
        [
            "0.name = NVIDIA A100-SXM4-40GB",
            "1.pcie_width = 8",
            "2.remap_pending = 1",
            "3.retired_pending = 1",
            "4.nvlink_down = 3",
            "5.throttle = 0x40",
            "5.ecc_uncorr = 2",
            "6.mig_mode = 1",
            "6.persistence = 0",
            "7.ecc_mode = 0",
        ],
        [
            ("name", 0, True),
            ("pcie", 1, True),
            ("remap", 2, True),
            ("pages", 3, True),
            ("nvlink", 4, True),
            ("ecc", 5, False),
            ("throttled", 5, False),
            ("persistence", 6, False),
            ("mig", 6, True),
            ("ecc", 7, True),
        ],
    ),
    (
        "a lost GPU, a row that cannot be remapped, links that are not there, slow PCIe at work",
        ["3.lost = 1", "2.remap_pending = 1", "2.remap_failure = 1", "4.nvlink_count = 10", "5.pcie_gen = 1",
         "5.util_gpu = 80"],
        [("remap", 2, True), ("lost", 3, True), ("nvlink", 4, True), ("pcie", 5, False)],
    ),
    ("seven of eight", ["count = 7"], [("count", None, True)]),
    ("an idle GPU that saves power, a power cap at work", ["1.pcie_gen = 1", "5.throttle = 4"], []),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "found"), [each[1:] for each in FAULTS], ids=[each[0] for each in FAULTS])
def test_faults_are_found_and_drain_only_where_answers_suffer(
    host: Host, lines: list[str], found: list[tuple[str, int | None, bool]]
) -> None:
    host.gpus.become(*lines)
    assert host.findings() == found


def test_a_refusal_says_what_is_wrong_the_value_and_what_to_do(host: Host) -> None:
    host.gpus.become("4.nvlink_down = 3", "1.pcie_width = 8")
    result = host.check()
    assert result.returncode == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert failed == [
        (
            "FAILED: GPU 1: PCIe has 8 lanes, but 16 are expected: reseat the card or the riser "
            "(docs/operate/gpu-health.md#bus-xids)"
        ),
        "FAILED: GPU 4: 10 of 12 NVLinks are up; down: 0, 1 (docs/operate/gpu-health.md#nvlink-xids)",
    ]


def test_a_declared_power_limit_is_compared(host: Host) -> None:
    assert host.findings({**A100, "power_limit_watts": 300})[0] == ("power", 0, False)


def test_a_host_without_a_driver_is_refused(host: Host) -> None:
    result = host.check(environment={"LD_LIBRARY_PATH": str(host.folder)})
    assert result.returncode == 1
    assert "libnvidia-ml.so.1 was not found: install NVIDIA's driver" in result.stdout


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"MOCK_CUDA_FAULT": "3:context"}, "GPU 3: cuDevicePrimaryCtxRetain failed with CUDA_ERROR_INVALID_DEVICE"),
        ({"MOCK_CUDA_FAULT": "5:memory"}, "GPU 5: its memory changed 1 of 262144 words"),
        ({"MOCK_CUDA_DEVICES": "7"}, "CUDA finds 7 GPUs, but 8 are expected"),
    ],
)  # fmt: skip
def test_ready_means_that_cuda_works_on_all_gpus(host: Host, environment: dict[str, str], says: str) -> None:
    assert host.check(environment=environment).returncode == 0, "NVML alone sees nothing"
    result = host.check("--cuda", environment=environment)
    assert (result.returncode, says in result.stdout) == (1, True), result.stdout


def test_cuda_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, gpus: Gpus) -> None:
    from llmgpu import cuda

    for name, value in {**gpus.environment, "MOCK_CUDA_FAULT": "0:hang"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cuda.CudaError, match="does not answer within 1 s"):
        cuda.check(1.0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"expect": {"count": 0}}, "key 'expect.count' is 0"),
        ({"expect": {"count": 8, "nvlink": 12}}, "unknown key 'expect.nvlink'"),
        ({"expect": {"count": 4}, "engines": {"m": {"socket": "/x", "gpus": [4]}}}, "engine 'm' has GPU 4"),
        ({"expect": {"count": 4}, "stale_seconds": 5}, "stale_seconds (5) must be above seconds (10)"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError) as refused:
        load(file, GpuConfig)
    assert says in str(refused.value)


def test_thresholds_of_an_sku_can_be_overridden() -> None:
    config = GpuConfig.model_validate({"expect": {"count": 1, "name": "NVIDIA H200", "nvlinks": 0}})
    assert (config.expect.nvlinks, config.expect.pcie_generation) == (0, 5)
    assert all(name.startswith("NVIDIA ") for name in SKUS)
