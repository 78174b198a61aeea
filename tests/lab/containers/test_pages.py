"""The pages that `make lab` prints, in Chromium. Then what docs/use/loop.md walks through: a person asks, rates and corrects, an
expert corrects, the export has it, and a product owner sees intervals. `SCREENSHOTS=FOLDER` writes the walk's pictures there.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import ask, signed_in
from estate import HOSTS, LAB, QUESTION, ROOT, Client, Lab, answered, answers, request
from waiting import until

from lab import demo
from lab.door import open_door
from lab.instance import Instance

MODEL = "smollm2-135m-instruct"
GREEDY = "smollm2-greedy"  # says the same each time, and ends: an answer that is cut is not kept
FOLLOW_UP = "How many people live there?"
ASKED = "Which ocean is the largest?"
CORRECTED = "The Pacific Ocean."
WALK = (ROOT / "docs/use/loop.md").read_text().partition("## Rate an answer")[0]


def typed(begin: str) -> str:
    """The commands of the walk that begin so."""
    [block] = re.findall(rf"^```\n({re.escape(begin)}.*?)^```$", WALK, re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def pages(estate: Lab) -> Lab:
    """The estate with the walk's experiment and second model."""
    estate.on("ops1", f"set -e\n{typed('cp -r ')}", timeout=900)
    return estate


def new_key(lab: Lab, subject: str, role: str) -> str:
    return lab.on("llm1", f"llm-serve keys add --subject {subject} --tenant demo --role {role}").strip()


