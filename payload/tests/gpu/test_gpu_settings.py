"""Declared settings of GPUs: shown, set once, refused before anything changes; MIG only on GPUs that are drained.

On the stand-in for NVIDIA's library. The gateway is a page of metrics, systemctl a script that writes down its arguments.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvml_standin import Gpus
from service import Process, eventually, patched

from llmgpu.settings import GpuConfig

NAME = "NVIDIA A100-SXM4-80GB"
SYSTEMCTL = """#!/bin/sh
echo "$*" >> "{calls}"
[ "$1" = "$(cat "{fails}")" ] && exit 1
[ "$1" = is-active ] || : > "{gpus}"  # what computed there has ended
exit 0
"""


class Host:
    """Eight simulated A100, and an engine on two of them."""

    def __init__(self, folder: Path, gpus: Gpus) -> None:
        self.folder, self.gpus = folder, gpus
        self.engine = {"socket": "/run/vllm/big/api.sock", "unit": "vllm@big.service", "gpus": [2, 3]}
        self.config = folder / "gpu.yaml"
        self.calls, self.fails = folder / "calls", folder / "fails"
        self.calls.touch()
        self.fails.touch()
        (folder / "current").mkdir()
        (folder / "current/llmgpu.py").write_text(
            "raise SystemExit('root runs a module of its current folder')"
        )
        (folder / "bin").mkdir()
        script = folder / "bin/systemctl"
        script.write_text(SYSTEMCTL.format(calls=self.calls, fails=self.fails, gpus=gpus.file))
        script.chmod(0o755)
        self.running: list[Process | ThreadingHTTPServer] = []

    def declare(self, engines: bool = False, gateways: tuple[int, ...] = (), **expect: Any) -> None:
        """What each GPU has to be, and whether there is an engine."""
        content = {
            "expect": {"count": 8, "name": NAME, **expect},
            "engines": {"big": self.engine} if engines else {},
            "gateways": list(gateways),
            "audit": None,
            "state": str(self.folder / "state.json"),
            "orders": str(self.folder / "orders.json"),
            "metrics_port": 0,
            "seconds": 0.1,
            "stale_seconds": 5,
            "return_seconds": 0.1,
        }
        self.config.write_text(yaml.safe_dump(content))

    def start_watch(self) -> None:
        boot = self.folder / "boot_id"
        boot.write_text("first")
        patches = patched(self.folder, llmgpu__watch__BOOT_ID=str(boot), llmgpu__watch__LOOK_SECONDS=0.1)
        arguments = ["watch", "--config", str(self.config)]
        environment = patches | self.gpus.environment
        self.running.append(Process(self.folder, "watch", arguments, environment, "llmgpu").await_ready())

    def gateway(self, state: str) -> int:
        """The port of a gateway's metrics that say what became of the engine."""
        text = f'llm_engine_admission{{socket="{self.engine["socket"]}",state="{state}"}} 1.0\n'.encode()

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.running.append(server)
        return int(server.server_address[1])

    def begin(self, *options: str) -> subprocess.Popen[str]:
        """`llm-gpu settings` as root runs it."""
        arguments = [
            "settings",
            "--config",
            str(self.config),
            "--watch-config",
            str(self.config),
            "--operator",
            "ada",
        ]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "llmgpu", *arguments, *options],
            cwd=self.folder / "current",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.gpus.environment, "PATH": f"{self.folder}/bin:{os.environ['PATH']}"},
        )

    def settings(self, *options: str) -> tuple[int, str]:
        """Its exit code and what it printed."""
        process = self.begin(*options)
        printed, _ = process.communicate()
        return process.returncode, printed

    def ordered(self) -> dict[str, Any]:
        """What operators ordered."""
        path = self.folder / "orders.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"drains": {}}
        return found

    def kept(self) -> str:
        """What setters have set."""
        path = self.gpus.file.with_suffix(".txt.set")
        return path.read_text() if path.exists() else ""

    def units(self) -> list[str]:
        """What systemd was told to do."""
        return [line for line in self.calls.read_text().splitlines() if not line.startswith("is-active")]

    def stop(self) -> None:
        for each in self.running:
            each.stop() if isinstance(each, Process) else each.shutdown()


@pytest.fixture
def host(tmp_path: Path, gpus: Gpus) -> Iterator[Host]:
    host = Host(tmp_path, gpus)
    try:
        yield host
    finally:
        host.stop()


