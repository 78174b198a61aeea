"""Tabs of Chromium, which complain of what they were not told to expect."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = shutil.which("chromium-headless-shell")
NEEDED = "needs playwright of the environment payload-dev"
NO_QUOTAS = "/page/v1/usage"  # 503 where the gateways have no Redis
# Chromium reports now and then that a stream failed after its page has read the end of it, with any reader.
STREAM_ENDED = "/v1/chat/completions net::ERR_ABORTED"
LOCALES = {"en": "en-GB", "zh": "zh-CN"}


@contextmanager
def launched() -> Iterator[Any]:
    """A browser; skips the test where Playwright is not installed."""
    import pytest

    sync_api = pytest.importorskip("playwright.sync_api", reason=NEEDED)
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox needs a user of its own; what it loads here is ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def tab(chromium: Any, port: int, language: str, scheme: str, width: int, *expected: str) -> Iterator[Any]:
    """A tab; fails where the browser complained, as it does of what the content security policy forbids.

    `expected`: parts of complaints that are none.
    """
    address = f"https://localhost:{port}"
    context = chromium.new_context(
        base_url=address,
        ignore_https_errors=True,  # the authority is this test's own, which Chromium has no file for
        locale=LOCALES[language],
        color_scheme=scheme,
        viewport={"width": width, "height": 760},
        reduced_motion="reduce",
    )
    complaints: list[str] = []

    def failed(request: Any) -> None:
        # A page that is left ends what its script has asked for; an answer that is cut short is a complaint all the same.
        if request.method != "GET" or "ERR_ABORTED" not in str(request.failure):
            complaints.append(f"{request.url} {request.failure}")

    opened = context.new_page()
    opened.on(
        "console", lambda message: complaints.append(f"{message.text} {message.location.get('url', '')}")
    )
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("requestfailed", failed)
    opened.on(
        "request", lambda request: None if request.url.startswith(address) else complaints.append(request.url)
    )
    try:
        yield opened
        unexpected = [each for each in complaints if not any(part in each for part in expected)]
        assert not unexpected, unexpected
    finally:
        context.close()
