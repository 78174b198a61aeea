"""One estate, one gateway and one operator page for all tests of it; what a test stops, it starts again."""

from collections.abc import Iterator

import pytest
from operator_page import OperatorPage, serving
from service import running
from watched_estate import WatchedEstate, watched


@pytest.fixture(scope="session")
def estate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedEstate]:
    with watched(tmp_path_factory.mktemp("watched") / "estate") as estate:
        yield estate


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory, estate: WatchedEstate) -> Iterator[OperatorPage]:
    identity = {"certificate_header": "X-Client-Certificate"}
    with (
        running(tmp_path_factory.mktemp("web"), identity=identity) as service,
        serving(service, estate) as page,
    ):
        yield page
