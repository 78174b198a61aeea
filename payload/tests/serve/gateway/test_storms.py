"""Sustained load: vanishing clients, killed engines, a stop under load. Nothing is left behind."""

import json
import os
import random
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx2 as httpx
import pytest
from load import left_over, load
from scripted_opa import ScriptedOpa
from service import PATIENCE, Process, Service, eventually, running

WORDS = " ".join(f"word{number}" for number in range(100))
SLOW = {"echo": {"driver": "echo", "token_seconds": 0.02, "slots": 4}}
LIMITS = {"waiting": 8, "queue_seconds": 0.3, "drain_seconds": 10}
chance = random.Random(5)  # noqa: S311 - no secret


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An engine that takes 20 ms per token and has four slots."""
    with running(tmp_path_factory.mktemp("slow"), SLOW, limits=LIMITS) as service:
        yield service


def request(service: Service, stream: bool) -> bytes:
    """A request whose answer takes 2 s, as bytes."""
    content = json.dumps({"prompt": WORDS, "stream": stream}).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: llm\r\nauthorization: Bearer {service.key}\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def resident_kib(process: Process | None) -> int:
    """Resident memory of a process."""
    assert process
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_a_thousand_vanishing_clients_leave_nothing_behind(slow: Service) -> None:
    before = left_over(slow)
    for number in range(1000):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(slow.folder / "http.sock"))
            sent = request(slow, stream=number % 2 == 0)
            client.sendall(sent if number % 5 else sent[: chance.randrange(len(sent))])
            if number % 50 == 1:
                client.recv(1)  # the answer has begun, or was refused
    eventually("nothing is left over", lambda: left_over(slow) == before)
    with slow.client() as client:
        before_asking = time.monotonic()
        assert client.get("/generate?prompt=quick").status_code == 200
        assert time.monotonic() - before_asking < 2, "the engine works for disconnected clients"


def test_at_five_times_the_capacity_requests_are_answered_or_refused_at_once(slow: Service) -> None:
    with load(slow, 20, 10) as made:
        for outcome in "200", "429 too_many_waiting":
            eventually(f"20 times {outcome}", lambda outcome=outcome: made.outcomes[outcome] >= 20)
    assert set(made.outcomes) <= {"200", "429 too_many_waiting", "503 queue_timeout"}, made.outcomes
    assert statistics.median(made.refused_us) < 1e6 * LIMITS["queue_seconds"] / 2, "most did not wait"


def test_an_engine_killed_at_any_moment_loses_only_its_running_answers(tmp_path: Path) -> None:
    with running(tmp_path, SLOW, limits=LIMITS) as service:
        rests = left_over(service)
        with load(service, 6, 5) as made:
            kills = 0
            while kills < 4 or not made.outcomes["503 engine_lost"]:  # on a slow disk it is mostly idle
                assert kills < 100, made.outcomes
                kills += 1
                time.sleep(chance.uniform(0, 0.4))
                service.engines["echo"].kill()
                service.start_engine("echo")
                more = made.outcomes["200"] + 1
                eventually("it answers again", partial(made.answered, more))
        codes = "engine_lost", "engine_unavailable", "overloaded", "queue_timeout"
        assert set(made.outcomes) <= {"200", *(f"503 {code}" for code in codes)}, made.outcomes
        eventually("nothing is left over", lambda: left_over(service) == rests)
        assert "Traceback" not in service.logs()


def test_sigterm_under_load_loses_no_answer(tmp_path: Path) -> None:
    with running(tmp_path, SLOW, limits=LIMITS) as service:
        assert service.gateway
        with load(service, 8, 20) as made:
            eventually("answers come", lambda: made.outcomes["200"] >= 8)
            service.gateway.process.send_signal(signal.SIGTERM)
            assert service.gateway.process.wait(PATIENCE) == 0
        refused = {"503 draining", "429 too_many_waiting", "503 queue_timeout"}
        # Requests that found a closed socket; answers that had begun are counted below.
        gone = {"ConnectError", "RemoteProtocolError", "ReadError", "WriteError"}
        assert set(made.outcomes) <= {"200", *refused, *gone}, made.outcomes
        answered = [line for line in service.logs().splitlines() if '"answered"' in line]
        counted = Counter(json.loads(line)["http.response.status_code"] for line in answered)
        assert counted[200] == made.outcomes["200"], "every answer that was begun has arrived"


def test_memory_does_not_grow_with_the_requests(echo: Service) -> None:
    minutes = float(os.environ.get("STORM_MINUTES", "0"))  # `make storm` sets it
    with echo.client() as client:

        def ask(times: int) -> None:
            for number in range(times):
                client.get("/generate", params={"prompt": f"question {number}"})
                client.post("/generate", json={"prompt": f"question {number}", "stream": True})
                client.get(f"/nowhere/{number}")
                client.post("/v1/completions", json={"model": f"model {number}", "prompt": "x"})

        ask(300)
        before = resident_kib(echo.gateway)
        series = len(echo.metrics())
        begun = time.monotonic()
        ask(300)
        while time.monotonic() - begun < minutes * 60:
            ask(300)
        grown = resident_kib(echo.gateway) - before
        print(f"grown by {grown} KiB in {time.monotonic() - begun:.0f} s")
        assert grown < 1024 * max(1, minutes)
        assert len(echo.metrics()) == series, "values from clients create no series"


def test_prompts_of_ten_megabytes_are_refused_and_not_retained(echo: Service) -> None:
    def in_pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(160):
            yield b"x" * 65536
        yield b'"}'

    before = resident_kib(echo.gateway)
    with echo.client() as client:
        for number in range(10):
            body = in_pieces() if number % 2 else b'{"prompt": "' + b"x" * 10**7 + b'"}'
            try:
                answer = client.post("/generate", content=body)
            except httpx.TransportError:
                continue  # it disconnected while we were still sending
            assert answer.status_code == 413
        assert client.get("/generate?prompt=x").status_code == 200
    assert resident_kib(echo.gateway) - before < 8 * 1024


def test_a_gateway_is_small_starts_quickly_and_does_not_import_torch(tmp_path: Path) -> None:
    opa = ScriptedOpa(tmp_path / "opa.sock")  # the embedded policy engine maps another 20 MB of OPA's library
    policy = {"engine": "server", "socket": str(opa.socket)}
    no_fork = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with running(tmp_path, policy=policy, gateway_environment=no_fork) as service:
        assert service.gateway
        process = Path(f"/proc/{service.gateway.process.pid}")
        assert "libtorch" not in (process / "maps").read_text()
        assert resident_kib(service.gateway) <= 90 * 1024
        ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
        assert sum(map(int, ticks)) / 100 <= 1.5, "seconds of CPU until it was ready"
    opa.stop()
