"""What hosts log, found by request on the control node: Elasticsearch on ops1, Filebeat on both, over the finished estate."""

import contextlib
import http.client
import json
import re
import shlex
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import filebeat_cases
import pytest
import yaml
from dashboard_searches import bulk, msearch, nothing_in
from estate import ELASTICSEARCH_REQUEST as REQUEST
from estate import HOSTS, QUESTION, ROOT, WITH_LOGS, Client, Lab, answered, elasticsearch, open_client, within

CANARY = "canary-8c1d-in-a-question"
ASK_FOR_METRICS = (ROOT / "roles/exporters/files/ask_for_metrics.py").read_text()
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
KEY_PERMISSIONS = (ROOT / "roles/_common/files/key_permissions.py").read_text()


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


def count(lab: Lab, query: str) -> int:
    """How many documents of all hosts a query finds."""
    return int(elasticsearch(lab, "GET", f"/logs-llmkeep.*/_count?q={quote(query)}")["count"])


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
    assert count(logged, f'"{answered}"') > 0
    assert count(logged, f'"{CANARY}"') == 0


def test_a_rating_is_in_elasticsearch_once_though_it_was_sent_twice_and_is_gone_once_it_is_forgotten(
    logged: Lab, client: Client
) -> None:
    link = connected(client)
    given = {"authorization": f"Bearer {client.key}", "content-type": "application/json"}
    link.request("POST", "/generate", json.dumps({"prompt": QUESTION, "max_tokens": 2}), given)
    answer = link.getresponse()
    answer.read()
    rating = {"id": answer.headers["x-llm-response-id"], "thumb": "down", "comment": CANARY}
    link.request("POST", "/v1/feedback", json.dumps(rating), given)
    assert link.getresponse().status == 200
    journal = "runuser -u llm-gateway -- llm-serve feedback"
    rated = json.loads(logged.on("llm1", f"{journal} list").splitlines()[-1])
    exchange = f'transaction.id:"{rated["transaction.id"]}"'

    def sent() -> None:
        # Waits for a run that the timer has begun.
        logged.on("llm1", "systemctl start llmkeep-ratings-ship.service", timeout=60)

    def documents() -> list[Any]:
        indices = "llmkeep-ratings,llmkeep-ratings-history"
        elasticsearch(logged, "POST", f"/{indices}/_refresh")
        hits = elasticsearch(logged, "GET", f"/{indices}/_search?q={quote(exchange)}")["hits"]["hits"]
        return [hit["_source"] for hit in hits]

    sent()
    once = documents()
    logged.on("llm1", "rm /var/lib/llm-feedback/shipping/positions.json")
    sent()
    assert documents() == once
    assert [document["llmkeep.feedback.thumb"] for document in once] == ["down", "down"], "and its history"
    assert rated["user.id"] not in json.dumps(once)
    assert CANARY not in json.dumps(once)
    key = "python3 - https://ops1.estate.internal:9200 llm1 elasticsearch.ratings llmkeep-ratings"
    said = dict(line.split(": ") for line in logged.on("llm1", key, given=KEY_PERMISSIONS).splitlines())
    assert {"read", "see the cluster", "create in its own stream", "search llmkeep-ratings"} < said.keys()
    # By its name no document of a stream is deleted, whatever the key.
    assert {what: status for what, status in said.items() if status != "403"} == {"delete": "400"}
    whose = f"--subject {shlex.quote(rated['user.id'])} --tenant {shlex.quote(rated['organization.id'])}"
    told = logged.on("llm1", f"{journal} forget {whose}", timeout=120)
    assert told.splitlines()[1:] == ["0 of these ratings of this host are left in Elasticsearch"]
    assert documents() == []


def test_an_unknown_request_is_not_found(logged: Lab) -> None:
    said = logged.on("ops1", "llmkeep logs find no-such-request 2>&1; echo code $?")
    assert "no document has http.request.id 'no-such-request'" in said
    assert said.strip().endswith("code 3")


def compared(lab: Lab, *, counted: bool = True) -> tuple[int, Any]:
    """Exit code of `llmkeep logs check`, and what it says of llm1, of all until now."""
    if counted:
        lab.on("llm1", "systemctl start llmkeep-journal-count.service")
    said = lab.on("ops1", "llmkeep logs check --settle 0 --json; echo $?")
    result, _, code = said.strip().rpartition("\n")
    source = json.loads(result)["sources"]["llm1"]
    print(f"code {code}, silent: {source['silent']}, gaps: {source['gaps']}")  # shown where a test fails
    return int(code), source


