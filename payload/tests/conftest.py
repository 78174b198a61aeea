"""Services that several tests share."""

from collections.abc import Iterator

import httpx2 as httpx
import pytest
from redis_server import RedisServer
from service import Service, running


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


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for a module."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()
