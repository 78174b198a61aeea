"""A host whose GPUs get sick while they serve: quarantine, record, metrics, return. On the stand-in for NVIDIA's
library; engines are only names here, payload/tests/serve/upstream/test_quarantine.py has real ones.
"""

import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvml_standin import Gpus
from service import Process, eventually, patched, whole_lines

from llmgpu.cli import main

ENGINES = {"big": {"socket": "/run/vllm/big/api.sock", "gpus": [0, 1, 2, 3]},
           "small": {"socket": "/run/vllm/small/api.sock", "gpus": [7]}}  # fmt: skip
UUID = "GPU-4d4f434b-0000-4000-8000-00000000000{}"


class Host:
    """A host of eight simulated A100, its audit writer and its watch."""

    def __init__(self, folder: Path, gpus: Gpus) -> None:
        self.folder, self.gpus = folder, gpus
        self.boot = folder / "boot_id"
        self.boot.write_text("first\n")
        self.state, self.orders = folder / "state.json", folder / "orders.json"
        self.config = folder / "gpu.yaml"
        self.settings: dict[str, Any] = {
            "expect": {"count": 8, "name": "NVIDIA A100-SXM4-80GB"},
            "engines": ENGINES,
            "audit": str(folder / "audit.sock"),
            "state": str(self.state),
            "orders": str(self.orders),
            "metrics_port": 0,
            "seconds": 0.1,
            "stale_seconds": 0.5,
            "return_seconds": 0.2,
        }
        self.processes: dict[str, Process] = {}

    def start_writer(self) -> None:
        seed = self.folder / "audit.seed"
        seed.write_text("5e" * 32)
        arguments = ["serve", "--folder", str(self.folder / "audit"), "--socket", str(self.folder / "audit.sock"),
                     "--seed-file", str(seed)]  # fmt: skip
        self.processes["writer"] = Process(self.folder, "writer", arguments, {}, "llmproof").await_ready()

    def start_watch(self) -> None:
        self.config.write_text(yaml.safe_dump(self.settings))
        environment = patched(self.folder, llmgpu__watch__BOOT_ID=str(self.boot)) | self.gpus.environment
        arguments = ["watch", "--config", str(self.config)]
        self.processes["watch"] = Process(
            self.folder, "watch", arguments, environment, "llmgpu"
        ).await_ready()

    def reboot(self, boot: str) -> None:
        """As after a reboot: another boot, a watch that starts."""
        self.processes["watch"].stop()
        self.boot.write_text(boot)
        self.start_watch()

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()

    def cli(self, command: str, *arguments: str) -> tuple[int, str]:
        """Run `llm-gpu`; returns the exit code, and what it printed."""
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            code = main([command, "--config", str(self.config), *arguments])
        return code, printed.getvalue()

    def quarantine(self) -> dict[str, dict[str, str]]:
        held: dict[str, dict[str, str]] = json.loads(self.state.read_text())["quarantine"]
        return held

    def records(self) -> list[tuple[str, str, str]]:
        """Action, engine or GPU, and who, of what is on the audit record."""
        files = sorted((self.folder / "audit").glob("records-*.jsonl"))
        events = [json.loads(line) for file in files for line in whole_lines(file).splitlines()]
        return [
            (
                event["event.action"],
                event.get("llmkeep.engine", event.get("llmkeep.gpu.uuid", "")),
                event["user.name"],
            )
            for event in events
            if event["event.action"].startswith("gpu.")
        ]

    def scrape(self) -> tuple[int, str]:
        """Status and body of GET /metrics."""
        ready = next(json.loads(line) for line in self.log() if '"metrics"' in line)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{ready['port']}/metrics", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def log(self) -> list[str]:
        return whole_lines(self.folder / "watch.log").splitlines()


@pytest.fixture
def host(tmp_path: Path, gpus: Gpus) -> Iterator[Host]:
    host = Host(tmp_path, gpus)
    try:
        host.start_writer()
        yield host
    finally:
        host.stop()


