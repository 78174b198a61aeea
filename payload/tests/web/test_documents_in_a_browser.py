"""The chat page's panel for documents in Chromium: nginx, page, gateway, unit, parsers and Elasticsearch are real."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import browser
import httpx2 as httpx
import pytest
from browser import CHROMIUM, LOCALES, NEEDED, NO_QUOTAS, STREAM_ENDED
from chat_page import ChatPage, ask, served
from document_files import docx, drawn, paragraph, pdf
from scripted_upstream import QuotingUpstream, answer
from search_server import search_server
from service import Process, eventually
from uploads import LIMIT, searching, taking_in

sync_api = pytest.importorskip("playwright.sync_api", reason=NEEDED)
Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=NEEDED).Axe
pytest.importorskip("torch", reason="Debian's python3-torch is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium-headless-shell of requirements.apt")
MARKER = "avocet-3190"
ALIASES: dict[str, dict[str, Any]] = {"handbook-assistant": {"model": "quoting", "collections": ["handbook"]}}
DOCUMENTS = "/page/v1/collections/handbook/documents"


@contextmanager
def quoting(address: Path) -> Iterator[dict[str, Any]]:
    """A stand-in for a model that quotes passages, as the gateway's configuration names it."""
    server = QuotingUpstream(address)
    server.models = answer({"object": "list", "data": [{"id": "quoting", "max_model_len": 4096}]})
    try:
        yield {"socket": str(address), "revision": "1", "fields": ["structured_outputs"]}
    finally:
        server.stop()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatPage]:
    folder = tmp_path_factory.mktemp("panel")
    with (
        search_server() as index,
        quoting(folder / "quoting.sock") as model,
        served(folder, remotes={"quoting": model}, aliases=ALIASES, **searching(folder, index)) as chat,
        taking_in(chat.gateway, WAIT_SECONDS=8.0),
    ):
        yield chat


@contextmanager
def tab(
    chromium: Any,
    chat: ChatPage,
    language: str = "en",
    width: int = 1000,
    expected: str = NO_QUOTAS,
    **who: str,
) -> Iterator[Any]:
    """A tab that is signed in by the form."""
    complaints = (NO_QUOTAS, STREAM_ENDED, expected)
    with browser.tab(chromium, chat.edge.port, language, "light", width, *complaints) as opened:
        opened.goto("/")
        opened.get_by_label("API").fill(chat.key(**who)[0])
        opened.keyboard.press("Enter")
        opened.locator("#quota:not(:empty)").wait_for()
        yield opened


def open_panel(opened: Any) -> Any:
    """The panel, with the list of its collection."""
    with opened.expect_response(lambda answer: DOCUMENTS in answer.url):
        opened.locator("#documents summary").click()
    return opened.locator("#documents")


def add(opened: Any, *files: tuple[str, bytes]) -> str:
    """What the page says of files once it is done with them."""
    chosen = [{"name": name, "mimeType": "", "buffer": content} for name, content in files]
    opened.locator("#add-documents").set_input_files(chosen)
    opened.locator("#add-documents:enabled").wait_for()
    return str(opened.locator("#status").inner_text())


def items(opened: Any) -> list[str]:
    return list(opened.locator("#documents li span").all_inner_texts())


def test_a_writer_adds_a_document_that_is_found_and_removes_it(chromium: Any, chat: ChatPage) -> None:
    name = "Reise – 差旅.pdf"
    with tab(chromium, chat) as opened:
        panel = open_panel(opened)
        assert "The collection has no documents." in panel.inner_text()
        assert panel.locator("option").all_inner_texts() == ["handbook"]
        file = pdf(drawn("The first page."), drawn(f"The form is {MARKER}."))
        assert add(opened, (name, file)) == f"“{name}” was added."
        assert items(opened) == [f"{name}: passages: 2; added by ada"]
        with chat.gateway.client() as client:
            body = {"query": "form", "collections": ["handbook"]}
            assert MARKER in client.post("/v1/search", json=body).text
        opened.on("dialog", lambda dialog: dialog.accept())
        opened.get_by_label(f"Remove “{name}”").click()
        opened.get_by_text("The collection has no documents.").wait_for()
        assert opened.locator("#status").inner_text() == f"“{name}” was removed."
    events = {
        (each["event.action"], each["user.id"])
        for each in chat.gateway.records()
        if each["event.action"].startswith("document.")
    }
    assert {("document.added", "ada"), ("document.removed", "ada")} <= events