def test_settings_are_shown_then_set_and_a_second_run_changes_nothing(host: Host) -> None:
    host.gpus.become("3.persistence = 0", "5.ecc_mode = 0")
    host.declare(persistence=True, power_limit_watts=300, compute_mode="exclusive_process")
    code, shown = host.settings("--check", "--json")
    due = {
        (each["gpu"], each["setting"]): (each["before"], each["after"]) for each in json.loads(shown)["due"]
    }
    assert (code, len(due), host.kept()) == (0, 18, ""), "nothing was set"
    assert due[3, "persistence"] == ("off", "on")
    assert due[0, "the power limit"] == ("400 W", "300 W")
    assert due[0, "the compute mode"] == ("default", "exclusive_process")
    code, told = host.settings()
    assert (code, "GPU 5: ECC is on after a reset of the GPU or a reboot" in told) == (0, True)
    before = host.kept()
    code, told = host.settings()
    assert (code, told) == (0, "GPU 5: ECC is on after a reset of the GPU or a reboot\n")
    assert host.kept() == before
    host.gpus.become("3.persistence = 0")  # as after the reboot
    assert host.settings() == (0, "the settings of 8 GPUs are as declared\n")


@pytest.mark.parametrize(
    ("expect", "lines", "says"),
    [
        ({"power_limit_watts": 500}, [], f"the power limit of GPU 0 ({NAME}) cannot be 500 W: declare 100 to 400 W"),
        ({"power_limit_watts": 50, "persistence": False}, [], "cannot be 50 W"),
        ({"ecc": True}, ["6.ecc_mode = -1"], f"GPU 6 ({NAME}) has no setting for ECC: do not declare it as on"),
        ({"mig": True}, ["mig_mode = -1"], "has no setting for MIG"),
        ({"persistence": False}, ["count = 7"], "the driver finds 7 GPUs, but 8 are expected: no setting was changed"),
        ({"persistence": False}, ["1.lost = 1"], "GPU 1 does not answer: reboot the host"),
        ({"persistence": False}, ["fails = 999"], "NVML failed: Unknown Error; no setting was changed"),
        ({"mig_layout": {4: ["3g.40gb"]}}, ["4.procs = 1:900"], "GPU 4 is in use by process 1 ("),
    ],
)  # fmt: skip
def test_what_a_gpu_cannot_take_is_refused_before_anything_is_set(
    host: Host, expect: dict[str, Any], lines: list[str], says: str
) -> None:
    host.gpus.become(*lines)
    host.declare(**expect)
    code, told = host.settings()
    assert (code, says in told, host.kept()) == (3, True, ""), told


def test_without_the_right_to_set_it_says_so(host: Host) -> None:
    host.gpus.file.with_suffix(".txt.set").mkdir()
    host.declare(persistence=False)
    code, told = host.settings()
    assert (code, told) == (1, "llm-gpu: persistence of GPU 0 is still on: only root may set it\n")


def test_mig_is_changed_on_a_drained_gpu_whose_engine_then_returns(host: Host) -> None:
    host.gpus.become("2.procs = 1:30000")
    gateway = host.gateway("engine_drained")
    host.declare(engines=True, gateways=(gateway,), mig_layout={2: ["3g.40gb", "2g.20gb", "2g.20gb"]})
    host.start_watch()
    code, told = host.settings()
    assert (code, told) == (0, "GPU 2: MIG: off -> on (2g.20gb, 2g.20gb, 3g.40gb)\n")
    assert host.units() == ["stop vllm@big.service", "start vllm@big.service"]
    orders = host.ordered()
    assert orders["drains"] == {}
    assert orders["ended"]["big"]["operator"] == "ada"
    log = (host.folder / "watch.log").read_text()
    assert '"user.name":"ada"' in log, "it was the operator's drain that was put on record"
    assert json.loads((host.folder / "state.json").read_text())["quarantine"] == {}, "it serves again"
    before = host.kept()
    assert host.settings() == (0, "the settings of 8 GPUs are as declared\n")
    assert host.kept() == before


def test_a_layout_is_changed_and_ended(host: Host) -> None:
    host.declare(mig_layout={2: ["2g.20gb", "3g.40gb"]})
    assert host.settings() == (0, "GPU 2: MIG: off -> on (2g.20gb, 3g.40gb)\n")
    host.declare(mig_layout={2: ["7g.80gb"]})
    assert host.settings() == (0, "GPU 2: MIG: on (2g.20gb, 3g.40gb) -> on (7g.80gb)\n")
    host.declare(mig_layout={})
    assert host.settings() == (0, "GPU 2: MIG: on (7g.80gb) -> off\n")


@pytest.mark.parametrize(
    ("state", "units", "says"),
    [
        ("admission_kept", [], "'big' is the last instance that serves its model: start another one, or use --take-last"),
        ("admission_closed", [], "'big' is still answering requests from 1 s ago: try again later"),
        ("engine_drained", ["stop vllm@big.service", "start vllm@big.service"], "vllm@big.service does not stop"),
    ],
)  # fmt: skip
def test_a_change_of_mig_under_load_is_refused_and_the_engine_stays_in_service(
    host: Host, state: str, units: list[str], says: str
) -> None:
    host.fails.write_text("stop")
    host.declare(engines=True, gateways=(host.gateway(state),), mig_layout={3: ["7g.80gb"]})
    host.start_watch()
    code, told = host.settings("--seconds", "1")
    assert (code, says in told, host.kept(), host.units()) == (3, True, "", units), told
    orders = host.ordered()
    assert (orders["drains"], orders["ended"]["big"]["operator"]) == ({}, "ada")


