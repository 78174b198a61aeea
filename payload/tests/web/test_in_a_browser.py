"""The operator page in Chromium: accessible by axe's rules, by keyboard, at 320 pixels, in both languages and colour schemes.

`SCREENSHOTS=FOLDER` writes those of docs/ there.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import CHROMIUM, NEEDED
from operator_page import OperatorPage, serving
from service import running
from watched_estate import HOSTILE, watched

from llmcore.ratings import FIELD, REVIEWED, by_transaction
from llmserve.feedback.reviews import TAGS

PAGES = ("", "day", "hosts", "models", "gpus", "training", "alerts", "sign-in", "nothing")
FIRST = {
    "operator": "",
    "expert": "reviews",
    "product_owner": "experiments",
}  # the page that a role is sent to
WORDS = {"en": "Operator page", "zh": "运维页面"}

Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=NEEDED).Axe
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium-headless-shell of requirements.apt")


@contextmanager
def tab(
    chromium: Any,
    page: OperatorPage,
    language: str = "en",
    scheme: str = "light",
    width: int = 1200,
    role: str = "operator",
) -> Iterator[Any]:
    """A signed-in tab; each refusal that a test goes to is a complaint of its status."""
    with browser.tab(
        chromium, page.edge.port, language, scheme, width, "status of 400", "status of 404"
    ) as opened:
        opened.goto("/operator/")
        opened.get_by_label("API" if language == "en" else "API 密钥").fill(page.key(role, f"{role}-2")[0])
        opened.keyboard.press("Enter")
        opened.wait_for_url(f"**/operator/{FIRST[role]}")
        yield opened


@pytest.mark.parametrize(
    ("language", "scheme", "width"),
    [("en", "light", 1200), ("zh", "dark", 1200), ("zh", "light", 320), ("en", "dark", 320)],
)
def test_axe_finds_no_violation_and_nothing_is_wider_than_the_window(
    chromium: Any, page: OperatorPage, language: str, scheme: str, width: int
) -> None:
    with tab(chromium, page, language, scheme, width) as opened:
        for name in PAGES:
            opened.goto(f"/operator/{name}")
            assert WORDS[language] in opened.inner_text("header")
            opened.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            accessible(opened, name or "overview", width)


def accessible(opened: Any, name: str, width: int) -> None:
    """By axe's rules, and no wider than the window."""
    wide = opened.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, f"{name} is {wide} pixels wide"
    # axe is put into the page by the browser's own protocol, which the page's policy does not govern.
    found = Axe().run(opened)
    assert found.violations_count == 0, f"{name}: {found.generate_report()}"


# Names as long as real ones, put into the cells; then the words on two lines, but for those of hostile labels without a space.
LENGTHENED = """() => {
    for (const cell of document.querySelectorAll("td, th")) {
        const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
        for (let node = texts.nextNode(); node; node = texts.nextNode())
            node.data = node.data.replace("deepseek", "deepseek_coder_v2_lite").replace("llm1", "inference01");
    }
}"""
BROKEN_WORDS = """() => [...document.querySelectorAll("td, th")].flatMap(cell => {
    const words = [], texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    const parts = (token) => [...token[0].matchAll(/[\\p{Script=Latin}\\p{N}_]+/gu)].map(
        part => ({ 0: part[0], index: token.index + part.index }));
    for (let node = texts.nextNode(); node; node = texts.nextNode())
        for (const word of node.data.matchAll(/(?<!\\S)\\S{1,32}(?!\\S)/gu).flatMap(parts)) {
            const range = document.createRange();
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map(line => line.top)).size > 1) words.push(word[0]);
        }
    return words;
})"""


@pytest.mark.parametrize(
    ("language", "role", "names"),
    [
        ("en", "operator", ("", "day", "hosts", "models", "gpus", "training", "alerts")),
        ("zh", "operator", ("", "models")),
        ("en", "product_owner", ("experiments",)),
        ("en", "expert", ("reviews",)),
    ],
)
def test_no_word_of_a_table_is_broken(
    chromium: Any, page: OperatorPage, language: str, role: str, names: tuple[str, ...]
) -> None:
    with tab(chromium, page, language, role=role) as opened:
        for name in names:
            opened.goto(f"/operator/{name}")
            opened.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            opened.evaluate(LENGTHENED)
            for width in (320, 360, 840, 1040, 1200, 1400):
                opened.set_viewport_size({"width": width, "height": 760})
                where = f"{name or 'overview'} in {language} at {width}"
                assert opened.evaluate(BROKEN_WORDS) == [], where
                assert opened.evaluate("document.documentElement.scrollWidth") <= width, where