def missing(source: Any) -> int:
    return sum(gap["missing"] for gap in source["gaps"])


def numbers(lab: Lab, tag: str) -> list[int]:
    """Sequence numbers of llm1's entries of TAG, as its journal has them."""
    lines = lab.on("llm1", f"journalctl --quiet --output=json -t {tag}").splitlines()
    return [int(json.loads(line)["__SEQNUM"]) for line in lines]


def test_each_line_of_a_burst_is_there_once_although_filebeat_is_killed_in_it(logged: Lab) -> None:
    lines = 2000
    logged.on(
        "llm1",
        f"(for number in $(seq {lines}); do echo burst4e71 $number; [ $((number % 100)) -gt 0 ] || sleep 0.1; done"
        " | systemd-cat -t burst) & for kill in 1 2 3; do sleep 0.7;"
        " systemctl kill --signal=KILL filebeat.service; done; wait; sleep 1",
    )
    compared(logged)
    # Two minutes, since a killed Filebeat may read its queue again.
    within(120, "each line is there once", lambda: count(logged, "burst4e71") == lines)
    number = numbers(logged, "burst")[-1]

    def all_there() -> bool:
        code, source = compared(logged, counted=False)
        written = sum(hour["written"] for hour in source["hours"].values())
        return code in (0, 4) and not source["gaps"] and not source["silent"] and written > number - 200

    within(30, "nothing is missing", all_there)
    _, source = compared(logged, counted=False)
    assert all(hour["duplicates"] == 0 for hour in source["hours"].values())


def test_documents_that_were_deleted_are_named_by_their_sequence_numbers(logged: Lab) -> None:
    logged.on("llm1", "for number in $(seq 20); do logger -t taken taken77c0 $number; done")
    within(30, "they are there", lambda: count(logged, "taken77c0") == 20)
    compared(logged)
    within(30, "they are counted", lambda: not compared(logged, counted=False)[1]["gaps"])
    deleted = logged.on(
        "ops1", f"{REQUEST} POST '/logs-llmkeep.*/_delete_by_query?q=taken77c0&refresh=true' '{{}}'"
    )
    assert '"deleted":20' in deleted, deleted

    def named() -> bool:
        code, source = compared(logged, counted=False)
        taken = numbers(logged, "taken")
        return (
            code == 3
            and missing(source) == len(taken)
            and min(gap["first"] for gap in source["gaps"]) <= taken[0]
            and taken[-1] <= max(gap["last"] for gap in source["gaps"])
        )

    within(30, "the gap is named", named)


def test_entries_that_left_the_journal_before_they_were_shipped_are_named(logged: Lab) -> None:
    compared(logged)
    logged.on(
        "llm1",
        "systemctl stop filebeat.service; for number in $(seq 30); do logger -t vacuumed $number; done",
    )
    lost = numbers(logged, "vacuumed")
    logged.on(
        "llm1",
        "journalctl --quiet --rotate; journalctl --quiet --vacuum-time=1us; logger -t later one;"
        " systemctl start filebeat.service",
    )
    assert not numbers(logged, "vacuumed")

    def named() -> bool:
        code, source = compared(logged)
        gaps = [gap for gap in source["gaps"] if "left the journal" in gap["why"]]
        return (
            code == 3
            and len(gaps) == 1
            and gaps[0]["first"] <= lost[0]
            and lost[-1] <= gaps[0]["last"]
            and gaps[0]["missing"] >= len(lost)
        )

    within(60, "the gap is named", named)