def test_a_change_that_is_interrupted_leaves_no_engine_drained(host: Host) -> None:
    host.declare(engines=True, gateways=(host.gateway("admission_closed"),), mig_layout={3: ["7g.80gb"]})
    host.start_watch()
    process = host.begin()
    eventually("it is drained", lambda: "big" in host.ordered()["drains"])
    code, told = host.settings()
    assert (code, "another `llm-gpu settings` is at work" in told) == (3, True), told
    process.terminate()
    assert process.wait(10) == 128 + 15
    assert (host.ordered()["drains"], host.kept()) == ({}, "")


def test_what_a_killed_change_left_drained_and_stopped_comes_back_with_the_next_run(host: Host) -> None:
    gateway = host.gateway("engine_drained")
    host.declare(engines=True, gateways=(gateway,), mig_layout={3: ["7g.80gb"]})
    host.start_watch()
    systemctl = host.folder / "bin/systemctl"
    script = systemctl.read_text()
    systemctl.write_text(script.replace("exit 0", '[ "$1" != start ] || kill -9 $PPID'))
    assert host.settings()[0] == -9
    assert list(host.ordered()["drains"]) == ["big"]
    systemctl.write_text(script)
    assert host.settings() == (0, "the settings of 8 GPUs are as declared\n"), "nothing is left to change"
    assert host.units() == ["stop vllm@big.service", "start vllm@big.service", "start vllm@big.service"]
    assert host.ordered()["drains"] == {}
    assert host.ordered()["ended"]["big"]["reason"] == "MIG of GPU 3 is changed: done"


def test_the_last_instance_is_taken_where_that_is_said(host: Host) -> None:
    host.declare(engines=True, gateways=(host.gateway("admission_kept"),), mig_layout={3: ["7g.80gb"]})
    host.start_watch()
    assert host.settings("--take-last") == (0, "GPU 3: MIG: off -> on (7g.80gb)\n")


def test_an_engine_that_another_operator_drained_is_left_to_them(host: Host) -> None:
    host.declare(engines=True, mig_layout={3: ["7g.80gb"]})
    drain = {"operator": "grace", "reason": "new cable", "since": "2026-11-27T12:00:00+00:00"}
    (host.folder / "orders.json").write_text(
        json.dumps({"drains": {"big": drain}, "ended": {}, "repairs": []})
    )
    code, told = host.settings()
    assert (code, "'big' was drained by grace (new cable)" in told, host.kept()) == (3, True, "")


def test_a_layout_that_the_gpu_does_not_take_leaves_the_former_one(host: Host) -> None:
    host.declare(mig_layout={1: ["3g.40gb", "3g.40gb"]})
    assert host.settings()[0] == 0
    for expect, says in (
        ({1: ["3g.20gb"]}, "the GPU has no MIG profile 3g.20gb: declare those of 1g.10gb, 2g.20gb, 3g.40gb, 4g.40gb, 7g.80gb"),
        ({1: ["3g.40gb", "2g.20gb", "2g.20gb"], 0: ["2g.20gb", "2g.20gb", "3g.40gb"]}, "MIG of GPU 0 is still off"),
    ):  # fmt: skip
        host.gpus.become("0.mig_fails = 1")
        host.declare(mig_layout=expect)
        code, told = host.settings()
        assert (code, says in told) == (1, True), told
        host.declare(mig_layout={1: ["3g.40gb", "3g.40gb"]})
        assert host.settings() == (0, "the settings of 8 GPUs are as declared\n"), "as before"


def test_mig_that_waits_for_a_reset_is_told_so_and_its_instances_come_afterwards(host: Host) -> None:
    host.gpus.become("mig_waits = 1")
    host.declare(mig_layout={6: ["7g.80gb"]})
    waits = "GPU 6: MIG is on (7g.80gb) after a reset of the GPU or a reboot\n"
    assert host.settings() == (0, f"GPU 6: MIG: off -> on (7g.80gb)\n{waits}")
    assert host.settings() == (0, waits)


@pytest.mark.parametrize(
    ("expect", "says"),
    [
        ({"mig": True, "mig_layout": {0: ["7g.80gb"]}}, "mig and mig_layout exclude each other"),
        ({"mig_layout": {8: ["7g.80gb"]}}, "mig_layout names GPU 8, but count is 8: they count from 0"),
        ({"mig_layout": {0: ["4g.40gb", "4g.40gb"]}}, "mig_layout of GPU 0 has 8 compute slices: a GPU has 7"),
        ({"mig_layout": {0: ["half"]}}, "String should match pattern"),
        ({"compute_mode": "exclusive_thread"}, "Input should be 'default', 'exclusive_process' or 'prohibited'"),
    ],
)  # fmt: skip
def test_a_declaration_that_no_gpu_could_have_is_refused(expect: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        GpuConfig.model_validate({"expect": {"count": 8, **expect}})
