"""Nobody in without a policy that says so, and a record that cannot be altered unseen: on the estate itself."""

import http.client
import json
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from urllib.parse import urlsplit

import pytest
from conftest import Client, Lab
from test_estate import QUESTION, answers, request

ASK = f"/generate?prompt={QUESTION.replace(' ', '%20')}&max_tokens=4"
RECORDS = "/var/log/llm-audit"
VERIFY = "llm-serve audit verify --json"
SOURCE = "/etc/llmkeep/policy/source"
# The officer changes the role, and the test beside it that says what the role may.
ANALYST_MAY_POST = (
    f"sed -i '/^analyst:/,/^$/s,GET /generate,&\\, POST /generate,' {SOURCE}/llm/roles/data.yaml && "
    f'sed -i \'/^test_an_analyst/s,"GET /generate",&\\, "POST /generate",\' {SOURCE}/llm/roles/roles_test.rego'
)


def refusal(answer: tuple[int, bytes]) -> tuple[int, str, str]:
    """Status, code and message of an answer that is an error."""
    error = json.loads(answer[1])["error"]
    return answer[0], error["code"], error["message"]


def within(seconds: float, what: str, holds: Callable[[], bool]) -> None:
    """Wait until `holds()` is true."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.3)


@pytest.fixture(scope="module")
def analyst(estate: Lab, client: Client) -> str:
    """A key with the guide's own role."""
    answers(client)
    return estate.on("llm1", "llm-serve keys add --subject ann@lab --tenant t --role analyst").strip()


def test_an_analyst_may_get_generate_and_nothing_else(client: Client, analyst: str) -> None:
    assert request(client, "GET", ASK, key=analyst)[0] == 200
    for method, path, body in (
        ("POST", "/generate", {"prompt": "x"}),
        ("GET", "/v1/models", None),
        ("POST", "/v1/chat/completions", {"model": "m", "messages": []}),
        ("GET", "/openapi.json", None),
    ):
        status, code, message = refusal(request(client, method, path, body, key=analyst))
        assert (status, code) == (403, "denied")
        assert "default_deny" in message


def test_headers_from_outside_make_nobody_somebody(client: Client) -> None:
    target = urlsplit(client.url)
    context = ssl.create_default_context(cafile=str(client.ca))
    for name in ("X-Client-Certificate", "X-Subject", "X-Tenant", "X-Forwarded-User", "X-SSL-Client-S-DN"):
        link = http.client.HTTPSConnection(str(target.hostname), target.port, context=context, timeout=60)
        link.request("GET", "/v1/models", headers={name: "ann@lab"})
        answer = link.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (401, "missing_key")
        link.close()


def test_a_changed_role_holds_within_seconds_and_nothing_restarts(
    estate: Lab, client: Client, analyst: str
) -> None:
    started = "systemctl show -P ExecMainStartTimestampMonotonic llm-gateway@1.service llm-gateway@2.service opa.service"
    before = estate.on("llm1", started)
    question = {"prompt": QUESTION, "max_tokens": 4}
    assert request(client, "POST", "/generate", question, key=analyst)[0] == 403
    estate.on(
        "ops1", f"cp -r /opt/llmkeep/tree/policy {SOURCE} && {ANALYST_MAY_POST} && llmkeep policy build"
    )
    estate.on("ops1", "llmkeep site -i inventory/lab -t opa,llm_serving", timeout=900)
    within(
        10, "the analyst may", lambda: request(client, "POST", "/generate", question, key=analyst)[0] == 200
    )
    assert estate.on("llm1", started) == before
    estate.on("ops1", f"rm -r {SOURCE} && llmkeep policy build")
    estate.on("ops1", "llmkeep site -i inventory/lab -t opa,llm_serving", timeout=900)
    within(10, "no longer", lambda: request(client, "POST", "/generate", question, key=analyst)[0] == 403)


def test_without_opa_nothing_is_answered_and_with_it_again_within_five_seconds(
    estate: Lab, client: Client
) -> None:
    estate.on("llm1", "systemctl stop opa.service")
    within(3, "noticed", lambda: request(client, "GET", ASK)[0] == 503)
    for method, path, body in (
        ("GET", ASK, None),
        ("POST", "/generate", {"prompt": "x"}),
        ("GET", "/v1/models", None),
    ):
        status, code, _ = refusal(request(client, method, path, body))
        assert (status, code) == (503, "policy_unavailable")
    estate.on("llm1", "systemctl start opa.service")
    within(5, "served again", lambda: request(client, "GET", "/v1/models")[0] == 200)


def test_the_record_survives_a_power_cut_under_load_and_shows_every_edit(estate: Lab, client: Client) -> None:
    def ask(number: int) -> str | None:
        """The request's id, if it was answered."""
        try:
            status, _ = request(client, "POST", "/generate", {"prompt": f"number {number}", "max_tokens": 2})
        except (OSError, http.client.HTTPException):
            return None
        return str(number) if status == 200 else None

    pool = ThreadPoolExecutor(4)
    asked = [pool.submit(ask, number) for number in range(40)]
    time.sleep(4)
    within(120, "one is answered", lambda: any(each.done() and each.result() for each in asked))
    estate.run("power-off", "llm1")
    pool.shutdown(wait=False, cancel_futures=True)
    # What was on its way is here by then; who still waits hears nothing more, and would wait for two minutes.
    done, _ = wait([each for each in asked if not each.cancelled()], timeout=10)
    answered = sum(each.result() is not None for each in done)
    estate.run("power-on", "llm1")
    answers(client, seconds=240)
    report = json.loads(estate.on("llm1", VERIFY))
    assert report["ok"], report
    intents = estate.on("llm1", f"cat {RECORDS}/records-*.jsonl | grep -c '\"intent\"'")
    assert answered
    assert int(intents) >= answered
    copy = f"rm -rf /tmp/edited && cp -r {RECORDS} /tmp/edited"
    edit = 'sed -i \'3s/timestamp":"2/timestamp":"3/\' /tmp/edited/records-*.jsonl'
    cut = "sed -i '5d' /tmp/edited/records-*.jsonl"
    for change in edit, cut:
        exits = estate.on("llm1", f"{copy} && {change} && {VERIFY} /tmp/edited > /dev/null; echo $?")
        assert exits.strip() == "3", change
    estate.on("llm1", "rm -r /tmp/edited")
    # A witness that came while llm1 was away has its own line behind it.
    run = estate.on(
        "ops1", "llmkeep audit show | grep 'run site.yml'; llmkeep audit verify > /dev/null; echo $?"
    )
    assert "run site.yml" in run
    assert run.strip().endswith("0")
