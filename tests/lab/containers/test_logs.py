"""What hosts log, found by request on the control node: Elasticsearch on ops1, Filebeat on both, over the finished estate."""

import http.client
import json
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import filebeat_cases
import pytest
import yaml
from dashboard_searches import bulk, msearch, nothing_in
from estate import QUESTION, ROOT, Client, Lab, require_programs, within

CANARY = "canary-8c1d-in-a-question"
INVENTORIES = "-i inventory/lab -i inventory/lab-logs"
REQUEST = "/usr/local/lib/llmkeep/elasticsearch-request"
OPERATOR = yaml.safe_load((ROOT / "roles/kibana/vars/main.yml").read_text())["__kibana_operator"]
# What an operator's password is good for: status of each request, a line each.
AS_OPERATOR = """
import base64, http.client, ssl
context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
context.load_cert_chain("/etc/llmkeep/pki/host.pem", "/etc/llmkeep/pki/host.key")
token = base64.b64encode(b"ada:%s").decode()
given = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
for method, path in (
    ("GET", "/logs-llmkeep.*/_search"), ("POST", "/logs-llmkeep.system-ops1/_doc"),
    ("DELETE", "/_data_stream/logs-llmkeep.system-ops1"),
    ("GET", "/.security/_search"), ("GET", "/_security/user"), ("GET", "/_cluster/health"),
):
    link = http.client.HTTPSConnection("ops1.estate.internal", 9200, context=context)
    link.request(method, path, "{}" if method == "POST" else None, given)
    print(link.getresponse().status)
"""
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


def test_each_panel_of_each_dashboard_finds_something(logged: Lab, tmp_path: Path) -> None:
    """Among the estate's documents, and those of the table of cases: sudo refuses no user here."""
    cases = filebeat_cases.documents(ROOT / ".lab/bundle/bin/filebeat", tmp_path).values()
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    created = logged.on("ops1", f"{REQUEST} POST '/_bulk?refresh=true' -", given=bulk(cases, now))
    assert json.loads(created.partition(" ")[2])["errors"] is False, created[:2000]
    names, body = msearch()
    answers = json.loads(logged.on("ops1", f"{REQUEST} POST /_msearch -", given=body).partition(" ")[2])
    found = dict(zip(names, map(nothing_in, answers["responses"]), strict=True))
    assert {name: nothing for name, nothing in found.items() if nothing} == {}


def test_an_operator_reads_logs_and_nothing_else(logged: Lab) -> None:
    password = "an operators own password"
    for path, body in (
        ("role/llmkeep-operator", OPERATOR),
        ("user/ada", {"password": password, "roles": ["llmkeep-operator"]}),
    ):
        logged.on("ops1", f"{REQUEST} --until ^200 9 PUT /_security/{path} -", given=json.dumps(body))
    said = logged.on("ops1", "python3 -", given=AS_OPERATOR % password)
    assert said.split() == ["200", "403", "403", "403", "403", "403"]


def test_the_key_of_one_host_is_revoked_and_the_other_hosts_goes_on(logged: Lab) -> None:
    def permitted(host: str) -> str:
        url = "https://ops1.estate.internal:9200"
        return logged.on(host, f"python3 - {url} {host}", given=KEY_PERMISSIONS).splitlines()[0]

    own = "create in its own stream: "
    assert [permitted("ops1"), permitted("llm1")] == [f"{own}400", f"{own}400"]
    logged.on("ops1", f"""{REQUEST} --until ^200 9 DELETE /_security/api_key '{{"name": "filebeat-llm1"}}'""")
    within(10, "the revoked key is refused", lambda: permitted("llm1") == f"{own}401")
    assert permitted("ops1") == f"{own}400"
