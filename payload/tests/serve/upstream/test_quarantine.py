"""Engines on sick GPUs: no new request while another instance serves, never the last one, all of it on the record.

The instances are scripted servers of OpenAI's API, as vLLM is one; the GPUs are the stand-in for NVIDIA's library.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
import yaml
from nvml_standin import Gpus
from prometheus_client import Gauge
from questions import CHAT, error
from scripted_upstream import END, USAGE, ScriptedUpstream, delta, stream
from service import Process, Service, eventually, patched, running

from llmgpu import quarantine
from llmgpu.quarantine import Entry, Saved
from llmserve.protocol import Generate, Hello
from llmserve.upstream.admission import Queue
from llmserve.upstream.engine_client import EngineClient
from llmserve.upstream.instances import Instances
from llmserve.upstream.quarantine import Quarantine

SOME = range(20)  # conversations; that all prefer the same of two instances has a probability of 2**-19
QUARANTINED = 'llm_engine_quarantined{model="m"}'


class Host:
    """A gateway before two instances of a model, and the file of quarantines."""

    def __init__(self, folder: Path) -> None:
        self.sockets = {name: folder / f"{name}.sock" for name in ("a", "b")}
        self.servers = {name: ScriptedUpstream(path) for name, path in self.sockets.items()}
        for server in self.servers.values():
            server.script = stream(delta("hello"), delta("", "stop"), USAGE, END)
        remote = {"socket": [str(path) for path in self.sockets.values()], "revision": "7"}
        self.state = folder / "state.json"
        self.service = Service(folder, {}, remotes={"m": remote}, quarantine=self.state)

    def quarantine(self, *names: str) -> None:
        """From now on these instances are quarantined, and no others."""
        entries = {
            name: Entry(str(self.sockets[name]), "llm-gpu", "GPU 2: Xid 79", "2026-11-27T12:00:00+00:00")
            for name in names
        }
        quarantine.save(self.state, Saved("boot", quarantine=entries))
        eventually("the gateway knows", lambda: self.service.metrics()[QUARANTINED] == len(names))

    def used(self, client: httpx.Client) -> set[str]:
        """The instances that answer some conversations, all of which are answered."""
        before = {name: len(server.requests) for name, server in self.servers.items()}
        for number in SOME:
            assert client.post(CHAT, json=question(number)).content.endswith(END)
        return {name for name, server in self.servers.items() if len(server.requests) > before[name]}

    def actions(self, name: str) -> list[str]:
        """What is on record about an instance."""
        return [
            each["event.action"]
            for each in self.service.records()
            if each.get("llmkeep.engine.socket") == str(self.sockets[name])
        ]

    def stop(self) -> None:
        self.service.stop()
        for server in self.servers.values():
            server.stop()


def question(number: int) -> dict[str, object]:
    """A request of conversation `number`."""
    return {"model": "m", "messages": [{"role": "user", "content": f"hello {number}"}], "stream": True}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    try:
        host.service.start()
        yield host
    finally:
        host.stop()


def test_a_quarantined_instance_gets_no_request_while_another_one_serves(host: Host) -> None:
    with host.service.client() as client:
        assert host.used(client) == {"a", "b"}
        host.quarantine("a")
        assert host.used(client) == {"b"}
        assert client.get("/readyz").status_code == 200, "the model is served by healthy GPUs"
        eventually(
            "it is recorded", lambda: host.actions("a") == ["gpu.admission_closed", "gpu.engine_drained"]
        )
        host.quarantine()
        assert host.used(client) == {"a", "b"}
        eventually("it is recorded", lambda: host.actions("a")[-1] == "gpu.admission_opened")
        assert host.actions("b") == []


def test_two_sick_instances_at_once_both_keep_serving(host: Host) -> None:
    with host.service.client() as client:
        host.quarantine("a", "b")
        assert host.used(client) == {"a", "b"}
        refused = client.get("/readyz")
        assert '"code": "quarantined"' in refused.text, "release_rollout looks for these bytes"
        assert error(refused, 503, "quarantined")["message"] == "1 of 1 engines run on quarantined GPUs only"
        kept = ["gpu.admission_kept"]
        eventually("it is recorded", lambda: host.actions("a") == host.actions("b") == kept)
        host.quarantine("a")
        assert host.used(client) == {"b"}, "the one that has recovered serves alone"
        host.servers.pop("b").stop()
        eventually("it is noticed", lambda: host.service.metrics()['llm_engine_up{model="m"}'] == 1)
        assert host.used(client) == {"a"}, "the last one that is there serves, sick as it is"


def test_what_runs_is_finished_before_an_instance_counts_as_drained(host: Host) -> None:
    slow = stream(delta("hello"), *([0.1] * 8), delta("", "stop"), USAGE, END)
    for server in host.servers.values():
        server.script = slow
    with host.service.client() as client, ThreadPoolExecutor(len(SOME)) as pool:
        asked = [pool.submit(client.post, CHAT, json=question(number)) for number in SOME]
        eventually("both are at work", lambda: all(server.requests for server in host.servers.values()))
        host.quarantine("a")
        eventually("it is recorded", lambda: "gpu.admission_closed" in host.actions("a"))
        assert "gpu.engine_drained" not in host.actions("a")
        assert all(each.result().content.endswith(END) for each in asked)
        eventually("it is drained", lambda: host.actions("a")[-1] == "gpu.engine_drained")


def test_another_host_s_gateway_says_that_its_gpus_are_sick(tmp_path: Path, host: Host) -> None:
    (front := tmp_path / "front").mkdir()
    well = ScriptedUpstream(front / "well.sock")
    well.script = stream(delta("hello"), delta("", "stop"), USAGE, END)
    sockets = [str(tmp_path / "http.sock"), str(front / "well.sock")]
    remote = {"socket": sockets, "revision": "7", "context": 4096, "key_credential": "other.key"}
    host.quarantine("a", "b")
    with running(front, {}, remotes={"m": remote}, credentials={"other.key": host.service.key}) as service:
        assert service.metrics()[QUARANTINED] == 1
        with service.client() as client:
            before = sum(len(server.requests) for server in host.servers.values())
            for number in SOME:
                assert client.post(CHAT, json=question(number)).content.endswith(END)
            assert sum(len(server.requests) for server in host.servers.values()) == before
            well.stop()
            eventually("it is noticed", lambda: service.metrics()['llm_engine_up{model="m"}'] == 1)
            assert client.post(CHAT, json=question(1)).content.endswith(END), "the last host that is there"


def test_each_step_is_recorded_once_and_drained_only_when_idle(tmp_path: Path) -> None:
    engines = [EngineClient("m", tmp_path / f"{name}.sock", Queue(64, 10**6)) for name in ("a", "b")]
    for engine in engines:
        engine.hello = Hello("m", "r", "echo", 4096, 8)
    told: list[dict[str, object]] = []
    two = Instances("m", engines, Queue(64, 10**6))
    shown = Gauge("shown", "", ["socket", "state"], registry=None)
    path = tmp_path / "state.json"
    watched = Quarantine(path, [two], told.append, shown)
    entry = Entry(str(engines[0].socket), "ada", "new cable", "2026-11-27T12:00:00+00:00")

    def actions() -> list[object]:
        for _ in range(3):
            watched.look()
        said = [each["event.action"] for each in told]
        told.clear()
        return said

    def states() -> dict[str, str]:
        (family,) = shown.collect()
        return {Path(each.labels["socket"]).stem: each.labels["state"] for each in family.samples}

    assert (actions(), states()) == ([], {"a": "admission_opened", "b": "admission_opened"})
    quarantine.save(path, Saved("boot", quarantine={"a": entry}))
    engines[0].admission.running.total.requests = 1
    assert (actions(), states()["a"]) == (["gpu.admission_closed"], "admission_closed")
    for _ in range(9):  # however busy the other one is
        routed = two.route("t", Generate(0, True, 16, messages=[{"role": "user", "content": "x"}])).choose()
        assert routed is engines[1]
        routed.admission.running.total.requests += 1
    engines[0].admission.running.total.requests = 0
    assert (actions(), states()["a"]) == (["gpu.engine_drained"], "engine_drained")
    engines[1].hello = None
    assert actions() == ["gpu.admission_kept"]
    path.unlink()
    assert actions() == ["gpu.admission_opened"]


def test_a_file_that_cannot_be_read_changes_nothing(host: Host) -> None:
    with host.service.client() as client:
        host.quarantine("a")
        host.state.write_text("{")
        eventually("it is told", lambda: "state.json cannot be used" in host.service.logs())
        assert host.used(client) == {"b"}
        host.quarantine()
        assert host.used(client) == {"a", "b"}


def test_eight_gpus_one_xid_drained_quarantined_rebooted_and_back_all_on_record(
    host: Host, gpus: Gpus
) -> None:
    folder = host.service.folder
    (boot := folder / "boot_id").write_text("first")
    config = {
        "expect": {"count": 8, "name": "NVIDIA A100-SXM4-80GB"},
        "engines": {
            name: {"socket": str(host.sockets[name]), "gpus": list(range(first, first + 4))}
            for name, first in (("a", 0), ("b", 4))
        },
        "audit": str(folder / "audit.sock"),
        "state": str(host.state),
        "orders": str(folder / "orders.json"),
        "metrics_port": 0,
        "seconds": 0.1,
        "stale_seconds": 5,
        "return_seconds": 0.2,
    }
    (folder / "gpu.yaml").write_text(yaml.safe_dump(config))
    environment = patched(folder, llmgpu__watch__BOOT_ID=str(boot)) | gpus.environment
    watch = ["watch", "--config", str(folder / "gpu.yaml")]
    process = Process(folder, "watch", watch, environment, "llmgpu").await_ready()
    try:
        with host.service.client() as client:
            assert host.used(client) == {"a", "b"}, "accepted"
            gpus.become("2.xid = 79", "2.lost = 1")
            eventually("a is drained", lambda: "gpu.engine_drained" in host.actions("a"))
            assert host.used(client) == {"b"}
            assert process.stop() == 0
            boot.write_text("second")
            gpus.become()
            process = Process(folder, "watch", watch, environment, "llmgpu").await_ready()
            eventually("a is back", lambda: host.actions("a")[-1] == "gpu.admission_opened")
            assert host.used(client) == {"a", "b"}
    finally:
        process.stop()
    told = [
        (each["event.action"], each["event.reason"])
        for each in host.service.records()
        if each["event.action"].startswith("gpu.")
    ]
    actions = [action for action, _ in told]
    assert actions[0] == "gpu.engine_quarantined"
    assert actions[-2:] == ["gpu.engine_returned", "gpu.admission_opened"]
    assert any("Xid 79 (the GPU has fallen off the bus)" in reason for _, reason in told), json.dumps(told)