@pytest.fixture(scope="module")
def mirror_port(estate: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A port of this machine that leads to the mirror, from an address that may read the documentation alone."""
    if estate.on("ops1", "ls /srv/llmkeep/bundle/current/docs 2> /dev/null || true") == "":
        pytest.skip("needs `make peers PEER=docs`")
    instance, port_file = Instance(estate.instance), tmp_path_factory.mktemp("forward") / "port"
    command = [
        sys.executable,
        "-m",
        "lab.forward",
        "--namespace",
        str(instance.namespace.path),
        "--port",
        "8443",
    ]
    command += ["--address", instance.machine("ops1").host.address, "--port-file", str(port_file)]
    with subprocess.Popen(command, cwd=ROOT) as forwarder:
        until(port_file.exists)
        yield int(port_file.read_text())
        forwarder.terminate()


def picture(opened: Any, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        opened.screenshot(path=Path(folder) / f"loop-{name}.png", full_page=name != "experiments")


@pytest.fixture(scope="module")
def printed(estate: Lab, client: Client) -> dict[str, tuple[str, str]]:
    """What `make lab` prints of each page: its address, and the key in the file that is named below it."""
    answers(client)  # an estate from a snapshot boots, and its engine loads the model
    instance = Instance(estate.instance)
    *pages, (_, ca) = demo.pages(instance, open_door(instance))
    assert Path(ca).samefile(client.ca)
    return {
        name: (url, Path(key).read_text().strip())
        for (name, url), (_, key) in itertools.batched(pages, 2, strict=True)
    }


def test_a_person_asks_twice_on_the_page_that_make_lab_prints_and_the_second_answer_builds_on_the_first(
    printed: dict[str, tuple[str, str]], client: Client, chromium: Any
) -> None:
    url, key = printed["chat page"]
    assert request(client, "GET", "/page/sign-in")[0] == 200, "the printed CA is not the page's"
    with signed_in(chromium, client, url, key) as person:
        person.locator(f"#model option[value='{MODEL}']").wait_for(state="attached")
        answer, _ = ask(person, QUESTION)
        first = answer.locator(".text").inner_text().strip()
        assert "Paris" in first
        answer, messages = ask(person, FOLLOW_UP)
        second = answer.locator(".text").inner_text()
    assert [message["content"] for message in messages] == [QUESTION, first, FOLLOW_UP]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert "Paris" in second
    alone = {"model": MODEL, "messages": messages[-1:], "max_tokens": 64}
    assert "Paris" not in str(answered(client, "/v1/chat/completions", alone, seconds=60))


@pytest.mark.parametrize(
    ("language", "page", "marked", "words", "found"),
    [
        ("en", "docs/operate/metrics.html", "en", "quarantine", "Health of GPUs"),
        ("zh", "README.zh-CN.html", "zh-CN", "审计记录", "Glossary"),
    ],
)
def test_the_documentation_is_read_and_searched_from_the_mirror_alone(
    mirror_port: int, chromium: Any, language: str, page: str, marked: str, words: str, found: str
) -> None:
    from browser import tab

    with tab(chromium, mirror_port, language, "dark", 1200) as reader:
        reader.goto("/docs/")
        reader.get_by_role("link", name="Glossary").first.wait_for()
        reader.goto(f"/docs/{page}")
        assert reader.locator("html").get_attribute("lang") == marked
        assert reader.locator("body").get_attribute("data-theme") == "auto", "the theme's script did not run"
        reader.locator(".sidebar-search").fill(words)
        reader.keyboard.press("Enter")
        reader.locator("#search-results").get_by_role("link", name=found, exact=True).wait_for()
        reader.goto("/docs/docs/operate/gpu-health.md#throttled")  # as a message names it
        assert reader.url.endswith("/docs/docs/operate/gpu-health.html#throttled")
        assert reader.request.get("/apt/dists/trixie/InRelease").status == 403


def test_an_operator_sees_both_hosts_on_the_page_that_make_lab_prints(
    printed: dict[str, tuple[str, str]], client: Client, chromium: Any
) -> None:
    with signed_in(chromium, client, *printed["operator page"]) as operator:
        operator.get_by_role("link", name="Hosts", exact=True).click()
        operator.wait_for_url("**/operator/hosts")
        shown = operator.inner_text("main")
    assert all(host in shown for host in HOSTS)


def test_what_a_person_corrects_is_corrected_by_an_expert_and_exported_once(
    pages: Lab, client: Client, chromium: Any
) -> None:
    with signed_in(chromium, client, "/", client.key) as person:
        person.locator(f"#model option[value='{GREEDY}']").wait_for(state="attached")
        person.locator("#model").select_option(GREEDY)
        person.locator("#question").fill(ASKED)
        person.keyboard.press("Enter")
        answer = person.locator("article.answer")
        answer.get_by_role("button", name="Bad answer").click()
        said = answer.locator(".text").inner_text()
        answer.get_by_label("Reason").select_option("wrong")
        answer.get_by_label("What should have been answered").fill("The Pacific.")
        picture(person, "rated")
        answer.get_by_role("button", name="Send the rating").click()
        answer.get_by_label("What should have been answered").wait_for(state="hidden")  # once that is kept
    with signed_in(chromium, client, "/operator/", new_key(pages, "eva", "expert")) as expert:
        expert.wait_for_url("**/operator/reviews")
        expert.get_by_role("link", name=ASKED).click()
        shown = expert.inner_text("main")
        assert said in shown
        assert "The Pacific." in shown
        expert.get_by_role("checkbox", name="wrong fact").check()
        expert.get_by_label("Correction").fill(CORRECTED)
        picture(expert, "review")
        expert.get_by_role("button", name="Save the correction").click()
        expert.wait_for_url("**/operator/reviews")
        assert expert.get_by_role("link", name=ASKED).count() == 0
    lines = pages.on("llm1", typed("runuser ")).splitlines()
    [example] = [json.loads(line) for line in lines if line.startswith('{"')]  # after the report
    assert example["prompt"] == [{"role": "user", "content": ASKED}]
    assert example["chosen"] == [{"role": "assistant", "content": CORRECTED}]
    assert example["rejected"] == [{"role": "assistant", "content": said}]


def test_a_product_owner_sees_the_intervals_that_were_printed(
    pages: Lab, client: Client, chromium: Any
) -> None:
    environment = os.environ | {"LAB_INSTANCE": pages.instance, "PATH": f"{LAB.parent}:{os.environ['PATH']}"}
    own = typed("source .lab/env").replace(".lab/env", f".lab/instances/{pages.instance}/env")
    subprocess.run(["bash", "-euo", "pipefail", "-c", own], env=environment, cwd=ROOT, check=True)
    pages.on("ops1", f"set -e\n{typed('llmkeep experiment show ')}")
    [rung] = json.loads(pages.on("ops1", "cat /etc/llmkeep/verdicts/greedy.json"))
    with signed_in(chromium, client, "/operator/", new_key(pages, "paula", "product_owner")) as owner:
        owner.wait_for_url("**/operator/experiments")
        shown = owner.inner_text("main")
        assert re.search(rf"greedy\s+{MODEL}\s+{MODEL}\s+{GREEDY}\s+request\s+50 %", shown), shown
        for metric in rung["metrics"]:
            low, high = metric["interval"]
            assert f"{low:+.3f} … {high:+.3f}" in shown
        owner.set_viewport_size({"width": 1000, "height": 700})
        picture(owner, "experiments")
