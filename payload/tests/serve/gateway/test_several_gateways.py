"""Several gateways behind the role's nginx: what clients see when one stops, is killed, or comes back."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from edge import Edge, in_front_of
from service import PEPPER, Process, Service, eventually, patched, running

from llmserve.access.api_keys import edited, new_key

CLIENTS = 4


class Pair:
    """Two gateways in front of one engine, and an edge in front of them."""

    edge: Edge

    def __init__(self, service: Service, keys: list[str]) -> None:
        """`keys`: many, so that no quota is exhausted."""
        self.service = service
        self.keys = keys
        self.gateways = {number: start(service, number) for number in (1, 2)}

    def replace(self, number: int) -> None:
        """Stop, start, and wait until ready, as the module `rollout` does."""
        assert self.gateways[number].stop() == 0
        self.gateways[number] = start(self.service, number)
        with self.service.client("", f"{number}.sock") as client:
            eventually("it is ready", lambda: client.get("/readyz").status_code == 200)

    def answered_by(self) -> dict[int, float]:
        """Number of 200 responses of each current gateway."""
        found = {}
        for number in self.gateways:
            with self.service.client("", f"metrics-{number}.sock") as client:
                lines = client.get("/metrics").text.splitlines()
            found[number] = sum(
                float(line.rsplit(" ", 1)[1])
                for line in lines
                if line.startswith("llm_requests_total{") and "/generate" in line and 'status="200"' in line
            )
        return found


def start(service: Service, number: int, environment: dict[str, str] | None = None) -> Process:
    """Start gateway `number`: the service's configuration, with its own sockets."""
    config = yaml.safe_load((service.folder / "gateway.yaml").read_text())
    config["listen"]["socket"] = str(service.folder / f"{number}.sock")
    config["metrics"]["socket"] = str(service.folder / f"metrics-{number}.sock")
    config["policy"]["seen"] = str(service.folder / f"policy-revision-{number}")
    file = service.folder / f"gateway-{number}.yaml"
    file.write_text(yaml.safe_dump(config))
    credentials = {"CREDENTIALS_DIRECTORY": str(service.folder / "credentials")}
    arguments = ["gateway", "--config", str(file)]
    environment = credentials | (environment or {})
    return Process(service.folder, f"gateway-{number}", arguments, environment).await_ready()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with running(tmp_path, {"echo": {"driver": "echo", "token_seconds": 0.01}}) as service:
        assert service.gateway
        service.gateway.stop()
        service.gateway = None
        keys = []
        with edited(tmp_path / "keys.json") as records:
            for number in range(40):
                key, record = new_key(PEPPER, f"client-{number}", "research", ["developer"], None)
                keys.append(key)
                records.append(record)
        sockets = [tmp_path / f"{number}.sock" for number in (1, 2)]
        many = {"edge_requests_per_second": 10_000, "edge_request_burst": 10_000}
        pair = Pair(service, keys)
        try:
            with in_front_of(sockets[0], tmp_path / "nginx", sockets[1], **many) as pair.edge:
                yield pair
        finally:
            for gateway in pair.gateways.values():
                gateway.stop()


@contextmanager
def load(pair: Pair) -> Iterator[list[str]]:
    """Clients that send requests continuously, half of them streaming; yields their failures, which must be empty in
    the end.
    """
    wrong: list[str] = []
    done = threading.Event()

    def ask(number: int) -> None:
        keys = pair.keys[number::CLIENTS]
        body: dict[str, Any] = {"prompt": "one two three four", "max_tokens": 4, "stream": number % 2 == 0}
        with pair.edge.client() as client:
            sent = 0
            while not done.is_set():
                key = keys[sent % len(keys)]
                sent += 1
                try:
                    answer = client.post("/generate", json=body, headers={"authorization": f"Bearer {key}"})
                except httpx.TransportError as problem:
                    wrong.append(repr(problem))
                    continue
                if answer.status_code != 200 or '"error"' in answer.text:
                    wrong.append(f"{answer.status_code} {answer.text}")
                time.sleep(0.1)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        done.set()
        for thread in threads:
            thread.join(30)


def test_a_rolling_restart_under_load_loses_no_request(pair: Pair) -> None:
    with load(pair) as wrong:
        for number in pair.gateways:
            pair.replace(number)
        eventually("both answer again", lambda: min(pair.answered_by().values()) >= 1)
    assert wrong == []


def test_a_stopping_gateway_answers_a_request_that_still_waits_for_its_record(
    pair: Pair,
) -> None:
    assert pair.service.writer
    streams: list[str] = []

    def ask() -> None:
        with pair.service.client(pair.keys[0], "1.sock") as client:
            streams.append(client.post("/generate", json={"prompt": "x", "stream": True}).text)

    def tasks() -> float:
        with pair.service.client("", "metrics-1.sock") as client:
            [line] = [
                each
                for each in client.get("/metrics").text.splitlines()
                if each.startswith("llm_event_loop_tasks ")
            ]
        return float(line.split()[1])

    assert pair.gateways[1].stop() == 0
    # Its wait for the record outlasts all other time limits.
    patient = patched(pair.service.folder, llmserve__audit__writer_client__INTENT_SECONDS=100.0)
    pair.gateways[1] = start(pair.service, 1, patient)
    asking = threading.Thread(target=ask)
    rests = tasks()
    pair.service.writer.process.send_signal(signal.SIGSTOP)
    try:
        asking.start()
        eventually("it is being handled", lambda: tasks() > rests)
        pair.gateways[1].process.send_signal(signal.SIGTERM)
        time.sleep(4.4)  # more than the second until the socket is unused, and uvicorn's three
    finally:
        pair.service.writer.process.send_signal(signal.SIGCONT)
    asking.join(10)
    assert streams
    assert streams[0].endswith("data: [DONE]\n\n")


def test_a_killed_gateway_fails_no_later_request(pair: Pair) -> None:
    pair.gateways[1].process.send_signal(signal.SIGKILL)
    pair.gateways[1].process.wait()
    with pair.edge.client(authorization=f"Bearer {pair.keys[0]}") as client:
        for _ in range(6):
            assert client.post("/generate", json={"prompt": "x"}).status_code == 200


def test_without_gateways_the_edge_answers_503_until_one_is_back(pair: Pair) -> None:
    for gateway in pair.gateways.values():
        gateway.stop()
    with pair.edge.client(authorization=f"Bearer {pair.keys[0]}") as client:
        answer = client.post("/generate", json={"prompt": "x"})
        assert (answer.status_code, json.loads(answer.text)["error"]["code"]) == (503, "unavailable")
        pair.gateways[2] = start(pair.service, 2)
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200
