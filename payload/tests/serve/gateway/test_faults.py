"""Faults: when something breaks, hangs, disconnects or stops, nothing hangs and every client gets an answer."""

import json
import re
import resource
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from questions import CHAT, LASTING, STREAM, WORDS, error, lines_of, ready
from service import PATIENCE, Process, Service, eventually, running

from llmserve.gateway.process import ARRIVED_LOOKS, DRAIN_LOOK_SECONDS

SLOW = {"echo": {"driver": "echo", "token_seconds": 0.05, "slots": 2}}
LIMITS = {
    "waiting": 1,
    "queue_seconds": 0.5,
    "answer_seconds": 60,
    "drain_seconds": 5,
    "subject_share": 1,
    "tenant_share": 1,
}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose engine takes 50 ms per token and has two slots."""
    with running(tmp_path_factory.mktemp("slow"), SLOW, limits=LIMITS) as service:
        yield service


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[Service]:
    """The same, for one test that kills a part of it."""
    with running(tmp_path, SLOW, limits=LIMITS) as service:
        yield service


def running_requests(service: Service) -> float:
    """Number of requests in the engine."""
    return service.metrics()['llm_requests_running{model="echo"}']


def test_the_first_token_is_sent_at_once(slow: Service) -> None:
    with slow.client() as client, client.stream("POST", CHAT, json=STREAM) as answer:
        lines = lines_of(answer)
        next(lines)
        next(lines)
        assert running_requests(slow) == 1, "there are more to come"


def test_a_killed_engine_ends_its_stream_with_an_error_and_serves_after_its_restart(
    doomed: Service,
) -> None:
    with doomed.client() as client:
        with client.stream("POST", CHAT, json=STREAM) as answer:
            lines = lines_of(answer)
            next(lines)
            doomed.engines["echo"].kill()
            last = [json.loads(line.removeprefix("data: ")) for line in lines][-1]
        assert last["error"]["code"] == "engine_lost"
        assert "died while answering" in last["error"]["message"]
        refused = client.get("/readyz")
        assert "1 of 1 engines are unavailable" in error(refused, 503, "not_ready")["message"]
        assert client.get("/livez").status_code == 200
        refused = client.get("/generate?prompt=x")
        error(refused, 503, "engine_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        doomed.start_engine("echo")
        eventually("the gateway is ready", lambda: ready(doomed), 5)
        assert client.get("/generate?prompt=again").json()["response"] == "again"
    assert running_requests(doomed) == 0


def test_an_engine_killed_before_a_whole_answer_is_a_503(doomed: Service) -> None:
    with ThreadPoolExecutor() as pool, doomed.client() as client:
        waiting = pool.submit(client.get, "/generate", params={"prompt": WORDS})
        eventually("the request runs", lambda: running_requests(doomed) == 1)
        doomed.engines["echo"].kill()
        error(waiting.result(), 503, "engine_lost")


def test_a_request_to_a_hung_engine_ends_at_the_deadline(tmp_path: Path) -> None:
    with running(tmp_path, limits={"answer_seconds": 0.5}) as service, service.client() as client:
        process = service.engines["echo"].process
        process.send_signal(signal.SIGSTOP)
        try:
            error(client.get("/generate?prompt=x"), 503, "deadline_exceeded")
        finally:
            process.send_signal(signal.SIGCONT)
        assert client.get("/generate?prompt=x").status_code == 200
        assert running_requests(service) == 0


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_clients_free_their_slots(slow: Service, stream: bool) -> None:
    body = json.dumps({**LASTING, "stream": stream}).encode()
    authorization = f"authorization: Bearer {slow.key}"
    head = f"POST {CHAT} HTTP/1.1\r\nhost: llm\r\n{authorization}\r\ncontent-length: {len(body)}\r\n\r\n"
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(slow.folder / "http.sock"))
            client.sendall(head.encode() + body)
            time.sleep(0.03)
    eventually("all slots are free", lambda: running_requests(slow) == 0)
    with slow.client() as client:
        eventually(
            "the engine has stopped working for disconnected clients",
            lambda: client.get("/generate?prompt=quick").status_code == 200,
        )
    assert slow.metrics()['llm_cancelled_total{by="client"}'] >= 2


def test_excess_requests_are_refused_at_once_with_retry_after(tmp_path: Path) -> None:
    with (
        running(tmp_path, SLOW, limits={**LIMITS, "queue_seconds": 30}) as slow,
        ThreadPoolExecutor(1) as pool,
        slow.client() as client,
        slow.client(slow.add_key("grace", "sales")["key"]) as other,
    ):
        with client.stream("POST", CHAT, json=LASTING), client.stream("POST", CHAT, json=LASTING):
            assert running_requests(slow) == 2
            third = pool.submit(client.get, "/generate?prompt=waits")
            waits = 'llm_requests_waiting{model="echo"}'
            eventually("one waits", lambda: slow.metrics()[waits] == 1)
            refused = client.get("/generate?prompt=too+many"), other.get("/generate?prompt=no+room")
            error(refused[0], 429, "too_many_waiting")
            error(refused[1], 503, "overloaded")
            assert all(int(each.headers["retry-after"]) >= 1 for each in refused)
            assert slow.metrics()[waits] == 1, "refused while it waits, which is for 30 s"
        assert third.result().status_code == 200


def test_sigterm_finishes_running_answers_and_accepts_no_new_ones(tmp_path: Path) -> None:
    with (
        running(tmp_path, SLOW, limits={**LIMITS, "drain_seconds": 120}) as service,
        service.client() as client,
        service.client() as other,
    ):
        gateway = service.gateway
        assert gateway
        assert other.get("/readyz").status_code == 200
        body = {**STREAM, "max_tokens": 80}  # 4 s: the gateway starts to drain a second after the signal
        with client.stream("POST", CHAT, json=body) as answer:
            lines = lines_of(answer)
            next(lines)
            gateway.process.send_signal(signal.SIGTERM)
            eventually("not ready", lambda: other.get("/readyz").status_code == 503)
            error(other.get("/generate?prompt=new"), 503, "draining")
            assert list(lines)[-1] == "data: [DONE]"
        assert gateway.process.wait(PATIENCE) == 0
        gateway.states.append(gateway.notifications.recv(1000).decode())
        assert "STOPPING=1" in gateway.states


def test_sigterm_serves_accepted_connections_and_refuses_new_ones_before_they_send(
    doomed: Service,
) -> None:
    path = doomed.folder / "http.sock"
    head = f"GET /generate?prompt=late HTTP/1.1\r\nhost: llm\r\nauthorization: Bearer {doomed.key}\r\n"

    def asked_late() -> tuple[float, bytes]:
        """Upper bound of the time since the socket was removed when the request was sent, and the answer."""
        assert doomed.gateway
        with socket.socket(socket.AF_UNIX) as early, socket.socket(socket.AF_UNIX) as late:
            early.connect(str(path))
            doomed.gateway.process.send_signal(signal.SIGTERM)
            there = time.monotonic()
            while path.exists():
                there = time.monotonic()
                time.sleep(0.001)
            answer = b""
            with suppress(ConnectionError):
                early.sendall(f"{head}connection: close\r\n\r\n".encode())
            after = time.monotonic() - there
            with suppress(ConnectionError):
                answer = early.recv(1000)
            with pytest.raises(FileNotFoundError):
                late.connect(str(path))
        assert doomed.gateway.process.wait(PATIENCE) == 0
        return after, answer

    after, answer = asked_late()
    for _ in range(9):
        if after < ARRIVED_LOOKS * DRAIN_LOOK_SECONDS / 2:
            break
        doomed.start_gateway()  # this process did not run in time, which proves nothing about the gateway
        after, answer = asked_late()
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("signals", [1, 2])
def test_a_drain_ends_long_streams_with_an_error_and_a_second_sigterm_does_so_at_once(
    tmp_path: Path, signals: int
) -> None:
    seconds = {1: 5, 2: 30}[signals]
    with running(tmp_path, SLOW, limits={**LIMITS, "drain_seconds": seconds}) as service:
        gateway = service.gateway
        assert gateway
        with service.client() as client, client.stream("POST", CHAT, json=LASTING) as answer:
            lines = lines_of(answer)
            next(lines)
            before = time.monotonic()
            gateway.process.send_signal(signal.SIGTERM)
            if signals == 2:  # two signals that arrive before the first is handled count as one
                eventually("the first is handled", lambda: not (tmp_path / "http.sock").exists())
                gateway.process.send_signal(signal.SIGTERM)
            last = json.loads(list(lines)[-1].removeprefix("data: "))
            took = time.monotonic() - before
        assert last["error"]["code"] == "draining"
        assert took < 25 if signals == 2 else took > 3, took
        assert gateway.process.wait(PATIENCE) == 0


def test_a_gateway_starts_without_its_engine_and_finds_it_later(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        service.engines["echo"].kill()
        assert service.gateway
        service.gateway.stop()
        service.start_gateway()
        assert not ready(service)
        service.start_engine("echo")
        eventually("the gateway is ready", lambda: ready(service), 5)


def test_an_engine_that_serves_another_model_is_not_used(tmp_path: Path) -> None:
    with running(tmp_path, {"echo": {"driver": "echo"}}) as service:
        service.engines["echo"].stop()
        (tmp_path / "other.yaml").write_text((tmp_path / "engine-echo.yaml").read_text())
        arguments = ["engine", "--name", "imposter", "--config", str(tmp_path / "other.yaml")]
        service.engines["imposter"] = Process(tmp_path, "imposter", arguments, {}).await_ready()
        eventually("it is noticed", lambda: "serves 'imposter', not 'echo'" in service.logs())
        assert not ready(service)


def test_a_request_beyond_asyncios_line_limit_reaches_the_engine(slow: Service) -> None:
    with slow.client() as client:
        answer = client.post("/generate", json={"prompt": "x" * 900_000, "max_tokens": 1})
        assert len(answer.json()["response"]) == 900_000


def test_a_slow_reader_holds_no_slot(slow: Service) -> None:
    body = json.dumps({"prompt": "x" * 900_000 + " y", "stream": True}).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: llm\r\nauthorization: Bearer {slow.key}\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(slow.folder / "http.sock"))
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(12) == b"HTTP/1.1 200"
        eventually(
            "the slot is free while the answer is still being read", lambda: running_requests(slow) == 0
        )


def test_requests_that_are_sent_at_once_are_answered_one_after_the_other(slow: Service) -> None:
    head = f"POST /generate HTTP/1.1\r\nhost: llm\r\nauthorization: Bearer {slow.key}\r\n"
    bodies = [json.dumps({"prompt": word}).encode() for word in ("one", "two", "three")]
    received = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(slow.folder / "http.sock"))
        client.sendall(
            b"".join(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies)
        )
        while b'"three"' not in received:
            received += client.recv(65536)
    assert re.findall(rb'"response":"(\w+)"', received) == [b"one", b"two", b"three"]


@pytest.mark.parametrize(
    "piece", [b"x: y\r\n" * 10_000, b"y" * 60_000], ids=["many trailers", "an endless one"]
)
def test_trailers_without_end_are_not_read(slow: Service, piece: bytes) -> None:
    head = f"POST /generate HTTP/1.1\r\nauthorization: Bearer {slow.key}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(slow.folder / "http.sock"))
        client.settimeout(PATIENCE)
        client.sendall(head + b'c\r\n{"prompt":"a\r\n0\r\nx: ')
        taken = 0
        with suppress(BrokenPipeError, ConnectionResetError):
            while taken < 30 * 1024 * 1024:
                client.sendall(piece)
                taken += len(piece)
        assert taken < 4 * 1024 * 1024, "what the sockets hold, and some reads"
        with suppress(ConnectionResetError):
            assert b'"head_too_large"' in client.recv(10_000)


def test_a_chunked_body_of_many_parts_is_read(slow: Service) -> None:
    body = b'{"prompt":"' + b"a" * 100_000 + b'"}'
    with slow.client() as client:
        answer = client.post("/generate", content=(body[at : at + 10] for at in range(0, len(body), 10)))
    assert answer.status_code == 200


def test_invalid_http_and_an_endless_head_are_refused(slow: Service) -> None:
    def refused(sent: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(slow.folder / "http.sock"))
            client.settimeout(PATIENCE)
            with suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(sent)
            return client.recv(10_000)

    assert b'"invalid_http"' in refused(b"nonsense\r\n\r\n")
    assert b'"invalid_http"' in refused(b"POST /generate HTTP/1.1\r\ncontent-length: -1\r\n\r\n")
    for endless in b"GET /generate HTTP/1.1\r\nx: " + b"y" * 10**6, b"GET /generate?prompt=" + b"y" * 10**6:
        assert b'"head_too_large"' in refused(endless)
    many = b"".join(b"x%d: y\r\n" % number for number in range(100_000))
    assert b'"head_too_large"' in refused(b"GET /generate HTTP/1.1\r\n" + many)


def test_prompts_answers_and_keys_are_never_logged(doomed: Service) -> None:
    canary = "canary-7d1f"
    with doomed.client() as client:
        client.get("/generate", params={"prompt": canary})
        client.get(f"/generate?prompt=x&{canary}=1")
        client.get(f"/{canary}")
        client.post("/generate", json={"prompt": canary, "stream": True})
        client.post("/generate", content=f'{{"prompt": "{canary}", broken'.encode())
        client.post(CHAT, json={"model": canary, "messages": [{"role": canary, "content": canary}]})
        client.get("/generate", params={"prompt": canary * 4_000})
        client.get("/generate?prompt=x", headers={"authorization": f"Bearer llmk_{canary}_x"})
        with client.stream(
            "POST", CHAT, json={**STREAM, "messages": [{"role": "user", "content": canary * 3}]}
        ) as it:
            next(it.iter_lines())
            doomed.engines["echo"].kill()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(doomed.folder / "http.sock"))
        raw.sendall(f"{canary} is no HTTP\r\n\r\n".encode())
        raw.recv(1000)
    logged = doomed.logs()
    assert "answered" in logged
    assert canary not in logged
    assert doomed.key not in logged
    assert doomed.key.split("_")[2] not in logged
    for line in logged.splitlines():
        json.loads(line)


def test_a_full_audit_disk_stops_answers_until_there_is_space(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        assert client.get("/generate?prompt=x").status_code == 200
        assert service.writer
        writer = service.writer.process.pid
        longest = max(path.stat().st_size for path in (tmp_path / "audit").glob("records-*.jsonl"))
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (longest, resource.RLIM_INFINITY))
        error(client.get("/generate?prompt=x"), 503, "audit_unavailable")
        assert client.get("/livez").status_code == 200
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        eventually("it is answered again", lambda: client.get("/generate?prompt=x").status_code == 200, 10)


MOVED_CLOCK = """
import pathlib, time
real, file = time.time, pathlib.Path(__file__).with_name("offset")
time.time = lambda: real() + float(file.read_text())
"""


def test_a_clock_change_of_an_hour_stops_no_answer(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(MOVED_CLOCK)
    offset = tmp_path / "offset"
    offset.write_text("0")
    moved = {"PYTHONPATH": str(tmp_path)}
    with running(tmp_path, SLOW, gateway_environment=moved) as service, service.client() as other:
        body = {**STREAM, "max_tokens": 40}
        with service.client() as client, client.stream("POST", CHAT, json=body) as answer:
            lines = lines_of(answer)
            next(lines)
            for hours in 1, -1:
                aside = tmp_path / "offset.new"
                aside.write_text(str(hours * 3600))
                aside.replace(offset)
                assert other.get("/generate?prompt=x").status_code == 200
                assert ready(service)
            assert list(lines)[-1] == "data: [DONE]"
        assert other.get("/generate?prompt=x").status_code == 200
