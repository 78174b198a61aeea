"""Engines of other hosts, through the nginx of role `engine_access`: who reaches them, and what becomes of their requests."""

import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from edge import revoke
from engine_access import EngineAccess, offering
from scripted_upstream import END, USAGE, ScriptedUpstream, delta, stream
from service import PATIENCE, Service, eventually, patched

from llmgpu.metrics import Metrics
from llmgpu.quarantine import Entry, Saved, serialized
from llmserve.upstream.engine_client import LINK_SECONDS

CLIENTS = 8
CHAT = "/v1/chat/completions"


@contextmanager
def engines_elsewhere(
    folder: Path,
    *names: str,
    slow: float = 0.0,
    certificate: str = "gateway",
    watch: int | None = None,
    link_seconds: float = LINK_SECONDS,
) -> Iterator[tuple[EngineAccess, Service, Service]]:
    """Engines NAMES of one model on one host, and a gateway on another that has no engine of its own."""
    there = Service(folder, {name: {"driver": "echo", "token_seconds": slow} for name in names})
    there.engine_options = {"name": "echo"}
    here = Service(folder / "here", {})
    here.folder.mkdir()
    here.gateway_environment = patched(
        here.folder, llmserve__upstream__engine_client__LINK_SECONDS=link_seconds
    )
    try:
        for name in names:
            there.start_engine(name)
        sockets = {name: folder / f"{name}.sock" for name in names}
        with offering(folder / "access", sockets, watch) as access:
            here.offered = {
                "echo": {
                    "offered": [access.engine(name, gpus=watch is not None) for name in names],
                    "tls": access.tls(certificate),
                }
            }
            here.start()
            yield access, there, here
    finally:
        here.stop()
        there.stop()