def test_a_gpu_lost_to_an_xid_is_quarantined_and_returns_after_the_reboot(host: Host) -> None:
    host.start_watch()
    assert host.cli("status") == (0, "big: in service\nsmall: in service\n")
    host.gpus.become("2.xid = 79", "2.util_gpu = 93")
    entry = eventually("it is quarantined", lambda: host.quarantine().get("big"))
    assert entry["reason"] == "GPU 2: Xid 79 (the GPU has fallen off the bus): reboot the host"
    assert entry["by"] == "llm-gpu"
    assert "small" not in host.quarantine(), "its GPU is well"
    busy = 'llm_gpu_busy_ratio{gpu="2"} 0.93'
    text = eventually("it is read", lambda: busy in (text := host.scrape()[1]) and text)
    assert 'llm_gpu_xids_total{code="79",gpu="2"} 1.0' in text
    assert 'llm_gpu_xids_total{code="48",gpu="2"} 0.0' in text, "known codes start at 0"
    assert 'llm_gpu_engine_quarantined{engine="big"} 1.0' in text
    host.gpus.become("2.xid = 79", "2.lost = 1")
    eventually("all of it is the reason", lambda: "does not answer" in host.quarantine()["big"]["reason"])
    code, refusal = host.cli("undrain", "big", "--operator", "ada", "--reason", "looks fine")
    assert (code, "no operator has drained 'big'" in refusal) == (3, True)
    opened_anew = f'llm_gpu_present{{gpu="2",name="",uuid="{UUID.format(2)}"}} 0.0'
    eventually("it is looked for", lambda: opened_anew in host.scrape()[1])
    assert "Xid 79" in host.quarantine()["big"]["reason"], "the cause is not forgotten"
    host.gpus.become()  # it answers again, without a reboot
    eventually("only the Xid is left", lambda: "does not answer" not in host.quarantine()["big"]["reason"])
    host.reboot("second")
    eventually("it has returned", lambda: host.quarantine() == {})
    actions = [(action, engine) for action, engine, _ in host.records() if engine == "big"]
    assert (actions[0], actions[-1]) == (("gpu.engine_quarantined", "big"), ("gpu.engine_returned", "big"))


def test_only_the_operator_who_drained_undrains_also_after_a_restart(host: Host) -> None:
    host.start_watch()
    assert host.cli("drain", "small", "--operator", "ada", "--reason", "new cable")[0] == 0
    eventually("it is drained", lambda: "small" in host.quarantine())
    host.reboot("second")
    assert host.quarantine()["small"]["by"] == "ada", "it outlasts restart and reboot"
    code, refusal = host.cli("undrain", "small", "--operator", "grace", "--reason", "why not")
    assert (code, "drained by ada (new cable), not by grace" in refusal) == (3, True)
    assert host.cli("undrain", "small", "--operator", "ada", "--reason", "cable is in")[0] == 0
    eventually("it is back", lambda: host.quarantine() == {})
    assert host.records() == [
        ("gpu.engine_quarantined", "small", "ada"),
        ("gpu.engine_returned", "small", "ada"),
    ]
    assert host.cli("drain", "tiny", "--reason", "x")[0] == 3


def test_what_an_inspection_is_for_ends_by_a_declared_repair_alone(host: Host) -> None:
    host.start_watch()
    host.gpus.become("7.xid = 54")
    eventually("it is quarantined", lambda: "small" in host.quarantine())
    host.gpus.become()
    host.reboot("second")
    eventually("it was looked at", lambda: any("finding" in line for line in host.log()[-3:]))
    assert "inspected" in host.quarantine()["small"]["reason"]
    declared = ["--operator", "ada", "--reason", "power cable plugged in"]
    assert host.cli("repaired", UUID.format(7), *declared)[0] == 0
    eventually("it has returned", lambda: host.quarantine() == {})
    assert [each for each in host.records() if each[2] == "ada"] == [("gpu.repaired", UUID.format(7), "ada")]