@pytest.mark.parametrize(("language", "scheme", "width"), [("en", "light", 320), ("zh", "dark", 1200)])
def test_pages_of_experts_and_product_owners_are_accessible(
    chromium: Any, page: OperatorPage, language: str, scheme: str, width: int
) -> None:
    transaction = page.rated(30, text=HOSTILE + " " + "word" * 200, stars=1, reason="wrong", comment=HOSTILE)
    with tab(chromium, page, language, scheme, width, "expert") as opened:
        accessible(opened, "the queue", width)
        opened.goto(f"/operator/reviews?answer={transaction}")
        assert HOSTILE in opened.inner_text("main")
        assert opened.locator("main script, main img").count() == 0
        accessible(opened, "an answer", width)
        opened.get_by_role("button").first.press("Enter")
        opened.wait_for_selector("#wrong")
        accessible(opened, "an answer without a correction", width)
    arm = {"mean": 0.5, "values": 40}
    metric = {
        "metric": "thumb",
        "verdict": "worse",
        "interval": [-0.3, -0.1],
        "control": arm,
        "candidate": arm,
    }
    rung = {
        "percent": 50,
        "units": [40, 40],
        "stopped": "",
        "metrics": [metric, metric | {"metric": "stars"}],
    }
    verdict = page.gateway.folder / "verdicts/support-12.json"
    verdict.write_text(json.dumps([rung]))
    with tab(chromium, page, language, scheme, width, "product_owner") as opened:
        opened.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert opened.get_by_role("img", name="interval" if language == "en" else "区间").is_visible()
        accessible(opened, "experiments", width)
    verdict.unlink()


def test_an_expert_corrects_an_answer_by_keyboard(chromium: Any, page: OperatorPage) -> None:
    transaction = page.rated(31)
    with tab(chromium, page, role="expert") as opened:
        opened.goto(f"/operator/reviews?answer={transaction}")
        assert opened.get_by_role("group", name="What was wrong with it").is_visible()
        box = opened.get_by_role("checkbox", name="wrong fact")
        box.focus()
        opened.keyboard.press("Space")
        for _ in TAGS:
            opened.keyboard.press("Tab")
        assert opened.evaluate("document.activeElement.id") == "correction"
        opened.keyboard.type("It is Paris.")
        opened.keyboard.press("Tab")
        opened.keyboard.press("Enter")
        opened.wait_for_url("**/operator/reviews")
    last = by_transaction(page.journal, REVIEWED)[transaction]
    assert (last[FIELD + "correction"], last[FIELD + "tags"]) == ("It is Paris.", ["factual"])


def test_axe_would_find_a_violation(chromium: Any, page: OperatorPage) -> None:
    with tab(chromium, page) as opened:
        opened.evaluate("document.querySelector('h1').style.color = 'rgb(250, 250, 250)'")
        opened.evaluate("document.documentElement.removeAttribute('lang')")
        found = {each["id"] for each in Axe().run(opened).response["violations"]}
        assert found >= {"color-contrast", "html-has-lang"}


def test_the_browser_would_complain_of_an_inline_style(chromium: Any, page: OperatorPage) -> None:
    with pytest.raises(AssertionError, match="Content Security Policy"), tab(chromium, page) as opened:
        opened.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">x</p>')")