@pytest.mark.parametrize(
    ("language", "name", "content", "question", "sentence", "source"),
    [
        (
            "en",
            "travel.pdf",
            pdf(drawn("Meals are paid by receipt."), drawn("Travel is booked a week ahead.")),
            "When is travel booked?",
            "Travel is booked a week ahead.",
            "travel.pdf, page 2",
        ),
        (
            "zh",
            "差旅规定.docx",
            docx(paragraph("出差须提前一周预订。")),
            "出差要提前多久预订？",
            "出差须提前一周预订。",
            "差旅规定.docx，第 1 页",
        ),
    ],
)
def test_an_answer_from_a_document_that_was_just_added_shows_its_page_and_passage(
    chromium: Any,
    chat: ChatPage,
    language: str,
    name: str,
    content: bytes,
    question: str,
    sentence: str,
    source: str,
) -> None:
    """By a stand-in for a model that quotes the best passage."""
    with tab(chromium, chat, language) as opened:
        open_panel(opened)
        add(opened, (name, content))
        answered = ask(opened, question, "handbook-assistant")
        assert sentence in answered.locator(".text").inner_text()
        [summary] = answered.locator(".source summary").all_inner_texts()
        assert summary.endswith(source)
        assert sentence in str(answered.locator(".source p").text_content())
        assert answered.locator(".unsupported").count() == 0
        opened.on("dialog", lambda dialog: dialog.accept())
        entry = opened.locator("#documents li", has_text=name)
        entry.get_by_role("button").click()
        entry.wait_for(state="detached")


def test_each_file_that_cannot_be_read_is_named_with_its_reason_and_the_others_are_added(
    chromium: Any, chat: ChatPage
) -> None:
    with tab(chromium, chat, expected=DOCUMENTS) as opened:
        open_panel(opened)
        outcome = add(
            opened,
            ("broken.docx", b"PK"),
            ("rules.md", b"A rule."),
            ("tool.exe", b"MZ"),
            ("large.md", b"x" * (LIMIT + 1)),
        )
        assert "“broken.docx” was not added: broken.docx is broken" in outcome
        assert "“rules.md” was added." in outcome
        assert "“tool.exe” was not added: tool.exe has the unsupported format '.exe'" in outcome
        assert (
            f"“large.md” has {LIMIT + 1:,} bytes, and a document may have at most {LIMIT:,}: split it."
            in outcome
        )
        [failed, added] = items(opened)
        assert failed.startswith("broken.docx: not added, because broken.docx is broken")
        assert added == "rules.md: passages: 1; added by ada"


def test_what_is_sent_of_a_document_is_shown(chromium: Any, chat: ChatPage) -> None:
    """Chromium is given as slow a network as a person might have."""
    with tab(chromium, chat) as opened:
        open_panel(opened)
        network = opened.context.new_cdp_session(opened)
        slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": LIMIT // 4}
        network.send("Network.enable")
        network.send("Network.emulateNetworkConditions", slow)
        opened.evaluate(
            """() => {
              window.shown = [];
              const [meter, status] = ["#sent", "#status"].map((name) => document.querySelector(name));
              const note = () => window.shown.push([meter.value, status.textContent]);
              new MutationObserver(note).observe(status, { childList: true });
            }"""
        )
        content = b"<p>A long rule.</p><!--" + b"x" * (LIMIT - 100) + b"-->"
        assert add(opened, ("long.html", content)) == "“long.html” was added."
        shown = opened.evaluate("window.shown")
        parts = [part for part, text in shown if text.startswith("“long.html” is being sent: ")]
        assert parts
        assert all(0 < part < 1 for part in parts)
        assert [1, "“long.html” is being processed."] in shown


def test_no_panel_is_shown_to_those_who_write_nothing(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, subject="eve", tenant="accounts") as opened:
        assert opened.locator("#documents").is_hidden()


