"""Services that several tests share."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forks
import httpx2 as httpx
import pytest
from nvml_standin import Gpus, compiled
from redis_server import RedisServer
from service import Service, running

from llmcore.logs import Batched

if TYPE_CHECKING:
    from annotation_bench import Bench
    from chat_page import ChatPage
    from operator_page import OperatorPage
    from watched_estate import WatchedEstate

pytest_plugins = ["allowed_skips", "ledger"]

# For torch, here and in programs that tests start: threads of OpenMP and OpenBLAS wait for each other in a loop, which on cores
# that others use is up to half of a test's CPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A program that a test calls in this process configures its logging, which must not reach the tests after it."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)
    logging.root.handlers[:] = [each for each in logging.root.handlers if not isinstance(each, Batched)]


@pytest.fixture(scope="session", autouse=True)
def forked_programs() -> Iterator[None]:
    """Ends the processes of `forks` after all tests, so that their CPU seconds are counted."""
    yield
    forks.end_origins()


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gateway before the echo engine. Tests that break something start one of their own."""
    with running(tmp_path_factory.mktemp("echo")) as service:
        yield service


@pytest.fixture
def client(echo: Service) -> Iterator[httpx.Client]:
    """A client of `echo` that has a key."""
    with echo.client() as client:
        yield client


@pytest.fixture(scope="session")
def estate(tmp_path_factory: pytest.TempPathFactory) -> Iterator["WatchedEstate"]:
    """Prometheus and Alertmanager of an estate that is made up, for the operator page."""
    from watched_estate import watched

    with watched(tmp_path_factory.mktemp("watched") / "estate") as estate:
        yield estate


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory, estate: "WatchedEstate") -> Iterator["OperatorPage"]:
    """A gateway and its operator page; what a test stops, it starts again. Its journal is another one than the gateway's."""
    from operator_page import EXPERIMENTS, TENANTS, serving

    identity = {"certificate_header": "X-Client-Certificate"}
    folder = tmp_path_factory.mktemp("web")
    folders = {name: str(folder / name) for name in ("feedback", "verdicts")}
    for name in folders:
        (folder / name).mkdir()
    with (
        running(folder, identity=identity, tenants=TENANTS, experiments=EXPERIMENTS) as service,
        serving(service, estate, **folders) as page,
    ):
        yield page


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ChatPage"]:
    """A gateway that keeps ratings, and its chat page; what a test stops, it starts again."""
    from chat_page import served

    with served(tmp_path_factory.mktemp("chat")) as chat:
        yield chat


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser."""
    from browser import launched

    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for a module."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def nvidia_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-ins for NVIDIA's libraries."""
    return compiled(tmp_path_factory.mktemp("nvidia"))


@pytest.fixture
def gpus(nvidia_libraries: Path, tmp_path: Path) -> Gpus:
    """Simulated GPUs, for processes that are started with their environment."""
    return Gpus(nvidia_libraries, tmp_path)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Bench":
    """Exports and imports of annotations, with the key that recorded ones have."""
    from annotation_bench import KEY, Bench

    monkeypatch.setattr("llmtrain.annotation.tasks.secrets.token_bytes", lambda size: KEY[:size])
    return Bench(tmp_path)
