"""What hosts log, found by request on the control node: Elasticsearch on ops1, Filebeat on both, over the finished estate."""

import http.client
import json
import ssl
import time
from urllib.parse import urlsplit

import pytest
from estate import QUESTION, ROOT, Client, Lab, require_programs, within

CANARY = "canary-8c1d-in-a-question"
INVENTORIES = "-i inventory/lab -i inventory/lab-logs"
REQUEST = "/usr/local/lib/llmkeep/elasticsearch-request"
KEY_PERMISSIONS = (ROOT / "roles/filebeat/files/key_permissions.py").read_text()


@pytest.fixture(scope="module")
def logged(estate: Lab) -> Lab:
    """The estate with logs."""
    require_programs("elasticsearch", "filebeat")
    estate.on("ops1", f"llmkeep site {INVENTORIES} --tags elasticsearch,filebeat", timeout=900)
    return estate


def asked(client: Client, body: dict[str, object], key: str | None = None) -> tuple[int, str]:
    """Status and id of one request to /generate."""
    target = urlsplit(client.url)
    context = ssl.create_default_context(cafile=str(client.ca))
    link = http.client.HTTPSConnection(str(target.hostname), target.port, context=context, timeout=120)
    headers = {"authorization": f"Bearer {key or client.key}", "content-type": "application/json"}
    link.request("POST", "/generate", json.dumps(body), headers)
    answer = link.getresponse()
    answer.read()
    return answer.status, str(answer.headers["x-request-id"])


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


def test_streams_that_were_deleted_come_back_from_the_snapshot(logged: Lab, client: Client) -> None:
    """Last of those that look for a document: shippers make their streams anew meanwhile, so they come back beside."""
    status, answered = asked(client, {"prompt": QUESTION, "max_tokens": 2, "temperature": 0})
    assert status == 200
    logged.on("ops1", f"llmkeep logs find {answered} --wait 10")
    logged.on("ops1", "systemctl start llmkeep-logs-keep.service", timeout=300)
    logged.on(
        "ops1",
        f"{REQUEST} --until ^200 9 DELETE '/_data_stream/logs-llmkeep.service-llm1,logs-llmkeep.edge-llm1'",
    )
    assert "code 3" in logged.on("ops1", f"llmkeep logs find {answered} 2>&1; echo code $?")
    keep = "/usr/local/lib/llmkeep/elasticsearch-keep restore"
    newest = logged.on("ops1", f"{keep} 2>&1", check=False).splitlines()[-1].split(":")[0]
    logged.on("ops1", f"{keep} {newest}", timeout=300)
    lines = logged.on("ops1", f"llmkeep logs find {answered} --json --wait 10").splitlines()
    found = {json.loads(line)["data_stream"]["dataset"] for line in lines}
    assert found == {"llmkeep.service", "llmkeep.edge"}


def test_the_key_of_one_host_is_revoked_and_the_other_hosts_goes_on(logged: Lab) -> None:
    def permitted(host: str) -> str:
        url = "https://ops1.estate.internal:9200"
        return logged.on(host, f"python3 - {url} {host}", given=KEY_PERMISSIONS).splitlines()[0]

    own = "create in its own stream: "
    assert [permitted("ops1"), permitted("llm1")] == [f"{own}400", f"{own}400"]
    logged.on("ops1", f"""{REQUEST} --until ^200 9 DELETE /_security/api_key '{{"name": "filebeat-llm1"}}'""")
    within(10, "the revoked key is refused", lambda: permitted("llm1") == f"{own}401")
    assert permitted("ops1") == f"{own}400"