def test_each_component_of_both_hosts_is_the_bundles_and_a_planted_program_is_named(logged: Lab) -> None:
    whole = logged.operate("sbom make")
    assert "complete: 2 of 2 hosts answered" in whole
    # The inventory has exporters, which this estate was made without.
    lines = [line for line in whole.splitlines() if "of role exporters" not in line]
    assert not [line for line in lines if ": unknown: " in line or ": missing: " in line]
    logged.on("llm1", "cp /usr/bin/true /usr/local/bin/miner")
    planted = logged.operate("sbom make")
    logged.on("llm1", "rm /usr/local/bin/miner")
    unknown = [line for line in planted.splitlines() if ": unknown: " in line]
    assert unknown == ["llm1: unknown: application:/usr/local/bin/miner#/usr/local/bin/miner"]
    names = logged.on("ops1", "ls /var/lib/llmkeep/sboms").split()
    changes = logged.on("ops1", f"llmkeep sbom diff {' '.join(names[-2:])}").splitlines()
    assert [line.split(" (")[0] for line in changes] == [
        "llm1: + application:/usr/local/bin/miner#/usr/local/bin/miner"
    ]
    key = logged.on("ops1", "cat /var/log/llmkeep-audit/verifier").strip()
    archive = f"/var/lib/llmkeep/sboms/{names[-1]}"
    proved = logged.on(
        "ops1", f"/opt/llmkeep/control/bin/python -m llmproof verify-sbom {archive} --verifier '{key}'"
    )
    assert f"as signed by {key}" in proved


def test_without_a_database_vulnerabilities_of_both_hosts_are_unknown(logged: Lab) -> None:
    printed = logged.on("ops1", f"{logged.command('cve', '--json')}; echo $?")
    text, _, code = printed.rstrip().rpartition("\n")
    assert code == "4"
    scan = json.loads(text)
    assert {name: (host["answers"], host["release"]) for name, host in scan["hosts"].items()} == {
        "llm1": (True, "debian trixie"),
        "ops1": (True, "debian trixie"),
    }
    for host in scan["hosts"].values():
        assert "has no database of debian: its builder did not reach the source" in host["unknown"][0]
        assert host["components"] > 200


def test_the_copy_of_the_audit_record_is_what_the_host_signed_and_a_missing_line_is_named(
    logged: Lab, client: Client
) -> None:
    status, _ = asked(client, {"prompt": f"{QUESTION} {CANARY}", "max_tokens": 2, "temperature": 0})
    assert status == 200

    def copied() -> tuple[int, Any]:
        said = logged.on("ops1", "llmkeep audit shipped --json; echo $?")
        lines, _, code = said.strip().rpartition("\n")
        return int(code), json.loads(lines)

    def proved() -> bool:
        # Asked more often than systemd starts a unit without that.
        unit = "llmkeep-audit-ship.service"
        logged.on("llm1", f"systemctl reset-failed {unit}; systemctl start {unit}")
        code, copy = copied()
        return code == 0 and copy["records"] == copy["last"] >= 2 and copy["heads"] >= 1

    # A head a minute, and a look of the witness.
    within(180, "heads match the copy", proved)
    line = "event.action:audit_shipped%20AND%20event.sequence:1"
    deleted = logged.on(
        "ops1", f"{REQUEST} POST '/logs-llmkeep.*/_delete_by_query?q={line}&refresh=true' '{{}}'"
    )
    assert '"deleted":1' in deleted, deleted
    code, copy = copied()
    assert (code, copy["first"], copy["heads"]) == (3, 2, 0)
    assert copy["findings"] == [
        "records 1 to 1 are missing, and no record declares them removed by retention"
    ]


def test_what_is_sent_again_is_refused_as_a_duplicate_and_counted_as_one_after_a_rollover(
    logged: Lab,
) -> None:
    """A Filebeat that has lost its registry sends the whole journal again."""

    def again() -> None:
        logged.on(
            "llm1",
            "systemctl stop filebeat.service; rm -r /var/lib/filebeat/data/registry; systemctl start filebeat.service",
        )

    def twice() -> int:
        return sum(int(hour["duplicates"]) for hour in compared(logged)[1]["hours"].values())

    logged.on("llm1", "for number in $(seq 20); do logger -t again again1b07 $number; done")
    within(30, "they are there", lambda: count(logged, "again1b07") == 20)
    again()
    logged.on("llm1", "logger -t again end1b07")
    within(60, "all was sent again", lambda: count(logged, "end1b07") == 1)
    assert count(logged, "again1b07") == 20
    before = twice()
    logged.on("ops1", f"{REQUEST} POST /logs-llmkeep.system-llm1/_rollover '{{}}'")
    again()
    within(60, "those of before the rollover are there twice", lambda: count(logged, "again1b07") == 40)
    within(30, "they are counted", lambda: twice() >= before + 20)


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
        return count(logged, query) > 0

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
        "header": "Bearer llmk_",
    }
    journal = logged.on("llm1", "journalctl --quiet --no-pager -o json")
    documents = [json.dumps(each) for host in HOSTS for each in every(logged, f"logs-llmkeep.*-{host}")]
    assert len(documents) > 500
    assert "the model failed" in journal
    assert [name for name, secret in secrets.items() if secret in journal] == []
    assert [name for name, secret in secrets.items() if any(secret in each for each in documents)] == []


