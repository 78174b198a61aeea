"""Nobody in without a policy that says so, and a record that cannot be altered unseen: on the estate itself."""

import http.client
import json
import ssl
from urllib.parse import urlsplit

import pytest
from estate import QUESTION, Client, Lab, answers, request, within

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
        ("POST", "/v1/responses", {"model": "m", "input": "x"}),
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
    estate.site("-t", "opa,llm_serving")
    within(
        10, "the analyst may", lambda: request(client, "POST", "/generate", question, key=analyst)[0] == 200
    )
    assert estate.on("llm1", started) == before
    estate.on("ops1", f"rm -r {SOURCE} && llmkeep policy build")
    estate.site("-t", "opa,llm_serving")
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