def connections(access: EngineAccess) -> set[str]:
    """The gateway's ends of its connections to what offers the engines."""
    shown = subprocess.run(
        ["ss", "--no-header", "--tcp", "--numeric", "state", "established", f"( dport = {access.port} )"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.split()[2] for line in shown.stdout.splitlines()}


def running_requests(gateway: Service) -> float:
    return gateway.metrics()['llm_requests_running{model="echo"}']


def question(text: str, **fields: object) -> dict[str, object]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def answers(gateway: Service) -> bool:
    with gateway.client() as client:
        return client.post(CHAT, json=question("x")).status_code == 200


def test_a_gateway_answers_by_an_engine_of_another_host(tmp_path: Path) -> None:
    with engines_elsewhere(tmp_path, "echo") as (_, _, gateway):
        eventually("the engine is connected", lambda: answers(gateway))
        with gateway.client() as client:
            answer = client.post(CHAT, json=question("the harbour")).json()
        assert answer["choices"][0]["message"]["content"] == "the harbour"


def test_a_host_that_is_no_gateway_reaches_no_engine(tmp_path: Path) -> None:
    with engines_elsewhere(tmp_path, "echo", certificate="stranger") as (_, _, gateway):
        eventually("it is refused", lambda: "it closed the connection" in gateway.logs())
        assert not answers(gateway)


def test_a_gateway_whose_certificate_was_revoked_is_refused_by_the_next_connection(tmp_path: Path) -> None:
    with engines_elsewhere(tmp_path, "echo") as (access, there, gateway):
        eventually("the engine is connected", lambda: answers(gateway))
        revoke(access.folder / "root.pem", access.folder / "gateway.pem")
        access.reload()
        there.engines["echo"].kill()
        there.start_engine("echo")
        eventually("it is refused", lambda: "it closed the connection" in gateway.logs())
        assert not answers(gateway)


WORDS = "one two three four"


def whole(gateway: Service, number: int) -> str:
    """The answer to a question of its own."""
    with gateway.client() as client:
        answer = client.post(CHAT, json=question(f"{number} {WORDS}"))
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def last_event(gateway: Service, number: int, begun: threading.Semaphore) -> str:
    """How the stream of an answer ends, whose first piece has come."""
    with (
        gateway.client() as client,
        client.stream("POST", CHAT, json=question(f"{number} {WORDS}", stream=True)) as stream,
    ):
        lines = (line for line in stream.iter_lines() if line)
        next(line for line in lines if '"content"' in line)
        begun.release()
        return list(lines)[-1]


def test_requests_that_had_not_begun_to_answer_are_sent_to_another_host(tmp_path: Path) -> None:
    with engines_elsewhere(tmp_path, "one", "two", slow=0.4) as (_, there, gateway):
        eventually("both engines are connected", lambda: gateway.logs().count("engine connected") == 2)
        with ThreadPoolExecutor(CLIENTS) as pool:
            pending = [pool.submit(whole, gateway, number) for number in range(CLIENTS)]
            eventually("all are in progress", lambda: running_requests(gateway) == CLIENTS)
            there.engines["one"].kill()
            assert [each.result() for each in pending] == [f"{number} {WORDS}" for number in range(CLIENTS)]


def test_a_stream_that_had_begun_ends_with_an_error_and_those_of_the_other_host_go_on(tmp_path: Path) -> None:
    with engines_elsewhere(tmp_path, "one", "two", slow=0.4) as (_, there, gateway):
        eventually("both engines are connected", lambda: gateway.logs().count("engine connected") == 2)
        begun = threading.Semaphore(0)
        with ThreadPoolExecutor(CLIENTS) as pool:
            streams = [pool.submit(last_event, gateway, number, begun) for number in range(CLIENTS)]
            for _ in streams:
                assert begun.acquire(timeout=PATIENCE)
            there.engines["one"].kill()
            ends = [each.result() for each in streams]
        broken = [end for end in ends if "engine_lost" in end]
        assert broken
        assert [end for end in ends if end not in broken] == ["data: [DONE]"] * (CLIENTS - len(broken))
        assert len(broken) < CLIENTS


def test_a_stream_is_finished_on_a_connection_that_is_being_replaced(tmp_path: Path) -> None:
    with engines_elsewhere(tmp_path, "echo", slow=0.5, link_seconds=0.6) as (access, _, gateway):
        eventually("the engine is connected", lambda: answers(gateway))
        begun, first = threading.Semaphore(0), connections(access)
        with ThreadPoolExecutor(CLIENTS) as pool:
            streams = [pool.submit(last_event, gateway, number, begun) for number in range(CLIENTS)]
            assert [each.result() for each in streams] == ["data: [DONE]"] * CLIENTS
        eventually("the first connection is closed", lambda: not first & connections(access))
        assert answers(gateway)
        assert "engine lost" not in gateway.logs()


@pytest.fixture
def saved() -> Saved:
    """What the other host's watch over GPUs has quarantined."""
    return Saved("boot")


@pytest.fixture
def watch_port(saved: Saved) -> Iterator[int]:
    """Where that watch answers; its GPUs are never read."""
    server = Metrics(Mock(), 0).listen("127.0.0.1", 0, lambda: serialized(saved))
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_an_engine_on_sick_gpus_of_another_host_gets_no_new_request_while_another_one_serves(
    tmp_path: Path, saved: Saved, watch_port: int
) -> None:
    with engines_elsewhere(tmp_path, "one", "two", watch=watch_port) as (access, there, gateway):
        eventually("both engines are connected", lambda: gateway.logs().count("engine connected") == 2)

        def actions(name: str) -> list[str]:
            socket = f"localhost:{access.port}/{name}"
            return [
                each["event.action"]
                for each in gateway.records()
                if each.get("llmkeep.engine.socket") == socket
            ]

        for name in ("one", "two"):
            socket = str(tmp_path / f"{name}.sock")
            saved.quarantine[name] = Entry(socket, "llm-gpu", "GPU 2: Xid 79", "2026-11-27T12:00:00+00:00")
            if name == "one":
                eventually(
                    "it is drained", lambda: actions("one") == ["gpu.admission_closed", "gpu.engine_drained"]
                )
                there.engines["one"].kill()
                assert all(answers(gateway) for _ in range(10))
        eventually("the last one goes on", lambda: actions("two") == ["gpu.admission_kept"])
        assert answers(gateway)
        saved.quarantine.clear()
        eventually("it is as before", lambda: actions("two")[-1] == "gpu.admission_opened")


def test_a_watch_that_does_not_answer_changes_nothing(tmp_path: Path, saved: Saved, watch_port: int) -> None:
    with engines_elsewhere(tmp_path, "one", "two", watch=watch_port) as (access, _, gateway):
        socket = str(tmp_path / "one.sock")
        saved.quarantine["one"] = Entry(socket, "ada", "new cable", "2026-11-27T12:00:00+00:00")
        quarantined = 'llm_engine_quarantined{model="echo"}'
        eventually("it is quarantined", lambda: gateway.metrics()[quarantined] == 1)
        access.process.terminate()
        eventually("the watch is away", lambda: "quarantine unknown" in gateway.logs())
        assert gateway.metrics()[quarantined] == 1


def test_a_server_of_openais_api_on_another_host_answers(tmp_path: Path) -> None:
    server = ScriptedUpstream(tmp_path / "m.sock")
    server.script = stream(delta("hello"), delta("", "stop"), USAGE, END)
    here = Service(tmp_path / "here", {})
    here.folder.mkdir()
    try:
        with offering(tmp_path / "access", {"m": tmp_path / "m.sock"}) as access:
            engine = {"remote": {"revision": "7"}, "offered": [access.engine("m")], "tls": access.tls()}
            here.offered = {"m": engine}
            here.start()
            eventually("the server is connected", lambda: "upstream connected" in here.logs())
            with here.client() as client:
                body = question("x", stream=True) | {"model": "m"}
                assert client.post(CHAT, json=body).content.endswith(END)
    finally:
        here.stop()
        server.stop()