@pytest.fixture(scope="module")
def cases(logged: Lab, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Documents of the table of cases beside the estate's: in containers sudo refuses none, and nothing is audited."""
    made = filebeat_cases.documents(ROOT / ".lab/bundle/bin/filebeat", tmp_path_factory.mktemp("cases"))
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    sent = bulk(made.values(), now)
    created = logged.on("ops1", f"{REQUEST} POST '/_bulk?refresh=true' -", given=sent)
    assert json.loads(created.partition(" ")[2])["errors"] is False, created[:2000]


@pytest.mark.usefixtures("cases")
def test_each_panel_of_each_dashboard_finds_something(logged: Lab) -> None:
    names, body = msearch()
    answers = json.loads(logged.on("ops1", f"{REQUEST} POST /_msearch -", given=body).partition(" ")[2])
    found = dict(zip(names, map(nothing_in, answers["responses"]), strict=True))
    assert {name: nothing for name, nothing in found.items() if nothing} == {}


@pytest.mark.usefixtures("cases")
def test_an_audited_call_is_found_by_its_rules_key(logged: Lab) -> None:
    assert count(logged, "rule.name:identity") == 1
    assert count(logged, "rule.name:access AND event.outcome:failure AND user.audit.id:1000") == 1


def test_an_operator_reads_logs_and_nothing_else(logged: Lab) -> None:
    password = "an operators own password"
    for path, body in (
        ("role/llmkeep-operator", OPERATOR),
        ("user/ada", {"password": password, "roles": ["llmkeep-operator"]}),
    ):
        logged.on("ops1", f"{REQUEST} --until ^200 9 PUT /_security/{path} -", given=json.dumps(body))
    said = logged.on("ops1", "python3 -", given=AS_OPERATOR % password)
    assert said.split() == ["200", "403", "403", "403", "403", "403"]


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
        return logged.on(host, f"python3 - {url} {host} filebeat.key", given=KEY_PERMISSIONS).splitlines()[0]

    own = "create in its own stream: "
    assert [permitted("ops1"), permitted("llm1")] == [f"{own}400", f"{own}400"]
    logged.on("ops1", f"""{REQUEST} --until ^200 9 DELETE /_security/api_key '{{"name": "filebeat-llm1"}}'""")
    within(10, "the revoked key is refused", lambda: permitted("llm1") == f"{own}401")
    assert permitted("ops1") == f"{own}400"


def test_elasticsearchs_figures_are_exported_by_a_key_that_reads_nothing_else(logged: Lab) -> None:
    logged.on("ops1", f"llmkeep site {WITH_LOGS} --tags exporters --limit ops1", timeout=900)
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
    tried = "python3 - https://ops1.estate.internal:9200 ops1 elasticsearch.exporter"
    said = dict(line.split(": ") for line in logged.on("ops1", tried, given=KEY_PERMISSIONS).splitlines())
    assert said.pop("see the cluster") == "200"
    assert {"read", "see snapshots", "drop the repository"} < said.keys()
    assert set(said.values()) == {"403"}, said
    unit = "prometheus-elasticsearch-exporter.service"
    pid = f"systemctl show --property=MainPID --value {unit}"
    key = "systemd-creds decrypt --name=elasticsearch.exporter /etc/credstore.encrypted/elasticsearch.exporter -"
    # 1: no line has it. 2: it cannot be read; on a busy machine the unit was once just being started again.
    seen = ""

    def read() -> bool:
        nonlocal seen
        seen = logged.on("ops1", f'grep --quiet "$({key})" /proc/$({pid})/cmdline; echo $?').strip()
        if seen == "2":
            print(logged.on("ops1", f"systemctl status --lines=30 {unit} || true"))
        return seen != "2"

    within(120, "its command line is read", read)
    assert seen == "1"
    logged.on("ops1", f"""{REQUEST} --until ^200 9 DELETE /_security/api_key '{{"name": "exporter-ops1"}}'""")
    within(20, "a revoked key shows", lambda: shown(up) == ["200 /elasticsearch without samples"])
