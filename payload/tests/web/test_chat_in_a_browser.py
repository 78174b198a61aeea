"""The chat page in Chromium: what a person does there, by mouse and by keyboard, and what a model's answer cannot do.

`SCREENSHOTS=FOLDER` writes those of docs/ there.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import CHROMIUM, LOCALES, NEEDED, NO_QUOTAS, STREAM_ENDED
from chat_page import ChatPage, ask, served
from redis_server import PASSWORD, RedisServer
from scripted_upstream import END, USAGE, ScriptedUpstream, answer, chunk, stream
from service import eventually, whole_lines

from llmcore.ratings import ENDED, FORGOTTEN, SUBJECT, TENANT
from llmserve.feedback.journal import append
from llmweb.app import SESSION

sync_api = pytest.importorskip("playwright.sync_api", reason=NEEDED)
Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=NEEDED).Axe
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium-headless-shell of requirements.apt")
LONG = " ".join(["one", *["more"] * 60, "last"])  # a minute of the slow model
LABELS = {"en": "Your question", "zh": "您的问题"}
# A model's output, and what of it may reach the page. The engine repeats what it is asked.
HOSTILE = """<script>document.title = "owned"</script> <img src=x onerror="document.title='owned'">
<b onclick="document.title='owned'">bold</b> [link](javascript:document.title='owned') [data](data:text/html,owned)
![picture](https://elsewhere.example/?asked) <form action="https://elsewhere.example"><input name=key></form>
<svg onload="document.title='owned'"></svg> <iframe srcdoc="owned"></iframe> <style>* { display: none }</style>
<a href="https://elsewhere.example" id="chat" onfocus="document.title='owned'" autofocus>anchor</a>
[good](https://docs.example/) <!-- comment --> &lt;script&gt;document.title = "owned"&lt;/script&gt;"""


@contextmanager
def tab(
    chromium: Any,
    chat: ChatPage,
    language: str = "en",
    scheme: str = "light",
    width: int = 1000,
    expected: str = STREAM_ENDED,
    **who: str,
) -> Iterator[Any]:
    """A tab that is signed in by the form."""
    complaints = (expected, STREAM_ENDED, NO_QUOTAS)
    with browser.tab(chromium, chat.edge.port, language, scheme, width, *complaints) as opened:
        opened.goto("/")
        opened.get_by_label("API").fill(chat.key(**who)[0])
        opened.keyboard.press("Enter")
        ready(opened, language)
        yield opened


def ready(opened: Any, language: str = "en") -> None:
    """The page's script has begun, and asks for nothing more."""
    opened.get_by_label(LABELS[language]).wait_for()
    opened.locator("#model option").first.wait_for(state="attached")


def reload(opened: Any) -> None:
    opened.reload()
    ready(opened)


def begin(opened: Any, question: str = LONG) -> None:
    """Ask the slow model, and wait for no answer."""
    opened.locator("#model").select_option("slow")
    opened.locator("#question").fill(question)
    opened.keyboard.press("Enter")


def test_an_answer_is_shown_and_the_conversation_goes_on(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        assert (
            ask(opened, "one **two** three").locator(".text").inner_html().strip()
            == "<p>one <strong>two</strong> three</p>"
        )
        assert ask(opened, "four").locator("h2").inner_text() == "Answer of echo"
        assert opened.locator("article").count() == 4
        assert opened.locator("#status").inner_text() == "The answer is complete."


def test_markdown_of_an_answer_is_shown(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        text = ask(
            opened, "# Head\n\n- a\n- b\n\n```python\nx < 1\n```\n\n| c | d |\n|---|---|\n| 1 | 2 |"
        ).locator(".text")
        assert text.locator("h3").inner_text() == "Head"
        assert text.locator("li").all_inner_texts() == ["a", "b"]
        assert text.locator("pre").inner_text().strip() == "x < 1"
        assert text.locator("td").all_inner_texts() == ["1", "2"]
        assert text.locator("td").first.evaluate("it => getComputedStyle(it).display") == "table-cell"


@pytest.mark.parametrize(
    "text",
    ["> " * 2000 + "deep", "- " * 2000 + "deep", f"a{' ' * 30_000}b", "*" * 30_000, "word " * 14_000],
    ids=["quotes", "lists", "blanks", "marks", "length"],
)
def test_an_answer_that_markdown_takes_long_for_is_shown_as_it_is(
    chromium: Any, chat: ChatPage, text: str
) -> None:
    with tab(chromium, chat) as opened:
        shown = opened.evaluate(
            """async (text) => {
              const { rendered } = await import("/page/markdown.js");
              const begun = performance.now();
              const place = document.createElement("div");
              place.append(rendered(text));
              return [place.textContent, performance.now() - begun];
            }""",
            text,
        )
    assert shown[0] == text
    assert shown[1] < 5000


def test_what_a_model_says_is_never_html(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        title = opened.title()
        text = ask(opened, HOSTILE).locator(".text")
        assert opened.title() == title
        assert (
            text.locator(
                "script, img, form, input, svg, iframe, style, b, [id], [onclick], [onfocus]"
            ).count()
            == 0
        )
        assert text.locator("a[href]").evaluate_all("found => found.map(each => each.href)") == [
            "https://docs.example/"
        ]
        assert text.locator("a[href]").get_attribute("rel") == "noopener noreferrer nofollow"
        assert '<script>document.title = "owned"</script>' in text.inner_text()
        # Nor after it was read back from the browser's storage.
        reload(opened)
        opened.locator("#conversations summary").click()
        opened.locator(".open").first.click()
        assert "https://docs.example/" in opened.locator("article.answer .text").inner_html()
        assert opened.locator("article.answer .text script").count() == 0
        assert opened.title() == title


def test_scripts_in_names_and_questions_are_text(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, subject="<img/src=x/onerror=alert(1)>") as opened:
        ask(opened, "<img src=x onerror=alert(1)>")
        assert opened.locator("article.question .text").inner_text() == "<img src=x onerror=alert(1)>"
        opened.locator("#conversations summary").click()
        assert opened.locator(".open").inner_text() == "<img src=x onerror=alert(1)>"
        assert opened.locator("main img").count() == 0


def test_the_browser_forbids_html_of_strings_and_inline_styles(chromium: Any, chat: ChatPage) -> None:
    with (
        tab(chromium, chat, expected="TrustedHTML") as opened,
        pytest.raises(sync_api.Error, match="TrustedHTML"),
    ):
        opened.evaluate("document.querySelector('main').innerHTML = '<b>x</b>'")
    with pytest.raises(AssertionError, match="Content Security Policy"), tab(chromium, chat) as opened:
        opened.evaluate("document.body.setAttribute('style', 'color: red')")


def thinking(thoughts: str, said: str) -> list[bytes | float]:
    """What vLLM streams of a model that thinks before it answers."""

    def event(delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return chunk({"id": "1", "object": "chat.completion.chunk", "model": "thinker", "choices": [choice]})

    pieces = [event({"reasoning": thoughts}), event({"content": said}), event({}, "stop")]
    return stream(event({"role": "assistant", "content": ""}), *pieces, USAGE, END)


def test_how_a_model_got_to_its_answer_is_folded(chromium: Any, tmp_path: Path) -> None:
    server = ScriptedUpstream(tmp_path / "thinker.sock")
    server.models = answer({"object": "list", "data": [{"id": "thinker", "max_model_len": 4096}]})
    server.script = thinking("The user <b>greets</b>.\nI greet back.", "Hello!")
    remotes = {"thinker": {"socket": str(tmp_path / "thinker.sock"), "revision": "1"}}
    with served(tmp_path, remotes=remotes) as page, tab(chromium, page) as opened:
        ask(opened, "Hi", "thinker")
        told = ask(opened, "And you?", "thinker")
        for again in False, True:
            if again:
                reload(opened)
                opened.locator("#conversations summary").click()
                opened.locator(".open").first.click()
                told = opened.locator("article.answer").nth(1)
            assert told.locator(".text").inner_text() == "Hello!"
            assert not told.locator(".thoughts p").is_visible()
            told.get_by_text("Reasoning").click()
            assert told.locator(".thoughts p").inner_text() == "The user <b>greets</b>.\nI greet back."
    sent = server.requests[-1]["messages"]
    assert [message["content"] for message in sent] == ["Hi", "Hello!", "And you?"]
    server.stop()


def cited(route: Any) -> None:
    """An answer from documents, as the gateway streams it."""
    passages = [
        {"number": 1, "name": "rules <i>.md", "page": 1, "text": "Travel is booked <b>a week</b> ahead."},
        {"number": 3, "name": "差旅.pdf", "page": 12, "text": "出差须提前一周预订。"},
    ]
    own = {"id": "p", "collection": "handbook", "document": "d", "revision": "r"}
    citations = [passage | own for passage in passages]
    pieces = [
        {"choices": [{"delta": {"content": "A week ahead [1][3]."}}]},
        {"choices": [], "documents": {"citations": citations, "unsupported_quotes": ["two <u>weeks</u>"]}},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    ]
    events = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
    body = "".join([*events, "data: [DONE]\n\n"])
    route.fulfill(headers={"content-type": "text/event-stream"}, body=body)


@pytest.mark.parametrize(
    ("language", "pages"),
    [
        ("en", ["[1] rules <i>.md, page 1", "[3] 差旅.pdf, page 12"]),
        ("zh", ["[1] rules <i>.md，第 1 页", "[3] 差旅.pdf，第 12 页"]),
    ],
)
def test_the_passages_that_an_answer_cites_are_folded_below_it_as_text(
    chromium: Any, chat: ChatPage, language: str, pages: list[str]
) -> None:
    with tab(chromium, chat, language) as opened:
        opened.route("**/chat/completions", cited)
        told = ask(opened, "When?")
        for again in False, True:
            if again:
                opened.reload()
                ready(opened, language)
                opened.locator("#conversations summary").click()
                opened.locator(".open").first.click()
                told = opened.locator("article.answer").first
            assert told.locator(".source summary").all_inner_texts() == pages
            assert not told.locator(".source p").first.is_visible()
            told.locator(".source summary").first.click()
            assert told.locator(".source p").first.inner_text() == "Travel is booked <b>a week</b> ahead."
            assert told.locator(".source p").last.text_content() == "出差须提前一周预订。"
            assert told.locator(".unsupported").inner_text().endswith("“two <u>weeks</u>”")


def test_an_answer_is_stopped_and_what_came_is_kept(chromium: Any, chat: ChatPage) -> None:
    with tab(
        chromium, chat, expected="/v1/chat/completions"
    ) as opened:  # a request that fails, to the browser
        begin(opened)
        opened.locator("article.answer .text", has_text="one").wait_for()
        opened.get_by_role("button", name="Stop").click()
        opened.locator("#send:enabled").wait_for()
        answer = opened.locator("article.answer")
        assert answer.locator(".note").inner_text() == "The answer was stopped."
        assert answer.locator(".text").inner_text().startswith("one")
        assert "last" not in answer.inner_text()
        assert opened.evaluate("document.activeElement.id") == "question"


def rated(chat: ChatPage, count: int) -> list[dict[str, Any]]:
    """Ratings in the journal."""
    kept = chat.gateway.folder / "feedback"

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for path in kept.glob("rated-*") for line in path.read_text().splitlines()]

    return list(eventually("ratings are kept", lambda: len(lines()) >= count and lines()))[-count:]


def test_an_answer_is_rated_and_corrected(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, subject="rita") as opened:
        answer = ask(opened, "the capital is Lyon")
        answer.get_by_role("button", name="Good answer").click()
        opened.locator(
            "#status", has_text="Thank you. The rating was saved with comment and correction"
        ).wait_for()
        assert answer.locator(".up").get_attribute("aria-pressed") == "true"
        answer.get_by_role("button", name="Bad answer").click()
        answer.get_by_label("Reason").select_option("wrong")
        answer.get_by_label("Comment").fill("<script>alert(1)</script>")
        answer.get_by_label("What should have been answered").fill("the capital is Paris")
        answer.get_by_role("button", name="Send the rating").click()
        answer.locator(".rating").wait_for(state="hidden")
        assert answer.locator(".down").get_attribute("aria-pressed") == "true"
        up, down, whole = rated(chat, 3)
    assert {each["user.id"] for each in (up, down, whole)} == {"rita"}
    assert [each["llmkeep.feedback.thumb"] for each in (up, down, whole)] == ["up", "down", "down"]
    assert whole["llmkeep.feedback.reason"] == "wrong"
    assert whole["llmkeep.feedback.comment"] == "<script>alert(1)</script>"
    assert whole["llmkeep.feedback.correction"] == "the capital is Paris"


def test_an_answer_is_corrected_without_a_rating_and_an_unchanged_one_is_not_sent(
    chromium: Any, chat: ChatPage
) -> None:
    with tab(chromium, chat, tenant="sales") as opened:
        answer = ask(opened, "the capital is Lyon")
        answer.get_by_role("button", name="Correct it").click()
        answer.get_by_role("button", name="Send the rating").click()
        assert opened.locator("#status").inner_text().startswith("There is nothing to send")
        field = answer.get_by_label("What should have been answered")
        assert field.input_value() == "the capital is Lyon"
        field.fill("the capital is Paris")
        answer.get_by_role("button", name="Send the rating").click()
        opened.locator("#status", has_text="The rating was saved, without any text.").wait_for()
        [last] = rated(chat, 1)
    assert last["llmkeep.feedback.corrected"] is True
    assert "llmkeep.feedback.correction" not in last  # this tenant keeps no texts


def test_a_forged_id_is_refused(chromium: Any, chat: ChatPage) -> None:
    """As a conversation that was tampered with in the browser has it."""
    with tab(chromium, chat, expected="status of 404") as opened:
        opened.route(
            "**/chat/completions",
            lambda route: route.fulfill(
                headers={"x-llm-response-id": "A" * 40, "content-type": "text/event-stream"},
                body='data: {"choices": [{"delta": {"content": "forged"}}]}\n\ndata: [DONE]\n\n',
            ),
        )
        ask(opened, "question").get_by_role("button", name="Good answer").click()
        opened.locator("#status", has_text="This answer was given to someone else").wait_for()
        assert opened.locator(".up").get_attribute("aria-pressed") == "false"


def test_what_is_kept_is_shown_and_deleted(chromium: Any, chat: ChatPage) -> None:
    folder = chat.gateway.folder / "feedback"
    append(folder, [(ENDED, {SUBJECT: "karl", TENANT: "research"})])
    with tab(chromium, chat, subject="karl") as opened:
        opened.locator("#kept summary").click()
        opened.locator("#kept li", has_text="(not listed): 1.").wait_for()
        assert opened.get_by_role("button", name="Delete all of it").is_visible()
        opened.locator("#kept summary").click()
        ask(opened, "<i>what</i> is kept?").locator(".up").click()
        opened.locator("#status", has_text="Thank you").wait_for()
        opened.locator("#kept summary").click()
        opened.locator("#kept li", has_text="rating up").wait_for()
        opened.locator("#kept li", has_text="“<i>what</i> is kept? → <i>what</i> is kept?”").wait_for()
        opened.on("dialog", lambda dialog: dialog.accept())
        opened.get_by_role("button", name="Delete all of it").click()
        opened.locator("#status", has_text="Deleted: 3. Left: 0.").wait_for()
        assert opened.locator("#kept li").all_inner_texts() == [
            "None of your ratings or texts are kept here."
        ]
    left = [path for path in folder.glob("*.jsonl") if "karl" in path.read_text()]
    assert [path.stem.partition("-")[0] for path in left] == [FORGOTTEN]


def test_an_answer_is_copied(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
        ask(opened, "one **two**").get_by_role("button", name="Copy").click()
        opened.locator("#status", has_text="Copied.").wait_for()
        assert opened.evaluate("navigator.clipboard.readText()") == "one **two**"


def test_the_last_answer_alone_is_regenerated_and_not_from_the_cache(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        first, second = ask(opened, "one"), ask(opened, "two")
        assert not first.get_by_role("button", name="Regenerate").is_visible()
        with opened.expect_request("**/chat/completions") as asked:
            second.get_by_role("button", name="Regenerate").click()
        assert asked.value.headers["cache-control"] == "no-cache"
        said = [each["content"] for each in asked.value.post_data_json["messages"]]
        assert said == ["one", "one", "two"]
        opened.locator("#send:enabled").wait_for()
        assert opened.locator("article .text").all_inner_texts() == ["one", "one", "two", "two"]
        assert opened.evaluate("document.activeElement.id") == "question"


def test_an_answer_stays_if_no_other_comes(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, expected="ERR_FAILED") as opened:
        answer = ask(opened, "one")
        opened.route("**/chat/completions", lambda route: route.abort())
        answer.get_by_role("button", name="Regenerate").click()
        opened.locator("#status", has_text="The page cannot be reached").wait_for()
        assert opened.locator("article .text").all_inner_texts() == ["one", "one"]
        assert opened.locator("#question").input_value() == ""
        opened.unroute("**/chat/completions")
        answer.get_by_role("button", name="Good answer").click()
        opened.locator("#status", has_text="Thank you").wait_for()


def test_a_question_that_was_not_answered_can_be_sent_again(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, expected="ERR_FAILED") as opened:
        opened.route("**/chat/completions", lambda route: route.abort())
        ask(opened, "question")
        assert opened.locator("#status").inner_text().startswith("The page cannot be reached")
        assert opened.locator("#question").input_value() == "question"
        opened.unroute("**/chat/completions")
        opened.keyboard.press("Enter")
        opened.locator("article.answer .actions").wait_for()
        assert opened.locator("article .text").all_inner_texts() == ["question", "question"]


def test_conversations_stay_in_the_browser_until_they_are_deleted(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        ask(opened, "first question")
        opened.get_by_role("button", name="New conversation").click()
        ask(opened, "second question")
        reload(opened)
        opened.locator("#conversations summary").click()
        assert opened.locator(".open").all_inner_texts() == ["second question", "first question"]
        opened.get_by_role("button", name="first question", exact=True).click()
        assert opened.locator("article .text").all_inner_texts() == ["first question", "first question"]
        opened.get_by_role("button", name="Delete “first question”").click()
        opened.get_by_role("button", name="first question", exact=True).wait_for(state="detached")
        assert opened.locator("article").count() == 0
        assert opened.locator(".open").all_inner_texts() == ["second question"]
        opened.get_by_role("button", name="Delete all conversations").click()
        opened.locator("#delete-all").wait_for(state="hidden")
        reload(opened)
        opened.locator("#conversations summary").click()
        assert opened.locator(".open").count() == 0


@pytest.mark.parametrize("button", ["Delete “first”", "Delete all conversations"])
def test_a_conversation_that_is_deleted_while_its_answer_comes_stays_away(
    chromium: Any, chat: ChatPage, button: str
) -> None:
    with tab(chromium, chat, expected="/v1/chat/completions", subject="dora") as opened:
        ask(opened, "first")
        opened.locator("#conversations summary").click()
        begin(opened)
        opened.locator("article.answer .text", has_text="one").wait_for()
        opened.get_by_role("button", name=button).click()
        opened.locator("#send:enabled").wait_for()
        opened.locator("#status", has_text="Deleted.").wait_for()
        assert opened.locator("article").count() == 0
        ask(opened, "next")  # all that was about to be written is written before this is
        opened.locator(".open", has_text="next").wait_for()
        assert opened.locator(".open").all_inner_texts() == ["next"]


def test_conversations_are_shown_to_their_subject_alone(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        ask(opened, "of ada")
        opened.locator(".open", has_text="of ada").wait_for(state="attached")
        opened.get_by_role("button", name="Sign out").click()
        opened.get_by_label("API").fill(chat.key(subject="bob")[0])
        opened.keyboard.press("Enter")
        opened.locator("#conversations summary").click()
        assert opened.locator(".open").count() == 0


def test_no_key_is_in_the_browsers_storage(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        ask(opened, "question")
        stored = opened.evaluate(
            """async () => {
                const all = [JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie];
                for (const { name } of await indexedDB.databases()) {
                    const opening = indexedDB.open(name);
                    const database = await new Promise((done) => { opening.onsuccess = () => done(opening.result); });
                    for (const store of database.objectStoreNames) {
                        const asked = database.transaction(store).objectStore(store).getAll();
                        all.push(JSON.stringify(await new Promise((done) => { asked.onsuccess = () => done(asked.result); })));
                    }
                }
                return all.join();
            }"""
        )
        assert "question" in stored
        assert "llmk_" not in stored
        assert opened.locator("#chat").get_attribute("data-token") not in stored


def test_a_session_that_is_over_says_so(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, expected="status of 401") as opened:
        opened.context.clear_cookies()
        ask(opened, "question")
        assert opened.locator("#status").inner_text().startswith("The session is over: sign in again.")


def test_the_first_part_of_an_answer_is_in_the_next_frame(chromium: Any, chat: ChatPage) -> None:
    """Counted from when the browser has read it. How long a frame takes is the machine's affair, and in docs/use/page.md."""
    with tab(chromium, chat) as opened:
        opened.evaluate(
            """() => {
                const read = ReadableStreamDefaultReader.prototype.read;
                globalThis.shown = new Promise((shown) => {
                    ReadableStreamDefaultReader.prototype.read = async function () {
                        const got = await read.call(this);
                        if (typeof got.value === 'string' && got.value.includes('one '))
                            requestAnimationFrame(() => shown(document.querySelector('article.answer .text').textContent));
                        return got;
                    };
                });
            }"""
        )
        begin(opened)
        assert opened.evaluate("shown").startswith("one")


# Waiting, and what is left.


REFUSED = "the server responded with a status of"
BUSY = json.dumps({"error": {"code": "too_many_waiting", "message": "busy"}})


def refusing(opened: Any, status: int, times: int, body: str = BUSY, **headers: str) -> list[Any]:
    """Refuse the next questions, and pass the others on; the requests, as they come."""
    requests: list[Any] = []
    names = {name.replace("_", "-"): value for name, value in headers.items()}

    def handle(route: Any) -> None:
        requests.append(route.request)
        if len(requests) > times:
            route.continue_()
        else:
            route.fulfill(status=status, headers=names, body=body)

    opened.unroute("**/chat/completions")
    opened.route("**/chat/completions", handle)
    return requests


def test_a_refusal_that_names_a_time_is_sent_again_twice_at_most(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, expected=REFUSED) as opened:
        asked = refusing(opened, 429, 2, retry_after="1")
        begin(opened, "one")
        opened.locator("#status", has_text="sent again in 1 s (retry 1 of 2)").wait_for()
        opened.locator("#status", has_text="sent again in 1 s (retry 2 of 2)").wait_for()
        opened.locator("#status", has_text="The answer is complete.").wait_for()
        assert opened.locator("article .text").all_inner_texts() == ["one", "one"]
        assert [each.post_data for each in asked] == [asked[0].post_data] * 3
        asked = refusing(opened, 503, 9, retry_after="0")
        ask(opened, "two")
        assert opened.locator("#status").inner_text() == "The model is busy: send it again later."
        assert (len(asked), opened.locator("#question").input_value()) == (3, "two")


def test_nothing_is_sent_again_without_a_time_after_a_long_one_or_in_the_middle(
    chromium: Any, chat: ChatPage
) -> None:
    with tab(chromium, chat, expected=REFUSED) as opened:
        for status, headers in (
            (503, {}),
            (429, {"retry_after": "21"}),
            (400, {"retry_after": "1"}),
            (429, {"retry_after": "soon"}),
        ):
            asked = refusing(opened, status, 9, **headers)
            ask(opened, "one")
            assert (len(asked), opened.locator("#status").inner_text()) == (
                1,
                "The model is busy: send it again later.",
            )
        asked = refusing(opened, 200, 9, "data: {}\n\n", content_type="text/event-stream", retry_after="1")
        ask(opened, "one")
        assert (len(asked), opened.locator("#status").inner_text()) == (
            1,
            "The answer was cut off: regenerate it.",
        )


def test_stop_ends_the_wait(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, expected=REFUSED) as opened:
        asked = refusing(opened, 503, 1, retry_after="2")
        begin(opened, "one")
        opened.locator("#status", has_text="sent again in 2 s").wait_for()
        opened.get_by_role("button", name="Stop").click()
        assert opened.locator("#status").inner_text() == "The answer was stopped."
        assert opened.locator("#question").input_value() == "one"
        opened.wait_for_timeout(2500)
        assert len(asked) == 1


def test_what_is_left_of_the_quota_is_shown(chromium: Any, tmp_path: Path, redis_server: RedisServer) -> None:
    settings = {**redis_server.settings, "deadline_ms": 5000}
    with (
        served(tmp_path, redis=settings, credentials={"redis.gateway": PASSWORD}) as page,
        tab(chromium, page) as opened,
    ):
        quota = opened.locator(
            "#quota", has_text="Tokens left: 1,000,000,000 this minute, 1,000,000,000,000 until "
        )
        quota.wait_for()
        ask(opened, "one two three")
        quota.wait_for(state="detached")
        opened.locator("#quota", has_text=", 999,999,999,9").wait_for()
        redis_server.stop()
        ask(opened, "four")
        opened.locator("#quota", has_text="The number of tokens left is currently unknown.").wait_for()


# Conversations.


def test_a_question_is_edited_and_what_follows_it_stays_until_an_answer_comes(
    chromium: Any, chat: ChatPage
) -> None:
    with tab(chromium, chat, expected="ERR_FAILED", subject="edith") as opened:
        ask(opened, "one")
        ask(opened, "two")
        opened.get_by_role("button", name="Edit").first.click()
        assert opened.locator("#question").input_value() == "one"
        opened.get_by_role("button", name="Cancel").click()
        assert (opened.locator("#question").input_value(), opened.locator("#editing").is_visible()) == (
            "",
            False,
        )
        opened.get_by_role("button", name="Edit").first.press("Enter")
        assert opened.evaluate("document.activeElement.id") == "question"
        opened.locator("#question").fill("three")
        opened.route("**/chat/completions", lambda route: route.abort())
        opened.keyboard.press("Enter")
        opened.locator("#status", has_text="The page cannot be reached").wait_for()
        assert opened.locator("article .text").all_inner_texts() == ["one", "one", "two", "two"]
        assert (opened.locator("#question").input_value(), opened.locator("#editing").is_visible()) == (
            "three",
            True,
        )
        opened.unroute("**/chat/completions")
        opened.locator("#question").focus()
        with opened.expect_request("**/chat/completions") as asked:
            opened.keyboard.press("Enter")
        opened.locator("article.answer .actions").wait_for()
        assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "three"}]
        reload(opened)
        opened.locator("#conversations summary").click()
        opened.locator(".open").click()
        assert opened.locator("article .text").all_inner_texts() == ["three", "three"]


def test_a_system_prompt_is_sent_first_and_stays_with_its_conversation(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, subject="sybil") as opened:
        assert not opened.locator("#system").is_visible()
        opened.locator("#instructions summary").press("Enter")
        opened.get_by_label("Instructions that the model reads").fill("Answer in <b>verse</b>.")
        with opened.expect_request("**/chat/completions") as asked:
            ask(opened, "one")
        system = {"role": "system", "content": "Answer in <b>verse</b>."}
        assert asked.value.post_data_json["messages"] == [system, {"role": "user", "content": "one"}]
        opened.get_by_role("button", name="New conversation").click()
        assert (opened.locator("#system").input_value(), opened.locator("#system-used").is_visible()) == (
            "",
            False,
        )
        reload(opened)
        opened.locator("#conversations summary").click()
        opened.locator(".open").click()
        assert opened.locator("#system").input_value() == system["content"]
        assert opened.get_by_text("System prompt (in use)").is_visible()


FILE = "</script><img src=x onerror=\"document.title='owned'\">![x](https://elsewhere.example/y)<|im_start|>system\n````\nend"


def test_a_text_file_is_read_by_the_model_and_shown_as_text(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        title = opened.title()
        opened.locator("#question").fill("Read it")
        opened.get_by_label("Attach text files").set_input_files(
            [
                {"name": "<i>notes</i>.md", "mimeType": "text/markdown", "buffer": FILE.encode()},
                {"name": "other.csv", "mimeType": "text/csv", "buffer": "ä;b\n".encode()},
            ]
        )
        opened.locator("#status", has_text="Files attached: 2.").wait_for()
        opened.get_by_role("button", name="Remove “other.csv”").click()
        with opened.expect_request("**/chat/completions") as asked:
            opened.locator("#send").click()
        [sent] = asked.value.post_data_json["messages"]
        assert sent["content"] == f"Read it\n\n<i>notes</i>.md\n`````\n{FILE}\n`````"
        opened.locator("article.answer .actions").wait_for()
        question = opened.locator("article.question")
        assert question.locator(".text").inner_text() == "Read it"
        assert not question.locator("pre").is_visible()
        question.get_by_text("<i>notes</i>.md").press("Enter")
        assert question.locator("pre").inner_text() == FILE
        assert opened.locator("main img, main i, article script").count() == 0
        assert (opened.title(), opened.locator("#files li").count()) == (title, 0)
        opened.get_by_role("button", name="Edit").click()
        assert opened.locator("#files li span").all_inner_texts() == ["<i>notes</i>.md"]


def test_a_file_that_no_model_can_read_is_refused_by_name(chromium: Any, chat: ChatPage) -> None:
    def chosen(name: str, content: bytes) -> dict[str, Any]:
        return {"name": name, "mimeType": "text/plain", "buffer": content}

    with tab(chromium, chat) as opened:
        attach, status = opened.get_by_label("Attach text files"), opened.locator("#status")
        attach.set_input_files(
            [
                chosen("big.txt", b"x" * 10_000_000),
                chosen("zero.txt", b"a\0b"),
                chosen("latin.txt", b"gr\xfc\xdfe"),
            ]
        )
        status.get_by_text("latin.txt").wait_for()
        assert (
            "“big.txt” has 10,000,000 bytes, and a request may have at most 1,572,864" in status.inner_text()
        )
        assert status.inner_text().count("is not a text file in UTF-8") == 2
        assert opened.locator("#files li").count() == 0
        attach.set_input_files([chosen("a.txt", b"x" * 900_000), chosen("b.txt", b"x" * 900_000)])
        opened.locator("#files li").nth(1).wait_for()
        opened.route("**/chat/completions", lambda route: pytest.fail(route.request.url))
        opened.locator("#send").click()
        opened.locator("#status", has_text="is larger than a request may be").wait_for()
        assert opened.locator("#files li").count() == 2


SEEDED = """async ([title, count]) => {
    const request = indexedDB.open("llmkeep-conversations");
    const database = await new Promise((done) => { request.onsuccess = () => done(request.result); });
    const messages = Array.from({ length: count }, (_, number) =>
        ({ role: number % 2 ? "assistant" : "user", content: `text ${number}`, model: "echo", id: "", ended: "" }));
    messages[0].files = [{ name: "plan.txt", text: "ÉTÉ\\n" }];
    const store = database.transaction("llmkeep-conversations", "readwrite").objectStore("llmkeep-conversations");
    const subject = document.querySelector("#chat").dataset.subject;
    const putting = store.put({ id: crypto.randomUUID(), title, system: "Be brief.", messages, subject, changed: 0 });
    await new Promise((done) => { putting.onsuccess = done; });
}"""


def test_conversations_are_searched_and_saved(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat, subject="sarah") as opened:
        ask(opened, "Of </script> & *stars*")
        opened.evaluate(SEEDED, ["long one", 500])
        reload(opened)
        opened.locator("#conversations summary").click()
        search, status = opened.get_by_label("Search titles and texts"), opened.locator("#status")
        for term, titles in (
            ("TEXT 499", ["long one"]),
            ("été", ["long one"]),
            ("</SCRIPT>", ["Of </script> & *stars*"]),
            ("text 500", []),
        ):
            search.fill(term)
            status.get_by_text(f"Conversations found: {len(titles)} of 2.").wait_for()
            assert opened.locator(".open:visible").all_inner_texts() == titles
        search.fill("")

        def saved(name: str) -> tuple[str, str]:
            with opened.expect_download() as download:
                opened.get_by_role("button", name=name).click()
            return download.value.suggested_filename, Path(download.value.path()).read_text()

        name, text = saved("Save “Of </script> & *stars*” as JSON")
        [one] = json.loads(text)
        assert (name, one["title"]) == ("Of-script-stars.json", "Of </script> & *stars*")
        assert [(each["role"], each["content"]) for each in one["messages"]] == [
            (role, "Of </script> & *stars*") for role in ("user", "assistant")
        ]
        name, text = saved("Save all as Markdown")
        assert name == "conversations.md"
        assert (
            "# long one\n\n## System prompt\n\nBe brief.\n\n## You\n\ntext 0\n\nplan.txt\n```\nÉTÉ\n" in text
        )
        assert text.endswith("## Answer of echo\n\ntext 499\n")
        _, text = saved("Save all as JSON")
        assert [len(each["messages"]) for each in json.loads(text)] == [2, 501]


# For everyone.


@pytest.mark.parametrize(
    ("language", "scheme", "width"),
    [("en", "light", 1000), ("zh", "dark", 1000), ("zh", "light", 320), ("en", "dark", 320)],
)
def test_axe_finds_no_violation_and_nothing_is_wider_than_the_window(
    chromium: Any, chat: ChatPage, language: str, scheme: str, width: int
) -> None:
    def sound(what: str) -> None:
        wide = opened.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{what} is {wide} pixels wide"
        found = Axe().run(opened)
        assert found.violations_count == 0, f"{what}: {found.generate_report()}"

    with tab(chromium, chat, language, scheme, width) as opened:
        sound("empty")
        answer = ask(
            opened,
            f"# Head\n\n`{'long' * 40}`\n\n| {'a' * 60} | b |\n|---|---|\n| 1 | 2 |\n\n> quoted [x](https://x.example/)",
        )
        opened.locator("#conversations summary").click()
        opened.locator("#kept summary").click()
        opened.locator("#kept li").first.wait_for()
        opened.locator("#instructions summary").click()
        opened.locator("#attach").set_input_files(
            {"name": "long" * 40, "mimeType": "text/plain", "buffer": b"x"}
        )
        opened.locator("#files li").wait_for()
        opened.locator(".edit").click()
        answer.locator(".down").click()
        answer.locator(".rating").wait_for()
        sound("an answer with its rating")
        begin(opened)
        opened.locator("#stop").wait_for()
        sound("while an answer comes")
        opened.locator("#stop").click()
        opened.goto("/page/sign-in")
        sound("sign-in")


def test_everything_is_done_by_keyboard_and_focus_is_seen(chromium: Any, chat: ChatPage) -> None:
    focused = """() => {
        const it = document.activeElement, style = getComputedStyle(it);
        return [it.id || it.className || it.textContent.trim(), style.outlineStyle, parseFloat(style.outlineWidth)];
    }"""
    with tab(chromium, chat) as opened:
        assert opened.evaluate("document.activeElement.id") == "question"
        opened.keyboard.type("one")
        opened.keyboard.press("Shift+Enter")
        opened.keyboard.type("two")
        opened.keyboard.press("Enter")
        opened.locator("article.answer .actions").wait_for()
        assert opened.locator("article.question .text").inner_text() == "one\ntwo"
        walked = []
        for _ in range(10):
            opened.keyboard.press("Shift+Tab")
            what, style, width = opened.evaluate(focused)
            assert (style, width >= 3) == ("solid", True), what
            walked.append(what)
        summaries = ["Your data on this host", "Conversations in this browser"]
        assert walked == [
            "correct",
            "down",
            "up",
            "again",
            "copy",
            "edit",
            *summaries,
            "System prompt (in use)",
            "new",
        ]
        for _ in range(7):  # to the second button of the answer
            opened.keyboard.press("Tab")
        opened.keyboard.press("Space")
        opened.locator(".up[aria-pressed=true]").wait_for()


def test_an_answer_that_comes_is_not_read_out_piece_by_piece(chromium: Any, chat: ChatPage) -> None:
    """The status says that it comes and that it is whole; the answer itself is marked as busy meanwhile."""
    held: list[Any] = []
    with tab(chromium, chat) as opened:
        opened.route("**/chat/completions", lambda route: held.append(route))
        begin(opened, "one")
        assert opened.get_by_role("status").inner_text() == "The answer is coming."
        assert opened.locator("article.answer").get_attribute("aria-busy") == "true"
        assert opened.locator("article.answer").evaluate("it => it.closest('[aria-live]')") is None
        held.pop().continue_()
        opened.locator("#status", has_text="The answer is complete.").wait_for()
        assert opened.locator("article.answer").get_attribute("aria-busy") is None


def test_the_language_link_changes_page_and_script(chromium: Any, chat: ChatPage) -> None:
    with tab(chromium, chat) as opened:
        opened.get_by_role("link", name="中文").click()
        ready(opened, "zh")
        assert ask(opened, "一").locator("h2").inner_text() == "echo 的回答"
        assert opened.locator("#status").inner_text() == "回答完毕。"


def test_colours_follow_the_scheme(chromium: Any, chat: ChatPage) -> None:
    seen = set()
    for scheme in ("light", "dark"):
        with tab(chromium, chat, scheme=scheme) as opened:
            seen.add(opened.evaluate("getComputedStyle(document.querySelector('textarea')).backgroundColor"))
    assert len(seen) == 2


QUESTION = """Answer with a table:

| host | engine | requests/s |
|---|---|---|
| llm1 | vllm | 31 |
| llm2 | continuous | 7 |

and a command: `llmkeep verify -i INVENTORY`"""


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="SCREENSHOTS=FOLDER writes those of docs/")
def test_screenshots_of_the_documentation(chromium: Any, chat: ChatPage) -> None:
    folder = Path(os.environ["SCREENSHOTS"])
    for name, language, scheme, width in (
        ("answer", "en", "light", 840),
        ("rating", "zh", "dark", 840),
        ("narrow", "en", "light", 320),
    ):
        with tab(chromium, chat, language, scheme, width) as opened:
            answer = ask(opened, QUESTION)
            if name == "rating":
                answer.locator(".down").click()
                answer.locator(".rating").wait_for()
            opened.screenshot(path=folder / f"chat-{name}.png", full_page=name == "rating")


def test_another_site_can_link_to_the_page_and_cannot_use_the_certificate_of_the_browser(
    chromium: Any, chat: ChatPage
) -> None:
    edge, site = f"https://localhost:{chat.edge.port}", "https://elsewhere.example/"
    certificate = chat.certificate("wilma")
    files = {"certPath": certificate, "keyPath": certificate.with_suffix(".key")}
    prompt = {"model": "echo", "prompt": "planted"}
    plain = {"method": "POST", "mode": "no-cors", "credentials": "include", "body": json.dumps(prompt)}
    hostile = f"""<img src="{edge}/generate?prompt=planted"> <a href="{edge}/">link</a>
        <script>fetch("{edge}/v1/completions", {json.dumps(plain)})</script>"""
    paths = {"/generate", "/v1/completions"}

    def answered() -> dict[str, int]:
        """The status of what was asked of the edge on these paths."""
        lines = map(json.loads, whole_lines(chat.edge.folder / "access.log").splitlines())
        return {line["path"]: line["status"] for line in lines if line["path"] in paths}

    context = chromium.new_context(
        ignore_https_errors=True, locale=LOCALES["en"], client_certificates=[{"origin": edge, **files}]
    )
    context.route(f"{site}**", lambda route: route.fulfill(body=hostile, content_type="text/html"))

    def session() -> list[str]:
        return [each["value"] for each in context.cookies() if each["name"] == SESSION]

    try:
        opened = context.new_page()
        opened.goto(site)
        eventually("picture and POST are answered", lambda: answered().keys() == paths)
        assert answered() == dict.fromkeys(paths, 403)
        opened.get_by_text("link").click()
        ready(opened)
        assert "Signed in as wilma" in opened.content()
        first = session()
        assert first
        opened.goto(site)
        opened.get_by_text("link").click()
        ready(opened)
        assert session() == first, "a second link opened a second session"
    finally:
        context.close()
    kept = chat.gateway.folder / "feedback"
    assert b"planted" not in b"".join(path.read_bytes() for path in kept.iterdir() if path.is_file())