def test_a_storm_of_xids_costs_one_log_line_and_no_memory(host: Host) -> None:
    host.start_watch()
    before = resident(host.processes["watch"])
    host.gpus.become(*(f"{gpu}.xid = 13" for gpu in range(8)), "xid_times = 3000")
    counted = 'llm_gpu_xids_total{code="13",gpu="7"} 3000.0'
    eventually("all are counted", lambda: counted in host.scrape()[1], 30)
    assert sum('"message":"Xid"' in line for line in host.log()) == 8, (
        "one for each GPU and code, until the next minute"
    )
    assert resident(host.processes["watch"]) - before < 8 << 20
    assert host.quarantine() == {}, "an application's Xid does not quarantine"
    assert len(host.state.read_text()) < 1000


def test_nvml_that_hangs_fails_the_scrape_and_quarantines_the_host_until_it_answers(host: Host) -> None:
    host.start_watch()
    eventually("it is scraped", lambda: host.scrape()[0] == 200)
    host.gpus.become("hang_ms = 1500")
    eventually("scrapes fail", lambda: host.scrape()[0] == 503)
    assert "no recent reading of the GPUs: NVML does not answer within 0.5 s" in host.scrape()[1]
    eventually("its engines are quarantined", lambda: set(host.quarantine()) == {"big", "small"})
    host.gpus.become()
    eventually("it answers, and they return", lambda: host.quarantine() == {}, 30)
    assert len(host.records()) == 4, "no record for each second of it"


def test_a_driver_that_fails_is_never_hidden_by_the_last_reading(host: Host) -> None:
    host.settings["stale_seconds"] = 600
    host.start_watch()
    eventually("it is scraped", lambda: host.scrape()[0] == 200)
    host.gpus.become("fails = 999")
    eventually(
        "scrapes fail",
        lambda: host.scrape() == (503, "no recent reading of the GPUs: NVML failed: Unknown Error\n"),
    )
    host.gpus.become()
    eventually("it is scraped", lambda: host.scrape()[0] == 200)
    assert host.quarantine() == {}, "it was away for less than stale_seconds"


def test_without_nvml_the_host_is_quarantined_and_says_why(host: Host) -> None:
    host.gpus.libraries = host.folder
    host.start_watch()
    eventually("its engines are quarantined", lambda: set(host.quarantine()) == {"big", "small"})
    assert "libnvidia-ml.so.1 was not found" in host.quarantine()["big"]["reason"]
    assert host.scrape()[0] == 503


def test_nothing_is_quarantined_before_that_is_on_record(host: Host) -> None:
    host.start_watch()
    host.processes["writer"].stop()
    host.gpus.become("0.remap_pending = 1")
    waits = "gpu.engine_quarantined waits for the audit record"
    eventually("it waits", lambda: any(waits in line for line in host.log()))
    assert host.quarantine() == {}
    host.start_writer()
    eventually("it is quarantined", lambda: "big" in host.quarantine())


def test_a_host_without_an_audit_record_waits_for_none(host: Host) -> None:
    host.processes["writer"].stop()
    host.settings["audit"] = None
    host.start_watch()
    host.gpus.become("0.remap_pending = 1")
    eventually("it is quarantined", lambda: "big" in host.quarantine())
    host.gpus.become()
    eventually("it has returned", lambda: host.quarantine() == {})
    assert host.records() == []


def test_unusable_files_are_named_and_orders_keep_their_effect(host: Host) -> None:
    host.start_watch()
    host.cli("drain", "small", "--operator", "ada", "--reason", "new cable")
    eventually("it is drained", lambda: "small" in host.quarantine())
    assert {path.stat().st_mode & 0o777 for path in (host.state, host.orders)} == {0o644}
    host.orders.write_text("{")
    eventually("it is named", lambda: any("orders.json cannot be used" in line for line in host.log()))
    assert "small" in host.quarantine()
    host.state.write_text("[]")
    code, refusal = host.cli("status")
    assert (code, "restore it, or remove it" in refusal) == (4, True)


def resident(process: Process) -> int:
    """Resident memory in bytes."""
    pages = Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
