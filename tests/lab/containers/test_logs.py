"""What hosts log, found by request on the control node: Elasticsearch on ops1, Filebeat on both, over the finished estate."""

import contextlib
import http.client
import json
import ssl
import time
from collections.abc import Iterator
from functools import partial
from urllib.parse import quote, urlsplit

import pytest
from estate import ELASTICSEARCH_REQUEST as REQUEST
from estate import HOSTS, QUESTION, ROOT, Client, Lab, answered, elasticsearch, open_client, within

CANARY = "canary-8c1d-in-a-question"
KEY_PERMISSIONS = (ROOT / "roles/filebeat/files/key_permissions.py").read_text()


@pytest.fixture(scope="module")
def client(logged: Lab) -> Client:
    return open_client(logged)


def connected(client: Client) -> http.client.HTTPSConnection:
    target = urlsplit(client.url)
    context = ssl.create_default_context(cafile=str(client.ca))
    return http.client.HTTPSConnection(str(target.hostname), target.port, context=context, timeout=120)


def asked(client: Client, body: object, key: str | None = None, deadline: str = "60000") -> tuple[int, str]:
    """Status and id of one request to /generate; a BODY that is a text is sent as it is."""
    link = connected(client)
    headers = {
        "authorization": f"Bearer {key or client.key}",
        "content-type": "application/json",
        "x-llm-deadline-ms": deadline,
    }
    link.request("POST", "/generate", body if isinstance(body, str) else json.dumps(body), headers)
    answer = link.getresponse()
    answer.read()
    return answer.status, str(answer.headers["x-request-id"])


def every(lab: Lab, streams: str) -> Iterator[dict[str, object]]:
    """All documents of these streams."""
    page = elasticsearch(lab, "POST", f"/{streams}/_search?scroll=1m", {"size": 5_000})
    while page["hits"]["hits"]:
        yield from (hit["_source"] for hit in page["hits"]["hits"])
        page = elasticsearch(
            lab, "POST", "/_search/scroll", {"scroll": "1m", "scroll_id": page["_scroll_id"]}
        )


def test_a_question_is_found_by_its_request_within_ten_seconds_parsed_and_without_its_prompt(
    logged: Lab, client: Client
) -> None:
    body = {"prompt": f"{QUESTION} {CANARY}", "max_tokens": 2, "temperature": 0}
    status, answered = asked(client, body)
    assert status == 200
    end = time.monotonic() + 10
    documents: dict[str, dict[str, object]] = {}
    while len(documents) < 2 and time.monotonic() < end:
        lines = logged.on("ops1", f"llmkeep logs find {answered} --json --wait 10")
        documents = {found["data_stream"]["dataset"]: found for found in map(json.loads, lines.splitlines())}
    gateway, edge = documents["llmkeep.service"], documents["llmkeep.edge"]
    assert gateway["http"] == {
        "request": {"id": answered, "method": "POST"},
        "response": {"status_code": 200},
    }
    assert edge["url"] == {"path": "/generate"}
    assert gateway["host"] == edge["host"] == {"name": "llm1.estate.internal"}
    refused = [asked(client, body | {"max_tokens": -1}), asked(client, body, key="llmk_wrong_key")]
    assert [status for status, _ in refused] == [400, 401]
    for _, request in refused:
        logged.on("ops1", f"llmkeep logs find {request} --wait 10")
    search = f"{REQUEST} GET '/logs-llmkeep.*/_count?q=%22{{}}%22&filter_path=count'"
    assert logged.on("ops1", search.format(answered)).strip() != '200 {"count":0}'
    assert logged.on("ops1", search.format(CANARY)).strip() == '200 {"count":0}'


def test_an_unknown_request_is_not_found(logged: Lab) -> None:
    said = logged.on("ops1", "llmkeep logs find no-such-request 2>&1; echo code $?")
    assert "no document has http.request.id 'no-such-request'" in said
    assert said.strip().endswith("code 3")


def test_each_line_of_a_burst_arrives_once(logged: Lab) -> None:
    lines = 500
    logged.on("llm1", f"for number in $(seq {lines}); do logger --tag burst burst4e71 $number; done")
    count = f"{REQUEST} GET '/logs-llmkeep.*/_count?q=burst4e71&filter_path=count'"
    within(
        30, "each line is there once", lambda: logged.on("ops1", count).strip() == f'200 {{"count":{lines}}}'
    )


# For the engine of llm1: a model that fails with its question in the message, so that one request, or the process, ends by it.
FAILING = """
from llmserve.engine import naive
generate = naive.NaiveDriver.generate
async def failing(self, request, emit):
    for word, kind in (("raise-in-request", ValueError), ("raise-in-process", KeyboardInterrupt)):
        if word in str(request):
            raise kind(str(request))
    return await generate(self, request, emit)
naive.NaiveDriver.generate = failing
"""
ENGINE = "llm-engine@smollm2-135m-instruct.service"
DROP_IN = f"/run/systemd/system/{ENGINE}.d"