def test_the_whole_page_is_reached_by_keyboard_and_focus_is_seen(chromium: Any, page: OperatorPage) -> None:
    focused = """() => {
        const it = document.activeElement, box = it.getBoundingClientRect(), style = getComputedStyle(it);
        return [it.textContent.trim(), style.outlineStyle, parseFloat(style.outlineWidth), box.width * box.height, box.left];
    }"""
    with tab(chromium, page) as opened:
        walked = []
        for _ in range(30):
            opened.keyboard.press("Tab")
            text, style, width, area, left = opened.evaluate(focused)
            if text in walked or opened.evaluate("document.activeElement === document.body"):
                break
            assert style == "solid", text
            assert width >= 3, text
            assert area > 0, text
            assert left >= 0, text
            walked.append(text)
        names = ["Overview", "Last 24 hours", "Hosts", "Models", "GPUs", "Training", "Alerts"]
        assert walked[:9] == ["Skip to content", "中文", *names]
        assert walked[9:] == ["target-down", "Bad events in 1 hour, by objective: as a table", "Sign out"]
        opened.keyboard.press("Shift+Tab")
        opened.keyboard.press("Enter")
        opened.wait_for_url("**/operator/sign-in")


def test_the_first_link_skips_to_the_content(chromium: Any, page: OperatorPage) -> None:
    with tab(chromium, page) as opened:
        opened.keyboard.press("Tab")
        opened.keyboard.press("Enter")
        opened.locator("#content:focus").wait_for(state="attached")


def test_a_plot_is_named_and_described_to_screen_readers(chromium: Any, page: OperatorPage) -> None:
    with tab(chromium, page) as opened:
        opened.goto("/operator/gpus")
        [plot] = opened.get_by_role("img", name="GPUs: busy share").all()
        assert "Last values: llm1" in plot.locator("desc").text_content()
        opened.locator("summary", has_text="GPUs: busy share").press("Enter")
        table = opened.get_by_role("table", name="GPUs: busy share: as a table")
        assert table.get_by_role("row").count() == 14
        opened.set_viewport_size({"width": 320, "height": 900})
        assert table.get_by_role("row").count() == 14  # cards are rows still


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_differ_by_dashes_and_are_seen_on_their_ground(
    chromium: Any, page: OperatorPage, scheme: str
) -> None:
    drawn = """() => [...document.querySelectorAll(".swatch .line")].map(line => {
        const style = getComputedStyle(line), ground = getComputedStyle(document.querySelector("svg.plot"));
        return [style.stroke, style.strokeDasharray, ground.backgroundColor];
    })"""

    def light(colour: str) -> float:
        shares = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    with tab(chromium, page, scheme=scheme) as opened:
        opened.goto("/operator/day")
        opened.evaluate(
            "document.querySelectorAll('.swatch .line').forEach((line, n) => line.className.baseVal = `line s${n % 6}`)"
        )
        lines = opened.evaluate(drawn)
    assert len({dashes for _, dashes, _ in lines}) == 6
    for stroke, _, ground in lines:
        low, high = sorted((light(stroke), light(ground)))
        assert (high + 0.05) / (low + 0.05) >= 3, (stroke, ground)


def test_hostile_labels_run_nothing(chromium: Any, page: OperatorPage) -> None:
    with tab(chromium, page) as opened:
        opened.goto("/operator/alerts")
        assert HOSTILE in opened.inner_text("main")
        assert opened.title() == "Alerts · Operator page"
        assert opened.locator("main script, main img").count() == 0


def test_the_language_link_is_remembered(chromium: Any, page: OperatorPage) -> None:
    with tab(chromium, page) as opened:
        opened.get_by_role("link", name="中文").click()
        opened.get_by_role("heading", name="总览", level=1).wait_for()
        opened.goto("/operator/hosts")
        assert opened.get_by_role("heading", name="主机", level=1).is_visible()


def test_colours_follow_the_scheme(chromium: Any, page: OperatorPage) -> None:
    seen = set()
    for scheme in ("light", "dark"):
        with tab(chromium, page, scheme=scheme) as opened:
            seen.add(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(seen) == 2


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="SCREENSHOTS=FOLDER writes those of docs/")
def test_screenshots_of_the_documentation(chromium: Any, tmp_path: Path) -> None:
    folder = Path(os.environ["SCREENSHOTS"])
    with (
        watched(tmp_path / "watched", hostile=False) as estate,
        running(tmp_path) as service,
        serving(service, estate) as page,
    ):
        for name, language, scheme, width in (
            ("overview", "en", "light", 840),
            ("gpus", "zh", "dark", 840),
            ("models", "en", "light", 320),
        ):
            with tab(chromium, page, language, scheme, width) as opened:
                opened.goto(f"/operator/{'' if name == 'overview' else name}")
                opened.screenshot(path=folder / f"operator-{name}.png")
