"""How log lines are written."""

import asyncio
import json
import logging
import subprocess
import sys
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


@pytest.mark.parametrize(
    "ends",
    [
        "raise ValueError(canary)",
        "threading.Thread(target=int, args=(canary,)).start()",
        "type('Held', (), {'__del__': lambda self: int(canary)})()",
        "logging.getLogger('llmserve').info('%d', canary)",
    ],
    ids=["process", "thread", "finalizer", "log line"],
)
def test_an_exception_that_nothing_catches_is_logged_without_its_message(ends: str) -> None:
    """Python itself would print the message, which may quote a prompt, as text that is shipped as it is."""
    program = f"""if True:
        import logging, threading
        from llmcore import logs
        logs.configure()
        canary = "canary-" + "in-a-message"
        {ends}
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "canary-in-a-message" not in done.stdout + done.stderr
    [written] = [json.loads(line) for line in done.stderr.splitlines()]
    assert written["error.type"] in ("builtins.ValueError", "builtins.TypeError")
    assert written["error.stack_trace"]