def test_the_other_tenant_sees_no_document_and_its_own_collection(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        open_panel(opened)
        add(opened, ("ours.md", f"Ours is {MARKER}.".encode()))
    with tab(chromium, chat, subject="eve", tenant="sales") as opened:
        with opened.expect_response(lambda answer: "/collections/plans/documents" in answer.url):
            opened.locator("#documents summary").click()
        assert opened.locator("#documents option").all_inner_texts() == ["plans"]
        assert items(opened) == []


def test_a_name_is_text(chromium: Any, chat: ChatPage) -> None:
    name = "<img src=x onerror=alert(1)>.md"
    with tab(chromium, chat) as opened:
        open_panel(opened)
        assert add(opened, (name, b"A rule.")) == f"“{name}” was added."
        assert f"{name}: passages: 1; added by ada" in items(opened)
        assert not opened.locator("#documents img").count()


@pytest.mark.parametrize("language", LOCALES)
def test_axe_finds_no_violation_in_either_language_and_nothing_is_wider_than_the_window(
    chromium: Any, chat: ChatPage, language: str
) -> None:
    words = {"en": ("Add documents", "was added."), "zh": ("添加文档", "已添加")}[language]
    with tab(chromium, chat, language, 320) as opened:
        panel = open_panel(opened)
        assert words[1] in add(opened, (f"{language}{'-' * 60}.md", b"A rule."))
        assert words[0] in panel.inner_text()
        found = [each for each in Axe().run(opened).response["violations"] if each["impact"]]
        assert not found, json.dumps(found, indent=1)[:2000]
        assert opened.evaluate("document.documentElement.scrollWidth") <= 320


def test_without_the_unit_the_panel_says_so(chromium: Any, chat: ChatPage) -> None:
    path = Path(str((chat.gateway.documents or {})["intake"]))
    aside = path.with_suffix(".aside")
    path.rename(aside)
    try:
        with tab(chromium, chat, expected=DOCUMENTS) as opened:
            open_panel(opened)
            opened.get_by_text(
                "Documents cannot be added, listed or removed now: try again later."
            ).wait_for()
    finally:
        aside.rename(path)


# Without a browser.


def resident(process: Process) -> int:
    """Bytes of anonymous memory that a process has."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def test_no_file_is_in_the_pages_memory_as_a_whole(chat: ChatPage) -> None:
    """A sender that pauses is waited for; what it has sent is with the unit."""
    size = 64 << 20
    with chat.signed_in() as client:
        before = resident(chat.process)
        largest = 0

        def content() -> Iterator[bytes]:
            nonlocal largest
            for _ in range(size >> 20):
                yield bytes(1 << 20)
                largest = max(largest, resident(chat.process))

        client.headers["content-length"] = str(size)
        with suppress(httpx.TransportError):
            client.post(f"{DOCUMENTS}?name=large.md", content=content())
    assert largest - before < 16 << 20


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [({"x-csrf-token": "0" * 64}, 403, "csrf"), ({"sec-fetch-site": "cross-site"}, 403, "cross_site")],
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_another_site_or_a_form_adds_and_removes_nothing(
    chat: ChatPage, headers: dict[str, str], status: int, code: str, method: str
) -> None:
    with chat.signed_in() as client:
        answer = client.request(method, f"{DOCUMENTS}?name=a.md&document=x", content=b"x", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_large_file_that_the_page_refuses_gets_the_refusal_and_its_connection_takes_more(
    chat: ChatPage,
) -> None:
    with chat.signed_in() as client:
        for _ in range(5):
            answer = client.post(
                f"{DOCUMENTS}?name=a.md", content=b"x" * LIMIT, headers={"x-csrf-token": "forged"}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "csrf")


@pytest.mark.parametrize(
    "path",
    [
        "collections/handbook",
        "collections/handbook/documents/x",
        "collections/%2e%2e%2fmodels/documents",
        "collections/a%0db/documents",
    ],
)
def test_no_other_path_below_collections_is_passed_on(chat: ChatPage, path: str) -> None:
    with chat.signed_in() as client:
        assert client.get(f"/page/v1/{path}").status_code in {400, 404}


def test_a_file_that_breaks_off_is_not_added_and_gives_its_place_back(chat: ChatPage) -> None:
    def content() -> Iterator[bytes]:
        yield b"A half"
        raise InterruptedError

    for _ in range(3):
        with chat.signed_in() as client, suppress(InterruptedError):
            client.post(f"{DOCUMENTS}?name=half.md", content=content(), headers={"content-length": "100"})
    with chat.signed_in() as client:
        eventually(
            "a place is free",
            lambda: client.post(f"{DOCUMENTS}?name=whole.md", content=b"A rule.").status_code in {200, 201},
        )
        assert "half.md" not in client.get(DOCUMENTS).text