def begun(client: Client, prompt: str) -> tuple[http.client.HTTPSConnection, str]:
    """A long answer's stream, whose first event was read, and the id of the request."""
    link = connected(client)
    body = {"prompt": prompt, "max_tokens": 400, "stream": True}
    link.request("POST", "/generate", json.dumps(body), {"authorization": f"Bearer {client.key}"})
    answer = link.getresponse()
    assert answer.readline().startswith(b"data:")
    return link, str(answer.headers["x-request-id"])


def engine_answers(client: Client) -> None:
    """Wait until the engine answers what no cache has."""
    answered(client, "/generate", {"prompt": f"It is {time.time()}", "max_tokens": 1}, seconds=120)


def test_no_path_of_a_request_brings_its_prompt_or_a_key_into_the_logs(logged: Lab, client: Client) -> None:
    story = f"Tell me a long story. {CANARY}"
    body = {"prompt": story, "max_tokens": 2}
    wrong_key = "llmk_0000000000000000_" + CANARY
    found: dict[str, str] = {}  # path of a request: its id

    def ask(path: str, status: int, body: object, **given: str) -> None:
        seen, found[path] = asked(client, body, **given)
        assert seen == status, path

    ask("answered", 200, body)
    ask("wrong value", 400, body | {"max_tokens": CANARY})
    ask("no JSON", 400, f'{{"prompt": "{CANARY}')
    ask("unknown key", 401, body, key=wrong_key)
    analyst = logged.on("llm1", "llm-serve keys add --subject ann@lab --tenant t --role analyst").strip()
    ask("refused by the policy", 403, body, key=analyst)
    ask("timeout", 503, body | {"max_tokens": 400}, deadline="50")
    link, found["aborted"] = begun(client, story)
    link.close()
    for signal, units in (
        ("SEGV", ENGINE),
        ("KILL", ENGINE),
        ("SEGV", "llm-gateway@*.service"),
        ("KILL", "llm-gateway@*.service"),
    ):
        link, found[f"{signal} {units}"] = begun(client, story)
        logged.on("llm1", f"systemctl kill --signal={signal} '{units}'")
        with contextlib.suppress(http.client.HTTPException, OSError):
            link.sock.settimeout(20)
            link.sock.recv(1 << 20)
        link.close()
        engine_answers(client)
    logged.on("llm1", f"systemctl stop {ENGINE}")
    ask("no engine", 503, body | {"prompt": f"Not asked before. {CANARY}"}, deadline="3000")
    logged.on(
        "llm1", f"mkdir -p /run/failing {DROP_IN} && cat > /run/failing/sitecustomize.py", given=FAILING
    )
    drop_in = "[Service]\nEnvironment=PYTHONPATH=/run/failing\n"
    logged.on(
        "llm1",
        f"cat > {DROP_IN}/failing.conf && systemctl daemon-reload && systemctl start {ENGINE}",
        given=drop_in,
    )
    engine_answers(client)
    for path in ("raise-in-request", "raise-in-process"):
        ask(path, 503, body | {"prompt": f"{path} {CANARY}"})
    logged.on(
        "llm1", f"rm -r /run/failing {DROP_IN} && systemctl daemon-reload && systemctl restart {ENGINE}"
    )
    engine_answers(client)

    def there(query: str) -> bool:
        return bool(elasticsearch(logged, "GET", f"/logs-llmkeep.*/_count?q={quote(query)}")["count"])

    for path, number in found.items():
        within(120, f"{path} is logged", partial(there, f'http.request.id:"{number}"'))
    for message in ("the model failed", "this process ends"):
        within(
            120, f"{message} is logged", partial(there, f'service.name:"{ENGINE}" AND message:"{message}"')
        )
    secrets = {
        "prompt": CANARY,
        "key": client.key.split("_")[2],
        "another key": analyst.split("_")[2],
        "header": "Bearer ",
    }
    journal = logged.on("llm1", "journalctl --quiet --no-pager -o json")
    documents = [json.dumps(each) for host in HOSTS for each in every(logged, f"logs-llmkeep.*-{host}")]
    assert len(documents) > 500
    assert "the model failed" in journal
    assert [name for name, secret in secrets.items() if secret in journal] == []
    assert [name for name, secret in secrets.items() if any(secret in each for each in documents)] == []


def test_the_key_of_one_host_is_revoked_and_the_other_hosts_goes_on(logged: Lab) -> None:
    def permitted(host: str) -> str:
        url = "https://ops1.estate.internal:9200"
        return logged.on(host, f"python3 - {url} {host}", given=KEY_PERMISSIONS).splitlines()[0]

    own = "create in its own stream: "
    assert [permitted("ops1"), permitted("llm1")] == [f"{own}400", f"{own}400"]
    logged.on("ops1", f"""{REQUEST} --until ^200 9 DELETE /_security/api_key '{{"name": "filebeat-llm1"}}'""")
    within(10, "the revoked key is refused", lambda: permitted("llm1") == f"{own}401")
    assert permitted("ops1") == f"{own}400"
