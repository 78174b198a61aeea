"""The experts' page: who sees which answers, what is kept of a review, and what is on record."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from markupsafe import escape
from operator_page import BROWSER, OperatorPage
from service import eventually
from watched_estate import HOSTILE

from llmcore.ratings import FIELD, RATED, REVIEWED, Record, files, read
from llmserve.api.errors import ApiError
from llmserve.feedback.journal import append
from llmserve.feedback.reviews import LONGEST
from llmtrain import exits
from llmtrain.cli import main as llm_train
from llmweb.reviews import Reviews

URL = "/operator/reviews"


@pytest.fixture(scope="module")
def expert(page: OperatorPage) -> Iterator[httpx.Client]:
    with page.signed_in(page.key("expert", "eve")[0]) as client:
        yield client


def send(client: httpx.Client, answer: str, verdict: str = "corrected", **more: Any) -> httpx.Response:
    form = {"answer": answer, "verdict": verdict, "correction": "Paris", **more}
    return client.post(URL, data=form, headers=BROWSER)


def reviewed(page: OperatorPage, transaction: str) -> list[Record]:
    records = (record for path in files(page.journal, REVIEWED) for record in read(path))
    return [record for record in records if record["transaction.id"] == transaction]


def waiting(client: httpx.Client) -> list[str]:
    return re.findall(r"\?answer=([0-9a-f]{16})", client.get(URL).text)


def test_an_expert_is_sent_to_the_queue_and_shown_no_other_page(page: OperatorPage) -> None:
    key, _ = page.key("expert", "elsa")
    with page.client() as client:
        signed = client.post("/operator/sign-in", data={"key": key}, headers=BROWSER)
        assert (signed.status_code, signed.headers["location"]) == (303, URL)
        assert client.get("/operator/").headers["location"] == URL
        shown = client.get(URL)
        navigation = shown.text.partition('<nav class="pages"')[2].partition("</nav>")[0]
        assert re.findall(r'href="([^"]+)"', navigation) == [URL]
        for name in ("hosts", "experiments"):
            assert client.get(f"/operator/{name}").status_code == 403


def test_experts_alone_review(page: OperatorPage) -> None:
    transaction = page.rated(1)
    for role in "operator", "developer", "admin", "auditor", "product_owner":
        key = {"authorization": f"Bearer {page.key(role, role)[0]}"}
        with page.client() as client:
            for path in URL, f"{URL}?answer={transaction}":
                assert client.get(path, headers=key).status_code == 403, role
            form = {"answer": transaction, "verdict": "dismissed"}
            assert client.post(URL, data=form, headers=BROWSER | key).status_code == 403, role
    with page.client() as stranger:
        assert stranger.get(URL).headers["location"] == "/operator/sign-in"
        assert send(stranger, transaction).headers["location"] == "/operator/sign-in"
    assert reviewed(page, transaction) == []


def test_prompt_answer_and_what_was_said_are_shown(page: OperatorPage, expert: httpx.Client) -> None:
    transaction = page.rated(2, stars=2, reason="incomplete", comment="half of it", correction="all of it")
    assert transaction in waiting(expert)
    shown = expert.get(f"{URL}?answer={transaction}").text
    for text in "question 2", "answer 2", "half of it", "all of it", "2 of 5 stars", "incomplete", "research":
        assert text in shown, text
    assert "ada" not in shown, "who rated is not shown"


def test_bad_ratings_whose_answer_is_on_another_host_are_told(
    page: OperatorPage, expert: httpx.Client
) -> None:
    who = {"transaction.id": "f" * 16, "user.id": "ada", "organization.id": "research"}
    rating = {"@timestamp": "2026-11-27T08:00:00.000+00:00", FIELD + "thumb": "down"}
    append(page.journal, [(RATED, who | rating)])
    assert "Badly rated, but in no queue: 1. The answers are not here" in expert.get(URL).text


def test_of_tenants_that_the_policy_does_not_name_nothing_is_shown(
    page: OperatorPage, expert: httpx.Client
) -> None:
    foreign = [page.rated(3, tenant) for tenant in ("secret", "silent", "operations")]
    forged = ["0" * 16, "", "../../etc/passwd", "%00", "<b>", "x" * 3000]
    assert set(foreign).isdisjoint(waiting(expert))
    answers = [expert.get(URL, params={"answer": each}) for each in (*foreign, *forged)]
    assert {each.status_code for each in answers} == {404}
    told = {re.sub(r"Request id: \w+|\?language=\w+", "", each.text) for each in answers}
    assert len(told) == 1, "what is foreign looks like what is not there"
    assert {send(expert, each).status_code for each in (*foreign, *forged)} == {404}
    assert all(reviewed(page, each) == [] for each in foreign)


def test_a_correction_is_kept_and_learned_from(
    page: OperatorPage, expert: httpx.Client, tmp_path: Path
) -> None:
    transaction = page.rated(4)
    answer = send(expert, transaction, correction="Paris,\r\nof course", tag=["factual", "style"])
    assert (answer.status_code, answer.headers["location"]) == (303, URL)
    assert transaction not in waiting(expert)
    [kept] = reviewed(page, transaction)
    told = {
        name: kept[FIELD + name] for name in ("reviewer", "reviewer_tenant", "verdict", "tags", "correction")
    }
    assert told == {
        "reviewer": "eve",
        "reviewer_tenant": "operations",
        "verdict": "corrected",
        "tags": ["factual", "style"],
        "correction": "Paris,\nof course",
    }
    export = [
        "--journal",
        str(page.journal),
        "--since",
        "2026-11-01",
        "--kind",
        "dpo",
        "--out",
        str(tmp_path / "dpo"),
    ]
    assert llm_train(["feedback", "export", *export]) == exits.DONE
    examples = {
        each["id"]: each for each in map(json.loads, (tmp_path / "dpo/dpo.jsonl").read_text().splitlines())
    }
    assert examples[transaction]["chosen"][0]["content"] == "Paris,\nof course"


def test_the_same_review_twice_is_one_and_a_later_one_counts(
    page: OperatorPage, expert: httpx.Client
) -> None:
    transaction = page.rated(5)
    for verdict in "corrected", "corrected", "dismissed":
        assert send(expert, transaction, verdict).status_code == 303
    assert [each[FIELD + "verdict"] for each in reviewed(page, transaction)] == ["corrected", "dismissed"]
    assert FIELD + "correction" not in reviewed(page, transaction)[-1]
    assert "Reviewed by eve" in expert.get(f"{URL}?answer={transaction}").text


def test_a_review_of_a_rating_that_is_no_longer_the_last_is_shown_again(
    page: OperatorPage, expert: httpx.Client
) -> None:
    transaction = page.rated(29)
    form = expert.get(f"{URL}?answer={transaction}").text
    [shown] = re.findall(r'name="rated" value="([^"]+)"', form)
    again = send(expert, transaction, "dismissed", rated="2025-01-01T00:00:00.000+00:00", correction="typed")
    assert (again.status_code, reviewed(page, transaction)) == (409, [])
    assert "The answer was rated again while you were writing" in again.text
    assert "typed" in again.text
    assert send(expert, transaction, "dismissed", rated=shown).status_code == 303
    assert len(reviewed(page, transaction)) == 1


def test_each_look_and_each_review_is_on_the_audit_record_without_text(page: OperatorPage) -> None:
    transaction = page.rated(6, text="of a secret matter")
    key, identifier = page.key("expert", "edda")
    with page.signed_in(key) as client:
        listed = waiting(client)
        client.get(f"{URL}?answer={transaction}")
        send(client, transaction, correction="unheard of")

    def recorded() -> list[tuple[Any, ...]]:
        names = "event.action", "llmkeep.audit.phase", "llmkeep.review.transactions", "llmkeep.review.verdict"
        mine = [each for each in page.records() if each.get("llmkeep.identity.id") == identifier]
        return [tuple(each.get(name) for name in names) for each in mine if each["url.path"] == URL]

    eventually("all are recorded", lambda: len(recorded()) == 6)
    assert [each for each in recorded() if each[1] == "intent"] == [
        (f"GET {URL}", "intent", listed, None),
        (f"GET {URL}", "intent", [transaction], None),
        (f"POST {URL}", "intent", [transaction], "corrected"),
    ]
    everything = "".join(map(str, page.gateway.records())) + page.gateway.logs()
    assert "secret matter" not in everything
    assert "unheard of" not in everything


def test_without_the_record_nothing_is_shown_or_kept(page: OperatorPage, expert: httpx.Client) -> None:
    transaction = page.rated(7)
    assert page.gateway.writer
    page.gateway.writer.stop()
    try:
        for answer in expert.get(URL), send(expert, transaction):
            assert answer.status_code == 503
            assert "question 7" not in answer.text
    finally:
        page.gateway.start_writer()
    eventually("it is shown again", lambda: expert.get(URL).status_code == 200)
    assert reviewed(page, transaction) == []


def test_scripts_in_prompts_answers_and_comments_are_text(page: OperatorPage, expert: httpx.Client) -> None:
    transaction = page.rated(8, text=HOSTILE, thumb="down", comment=HOSTILE)
    send(expert, transaction, correction=f"</textarea>{HOSTILE}")
    for path in URL, f"{URL}?answer={transaction}":
        shown = expert.get(path).text
        assert "<script" not in shown
        assert "<img" not in shown
    assert shown.count(str(escape(HOSTILE))) == 4
    assert shown.count("</textarea>") == 1


@pytest.mark.parametrize(
    ("form", "status", "words"),
    [
        ({"correction": " \r\n "}, 400, "There is no correction"),
        ({"correction": "é" * (LONGEST + 1)}, 400, "The correction is too long"),
        ({"tag": "<b>"}, 400, "is not a tag"),
        ({"verdict": "accepted"}, 400, "send corrected or dismissed"),
        ({"correction": "x" * 1_000_000}, 413, "The form is too large"),
        ({f"more{number}": "x" for number in range(20)}, 400, "more than 14 fields"),
    ],
)
def test_what_is_no_review_is_refused(
    page: OperatorPage, expert: httpx.Client, form: dict[str, str], status: int, words: str
) -> None:
    transaction = page.rated(9)
    answer = send(expert, transaction, **form)
    assert (answer.status_code, words in answer.text) == (status, True), answer.text[:2000]
    assert reviewed(page, transaction) == []


def test_what_was_typed_is_shown_again_with_what_is_wrong(page: OperatorPage, expert: httpx.Client) -> None:
    transaction = page.rated(10)
    long = "\n first " + "é" * LONGEST
    shown = send(expert, transaction, correction=long, tag=["outdated"]).text
    assert long.strip() in shown
    assert 'value="outdated" checked' in shown
    assert 'role="alert"' in shown
    assert 'aria-invalid="true"' in shown


def test_forms_of_other_sites_are_refused(page: OperatorPage, expert: httpx.Client) -> None:
    transaction = page.rated(11)
    form = {"answer": transaction, "verdict": "dismissed"}
    for headers in ({}, {"sec-fetch-site": "cross-site"}, {"origin": "https://elsewhere.example"}):
        assert expert.post(URL, data=form, headers=headers).status_code == 403
    assert reviewed(page, transaction) == []


def test_the_queue_shows_twenty_and_says_how_many_more_wait(page: OperatorPage, expert: httpx.Client) -> None:
    for number in range(100, 125):
        page.rated(number)
    assert len(waiting(expert)) == 20
    [more] = re.findall(r"(\d+) more are not shown", expert.get(URL).text)
    assert int(more) >= 5


def test_both_languages_say_it(page: OperatorPage, expert: httpx.Client) -> None:
    transaction = page.rated(12, stars=1, reason="wrong")
    shown = expert.get(f"{URL}?answer={transaction}", headers={"accept-language": "zh"}).text
    assert all(words in shown for words in ("复核回答", "事实错误", "1 星", "保存更正", "驳回"))
    assert f'href="?answer={transaction}&amp;language=en"' in shown, (
        "a link to the other language stays at the answer"
    )


def test_a_host_without_a_journal_or_with_a_broken_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="keeps no ratings"):
        asyncio.run(Reviews(None).item(["research"], "0" * 16))
    (tmp_path / "rated-20261127T08.jsonl").mkdir()
    with pytest.raises(ApiError, match="cannot be used now"):
        asyncio.run(Reviews(tmp_path).item(["research"], "0" * 16))
