"""How log lines are written."""

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from llmcore import logs


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Each write to stderr of a process that has configured its logs."""
    handler = logs.Batched()
    handler.setFormatter(logs.JsonLines())
    writes: list[str] = []
    monkeypatch.setattr(handler.stream, "write", writes.append)
    log = logging.getLogger("llmserve.test")
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "propagate", False)
    log.setLevel(logging.INFO)
    yield writes
    log.setLevel(logging.NOTSET)


def messages(write: str) -> list[str]:
    """Messages of the lines in one write."""
    return [json.loads(line)["message"] for line in write.splitlines()]


def test_lines_of_one_turn_of_the_event_loop_are_written_together(written: list[str]) -> None:
    async def scenario() -> None:
        logging.getLogger("llmserve.test").info("one")
        logging.getLogger("llmserve.test").info("two")
        assert not written
        await asyncio.sleep(0.05)
        assert [messages(write) for write in written] == [["one", "two"]]

    asyncio.run(scenario())


def test_a_warning_is_written_at_once_and_in_order(written: list[str]) -> None:
    async def scenario() -> None:
        logging.getLogger("llmserve.test").info("before")
        logging.getLogger("llmserve.test").warning("now")
        assert [messages(write) for write in written] == [["before", "now"]]

    asyncio.run(scenario())


def test_lines_without_an_event_loop_are_written_at_once(written: list[str]) -> None:
    logging.getLogger("llmserve.test").info("early")
    assert [messages(write) for write in written] == [["early"]]


def test_a_lone_surrogate_loses_no_line(written: list[str]) -> None:
    logging.getLogger("llmserve.test").info("a name", extra={"fields": {"file": "\udcff.yaml"}})
    assert json.loads(written[0])["file"] == "\udcff.yaml"
