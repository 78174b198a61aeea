"""An engine that hangs: readiness fails, no request waits for it, and the service manager replaces it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from nvml_standin import Gpus
from questions import error
from service import Process, eventually, running

from llmcore.notify import watchdog_seconds


def hangs() -> dict[str, dict[str, Any]]:
    """An engine that takes longer for a token than any timeout."""
    return {"echo": {"driver": "echo", "token_seconds": 1000.0}}


def said_since(process: Process, seconds: float) -> list[str]:
    """What a process sends to its service manager from now on for `seconds`."""
    process.notifications.settimeout(0.01)
    try:
        while True:
            process.notifications.recv(1000)
    except TimeoutError:
        pass
    states = []
    end = time.monotonic() + seconds
    process.notifications.settimeout(0.05)
    while time.monotonic() < end:
        try:
            states.append(process.notifications.recv(1000).decode())
        except TimeoutError:
            continue
    return states


@contextmanager
def heard(process: Process) -> Iterator[list[str]]:
    """What it sends to its service manager within the block. Unread, its tenth message would block."""
    states: list[str] = []
    done = Event()

    def listen() -> None:
        while not done.is_set():
            with suppress(TimeoutError):
                states.append(process.notifications.recv(1000).decode())

    thread = Thread(target=listen)
    thread.start()
    try:
        yield states
    finally:
        done.set()
        thread.join()


def test_an_engine_whose_model_hangs_is_not_ready_and_stops_notifying_its_watchdog(
    tmp_path: Path,
) -> None:
    options = {"stall_seconds": 0.6}
    feed = {"WATCHDOG_USEC": "600000"}
    with running(tmp_path, hangs(), engine_options=options, engine_environment=feed) as service:
        engine = service.engines["echo"]
        with service.client() as client, ThreadPoolExecutor() as pool:
            with heard(engine) as states:
                eventually("an idle engine does not hang", lambda: states.count("WATCHDOG=1") >= 3)
                waiting = pool.submit(client.get, "/generate?prompt=x")
                stalled = 'llm_engine_stalled{model="echo"}'
                eventually("it is noticed", lambda: service.metrics()[stalled] == 1, 5)
            refused = error(client.get("/readyz"), 503, "not_ready")
            assert refused["message"] == "not ready: 1 of 1 engines make no progress"
            assert client.get("/livez").status_code == 200, "the gateway itself is alive"
            refused = error(client.get("/generate?prompt=y"), 503, "engine_unavailable")
            assert "making no progress" in refused["message"]
            assert said_since(engine, 1.5) == []
            engine.kill()  # as systemd would
            error(waiting.result(), 503, "engine_lost")
            service.engine_models["echo"]["token_seconds"] = 0.0
            service.start_engine("echo")
            eventually("the gateway is ready", lambda: client.get("/readyz").status_code == 200, 5)
            assert client.get("/generate?prompt=y").status_code == 200
    assert "the model makes no progress" in service.logs()


def test_a_suspended_engine_with_pending_work_is_not_ready_until_it_resumes(tmp_path: Path) -> None:
    with running(tmp_path, {"echo": {"driver": "echo", "token_seconds": 0.1}}) as service:
        process = service.engines["echo"].process
        with service.client() as client, ThreadPoolExecutor() as pool:
            process.send_signal(signal.SIGSTOP)
            try:
                waiting = pool.submit(client.get, "/generate?prompt=x")
                eventually("it is noticed", lambda: client.get("/readyz").status_code == 503, 8)
            finally:
                process.send_signal(signal.SIGCONT)
            assert waiting.result().status_code == 200
            eventually("the gateway is ready", lambda: client.get("/readyz").status_code == 200, 5)


def test_the_engine_ends_late_requests_by_itself(tmp_path: Path) -> None:
    with running(tmp_path, hangs()) as service, service.client() as client:
        before = time.monotonic()
        late = client.get("/generate?prompt=x", headers={"x-llm-deadline-ms": "300"})
        assert "was not complete within 0." in error(late, 503, "deadline_exceeded")["message"]
        assert time.monotonic() - before < 20, "a token takes 1000 s"
        assert service.metrics()['llm_requests_running{model="echo"}'] == 0
        for wrong in "0", "-5", "soon", "1e3", "9" * 12:
            refused = client.get("/generate?prompt=x", headers={"x-llm-deadline-ms": wrong})
            assert error(refused, 400, "invalid_value")["param"] == "x-llm-deadline-ms"


def probed(path: Path) -> subprocess.CompletedProcess[str]:
    """What llm-probe says of a socket."""
    argv = [sys.executable, "-m", "llmserve.engine.probe", str(path), "--seconds", "3"]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_a_probe_passes_while_the_engine_makes_progress_and_fails_once_it_does_not(tmp_path: Path) -> None:
    with running(tmp_path, hangs(), engine_options={"stall_seconds": 0.6}) as service:
        path = tmp_path / "echo.sock"
        assert probed(path).returncode == 0
        with service.client() as client, ThreadPoolExecutor() as pool:
            waiting = pool.submit(client.get, "/generate?prompt=x")
            eventually(
                "it has stalled", lambda: service.metrics()['llm_engine_stalled{model="echo"}'] == 1, 5
            )
            done = probed(path)
            assert (done.returncode, "makes no progress" in done.stderr) == (1, True), done.stderr
            service.engines["echo"].process.send_signal(signal.SIGSTOP)
            done = probed(path)
            assert (done.returncode, "timed out" in done.stderr) == (1, True), done.stderr
            service.engines["echo"].kill()
            waiting.result()
        assert probed(path).returncode == 1, "the file is there, and no process listens"


def test_a_probe_fails_at_what_is_no_engine(tmp_path: Path) -> None:
    assert "No such file" in probed(tmp_path / "none.sock").stderr
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "other.sock"))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as link:
                link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = Thread(target=answer)
        thread.start()
        done = probed(tmp_path / "other.sock")
        thread.join()
    assert done.returncode == 1, done.stderr


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "20000000"}, 20.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(os.getpid())}, 20.0),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_the_watchdog_interval_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], seconds: float | None
) -> None:
    for name in "WATCHDOG_USEC", "WATCHDOG_PID":
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert watchdog_seconds() == seconds


def test_the_engine_reports_gpu_utilization_without_a_lost_gpu(tmp_path: Path, gpus: Gpus) -> None:
    gpus.become("count = 3", "util_gpu = 70", "1.util_gpu = 90", "2.lost = 1")
    with running(tmp_path, engine_environment=gpus.environment) as service:
        name = 'llm_gpu_utilization_ratio{gpu="%d",model="echo"}'
        eventually("it is reported", lambda: service.metrics().get(name % 0) == 0.7, 5)
        scrape = service.metrics()
        assert (scrape[name % 1], name % 2 in scrape) == (0.9, False)


def test_without_a_driver_there_are_no_gpus() -> None:
    code = "from llmserve.engine.gpu import Gpus; print(Gpus().used())"
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout == "[]\n"
