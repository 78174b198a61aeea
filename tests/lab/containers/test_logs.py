"""What hosts log, found by request on the control node: Elasticsearch on ops1, Filebeat on both, over the finished estate."""

import http.client
import json
import re
import shlex
import ssl
import time
from urllib.parse import urlsplit

import pytest
from estate import QUESTION, ROOT, Client, Lab, require_programs, within

CANARY = "canary-8c1d-in-a-question"
INVENTORIES = "-i inventory/lab -i inventory/lab-logs"
REQUEST = "/usr/local/lib/llmkeep/elasticsearch-request"
ASK_FOR_METRICS = (ROOT / "roles/exporters/files/ask_for_metrics.py").read_text()
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


def test_the_key_of_one_host_is_revoked_and_the_other_hosts_goes_on(logged: Lab) -> None:
    def permitted(host: str) -> str:
        url = "https://ops1.estate.internal:9200"
        return logged.on(host, f"python3 - {url} {host}", given=KEY_PERMISSIONS).splitlines()[0]

    own = "create in its own stream: "
    assert [permitted("ops1"), permitted("llm1")] == [f"{own}400", f"{own}400"]
    logged.on("ops1", f"""{REQUEST} --until ^200 9 DELETE /_security/api_key '{{"name": "filebeat-llm1"}}'""")
    within(10, "the revoked key is refused", lambda: permitted("llm1") == f"{own}401")
    assert permitted("ops1") == f"{own}400"


def test_elasticsearchs_figures_are_exported_by_a_key_that_reads_nothing_else(logged: Lab) -> None:
    metrics = f"{INVENTORIES} -i inventory/lab-metrics"
    logged.on("ops1", f"llmkeep site {metrics} --tags exporters --limit ops1", timeout=900)
    certificate = "/etc/llmkeep/pki/host.pem /etc/llmkeep/pki/host.key"

    def shown(*paths: str) -> list[str]:
        words = f"python3 - ops1.estate.internal 9443 {certificate} {' '.join(map(shlex.quote, paths))}"
        return logged.on("ops1", words, given=ASK_FOR_METRICS).splitlines()

    up = '/elasticsearch=elasticsearch_cluster_health_status{cluster="llmkeep",color="red"} 0'
    # The edge, as this host sees it: it is real here.
    asked = [up, "/edge-llm1-tls13=probe_success 1", "/edge-llm1-old-tls=probe_success 0"]
    assert shown(*asked) == [f"200 {one.partition('=')[0]} with samples" for one in asked]
    figures = logged.on("ops1", "python3 -c '{}'".format(
        'import urllib.request; print(urllib.request.urlopen("http://127.0.0.1:9114/metrics").read().decode())'
    ))  # fmt: skip
    assert re.search(
        r'^elasticsearch_index_stats_indexing_index_total\{.*index="\.ds-logs-llmkeep\.system-llm1-.*\} [1-9]',
        figures,
        re.MULTILINE,
    )
    mine = KEY_PERMISSIONS.replace("filebeat.key", "elasticsearch.exporter")
    said = logged.on("ops1", "python3 - https://ops1.estate.internal:9200 ops1", given=mine).splitlines()
    assert {line for line in said if not line.endswith(": 403")} == {"see the cluster: 200"}
    unit = "systemctl show --property=MainPID --value prometheus-elasticsearch-exporter.service"
    key = "systemd-creds decrypt --name=elasticsearch.exporter /etc/credstore.encrypted/elasticsearch.exporter -"
    assert logged.on("ops1", f'grep --count "$({key})" /proc/$({unit})/cmdline || true').strip() == "0"
    logged.on("ops1", f"""{REQUEST} --until ^200 9 DELETE /_security/api_key '{{"name": "exporter-ops1"}}'""")
    within(20, "a revoked key shows", lambda: shown(up) == ["200 /elasticsearch without samples"])
