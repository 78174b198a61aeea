"""An engine or the audit writer is replaced under load: requests wait meanwhile, and none is refused."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from load import left_over, load
from questions import CHAT, LASTING, STREAM, error, lines_of, ready
from service import PATIENCE, Service, eventually, patched, running

from llmserve.protocol import Beat, Delta, Done, Failed, Generate, Hello, decode, encode

QUICK = {"echo": {"driver": "echo", "token_seconds": 0.01, "slots": 4}}
SLOW = {"echo": {"driver": "echo", "token_seconds": 0.05, "slots": 4}}
WAITING = 'llm_requests_waiting{model="echo"}'
RUNNING = 'llm_requests_running{model="echo"}'


@pytest.fixture
def slow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    """An engine that takes 50 ms per token and finishes its requests when stopped, by default within 120 s. It waits
    for gateways that do not disconnect as long as it takes.
    """
    waits = patched(tmp_path, llmserve__engine__server__HANG_UP_SECONDS=120.0)
    options = {"drain_seconds": getattr(request, "param", 120)}
    with running(tmp_path, SLOW, engine_options=options, engine_environment=waits) as service:
        yield service


@pytest.mark.parametrize("replaced", ["engine", "writer", "writer that was killed"])
def test_a_replacement_under_load_fails_no_request(tmp_path: Path, replaced: str) -> None:
    # A busy machine may take longer than 5 s to start a writer.
    patient = patched(tmp_path, llmserve__audit__writer_client__INTENT_SECONDS=60.0)
    with running(tmp_path, QUICK, gateway_environment=patient) as service:
        rests = left_over(service)
        with load(service, 6, 10) as made:
            for _ in range(3):
                eventually("answers come", partial(made.answered, made.outcomes["200"] + 12))
                former = service.engines["echo"] if replaced == "engine" else service.writer
                assert former
                if "killed" in replaced:
                    former.kill()
                else:
                    assert former.stop() == 0
                if replaced == "engine":
                    service.start_engine("echo")
                else:
                    service.start_writer()
            eventually("answers come", partial(made.answered, made.outcomes["200"] + 12))
        assert set(made.outcomes) == {"200"}, made.outcomes
        eventually("nothing is left over", lambda: left_over(service) == rests)

        def recorded() -> set[str]:
            records = service.records()
            return {
                each["transaction.id"] for each in records if each.get("llmkeep.audit.phase") == "outcome"
            }

        eventually("all is recorded", lambda: len(recorded()) >= made.outcomes["200"])
        whole = service.cli("audit", "verify", str(tmp_path / "audit"))
        assert whole.returncode == 0, whole.stdout + whole.stderr
        assert len(recorded()) == made.outcomes["200"]


def test_stopping_one_of_two_instances_fails_no_request(tmp_path: Path) -> None:
    with running(tmp_path, QUICK, instances={"echo": 2}) as service, load(service, 6, 10) as made:
        eventually("answers come", lambda: made.answered(12))
        assert service.engines["echo"].stop() == 0
        assert ready(service)
        eventually("answers come", partial(made.answered, made.outcomes["200"] + 12))
        made.stop.set()
    assert set(made.outcomes) == {"200"}, made.outcomes


def test_requests_wait_while_a_stopped_engine_finishes_and_is_replaced(
    slow: Service,
) -> None:
    engine = slow.engines["echo"]
    with slow.client() as client, slow.client() as other, ThreadPoolExecutor() as pool:
        with client.stream("POST", CHAT, json={**STREAM, "max_tokens": 20}) as answer:
            lines = lines_of(answer)
            next(lines)
            engine.process.terminate()
            eventually("not ready", lambda: not ready(slow))
            waits = pool.submit(other.get, "/generate?prompt=new")
            eventually("it waits", lambda: slow.metrics()[WAITING] == 1)
            assert list(lines)[-1] == "data: [DONE]"
        assert engine.ended() == 0
        slow.start_engine("echo")
        assert waits.result().json()["response"] == "new"


@pytest.mark.parametrize(("slow", "signals"), [(2, 1), (30, 2)], indirect=["slow"])
def test_answers_beyond_the_drain_time_end_with_an_error_and_a_second_sigterm_ends_them_at_once(
    slow: Service, signals: int
) -> None:
    engine = slow.engines["echo"]
    with slow.client() as client, client.stream("POST", CHAT, json=LASTING) as answer:
        lines = lines_of(answer)
        next(lines)
        before = time.monotonic()
        engine.process.terminate()
        if signals == 2:  # two signals that arrive before the first is handled count as one
            eventually("the first is handled", lambda: not (slow.folder / "echo.sock").exists())
            engine.process.terminate()
        assert "engine_lost" in list(lines)[-1]
        took = time.monotonic() - before
    assert took < 25 if signals == 2 else took > 1.5, took
    assert engine.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("slow", [2], indirect=True)
def test_a_whole_answer_cut_off_by_the_stop_is_generated_again_by_the_next_engine(slow: Service) -> None:
    with slow.client() as client, ThreadPoolExecutor() as pool:
        pending = pool.submit(client.post, CHAT, json={**STREAM, "stream": False, "max_tokens": 80})
        eventually("it runs", lambda: slow.metrics()[RUNNING] == 1)
        assert slow.engines["echo"].stop() == 0
        slow.start_engine("echo")
        assert pending.result().json()["usage"]["completion_tokens"] == 80


def test_the_queue_for_an_absent_engine_is_bounded(tmp_path: Path) -> None:
    limits = {"waiting": 1, "queue_seconds": 8}
    with (
        running(tmp_path, limits=limits) as service,
        service.client() as client,
        ThreadPoolExecutor() as pool,
    ):
        assert service.engines["echo"].stop() == 0
        first = pool.submit(client.get, "/generate?prompt=x")
        eventually("it waits", lambda: service.metrics()[WAITING] == 1)
        with service.client() as other:
            error(other.get("/generate?prompt=x"), 429, "too_many_waiting")
        error(first.result(), 503, "queue_timeout")
        assert service.metrics()[WAITING] == 0


def test_a_leaving_engine_refuses_requests_and_exits_once_its_gateways_have_disconnected(
    slow: Service,
) -> None:
    assert slow.gateway
    assert slow.gateway.stop() == 0
    engine = slow.engines["echo"]

    with socket.socket(socket.AF_UNIX) as gateway:
        gateway.settimeout(10)
        gateway.connect(str(slow.folder / "echo.sock"))
        with gateway.makefile("rb") as lines:
            heard = map(decode, lines)
            assert isinstance(next(heard), Hello)
            gateway.sendall(encode(Generate(1, True, 20, prompt="word " * 20)))
            assert any(isinstance(frame, Delta) for frame in heard)
            engine.process.terminate()
            assert any(isinstance(frame, Beat) and frame.leaving for frame in heard)
            gateway.sendall(encode(Generate(2, True, 20, prompt="late")))
            refused = next(frame for frame in heard if isinstance(frame, Failed))
            assert (refused.id, refused.code) == (2, "engine_unavailable")
            assert any(isinstance(frame, Done) for frame in heard)
            assert engine.process.poll() is None
        gateway.shutdown(socket.SHUT_RDWR)
        assert engine.process.wait(PATIENCE) == 0, "it did not wait until its time limit, 120 s"
