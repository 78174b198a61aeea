"""The chat page of an estate in Chromium."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from estate import Client


@contextmanager
def signed_in(chromium: Any, client: Client, page: str, key: str, language: str = "en") -> Iterator[Any]:
    """A tab that is signed in by a key."""
    from browser import NO_QUOTAS, STREAM_ENDED, tab

    port = urlsplit(client.url).port
    with tab(chromium, port, language, "light", 840, STREAM_ENDED, NO_QUOTAS) as opened:
        opened.set_default_timeout(120_000)
        opened.goto(page)
        opened.get_by_label("API").fill(key)
        opened.keyboard.press("Enter")
        yield opened


def ask(opened: Any, question: str) -> tuple[Any, list[dict[str, str]]]:
    """The answer to a question, once it is complete, and the messages that the page sent for it."""
    before = opened.locator("article.answer").count()
    opened.locator("#question").fill(question)
    with opened.expect_request("**/v1/chat/completions") as sent:
        opened.keyboard.press("Enter")
    opened.locator("#send:enabled").wait_for()
    if opened.locator("article.answer").count() == before:
        raise AssertionError(f"the page says: {opened.inner_text('#status')}")
    return opened.locator("article.answer").nth(before), sent.value.post_data_json["messages"]
