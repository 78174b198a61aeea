"""What hosts log, found by request on the control node: Elasticsearch on ops1, Filebeat on both, over the finished estate."""

import http.client
import json
import ssl
import time
from typing import Any
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


def compared(lab: Lab, *, counted: bool = True) -> tuple[int, Any]:
    """Exit code of `llmkeep logs check`, and what it says of llm1, of all until now."""
    if counted:
        lab.on("llm1", "systemctl start llmkeep-journal-count.service")
    said = lab.on("ops1", "llmkeep logs check --settle 0 --json; echo $?")
    result, _, code = said.strip().rpartition("\n")
    return int(code), json.loads(result)["sources"]["llm1"]


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
    count = f"{REQUEST} GET '/logs-llmkeep.*/_count?q=burst4e71&filter_path=count'"
    within(
        120, "each line is there once", lambda: logged.on("ops1", count).strip() == f'200 {{"count":{lines}}}'
    )
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
    count = f"{REQUEST} GET '/logs-llmkeep.*/_count?q=taken77c0&filter_path=count'"
    within(30, "they are there", lambda: logged.on("ops1", count).strip() == '200 {"count":20}')
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
        logged.on("llm1", "systemctl start llmkeep-audit-ship.service")
        code, copy = copied()
        return code == 0 and copy["records"] == copy["last"] >= 2 and copy["heads"] >= 1

    # A head a minute, and a look of the witness.
    within(180, "heads fit the copy", proved)
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

    def there() -> int:
        count = f"{REQUEST} GET '/logs-llmkeep.*/_count?q=again1b07&filter_path=count'"
        return int(logged.on("ops1", count).strip().removeprefix('200 {"count":').rstrip("}"))

    def twice() -> int:
        return sum(int(hour["duplicates"]) for hour in compared(logged)[1]["hours"].values())

    logged.on("llm1", "for number in $(seq 20); do logger -t again again1b07 $number; done")
    within(30, "they are there", lambda: there() == 20)
    again()
    logged.on("llm1", "logger -t again end1b07")
    end = f"{REQUEST} GET '/logs-llmkeep.*/_count?q=end1b07&filter_path=count'"
    within(60, "all was sent again", lambda: logged.on("ops1", end).strip() == '200 {"count":1}')
    assert there() == 20
    before = twice()
    logged.on("ops1", f"{REQUEST} POST /logs-llmkeep.system-llm1/_rollover '{{}}'")
    again()
    within(60, "those of before the rollover are there twice", lambda: there() == 40)

    within(30, "they are counted", lambda: twice() >= before + 20)


def test_the_key_of_one_host_is_revoked_and_the_other_hosts_goes_on(logged: Lab) -> None:
    def permitted(host: str) -> str:
        url = "https://ops1.estate.internal:9200"
        return logged.on(host, f"python3 - {url} {host}", given=KEY_PERMISSIONS).splitlines()[0]

    own = "create in its own stream: "
    assert [permitted("ops1"), permitted("llm1")] == [f"{own}400", f"{own}400"]
    logged.on("ops1", f"""{REQUEST} --until ^200 9 DELETE /_security/api_key '{{"name": "filebeat-llm1"}}'""")
    within(10, "the revoked key is refused", lambda: permitted("llm1") == f"{own}401")
    assert permitted("ops1") == f"{own}400"
